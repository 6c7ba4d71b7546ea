// What a 1x1 convolution and the norm before it send back to the features, on tensor cores:
//
//   grad_z = scale2 dz2 - correction             of norm2, from dz2 and z (sums.cuh); written
//   grad_a = grad_z W                            [M, N] times [N, C], in registers only
//   dz = grad_a where the ReLU was open          recomputed from x
//   G += scale dz;  sums over the rows of dz and of dz (x - rounded mean)
//
//                  | grad_z: 16 rows, all N |         C, 32 columns at a time ->
//   warp 0            in registers, per tile       x, G | 32 | 32 | 32 | ...
//   warp 1            of rows                         accumulators, mask, sums, G
//   ...            W of the 32 columns: shared memory, one copy for all warps of the block
//
// A warp owns 16 rows, so dz2, z, x and G are read once, and grad_z and G are written once. Blocks
// split the rows and, where these are few, the columns. Weights, x and G come by asynchronous
// copies, kStages
// - 1 groups of columns ahead, also across tiles of rows. Sums: two rows per lane, then over the
// lanes of a column, the warps (in order, one group of columns later, when a barrier is due anyway)
// and the block's tiles of rows in float; one partial result per channel and block, added up in
// double by the kernel behind (left_over.cuh).
//
// Bytes: x, dz2 and z once, grad_z written, G read and written (4 bytes each). W, from the L2
// cache, once per tile of rows. Operations: 2 M C N. Limit: memory. G alone is 8 bytes per element
// of x. What keeps the kernel from it is the number of instructions, so what is the same in all
// groups of columns is computed once, and a lane's four columns are either all there or not
// (`pieces_are_whole`), but for strides and numbers of channels that no network has.
#include "cuda/tensor_core/copies.cuh"
#include "cuda/tensor_core/left_over.cuh"
#include "cuda/tensor_core/limits.cuh"
#include "operators/bn_relu_conv1x1.h"

namespace efficient_densenet::cuda {
namespace {

constexpr int kMaxWarps = 8;
constexpr int64_t kRowBlocks = 264;  // of kMaxWarps, along the rows: as many as run at once
constexpr int64_t kBlocks = 528;     // about, where blocks share the columns
constexpr int kColumns = 32;         // of a group
constexpr int kGroupTiles = kColumns / kTileColumns, kPairs = kGroupTiles / 2;
constexpr int kPairColumns = 2 * kTileColumns;

// Chunks of N numbers, of grad_z and W.
template <typename T, int kTiles>
constexpr int kChunks = (kTiles * kTileColumns + kChannelChunk<T> - 1) / kChannelChunk<T>;
template <typename T, int kTiles>
constexpr int kWeightStage = kChunks<T, kTiles> * kColumns * kPieces;

// Of a group of columns, a lane owns four neighbours of each pair of tiles in rows g and g + 8; it
// copies and reads its own x and G alone.
template <typename T>
constexpr int kOwnBytesX = 4 * sizeof(T);
template <typename T>
constexpr int kWarpBytes = 2 * kPairs * kWarp * (4 * sizeof(float) + kOwnBytesX<T>);

// Copies under way: as many as leave shared memory for two blocks per multiprocessor.
template <typename T, int kTiles>
constexpr int kStages = sizeof(T) == 2 && kTiles <= 16 ? 3 : 2;

// NormGradient for elements T.
template <typename T>
struct GradZ {
  Rows<const T> grad_a, z;
  Rows<T> grad_z;
  const float* coefficients;
  bool corrects;
  bool pieces_are_whole;  // all there or not, and aligned

  GradZ(const NormGradient& grad, int64_t outputs)
      : grad_a(grad.grad_a),
        z(grad.z),
        grad_z(grad.grad_z),
        coefficients(grad.coefficients),
        corrects(grad.batch_statistics),
        pieces_are_whole(grad_a.aligned && z.aligned && grad_z.aligned &&
                         outputs % kPiece<T> == 0) {}
};

// Channels whose coefficients a block keeps; those that do not exist have zeros.
template <typename T, int kTiles>
constexpr int kKeptOutputs = kChunks<T, kTiles> * kChannelChunk<T>;
// Pieces under way, of grad_a and of z each: as many as there are registers for.
template <typename T, int kTiles>
constexpr int kRawAtOnce = kTiles * sizeof(T) <= 32 ? 3 : 1;
constexpr int kCoefficients = NormGradCoefficients<float>::kNumbers;

#ifdef EFFICIENT_DENSENET_TENSOR_CORES

// What grad_z is made of in one piece of columns: rows `row` and row + 8.
template <typename T>
struct RawGradZ {
  Words<T, kPiece<T>> grad_a[2], z[2];

