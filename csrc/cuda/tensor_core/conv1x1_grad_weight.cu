// grad_W = grad_z^T relu(bn(x)) on tensor cores, [N, M] times [M, C] to [N, C], the normalised rows
// recomputed on the way.
//
//                M, kRows at a time ->            C: 64 columns of a block
//            | grad_z | grad_z | ...          | x, normalised |
//   N, up to   raw, in shared memory            in shared memory, in place
//   128 of   warps: 1 or 2 parts of N times 2 parts of C times 4 or 2 parts of the rows
//   a block
//
// Blocks split N, C and the rows. Pieces of both operands come by asynchronous copies, kStages - 1
// steps ahead; the thread that copied a piece of x normalises it one step before its use. The mma
// sums over rows, so the operands are read across: by transposing loads (16 bits), or as single
// words (TF32). At the end a block adds its warps' parts of the rows, in order, and writes one
// partial result; a later kernel adds those of all, as this one does for kernels before
// (left_over.cuh).
//
// Bytes: x once per part of N (one up to N = 128); grad_z once per 64 columns, from the L2 cache
// after the first. Partial results: kBlocks tiles of 32 KB at most, written and read. Operations:
// 2 M C N.
// Limit: shared memory, read N/16 + 2 times per 16 rows and 32 columns, and memory.
#include "cuda/tensor_core/copies.cuh"
#include "cuda/tensor_core/left_over.cuh"
#include "cuda/tensor_core/limits.cuh"
#include "operators/bn_relu_conv1x1.h"

namespace efficient_densenet::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kStages = 4;        // of copies under way
constexpr int kColumns = 64;      // of C, per block
constexpr int kWarpColumns = 32;  // per warp
constexpr int kWarpTiles = kWarpColumns / kTileColumns;
constexpr int kSlices = 4;             // parts of the rows of a step
constexpr int64_t kBlocks = 264;       // about; two per multiprocessor
constexpr int kPadding = kPieceBytes;  // bytes; rows of a stage start in other banks

// How a block of kOutputs (of N) by kColumns is shared by the warps.
template <typename T, int kOutputs_>
struct Shape {
  static constexpr int kOutputs = kOutputs_;
  static constexpr int kOutputParts = kOutputs > 64 ? 2 : 1;
  static constexpr int kRowParts = kWarps / 2 / kOutputParts;
  static constexpr int kWarpOutputs = kOutputs / kOutputParts;
  static constexpr int kOutputTiles = kWarpOutputs / kTileRows;
  static constexpr int kRows = kSlices * kStep<T>;  // of a step: 64 of 16 bits, 32 of TF32
  // Elements from row to row. For float, rows 8 banks apart: a lane reads word g of row t.
  static constexpr int kPad = sizeof(T) == 4 ? 8 : kPadding / sizeof(T);
  static constexpr int kPitchX = kColumns + kPad, kPitchZ = kOutputs + kPad;
  static constexpr int kStageElements = kRows * (kPitchX + kPitchZ);
  static constexpr int kPitchSum = kColumns + 4;  // floats
  static constexpr int64_t kBytes = std::max<int64_t>(
      kStages * kStageElements * sizeof(T), kRowParts * kOutputs * kPitchSum * sizeof(float));
};

struct Sizes {
  int64_t rows, rows_per_block;
  int channels, outputs;
};

#ifdef EFFICIENT_DENSENET_TENSOR_CORES

// Where a lane's part of an operand begins, in elements behind the operand's first.
template <typename T>
__device__ int lane_of_a(int lane, int pitch) {
  if constexpr (sizeof(T) == 2) return (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8;
  return lane % 4 * pitch + lane / 4;
}
template <typename T>
__device__ int lane_of_b(int lane, int pitch) {
  if constexpr (sizeof(T) == 2) return lane % 16 * pitch + lane / 16 * 8;
  return lane % 4 * pitch + lane / 4;
}

// A operand: 16 rows of the transposed matrix, summed over kStep of its rows; from the lane's part.
template <int kPitch, typename T>
__device__ void load_a(uint32_t (&a)[4], const T* from) {
  if constexpr (sizeof(T) == 2) {
    load_transposed(a, shared_address(from));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = __float_as_uint(to_operand(from[i / 2 * 4 * kPitch + i % 2 * 8]));
    }
  }
}

