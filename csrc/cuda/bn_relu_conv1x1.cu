// z = relu(bn(x)) W^T on tensor cores, [M, C] times [C, N] to [M, N], and the moments of z.
//
//                    C, chunk by chunk ->                 N, all of it
//                 | x | x | x | x | ...            | z: 8-column tiles side by side |
//   warp 0, 16 rows   pieces to registers,          accumulators of the warp
//   warp 1            normalised there
//   ...           W of the chunk: shared memory, one copy for all warps of the block
//
// A warp owns 16 rows and all N columns, so x is read once and normalised once. Pieces of x and
// chunks of W come by asynchronous copies, kStages - 1 chunks ahead, also across tiles of rows: a
// block takes one stretch of rows, tile after tile.
// Moments: of the 16 rows of a tile in registers, pairs of rows first, merged over the lanes, tiles
// and warps by the formula of Chan, Golub and LeVeque (moments.cuh), so no sum of squares cancels;
// then one partial result per column and block, merged in double by a second kernel. The order
// depends on the shape alone.
//
// Bytes: x once, z once; W (from the L2 cache) once per block. Operations: 2 M C N.
// Limit: memory where M is large. Per chunk, warp and multiprocessor, shared memory takes 4 cycles
// per tile of columns and the tensor cores about as much, less than the chunk's share of memory
// bandwidth (64 cycles against about 77 of 1 KB at N = 128). With few rows: latency of copies.
#include "../bn_relu_conv1x1.h"
#include "mma.cuh"
#include "moments.cuh"

namespace efficient_densenet::cuda {
namespace {

constexpr int kMaxWarps = 8;
constexpr int64_t kBlocks = 528;  // at most, about; four per multiprocessor of a large GPU

template <int n>
constexpr int kHalf = n % 2 == 0 ? n / 2 : n;

// What the lanes of a warp hold of the moments of a tile: kColumns per lane at first, and after
// merging over the 8 lanes of a column, each of which then owns a share of them.
template <int kColumns>
struct TileMoments {
  static constexpr int kOwned = kHalf<kHalf<kHalf<kColumns>>>;
  float count = 0, mean[kColumns] = {}, m2[kColumns] = {};
  int first = 0;      // column that the lane's first number is about
  bool owner = true;  // false: another lane has the same columns

  // Merges with the lane whose number differs in `bit`; each keeps half of the columns where their
  // number is even.
  template <int kNow>
  __device__ void merge_lanes(int bit) {
    const bool upper = threadIdx.x & bit;
    const float other_count = __shfl_xor_sync(~0u, count, bit);
    const float total = count + other_count;
    const float fraction = total == 0 ? 0 : other_count / total, weight = count * fraction;
    constexpr int kNext = kHalf<kNow>;
    constexpr bool kSplits = kNext < kNow;
#pragma unroll
    for (int i = 0; i < kNext; ++i) {
      const int j = kSplits ? i + kNext : i;
      const float kept_mean = kSplits && upper ? mean[j] : mean[i];
      const float kept_m2 = kSplits && upper ? m2[j] : m2[i];
      const float other_mean = __shfl_xor_sync(~0u, kSplits && upper ? mean[i] : mean[j], bit);
      const float other_m2 = __shfl_xor_sync(~0u, kSplits && upper ? m2[i] : m2[j], bit);
      const float delta = other_mean - kept_mean;
      mean[i] = fma(delta, fraction, kept_mean);
      m2[i] = fma(delta * delta, weight, kept_m2 + other_m2);
    }
    count = total;
    if (kSplits && upper) first += kNext;
    if (!kSplits && upper) owner = false;
  }