  // Of the piece at n; kWhole: GradZ::pieces_are_whole.
  template <bool kWhole>
  __device__ void load(const GradZ<T>& grad, int64_t row, int64_t end, int n, int outputs) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* const from_a = grad.grad_a.at(row + half * 8, n);
      const T* const from_z = grad.z.at(row + half * 8, n);
      const int count = row + half * 8 < end ? count_before<kPiece<T>>(outputs, n) : 0;
      if constexpr (kWhole) {
        grad_a[half] = z[half] = {};
        if (count > 0) {
          grad_a[half] = *reinterpret_cast<const Words<T, kPiece<T>>*>(from_a);
          z[half] = *reinterpret_cast<const Words<T, kPiece<T>>*>(from_z);
        }
      } else {
        grad_a[half] = load_row<kPiece<T>>(from_a, grad.grad_a.aligned, count);
        z[half] = load_row<kPiece<T>>(from_z, grad.z.aligned, count);
      }
    }
  }
};

// Brings what grad_z of 16 rows is made of into the L2 cache: all pieces of a lane.
template <typename T, int kTiles>
__device__ void prefetch_raw(const GradZ<T>& grad, int64_t row, int64_t end, int outputs) {
#pragma unroll
  for (int i = 0; i < kChunks<T, kTiles>; ++i) {
    const int n = i * kChannelChunk<T> + threadIdx.x % kPieces * kPiece<T>;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + half * 8 >= end || n >= outputs) continue;
      asm volatile("prefetch.global.L2 [%0];" ::"l"(grad.grad_a.at(row + half * 8, n)));
      asm volatile("prefetch.global.L2 [%0];" ::"l"(grad.z.at(row + half * 8, n)));
    }
  }
}