// B operands of two tiles of 8 columns, of operands as they are; likewise.
template <int kPitch, typename T>
__device__ void load_b(uint32_t (&b)[2][2], const T* from) {
  if constexpr (sizeof(T) == 2) {
    uint32_t both[4];
    load_transposed(both, shared_address(from));
    b[0][0] = both[0], b[0][1] = both[1], b[1][0] = both[2], b[1][1] = both[3];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      b[i / 2][i % 2] = __float_as_uint(from[i % 2 * 4 * kPitch + i / 2 * 8]);
    }
  }
}

#endif

template <typename T, int kOutputs>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    bn_relu_conv1x1_grad_weight_kernel(const __grid_constant__ Sizes sizes,
                                       const __grid_constant__ Rows<const T> x, BatchNorm bn,
                                       const __grid_constant__ Rows<const T> grad_z, float* parts,
                                       const __grid_constant__ WeightParts parts_left,
                                       const __grid_constant__ ReaderSumsLeft sums_left) {
#ifdef EFFICIENT_DENSENET_TENSOR_CORES
  using S = Shape<T, kOutputs>;
  constexpr int kThreads_ = kWarps * kWarp;
  constexpr int kPiecesX = kColumns / kPiece<T>, kPiecesZ = kOutputs / kPiece<T>;
  constexpr int kOwnX = S::kRows * kPiecesX / kThreads_;  // pieces of x per thread and step
  extern __shared__ uint4 shared[];
  T* const stages = reinterpret_cast<T*>(shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int row_part = warp / (2 * S::kOutputParts);
  const int output = warp / 2 % S::kOutputParts * S::kWarpOutputs;
  const int column = warp % 2 * kWarpColumns;
  const int first_channel = blockIdx.x * kColumns, first_output = blockIdx.y * kOutputs;
  const int64_t begin = blockIdx.z * sizes.rows_per_block;
  const int64_t end = min(begin + sizes.rows_per_block, sizes.rows);
  const int total = static_cast<int>((end - begin + S::kRows - 1) / S::kRows);

  // The thread's pieces of x are of the same channels in every step.
  const int own_column = threadIdx.x % kPiecesX * kPiece<T>;
  const int own_row = threadIdx.x / kPiecesX;
  const int count_x = count_before<kPiece<T>>(sizes.channels, first_channel + own_column);
  constexpr int kRowsApart = kThreads_ / kPiecesX;
  NormCoefficients<float> channels[kPiece<T>];
#pragma unroll
  for (int i = 0; i < kPiece<T>; ++i) {
    const int c = first_channel + own_column + i;
    channels[i] = c < sizes.channels ? load_numbers(bn, c) : NormCoefficients<float>{};
  }

  // So are its pieces of grad_z, where the block has enough threads for whole rows of them.
  constexpr int kRowsZ = kThreads_ / kPiecesZ, kOwnZ = (S::kRows + kRowsZ - 1) / kRowsZ;
  const int own_output = threadIdx.x % kPiecesZ * kPiece<T>;
  const int own_row_z = threadIdx.x / kPiecesZ < kRowsZ ? threadIdx.x / kPiecesZ : S::kRows;
  const int count_z = count_before<kPiece<T>>(sizes.outputs, first_output + own_output);
  const bool pieces_are_whole = x.aligned && grad_z.aligned && sizes.channels % kPiece<T> == 0 &&
                                sizes.outputs % kPiece<T> == 0;

  const auto x_stage = [&](int step) { return stages + step % kStages * S::kStageElements; };
  const auto z_stage = [&](int step) { return x_stage(step) + S::kRows * S::kPitchX; };
  const T* from_x = x.at(begin + own_row, first_channel + own_column);
  const T* from_z = grad_z.at(begin + own_row_z, first_output + own_output);
  const auto copy = [&](int step) {
    if (step < total) {
      const int rows = static_cast<int>(
          min(end - begin - static_cast<int64_t>(step) * S::kRows, int64_t(S::kRows)));
      T* const to_x = x_stage(step) + own_row * S::kPitchX + own_column;
      T* const to_z = z_stage(step) + own_row_z * S::kPitchZ + own_output;
      const auto for_each = [&](auto copy_piece) {
#pragma unroll
        for (int k = 0; k < kOwnX; ++k) {
          copy_piece(to_x + k * kRowsApart * S::kPitchX, from_x + k * kRowsApart * x.stride,
                     x.aligned, own_row + k * kRowsApart < rows ? count_x : 0);
        }
#pragma unroll
        for (int k = 0; k < kOwnZ; ++k) {
          const int r = own_row_z + k * kRowsZ;
          if (r >= S::kRows) break;
          copy_piece(to_z + k * kRowsZ * S::kPitchZ, from_z + k * kRowsZ * grad_z.stride,
                     grad_z.aligned, r < rows ? count_z : 0);
        }
      };
      if (pieces_are_whole) {
        for_each([](T* to, const T* from, bool, int count) {
          copy_async_if<kPieceBytes>(count > 0, to, from);
        });
      } else {
        for_each([](T* to, const T* from, bool aligned, int count) {
          copy_row<kPiece<T>>(to, from, aligned, count);
        });
      }
      from_x += S::kRows * x.stride;
      from_z += S::kRows * grad_z.stride;
    }
    commit_copies();
  };
  const auto normalise = [&](int step) {
    if (step >= total) return;
#pragma unroll
    for (int k = 0; k < kOwnX; ++k) {
      auto* const piece = reinterpret_cast<uint4*>(
          x_stage(step) + (own_row + k * kRowsApart) * S::kPitchX + own_column);
      *piece = normalised<T>(*piece, channels);
    }
  };

#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy(i);
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int blocks = gridDim.x * gridDim.y * gridDim.z;
  add_left<T>(sums_left, block, blocks);
  add_left<T>(parts_left, block, blocks);
  wait_for_copies<kStages - 2>();
  normalise(0);
  float sums[S::kOutputTiles][kWarpTiles][4] = {};
  const int from_a = row_part * kStep<T> * S::kPitchZ + output + lane_of_a<T>(lane, S::kPitchZ);
  const int from_b = row_part * kStep<T> * S::kPitchX + column + lane_of_b<T>(lane, S::kPitchX);
  for (int step = 0; step < total; ++step) {
    wait_for_copies<kStages - 3>();  // of the next step
    __syncthreads();                 // this step is there for all, and nobody reads the one before
    copy(step + kStages - 1);
    normalise(step + 1);
    const T* const xs = x_stage(step) + from_b;
    const T* const zs = z_stage(step) + from_a;
#pragma unroll
    for (int slice = 0; slice < kSlices; slice += S::kRowParts) {
      constexpr int kSliceX = kStep<T> * S::kPitchX, kSliceZ = kStep<T> * S::kPitchZ;
      uint32_t b[kWarpTiles][2];
#pragma unroll
      for (int j = 0; j < kWarpTiles; j += 2) {
        uint32_t both[2][2];
        load_b<S::kPitchX>(both, xs + slice * kSliceX + j * kTileColumns);
#pragma unroll
        for (int k = 0; k < 4; ++k) b[j + k / 2][k % 2] = both[k / 2][k % 2];
      }
#pragma unroll
      for (int m = 0; m < S::kOutputTiles; ++m) {
        uint32_t a[4];
        load_a<S::kPitchZ>(a, zs + slice * kSliceZ + m * kTileRows);
#pragma unroll
        for (int j = 0; j < kWarpTiles; ++j) mma<T>(sums[m][j], a, b[j]);
      }
    }
  }

  // The warps' parts of the rows, in order.
  wait_for_copies<0>();
  __syncthreads();
  float* const of_warps = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < S::kOutputTiles; ++m) {
#pragma unroll
    for (int j = 0; j < kWarpTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = output + m * kTileRows + lane / 4 + i / 2 * 8;
        const int c = column + j * kTileColumns + lane % 4 * 2 + i % 2;
        of_warps[(row_part * kOutputs + n) * S::kPitchSum + c] = sums[m][j][i];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kOutputs * kColumns / 4; i += kThreads_) {
    const int n = i / (kColumns / 4), c = i % (kColumns / 4) * 4;
    if (first_output + n >= sizes.outputs) break;
    Pack<float, 4> sum{};
#pragma unroll
    for (int part = 0; part < S::kRowParts; ++part) {
      const auto more = *reinterpret_cast<const Pack<float, 4>*>(
          of_warps + (part * kOutputs + n) * S::kPitchSum + c);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum.values[k] += more.values[k];
    }
    const int64_t row = int64_t(blockIdx.z) * sizes.outputs + first_output + n;
    store_row(parts + row * sizes.channels + first_channel + c, as_words(sum),
              sizes.channels % 4 == 0, count_before<4>(sizes.channels, first_channel + c));
  }
#endif
}

// Outputs of a block: all of N up to 128, else half of it. Half of 128 where shared memory is too
// little.
template <typename T, typename Body>
void dispatch_outputs(int64_t outputs, const Body& body) {
  const bool fits_128 = Shape<T, 128>::kBytes <= shared_memory();
  if (outputs <= 48) return body(std::integral_constant<int, 48>{});
  if (outputs <= 64) return body(std::integral_constant<int, 64>{});
  if (outputs <= 96 || (outputs > 128 && outputs <= 192)) {
    return body(std::integral_constant<int, 96>{});
  }
  if (fits_128) return body(std::integral_constant<int, 128>{});
  body(std::integral_constant<int, 64>{});
}

}  // namespace