  __device__ void merge_all_lanes() {
    merge_lanes<kColumns>(16);
    merge_lanes<kHalf<kColumns>>(8);
    merge_lanes<kHalf<kHalf<kColumns>>>(4);
  }
};

struct Sizes {
  int64_t rows, rows_per_block;
  int channels, outputs;
};

template <typename T, int kTiles>
constexpr int kWeightStage = kTiles * kTileColumns * kPieces;  // pieces of a chunk of W

__host__ __device__ inline int norm_floats(int chunks, int chunk) {
  return SharedNorm::kNumbers * chunks * chunk;
}

template <typename T, int kTiles>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kTiles <= 16 ? 2 : 1)
    bn_relu_conv1x1_kernel(const __grid_constant__ Sizes sizes,
                           const __grid_constant__ Rows<const T> x, BatchNorm bn,
                           const uint4* weight, const __grid_constant__ Rows<T> z,
                           double* partial_mean, double* partial_m2) {
#ifdef EFFICIENT_DENSENET_TENSOR_CORES
  constexpr int kOutputs = kTiles * kTileColumns, kPairs = kTiles / 2;
  extern __shared__ uint4 shared[];
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / kPieces, t = lane % kPieces;
  const int chunks = (sizes.channels + kChunk<T> - 1) / kChunk<T>;
  const SharedNorm norm(reinterpret_cast<float*>(shared), chunks * kChunk<T>);
  uint4* const stages = shared + norm_floats(chunks, kChunk<T>) / 4;
  const int stage_pieces = kWeightStage<T, kTiles> + warps * 2 * kWarp;
  const int own_x = kWeightStage<T, kTiles> + warp * 2 * kWarp + lane;

  const int64_t begin = blockIdx.x * sizes.rows_per_block;
  const int64_t end = min(begin + sizes.rows_per_block, sizes.rows);
  const int tile_rows = warps * kTileRows;
  const int total = static_cast<int>((end - begin + tile_rows - 1) / tile_rows) * chunks;

  // The next chunk to copy: its number, place in C and the lane's first row.
  int copied = 0, copied_chunk = 0;
  int64_t copied_row = begin + warp * kTileRows + g;
  const auto copy_next = [&] {
    if (copied < total) {
      uint4* const stage = stages + copied % kStages * stage_pieces;
      const uint4* const from = weight + copied_chunk * kWeightStage<T, kTiles>;
      for (int i = threadIdx.x; i < kWeightStage<T, kTiles>; i += blockDim.x) {
        copy_async(stage + i, from + i);
      }
      const int column = copied_chunk * kChunk<T> + t * kPiece<T>;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = copied_row + half * 8;
        copy_piece(stage + own_x + half * kWarp, x, row, column,
                   row < end ? sizes.channels - column : 0);
      }
      if (++copied_chunk == chunks) {
        copied_chunk = 0;
        copied_row += tile_rows;
      }
    }
    ++copied;
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy_next();
  norm.load(bn, 0, chunks * kChunk<T>, sizes.channels);

  float sums[kTiles][4] = {};
  using Tile_ = TileMoments<4 * kPairs>;
  Moments<float, Tile_::kOwned> moments;
  int first_owned = 0;
  bool owner = true;
  int chunk = 0;
  int64_t row = begin + warp * kTileRows + g;
  for (int i = 0; i < total; ++i) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // all copies of this stage are there, and nobody reads the one before
    copy_next();
    const uint4* const stage = stages + i % kStages * stage_pieces;
    Channel<float> channels[kPiece<T>];
    norm.get(channels, chunk * kChunk<T> + t * kPiece<T>);
    const auto operand = [&](int half) {
      const uint4 piece = stage[own_x + half * kWarp];
      return bits<T>(normalised<T>(*reinterpret_cast<const Piece<T>*>(&piece), channels));
    };
    const uint4 low = operand(0), high = operand(1);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const uint4 b = stage[j * kWarp + lane];
      mma_chunk_step<T>(sums[j], low, high, b, 0);
      mma_chunk_step<T>(sums[j], low, high, b, 1);
    }
    if (++chunk < chunks) continue;