// Of the piece at n, as operands.
template <bool kWhole, typename T, int kKept>
__device__ void make_grad_z(RawGradZ<T>& raw, const GradZ<T>& grad, const float* coefficients,
                            int64_t row, int64_t end, int n, int outputs, bool writes,
                            uint4 (&operands)[2]) {
#pragma unroll
  for (int first = 0; first < kPiece<T>; first += 4) {
    Pack<float, 4> numbers[kCoefficients];
#pragma unroll
    for (int i = 0; i < kCoefficients; ++i) {
      numbers[i] = *reinterpret_cast<const Pack<float, 4>*>(coefficients + i * kKept + n + first);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float values[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        NormGradCoefficients<float> channel;
        channel.mean = numbers[0].values[k];
        channel.scale = numbers[1].values[k];
        channel.bias = numbers[2].values[k];
        channel.offset = numbers[3].values[k];
        channel.slope = numbers[4].values[k];
        const float z = raw.z[half].get(first + k);
        const float dz = masked<T>(channel, z, raw.grad_a[half].get(first + k));
        values[k] = channel.grad_x(z, dz, grad.corrects);
      }
      raw.grad_a[half].put(first, values[0], values[1]);
      raw.grad_a[half].put(first + 2, values[2], values[3]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // As a mask: the compiler would make a branch around each number of a choice.
    const uint32_t exists = row + half * 8 < end ? ~0u : 0u;
#pragma unroll
    for (uint32_t& word : raw.grad_a[half].words) word &= exists;
    if (writes && exists != 0) {
      T* const to = grad.grad_z.at(row + half * 8, n);
      if constexpr (kWhole) {
        if (n < outputs) *reinterpret_cast<Words<T, kPiece<T>>*>(to) = raw.grad_a[half];
      } else {
        store_row(to, raw.grad_a[half], grad.grad_z.aligned, count_before<kPiece<T>>(outputs, n));
      }
    }
    operands[half] = bits<T>(to_operands(raw.grad_a[half]));
  }
}

// grad_z of rows `row` and row + 8, all pieces of a lane, as operands.
template <bool kWhole, typename T, int kTiles>
__device__ void make_tile(uint4 (&low)[kChunks<T, kTiles>], uint4 (&high)[kChunks<T, kTiles>],
                          const GradZ<T>& grad, const float* coefficients, int64_t row, int64_t end,
                          int outputs, bool writes) {
  constexpr int kCount = kChunks<T, kTiles>;
  constexpr int kAtOnce = std::min(kRawAtOnce<T, kTiles>, kCount);
  const int own = threadIdx.x % kPieces * kPiece<T>;
  RawGradZ<T> raw[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    raw[i].template load<kWhole>(grad, row, end, i * kChannelChunk<T> + own, outputs);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    uint4 operands[2];
    make_grad_z<kWhole, T, kKeptOutputs<T, kTiles>>(raw[i % kAtOnce], grad, coefficients, row, end,
                                                    i * kChannelChunk<T> + own, outputs, writes,
                                                    operands);
    low[i] = operands[0];
    high[i] = operands[1];
    if (i + kAtOnce < kCount) {
      raw[i % kAtOnce].template load<kWhole>(grad, row, end, (i + kAtOnce) * kChannelChunk<T> + own,
                                             outputs);
    }
  }
}

#endif

struct Sizes {
  int64_t rows, rows_per_block;
  int channels, outputs, groups_per_block;
};

// A block's sums of its columns, and those of the warps of a group, twice: the next group's are
// written while these are read.
__host__ __device__ inline int sum_floats(int columns, int warps) {
  return 2 * columns + 2 * warps * kColumns * 2;
}

template <typename T, int kTiles>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kTiles * sizeof(T) <= 64 ? 2 : 1)
    bn_relu_conv1x1_grad_input_kernel(const __grid_constant__ Sizes sizes,
                                      const __grid_constant__ Rows<const T> x, BatchNorm bn,
                                      const uint4* weight, const __grid_constant__ GradZ<T> grad,
                                      const __grid_constant__ Rows<float> grad_features,
                                      double* partial_dz, double* partial_dz_centred) {
#ifdef EFFICIENT_DENSENET_TENSOR_CORES
  constexpr int kChunks_ = kChunks<T, kTiles>, kWeightStage_ = kWeightStage<T, kTiles>;
  extern __shared__ uint4 shared[];
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / kPieces, t = lane % kPieces;
  const int all_groups = (sizes.channels + kColumns - 1) / kColumns;
  const int first_group = blockIdx.y * sizes.groups_per_block;
  const int groups = min(sizes.groups_per_block, all_groups - first_group);
  const int first_channel = first_group * kColumns, columns = sizes.groups_per_block * kColumns;
  const SharedNorm norm(reinterpret_cast<float*>(shared), columns);
  float* const block_sums = reinterpret_cast<float*>(shared) + SharedNorm::kNumbers * columns;
  float* const warp_sums = block_sums + 2 * columns;
  constexpr int kKept = kKeptOutputs<T, kTiles>;
  float* const coefficients = warp_sums + 2 * warps * kColumns * 2;
  // A stage: weights, each lane's G, each lane's x.
  char* const stages = reinterpret_cast<char*>(coefficients + kCoefficients * kKept);
  const int stage_bytes = kWeightStage_ * kPieceBytes + warps * kWarpBytes<T>;
  const int own = warp * 2 * kPairs * kWarp + lane;
  char* const own_g = stages + (kWeightStage_ + own) * kPieceBytes;
  char* const own_x =
      stages + (kWeightStage_ + warps * 2 * kPairs * kWarp) * kPieceBytes + own * kOwnBytesX<T>;
  // What pair and half of a lane's columns and rows lies behind that of the first.
  const auto behind = [](int pair, int half) { return (2 * pair + half) * kWarp; };
  const bool pieces_are_whole = x.aligned && grad_features.aligned && sizes.channels % 4 == 0;

  const int64_t begin = blockIdx.x * sizes.rows_per_block;
  const int64_t end = min(begin + sizes.rows_per_block, sizes.rows);
  const int tile_rows = warps * kTileRows;
  const int total = static_cast<int>((end - begin + tile_rows - 1) / tile_rows) * groups;

  const auto next_stage = [&](int stage) {
    return stage + stage_bytes == kStages<T, kTiles> * stage_bytes ? 0 : stage + stage_bytes;
  };
  int copied = 0, copied_group = 0, copied_stage = 0;
  int64_t copied_row = begin + warp * kTileRows + g;
  const uint4* const first_weight = weight + static_cast<int64_t>(first_group) * kWeightStage_;
  const uint4* from_weight = first_weight;
  const T* from_x = x.at(copied_row, first_channel + 4 * t);
  const float* from_g = grad_features.at(copied_row, first_channel + 4 * t);
  const int64_t x_half = 8 * x.stride, g_half = 8 * grad_features.stride;
  const auto copy_next = [&] {
    if (copied < total) {
      char* const to_x = own_x + copied_stage;
      char* const to_g = own_g + copied_stage;
      auto* const to_weight = reinterpret_cast<uint4*>(stages + copied_stage);
      for (int i = threadIdx.x; i < kWeightStage_; i += blockDim.x) {
        copy_async(to_weight + i, from_weight + i);
      }
      const int left = sizes.channels - (first_channel + copied_group * kColumns + 4 * t);
      const bool exists[2] = {copied_row < end, copied_row + 8 < end};
      const auto for_each = [&](auto copy) {
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            copy(to_x + behind(pair, half) * kOwnBytesX<T>,
                 from_x + pair * kPairColumns + half * x_half,
                 to_g + behind(pair, half) * kPieceBytes,
                 from_g + pair * kPairColumns + half * g_half, left - pair * kPairColumns,
                 exists[half]);
          }
        }
      };
      if (pieces_are_whole) {
        for_each([&](void* x_to, const T* x_at, void* g_to, const float* g_at, int columns_left,
                     bool row_exists) {
          const bool valid = row_exists && columns_left > 0;
          copy_async_if<kOwnBytesX<T>>(valid, x_to, x_at);
          copy_async_if<kPieceBytes>(valid, g_to, g_at);
        });
      } else {
        for_each([&](void* x_to, const T* x_at, void* g_to, const float* g_at, int columns_left,
                     bool row_exists) {
          const int count = row_exists ? count_before<4>(columns_left, 0) : 0;
          copy_row<4>(x_to, x_at, x.aligned, count);
          copy_row<4>(g_to, g_at, grad_features.aligned, count);
        });
      }
      from_weight += kWeightStage_;
      from_x += kColumns;
      from_g += kColumns;
      if (++copied_group == groups) {
        copied_group = 0;
        copied_row += tile_rows;
        from_weight = first_weight;
        from_x = x.at(copied_row, first_channel + 4 * t);
        from_g = grad_features.at(copied_row, first_channel + 4 * t);
      }
      copied_stage = next_stage(copied_stage);
    }
    ++copied;
    commit_copies();
  };
  prefetch_raw<T, kTiles>(grad, begin + warp * kTileRows + g, end, sizes.outputs);
