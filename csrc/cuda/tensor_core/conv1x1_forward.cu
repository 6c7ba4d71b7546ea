// z = relu(bn(x)) W^T on tensor cores, [M, C] times [C, N] to [M, N], and the moments of z.
//
//                    C, chunk by chunk ->              N, or a group of its columns
//                      | x | x | x | x | ...         | z: 8-column tiles side by side |
//   warp 0, 16 or 32 rows  pieces to registers,       accumulators of the warp
//   warp 1                 normalised there
//   ...                W of the chunk: shared memory, one copy for all warps of the block
//
// A warp owns its rows for all columns, so x is read and normalised once. Only where the rows are
// too few to fill the chip do blocks share N (and read x again, from the L2 cache). Pieces of x and
// chunks of W come by asynchronous copies, kStages - 1 chunks ahead, also across tiles of rows: a
// block takes one stretch of rows, tile after tile.
// Moments: of a tile's rows in registers, merged over the lanes, tiles and warps by the formula of
// Chan, Golub and LeVeque (moments.cuh), so no sum of squares cancels; then one partial result per
// column and block, merged in double by the kernel that normalises z (left_over.h). The order
// depends on shapes, strides and alignment alone (and, on devices with little shared memory, on how
// much that is).
//
// Bytes: x once, z once; W (from the L2 cache) once per block and tile. Operations: 2 M C N.
// Limit: memory where M is large; else the latency of a chunk, C / kChannelChunk times in a row.
#include <map>
#include <mutex>

#include "cuda/tensor_core/copies.cuh"
#include "cuda/tensor_core/limits.cuh"
#include "cuda/tensor_core/product.cuh"
#include "operators/bn_relu_conv1x1.h"

namespace efficient_densenet::cuda {
namespace {

constexpr int kMaxWarps = 8;
constexpr int64_t kBlocks = 264;  // along the rows, at most; two per multiprocessor of a large GPU
constexpr int kStages = 4;        // of copies under way

struct Sizes {
  int64_t rows, rows_per_block;
  int channels, outputs;
};

template <int kTiles>
constexpr int kWeightStage = kTiles * kTileColumns * kPieces;  // pieces of a chunk of W

__host__ __device__ inline int norm_floats(int channel_chunks, int channel_chunk) {
  return SharedNorm::kNumbers * channel_chunks * channel_chunk;
}

// A block of so many warps leaves its accumulators enough registers twice, or once.
constexpr int blocks_per_multiprocessor(int row_tiles, int tiles) {
  return row_tiles * tiles <= 12 ? 2 : 1;
}

// A warp's tile: kRowTiles times 16 rows, kTiles times 8 columns.
template <typename T, int kRowTiles, int kTiles>
__global__ void __launch_bounds__(kMaxWarps* kWarp, blocks_per_multiprocessor(kRowTiles, kTiles))
    bn_relu_conv1x1_kernel(const __grid_constant__ Sizes sizes,
                           const __grid_constant__ Rows<const T> x, BatchNorm bn,
                           const uint4* weight, FoldedNorm norm2, const __grid_constant__ Rows<T> z,
                           const __grid_constant__ Partials partials, MomentsOfBlocks result,
                           const __grid_constant__ MomentsLeft x_left, bool leaves) {
#ifdef EFFICIENT_DENSENET_TENSOR_CORES
  constexpr int kOutputs = kTiles * kTileColumns, kOwnRows = 2 * kRowTiles;
  extern __shared__ uint4 shared[];
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / kPieces, t = lane % kPieces;
  const int channel_chunks = (sizes.channels + kChannelChunk<T> - 1) / kChannelChunk<T>;
  const SharedNorm norm(reinterpret_cast<float*>(shared), channel_chunks * kChannelChunk<T>);
  uint4* const stages = shared + norm_floats(channel_chunks, kChannelChunk<T>) / 4;
  const int stage_pieces = kWeightStage<kTiles> + warps * kOwnRows * kWarp;
  const int own_x = kWeightStage<kTiles> + warp * kOwnRows * kWarp + lane;
  const int first_output = blockIdx.y * kOutputs;
  weight += static_cast<int64_t>(blockIdx.y) * channel_chunks * kWeightStage<kTiles>;

  const int64_t begin = blockIdx.x * sizes.rows_per_block;
  const int64_t end = min(begin + sizes.rows_per_block, sizes.rows);
  const int tile_rows = warps * kRowTiles * kTileRows;
  const int total = static_cast<int>((end - begin + tile_rows - 1) / tile_rows) * channel_chunks;

  const bool pieces_are_whole = x.aligned && sizes.channels % kPiece<T> == 0;
  // The next chunk to copy: its number, place in C, stage and the lane's first row; its rows are 8
  // apart.
  int copied = 0, copied_channel_chunk = 0, copied_stage = 0;
  int64_t copied_row = begin + warp * kRowTiles * kTileRows + g;
  const T* from_x = x.at(copied_row, t * kPiece<T>);
  const uint4* from_weight = weight;
  const auto copy_next = [&] {
    if (copied < total) {
      uint4* const stage = stages + copied_stage * stage_pieces;
      for (int i = threadIdx.x; i < kWeightStage<kTiles>; i += blockDim.x) {
        copy_async(stage + i, from_weight + i);
      }
      const int count = count_before<kPiece<T>>(
          sizes.channels, copied_channel_chunk * kChannelChunk<T> + t * kPiece<T>);
      const auto left = static_cast<int>(min(end - copied_row, int64_t(kOwnRows * 8)));
      if (pieces_are_whole) {
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) {
          copy_async_if<kPieceBytes>(count > 0 && r * 8 < left, stage + own_x + r * kWarp,
                                     from_x + r * 8 * x.stride);
        }
      } else {
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) {
          copy_row<kPiece<T>>(stage + own_x + r * kWarp, from_x + r * 8 * x.stride, x.aligned,
                              r * 8 < left ? count : 0);
        }
      }
      if (++copied_stage == kStages) copied_stage = 0;
      from_x += kChannelChunk<T>;
      from_weight += kWeightStage<kTiles>;
      if (++copied_channel_chunk == channel_chunks) {
        copied_channel_chunk = 0;
        copied_row += tile_rows;
        from_x = x.at(copied_row, t * kPiece<T>);
        from_weight = weight;
      }
    }
    ++copied;
    commit_copies();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) copy_next();
  load_norm(norm, bn, channel_chunks * kChannelChunk<T>, sizes.channels, x_left);