    // The tile is done: store it, and take its moments.
    const bool low_row = row < end, high_row = row + 8 < end;
    Tile_ tile;
    tile.count = low_row + high_row;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int column = pair * 2 * kTileColumns + 4 * t;
      const float (&left)[4] = sums[2 * pair], (&right)[4] = sums[2 * pair + 1];
      const float lows[4] = {left[0], left[1], right[0], right[1]};
      const float highs[4] = {left[2], left[3], right[2], right[3]};
      const int valid = sizes.outputs - column;
      if (low_row) store_row(z.at(row, column), lows, z.aligned, valid);
      if (high_row) store_row(z.at(row + 8, column), highs, z.aligned, valid);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float a = widen(narrow<T>(lows[k])), b = widen(narrow<T>(highs[k]));
        tile.mean[4 * pair + k] = high_row ? a + 0.5f * (b - a) : low_row ? a : 0;
        tile.m2[4 * pair + k] = high_row ? 0.5f * (b - a) * (b - a) : 0;
      }
    }
    if (partial_mean != nullptr) {
      tile.merge_all_lanes();
      moments.merge(
          tile.count, [&](int k) { return tile.mean[k]; }, [&](int k) { return tile.m2[k]; });
      first_owned = tile.first;
      owner = tile.owner;
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[j][k] = 0;
    }
    chunk = 0;
    row += tile_rows;
  }
  if (partial_mean == nullptr) return;

  // The warps' moments, in order.
  wait_for_copies<0>();
  __syncthreads();
  float* const means = reinterpret_cast<float*>(stages);
  float *const m2s = means + warps * kOutputs, *const counts = m2s + warps * kOutputs;
  if (lane == 0) counts[warp] = moments.count;
  if (owner) {
#pragma unroll
    for (int k = 0; k < Tile_::kOwned; ++k) {
      const int place = first_owned + k;
      const int column = place / 4 * 2 * kTileColumns + 4 * t + place % 4;
      means[warp * kOutputs + column] = moments.mean[k];
      m2s[warp * kOutputs + column] = moments.m2[k];
    }
  }
  __syncthreads();
  for (int n = threadIdx.x; n < sizes.outputs; n += blockDim.x) {
    Moments<float, 1> all;
    for (int w = 0; w < warps; ++w) {
      all.merge(
          counts[w], [&](int) { return means[w * kOutputs + n]; },
          [&](int) { return m2s[w * kOutputs + n]; });
    }
    const int64_t i = static_cast<int64_t>(n) * gridDim.x + blockIdx.x;
    partial_mean[i] = all.mean[0];
    partial_m2[i] = all.m2[0];
  }
#endif
}

// Warps per block, measured: wide blocks read W less often, narrow ones reach more multiprocessors.
int choose_warps(int64_t rows) {
  for (int warps = kMaxWarps; warps > 2; warps /= 2) {
    if (rows >= kBlocks / 2 * warps * kTileRows) return warps;
  }
  return 2;
}

Chunking choose_rows(int64_t rows, int warps) {
  const int64_t tile = warps * kTileRows, tiles = ceil_div(rows, tile);
  const int64_t rows_per_block = ceil_div(tiles, kBlocks) * tile;
  return {rows_per_block, static_cast<int>(ceil_div(rows, rows_per_block))};
}

// ---------------------------------------------------------------------------------------------
// Packed weights: [chunk of k][column][channels of the chunk], once per group of columns. kForward:
// columns are the N outputs, one group, k the channels of x. kGradInput: columns are the channels
// of x in groups of 32, k the outputs.

constexpr int kGradInputColumns = 32;

struct PackedShape {
  int64_t groups, chunks;
  int columns, chunk;  // of a group; channels

  __host__ __device__ PackedShape(WeightLayout layout, int chunk, int tiles, int64_t channels)
      : chunk(chunk) {
    const int64_t padded = tiles * kTileColumns;
    const bool forward = layout == WeightLayout::kForward;
    columns = forward ? static_cast<int>(padded) : kGradInputColumns;
    groups = forward ? 1 : (channels + columns - 1) / columns;
    chunks = ((forward ? channels : padded) + chunk - 1) / chunk;
  }

  __host__ __device__ int64_t elements() const { return groups * chunks * columns * chunk; }
};

__host__ __device__ inline int64_t channels_of(const Conv1x1Weights& weights, int64_t layer) {
  return weights.channels_in + layer * weights.growth;
}

template <typename T>
__global__ void pack_conv1x1_kernel(const __grid_constant__ Conv1x1Weights weights,
                                    WeightLayout layout, int tiles, T* packed) {
  const T* from = static_cast<const T*>(weights.data);
  for (int64_t l = 0; l < blockIdx.y; ++l) {
    from += weights.outputs * channels_of(weights, l);
    packed += PackedShape(layout, kChunk<T>, tiles, channels_of(weights, l)).elements();
  }
  const int64_t channels = channels_of(weights, blockIdx.y);
  const PackedShape shape(layout, kChunk<T>, tiles, channels);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < shape.elements(); i += step) {
    const int64_t place = i / shape.chunk, columns = place / shape.columns;
    const int p = static_cast<int>(place % shape.columns), pair = p / (2 * kTileColumns);
    const int64_t k = columns % shape.chunks * shape.chunk + i % shape.chunk;
    const int64_t column = columns / shape.chunks * shape.columns + pair * 2 * kTileColumns +
                           pair_column(p % (2 * kTileColumns));
    const bool forward = layout == WeightLayout::kForward;
    const int64_t n = forward ? column : k, c = forward ? k : column;
    const bool inside = n < weights.outputs && c < channels;
    packed[i] = inside ? to_operand(from[n * channels + c]) : narrow<T>(0.0f);
  }
}

}  // namespace