#pragma unroll
  for (int i = 0; i < kStages<T, kTiles> - 1; ++i) copy_next();
  norm.load(bn, first_channel, columns, sizes.channels);
  for (int i = threadIdx.x; i < 2 * columns; i += blockDim.x) block_sums[i] = 0;
  for (int i = threadIdx.x; i < kCoefficients * kKept; i += blockDim.x) {
    const int n = i % kKept;
    coefficients[i] = n < sizes.outputs ? grad.coefficients[i / kKept * sizes.outputs + n] : 0.0f;
  }
  __syncthreads();

  // Adds the warps' sums of a group of columns to the block's.
  const auto add_warps = [&](int i, int group) {
    if (warp != (i & (warps - 1))) return;  // a power of two
    const float* const from = warp_sums + (i & 1) * warps * kColumns * 2 + lane * 2;
    float dz = 0, dz_centred = 0;
#pragma unroll 4
    for (int w = 0; w < warps; ++w) {
      dz += from[w * kColumns * 2];
      dz_centred += from[w * kColumns * 2 + 1];
    }
    block_sums[group * kColumns + lane] += dz;
    block_sums[columns + group * kColumns + lane] += dz_centred;
  };

  uint4 low[kChunks_], high[kChunks_];  // of grad_z: rows g and g + 8
  int group = 0, stage = 0;
  int64_t row = begin + warp * kTileRows + g;
  for (int i = 0; i < total; ++i) {
    if (group == 0) {
      if (grad.pieces_are_whole) {
        make_tile<true, T, kTiles>(low, high, grad, coefficients, row, end, sizes.outputs,
                                   blockIdx.y == 0);
      } else {
        make_tile<false, T, kTiles>(low, high, grad, coefficients, row, end, sizes.outputs,
                                    blockIdx.y == 0);
      }
      prefetch_raw<T, kTiles>(grad, row + tile_rows, end, sizes.outputs);
    }
    wait_for_copies<kStages<T, kTiles> - 2>();
    __syncthreads();  // this stage is there, the one before is free, the sums of before are there
    copy_next();
    if (i > 0) add_warps(i - 1, group == 0 ? groups - 1 : group - 1);

    const auto* const weights = reinterpret_cast<const uint4*>(stages + stage) + lane;
    float grad_a[kGroupTiles][4] = {};
#pragma unroll
    for (int channel_chunk = 0; channel_chunk < kChunks_; ++channel_chunk) {
      uint4 b[kGroupTiles];
#pragma unroll
      for (int j = 0; j < kGroupTiles; ++j)
        b[j] = weights[(channel_chunk * kGroupTiles + j) * kWarp];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int j = 0; j < kGroupTiles; ++j) {
          mma_chunk_step<T>(grad_a[j], low[channel_chunk], high[channel_chunk], b[j], step);
        }
      }
    }

    float* const to = grad_features.at(row, first_channel + group * kColumns + 4 * t);
    const int left = sizes.channels - (first_channel + group * kColumns + 4 * t);
    const bool exists[2] = {row < end, row + 8 < end};
    float dz_sums[4 * kPairs] = {}, dz_centred_sums[4 * kPairs] = {};
    Words<float, 4> sums[kPairs][2];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      NormCoefficients<float> channels[4];
      norm.get(channels, group * kColumns + pair * kPairColumns + 4 * t);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto values = *reinterpret_cast<const Words<T, 4>*>(
            own_x + stage + behind(pair, half) * kOwnBytesX<T>);
        const auto before = *reinterpret_cast<const Words<float, 4>*>(
            own_g + stage + behind(pair, half) * kPieceBytes);
        float after[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float value = values.get(k);
          const float dz =
              masked<T>(channels[k], value, grad_a[2 * pair + k / 2][2 * half + k % 2]);
          dz_sums[4 * pair + k] += dz;
          dz_centred_sums[4 * pair + k] =
              fma(dz, value - channels[k].mean, dz_centred_sums[4 * pair + k]);
          after[k] = fma(channels[k].scale, dz, before.get(k));
        }
        sums[pair][half].put(0, after[0], after[1]);
        sums[pair][half].put(2, after[2], after[3]);
      }
    }
    const auto store_each = [&](auto store) {
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          store(to + half * g_half + pair * kPairColumns, sums[pair][half],
                left - pair * kPairColumns, exists[half]);
        }
      }
    };
    if (pieces_are_whole) {
      store_each([](float* at, const Words<float, 4>& values, int columns_left, bool row_exists) {
        if (row_exists && columns_left > 0) *reinterpret_cast<Words<float, 4>*>(at) = values;
      });
    } else {
      store_each([&](float* at, const Words<float, 4>& values, int columns_left, bool row_exists) {
        if (!row_exists) return;
        store_row(at, values, grad_features.aligned, count_before<4>(columns_left, 0));
      });
    }
    stage = next_stage(stage);
    const int place = add_lanes(dz_sums, dz_centred_sums);
    const int column = place / 4 * 2 * kTileColumns + 4 * t + place % 4;
    float* const sum = warp_sums + (((i & 1) * warps + warp) * kColumns + column) * 2;
    sum[0] = dz_sums[0];
    sum[1] = dz_centred_sums[0];
    if (++group == groups) {
      group = 0;
      row += tile_rows;
    }
  }
  wait_for_copies<0>();
  __syncthreads();
  add_warps(total - 1, groups - 1);
  __syncthreads();
  for (int i = threadIdx.x; i < groups * kColumns; i += blockDim.x) {
    const int64_t c = first_channel + i;
    if (c >= sizes.channels) continue;
    const int64_t to = int64_t(blockIdx.x) * sizes.channels + c;
    partial_dz[to] = block_sums[i];
    partial_dz_centred[to] = block_sums[columns + i];
  }