void bn_relu_conv1x1_grad_weight(const KernelArgs& args, const BatchNorm& bn, int64_t outputs,
                                 const View& grad_z, const WeightGradient& grad_weight,
                                 WeightParts* parts_left, const ReaderSumsLeft& sums_left) {
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const int64_t rows = args.rows.count;
  dispatch_operand(args.element, [&](auto element) {
    using T = decltype(element);
    dispatch_outputs<T>(outputs, [&](auto outputs_tag) {
      using S = Shape<T, decltype(outputs_tag)::value>;
      const int64_t column_blocks = ceil_div(args.channels, kColumns);
      const int64_t output_blocks = ceil_div(outputs, S::kOutputs);
      const int64_t steps = ceil_div(rows, S::kRows);
      const int64_t row_blocks = std::max<int64_t>(1, kBlocks / (column_blocks * output_blocks));
      const int64_t steps_per_block =
          std::max(ceil_div(steps, row_blocks), std::min<int64_t>(steps, 4));
      const int parts = static_cast<int>(ceil_div(steps, steps_per_block));
      const Sizes sizes{rows, steps_per_block * S::kRows, static_cast<int>(args.channels),
                        static_cast<int>(outputs)};
      const WeightParts own = make_weight_parts(args, outputs, 1, parts, grad_weight);
      constexpr auto kKernel = bn_relu_conv1x1_grad_weight_kernel<T, S::kOutputs>;
      allow_shared<kKernel>();
      kKernel<<<dim3(column_blocks, output_blocks, parts), kWarps * kWarp, S::kBytes, stream>>>(
          sizes, Rows<const T>(args.features[0].x), bn, Rows<const T>(grad_z), own.memory,
          *parts_left, sums_left);
      check(cudaGetLastError(), "bn_relu_conv1x1_grad_weight_kernel");
      *parts_left = own;
    });
  });
}

}  // namespace efficient_densenet::cuda