  float sums[kRowTiles][kTiles][4] = {};
  WarpMoments<kTiles> moments;
  int channel_chunk = 0;
  int64_t row = begin + warp * kRowTiles * kTileRows + g;
  for (int i = 0; i < total; ++i) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // all copies of this stage are there, and nobody reads the one before
    copy_next();
    const uint4* const stage = stages + i % kStages * stage_pieces;
    NormCoefficients<float> channels[kPiece<T>];
    norm.get(channels, channel_chunk * kChannelChunk<T> + t * kPiece<T>);
    uint4 a[kOwnRows];
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      a[r] = normalised<T>(stage[own_x + r * kWarp], channels);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const uint4 b = stage[j * kWarp + lane];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma_chunk_step<T>(sums[m][j], a[2 * m], a[2 * m + 1], b, step);
        }
      }
    }
    if (++channel_chunk < channel_chunks) continue;

    store_tile<T>(sums, z, row, end, first_output, sizes.outputs, norm2,
                  result.mean ? &moments : nullptr);
    channel_chunk = 0;
    row += tile_rows;
  }
  if (result.mean == nullptr) return;

  wait_for_copies<0>();
  __syncthreads();
  moments.write(reinterpret_cast<float*>(stages), first_output, sizes.outputs, partials);
  add_in_last_block(partials, blockIdx.y, blockIdx.x, first_output,
                    min(first_output + kOutputs, sizes.outputs), result, leaves);
#endif
}

// How a call is cut, from measurements on an H100. With many rows, warps of 32 rows read W half as
// often; with fewer, more warps hide more latency, and when even those of 16 rows do not fill the
// chip, groups of columns give more of them.
//
//   rows             rows of a warp   warps of a block   groups of columns
//   32,768 or more   32 (N <= 128)    4                  1
//   16,384 or more   16               8                  1
//   fewer            16               4                  2 or 4, of at least 32 columns
//
// Where a device has too little shared memory for that: 16 rows, and 4, 2 or 1 warps.
struct Warps {
  int row_tiles, warps;

  int64_t shared_bytes(int tiles, int64_t channels, Element element) const {
    const int channel_chunk = kPieces * kPieceBytes / element_size(element);
    const int64_t stage = tiles * kTileColumns * kPieces + warps * 2 * row_tiles * kWarp;
    const int64_t numbers =
        norm_floats(static_cast<int>(ceil_div(channels, channel_chunk)), channel_chunk);
    return numbers * static_cast<int64_t>(sizeof(float)) + kStages * stage * kPieceBytes;
  }
};

constexpr Warps kFewest{1, 1};

Warps choose_warps(int64_t rows, int tiles, int64_t channels, Element element) {
  Warps preferred{1, 4};
  if (rows >= 32768) {
    preferred.row_tiles = tiles <= 16 ? 2 : 1;
  } else if (rows >= 16384) {
    preferred.warps = kMaxWarps;
  }
  const int64_t limit = shared_memory();
  for (const Warps& warps : {preferred, Warps{1, 4}, Warps{1, 2}}) {
    if (warps.shared_bytes(tiles, channels, element) <= limit) return warps;
  }
  return kFewest;
}