std::string why_no_tensor_cores(int device_index) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_index),
        "cudaDeviceGetAttribute");
  if (major < 8) {
    return "the GPU has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
           ", needed is 8.0";
  }
  // A build for older GPUs alone runs on newer ones, with empty kernels here.
  int before = 0;
  check(cudaGetDevice(&before), "cudaGetDevice");
  check(cudaSetDevice(device_index), "cudaSetDevice");
  cudaFuncAttributes attributes{};
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, bn_relu_conv1x1_kernel<__nv_bfloat16, 16>);
  check(cudaSetDevice(before), "cudaSetDevice");
  check(error, "cudaFuncGetAttributes");
  if (attributes.ptxVersion < 80) return "this build has no kernels for compute capability 8.0";
  return "";
}

int64_t packed_conv1x1_bytes(Element element, WeightLayout layout, int64_t outputs,
                             int64_t channels) {
  const int size = element_size(element), chunk = kPieces * kPieceBytes / size;
  return PackedShape(layout, chunk, output_tiles(outputs), channels).elements() * size;
}

void pack_conv1x1(Element element, WeightLayout layout, const Conv1x1Weights& weights, void* packed,
                  void* stream) {
  dispatch_operand(element, [&](auto tag) {
    using T = decltype(tag);
    const int tiles = output_tiles(weights.outputs);
    const int64_t most =
        PackedShape(layout, kChunk<T>, tiles, channels_of(weights, weights.layers - 1)).elements();
    const dim3 grid(std::min<int64_t>(ceil_div(most, kThreads), 64), weights.layers);
    pack_conv1x1_kernel<T><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        weights, layout, tiles, static_cast<T*>(packed));
    check(cudaGetLastError(), "pack_conv1x1_kernel");
  });
}

void bn_relu_conv1x1(const Problem& problem, const BatchNorm& bn, const void* weight,
                     int64_t outputs, const View& z, const Statistics* moments) {
  const int warps = choose_warps(problem.rows.count);
  const Chunking chunking = choose_rows(problem.rows.count, warps);
  const Sizes sizes{problem.rows.count, chunking.rows_per_chunk, static_cast<int>(problem.channels),
                    static_cast<int>(outputs)};
  double *partial_mean = nullptr, *partial_m2 = nullptr;
  if (moments != nullptr) {
    partial_mean = problem.workspace(2 * outputs * chunking.chunks);
    partial_m2 = partial_mean + outputs * chunking.chunks;
  }
  dispatch_operand(problem.element, [&](auto element) {
    dispatch_tiles(output_tiles(outputs), [&](auto tiles) {
      using T = decltype(element);
      constexpr int kTiles = decltype(tiles)::value;
      const auto kernel = bn_relu_conv1x1_kernel<T, kTiles>;
      const int chunks = static_cast<int>(ceil_div(problem.channels, kChunk<T>));
      const int64_t stage = (kWeightStage<T, kTiles> + warps * 2 * kWarp) * kPieceBytes;
      const int64_t bytes = norm_floats(chunks, kChunk<T>) * sizeof(float) + kStages * stage;
      allow_shared(kernel, bytes);
      kernel<<<chunking.chunks, warps * kWarp, bytes, static_cast<cudaStream_t>(problem.stream)>>>(
          sizes, Rows<const T>(problem.features[0].x), bn, static_cast<const uint4*>(weight),
          Rows<T>(z, 4), partial_mean, partial_m2);
      check(cudaGetLastError(), "bn_relu_conv1x1_kernel");
    });
  });
  if (moments == nullptr) return;
  merge_moments(outputs, problem.rows.count, chunking, partial_mean, partial_m2, *moments,
                problem.stream);
}

}  // namespace efficient_densenet::cuda