#endif
}

// How a call is cut, from measurements on an H100: eight warps a block where the rows fill the
// chip, in as many blocks as run at once; else four, and blocks share the columns, in more parts
// where their rounds on a large GPU then take a tenth less (a block costs kAllowance groups of
// columns besides). Fewer warps where shared memory is too little, and kMostGroups groups of
// columns at most.
constexpr int64_t kMostGroups = 32, kAllowance = 2;
constexpr int64_t kMultiprocessors = 132, kMultiprocessorBytes = 227 << 10;
constexpr int64_t kWarpsTogether = 16;  // that the registers of a multiprocessor are enough for

struct Cut {
  int warps, groups_per_block, splits;
  int64_t shared_bytes;
  RowChunking chunking;

  // pieces: of the weights of a group of columns. coefficients: floats.
  Cut(int64_t rows, int64_t channels, int pieces, int warp_bytes, int stages, int coefficients) {
    const int64_t groups = ceil_div(channels, kColumns), limit = shared_memory();
    warps = rows >= kBlocks / 2 * kMaxWarps * kTileRows ? kMaxWarps : kMaxWarps / 2;
    for (;; warps /= 2) {
      const int64_t tile = warps * kTileRows, tiles = ceil_div(rows, tile);
      const int64_t rows_per_block = ceil_div(tiles, kRowBlocks * kMaxWarps / warps) * tile;
      chunking = {rows_per_block, static_cast<int>(ceil_div(rows, rows_per_block))};
      const auto share = [&](int64_t own_groups) {
        groups_per_block = static_cast<int>(own_groups);
        splits = static_cast<int>(ceil_div(groups, own_groups));
        const int columns = groups_per_block * kColumns;
        const int64_t floats =
            SharedNorm::kNumbers * columns + sum_floats(columns, warps) + coefficients;
        shared_bytes = floats * static_cast<int64_t>(sizeof(float)) +
                       stages * (int64_t(pieces) * kPieceBytes + warps * warp_bytes);
        const int64_t together =
            std::clamp<int64_t>(kMultiprocessorBytes / shared_bytes, 1, kWarpsTogether / warps);
        return ceil_div(chunking.chunks * splits, kMultiprocessors * together) *
               (own_groups + kAllowance);
      };
      const int64_t fewest =
          std::clamp<int64_t>(kBlocks / tiles, ceil_div(groups, kMostGroups), groups);
      int64_t best_groups = ceil_div(groups, fewest), best = share(best_groups);
      for (int64_t parts = fewest + 1; parts <= std::min(groups, 4 * fewest); ++parts) {
        const int64_t cost = share(ceil_div(groups, parts));
        if (10 * cost >= 9 * best) continue;
        best = cost;
        best_groups = ceil_div(groups, parts);
      }
      share(best_groups);
      if (shared_bytes <= limit || warps == 1) return;
    }
  }
};