RowChunking choose_rows(int64_t rows, const Warps& warps) {
  const int64_t tile = warps.warps * warps.row_tiles * kTileRows;
  const int64_t rows_per_block = ceil_div(ceil_div(rows, tile), kBlocks) * tile;
  return {rows_per_block, static_cast<int>(ceil_div(rows, rows_per_block))};
}

std::atomic<int64_t> limit_of_tests{0};

std::string ask_device(int device_index) {
  const CurrentDevice current(device_index);
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
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, bn_relu_conv1x1_kernel<__nv_bfloat16, 1, 16>),
        "cudaFuncGetAttributes");
  return attributes.ptxVersion < 80 ? "this build has no kernels for compute capability 8.0" : "";
}

// Empty, or why no kernel can run; every block of every step asks, so each device is asked once.
const std::string& why_not_on_device(int device_index) {
  static std::mutex mutex;
  static std::map<int, std::string> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device_index);
  if (found != known.end()) return found->second;
  return known.emplace(device_index, ask_device(device_index)).first->second;
}

}  // namespace

int64_t shared_memory() {
  static std::atomic<int> known[kKnownDevices];  // 0: not asked yet
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  int most = device < kKnownDevices ? known[device].load() : 0;
  if (most == 0) {
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "cudaDeviceGetAttribute");
    if (device < kKnownDevices) known[device] = most;
  }
  const int64_t limit = limit_of_tests;
  return limit > 0 ? std::min<int64_t>(limit, most) : most;
}

void limit_shared_memory(int64_t bytes) { limit_of_tests = bytes; }

std::string why_no_tensor_cores(int device_index, Element element, int64_t outputs,
                                int64_t channels) {
  if (is_double(element)) return "there are no float64 tensor-core kernels";
  if (outputs > kMaxConv1x1Outputs) {
    return "the bottleneck has " + std::to_string(outputs) + " channels, more than " +
           std::to_string(kMaxConv1x1Outputs);
  }
  const std::string& why = why_not_on_device(device_index);
  if (!why.empty()) return why;
  const CurrentDevice current(device_index);
  if (kFewest.shared_bytes(tiles_for(outputs), channels, element) > shared_memory()) {
    return "the block has " + std::to_string(channels) +
           " channels, more than shared memory holds numbers of";
  }
  return "";
}

void bn_relu_conv1x1(const KernelArgs& args, const BatchNorm& bn, const void* weight,
                     int64_t outputs, const FoldedNorm& norm2, const View& z,
                     const Statistics* moments, const MomentsLeft& x_left, MomentsLeft* z_left) {
  const OutputGroups groups(args.rows.count, outputs);
  const Warps warps = choose_warps(args.rows.count, groups.tiles, args.channels, args.element);
  const RowChunking chunking = choose_rows(args.rows.count, warps);
  const Sizes sizes{args.rows.count, chunking.rows_per_chunk, static_cast<int>(args.channels),
                    static_cast<int>(outputs)};
  const Partials partials = moments == nullptr ? Partials{}
                                               : make_partials(args, outputs, chunking.chunks,
                                                               groups.groups, z_left != nullptr);
  const MomentsOfBlocks result = moments_of_blocks(args.rows.count, chunking, moments);
  if (z_left != nullptr) *z_left = leave(partials, result);
  const auto launch = [&](auto element, auto row_tiles, auto tiles) {
    using T = decltype(element);
    constexpr int kRowTiles = decltype(row_tiles)::value, kTiles = decltype(tiles)::value;
    constexpr auto kKernel = bn_relu_conv1x1_kernel<T, kRowTiles, kTiles>;
    allow_shared<kKernel>();
    const int64_t bytes = warps.shared_bytes(kTiles, args.channels, args.element);
    kKernel<<<dim3(chunking.chunks, groups.groups), warps.warps * kWarp, bytes,
              static_cast<cudaStream_t>(args.stream)>>>(
        sizes, Rows<const T>(args.features[0].x), bn, static_cast<const uint4*>(weight), norm2,
        Rows<T>(z, 4), partials, result, x_left, z_left != nullptr);
    check(cudaGetLastError(), "bn_relu_conv1x1_kernel");
  };
  dispatch_operand(args.element, [&](auto element) {
    dispatch_tiles(groups.tiles, [&](auto tiles) {
      if constexpr (decltype(tiles)::value <= 16) {
        if (warps.row_tiles == 2) return launch(element, std::integral_constant<int, 2>{}, tiles);
      }
      launch(element, std::integral_constant<int, 1>{}, tiles);
    });
  });
}

}  // namespace efficient_densenet::cuda