template <typename T, int kTiles>
Cut cut_for(int64_t rows, int64_t channels) {
  return Cut(rows, channels, kWeightStage<T, kTiles>, kWarpBytes<T>, kStages<T, kTiles>,
             kCoefficients * kKeptOutputs<T, kTiles>);
}

}  // namespace

bool conv1x1_grad_input_shares_rows(Element element, int64_t rows, int64_t outputs,
                                    int64_t channels) {
  bool shares = false;
  dispatch_operand(element, [&](auto tag) {
    dispatch_tiles(tiles_for(outputs), [&](auto tiles) {
      shares = cut_for<decltype(tag), decltype(tiles)::value>(rows, channels).splits > 1;
    });
  });
  return shares;
}

void bn_relu_conv1x1_grad_input(const KernelArgs& args, const BatchNorm& bn, const void* weight,
                                int64_t outputs, const NormGradient& grad,
                                const NormGradArgs& norm_grad, ReaderSumsLeft* left) {
  dispatch_operand(args.element, [&](auto element) {
    dispatch_tiles(tiles_for(outputs), [&](auto tiles) {
      using T = decltype(element);
      constexpr int kTiles = decltype(tiles)::value;
      constexpr auto kKernel = bn_relu_conv1x1_grad_input_kernel<T, kTiles>;
      allow_shared<kKernel>();
      const Cut cut = cut_for<T, kTiles>(args.rows.count, args.channels);
      const Sizes sizes{args.rows.count, cut.chunking.rows_per_chunk,
                        static_cast<int>(args.channels), static_cast<int>(outputs),
                        cut.groups_per_block};
      *left = make_sums_left(args, bn, cut.chunking.chunks, norm_grad);
      kKernel<<<dim3(cut.chunking.chunks, cut.splits), cut.warps * kWarp, cut.shared_bytes,
                static_cast<cudaStream_t>(args.stream)>>>(
          sizes, Rows<const T>(args.features[0].x, 4), bn, static_cast<const uint4*>(weight),
          GradZ<T>(grad, outputs), Rows<float>(norm_grad.grad_features, 4), left->dz,
          left->dz_centred);
      check(cudaGetLastError(), "bn_relu_conv1x1_grad_input_kernel");
    });
  });
}

}  // namespace efficient_densenet::cuda
