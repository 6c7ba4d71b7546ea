// grad_W[tap] = grad_y^T relu(bn(z)) on tensor cores, with z shifted by the tap, [k, M] times
// [M, B] for each of 9 taps, the normalised rows recomputed on the way.
//
//                B: one chunk of 64 bytes per block
//              | z of a stretch of rows |        | grad_y of the rows, all of k |
//   warps        in shared memory, normalised      beside it
//                there once, read by all 9 taps
//   a warp has one line of taps, dy, for all of k: accumulators of 3 taps; the two warps of a dy
//   share the rows or, where k is large, the channels.
//
// Blocks split B and the rows. Copies of the next tile of rows are under way while one is
// multiplied. The mma sums over rows, so operands are read across: by transposing loads (16 bits),
// or as single words (TF32). At the end a block adds its warps' parts of the rows, in order, and
// writes one partial result; a later kernel adds those of all, as this one does for kernels before
// (left_over.cuh).
//
// Bytes: z once, times 1 + (2 W + 2) / R, the rest of that from the L2 cache; grad_y once per chunk
// of B, from the L2 cache after the first. Partial results: 9 k B floats per part of the rows,
// written and read. Operations: 18 M B k.
// Limit: shared memory (per 16 rows and tap, an operand of 1 KB for k / 8 * 2 products) and, with
// few rows, the latency of a tile.
#include "cuda/tensor_core/conv3x3.cuh"
#include "cuda/tensor_core/left_over.cuh"

namespace efficient_densenet::cuda {
namespace {

constexpr int kLines = 3, kHalves = 2;  // of taps; warps per line
constexpr int kBlockThreads = kLines * kHalves * kWarp;
constexpr int64_t kBlocks = 264;  // about; two per multiprocessor of a large GPU
constexpr int kMostTiles = 6;     // of k, per block: accumulators are 3 taps times so many

struct Sizes {
  ImageRows images;
  int64_t rows_per_block;
  int tile_rows;          // a multiple of 32
  int channels, outputs;  // B, k
};

// Elements from row to row of grad_y in shared memory: neighbouring rows lie in other banks, for
// the loads below.
template <typename T, int kTiles>
constexpr int kPitch = kTiles * kTileColumns + (sizeof(T) == 4 ? 8 : kPiece<T>);

// Floats from tap to tap of a block's sums: lanes that write at once then do so in other banks.
template <typename T>
constexpr int kPitchSum = kChannelChunk<T> + 4;

template <typename T>
constexpr int kChannelTiles = kChannelChunk<T> / kTileRows;

// What the two warps of a line share out: the channels where all of them were too many
// accumulators, else the rows.
template <typename T, int kTiles>
struct Share {
  static constexpr bool kOfChannels = kChannelTiles<T> * kTiles > 8;
  static constexpr int kParts = kOfChannels ? 1 : kHalves;  // of the rows
  static constexpr int kOwnTiles = kOfChannels ? kChannelTiles<T> / kHalves : kChannelTiles<T>;
};

// Bytes of a stage: stretch of z, grad_y, taps inside.
struct SharedLayout {
  int grad_y, inside, stage;

  __host__ __device__ SharedLayout(int stretch, int tile_rows, int pitch_bytes)
      : grad_y(stretch * kPieces * kPieceBytes),
        inside(grad_y + tile_rows * pitch_bytes),
        stage(inside + tile_rows * 4) {}
};

constexpr int kZeros = 64;  // bytes, at the beginning

#ifdef EFFICIENT_DENSENET_TENSOR_CORES

// B operands of all tiles of k, summed over kStep rows of grad_y.
template <typename T, int kTiles>
__device__ void load_grad_y(uint32_t (&b)[kTiles][2], const T* rows, int lane) {
  constexpr int kPitch_ = kPitch<T, kTiles>;
  if constexpr (sizeof(T) == 2) {
    const T* const from = rows + lane % 16 * kPitch_ + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t both[4];
      load_transposed(both, shared_address(from + j * kTileColumns));
      b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
    }
  } else {
    const T* const from = rows + lane % 4 * kPitch_ + lane / 4;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        b[j][i] = __float_as_uint(to_operand(from[i * 4 * kPitch_ + j * kTileColumns]));
      }
    }
  }
}

// A operands of the taps of a line: tiles of the chunk's channels, summed over kStep rows. Rows
// that a warp begins with are a multiple of 8, after which places repeat (swizzled), so where the
// lane's part begins is the same number behind the row's beginning all the time.
template <typename T>
struct TapLoads {
  static constexpr int kOwnRows = sizeof(T) == 2 ? 1 : 2;
  static_assert(kStep<T> % 8 == 0);
  int own, first_tile, first_tap;
  int from[3][kOwnRows];  // bytes behind the beginning of the row's pieces

  __device__ TapLoads(int lane, int first_tile, int dy, int width)
      : own(sizeof(T) == 2 ? lane % 8 + lane / 16 * 8 : lane % 4),
        first_tile(first_tile),
        first_tap(3 * dy) {
    const int channel = lane / 4;
#pragma unroll
    for (int dx = 0; dx < 3; ++dx) {
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        const int s = own + 4 * i + dy * width + dx;
        from[dx][i] = sizeof(T) == 2 ? swizzled(s, lane / 8 % 2) * kPieceBytes
                                     : swizzled(s, channel / kPiece<T>) * kPieceBytes +
                                           channel % kPiece<T> * static_cast<int>(sizeof(T));
      }
    }
  }

  // Of rows from stretch row `row` on; `inside` are the taps of the lane's.
  template <int kOwnTiles>
  __device__ void load(uint32_t (&a)[kOwnTiles][4], const uint32_t (&inside)[kOwnRows],
                       const uint4* stretch, const uint4* zeros, int row, int dx) const {
    const int begin = row * kPieces * kPieceBytes;
    if constexpr (sizeof(T) == 2) {
      const int piece = threadIdx.x / 8 % 2;
      const uint32_t at = inside[0] >> (first_tap + dx) & 1
                              ? shared_address(stretch) + begin + from[dx][0]
                              : shared_address(zeros + piece);
#pragma unroll
      for (int m = 0; m < kOwnTiles; ++m)
        load_transposed(a[m], at ^ ((first_tile + m) * 2 * kPieceBytes));
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool exists = inside[half] >> (first_tap + dx) & 1;
        const int at = begin + from[dx][half];
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // channels 8 apart are two pieces apart
          const auto value = *reinterpret_cast<const uint32_t*>(
              reinterpret_cast<const char*>(stretch) + (at ^ (i * 2 * kPieceBytes)));
          a[0][2 * half + i] = exists ? value : 0;
        }
      }
    }
  }
};

#endif

template <typename T, int kTiles>
__global__ void __launch_bounds__(kBlockThreads, 2)
    bn_relu_conv3x3_grad_weight_kernel(const __grid_constant__ Sizes sizes,
                                       const __grid_constant__ Rows<const T> z, BatchNorm bn,
                                       const __grid_constant__ Rows<const T> grad_y, float* parts,
                                       const __grid_constant__ WeightParts parts_left,
                                       const __grid_constant__ NormSumsLeft sums_left) {
#ifdef EFFICIENT_DENSENET_TENSOR_CORES
  constexpr int kColumns = kTiles * kTileColumns, kPitch_ = kPitch<T, kTiles>;
  constexpr int kRowPieces = kColumns / kPiece<T>;  // of grad_y
  extern __shared__ __align__(128) char bytes[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  using S = Share<T, kTiles>;
  const int dy = warp % kLines, half = warp / kLines;
  const int part = S::kOfChannels ? 0 : half;
  const int first_tile = S::kOfChannels ? half * S::kOwnTiles : 0;
  const int first_channel = blockIdx.x * kChannelChunk<T>, first_output = blockIdx.z * kColumns;
  const int stretch = sizes.images.stretch(sizes.tile_rows);
  const SharedLayout layout(stretch, sizes.tile_rows, kPitch_ * static_cast<int>(sizeof(T)));
  const auto stage = [&](int i) { return bytes + kZeros + i % 2 * layout.stage; };
  auto* const zeros = reinterpret_cast<uint4*>(bytes);

  const int64_t begin = blockIdx.y * sizes.rows_per_block;
  const int64_t end = min(begin + sizes.rows_per_block, sizes.images.rows);
  const int total = static_cast<int>((end - begin + sizes.tile_rows - 1) / sizes.tile_rows);

  const int piece = threadIdx.x % kPieces, channel = first_channel + piece * kPiece<T>;
  const int count_z = count_before<kPiece<T>>(sizes.channels, channel);
  NormCoefficients<float> channels[kPiece<T>];
#pragma unroll
  for (int k = 0; k < kPiece<T>; ++k) {
    channels[k] = k < count_z ? load_numbers(bn, channel + k) : NormCoefficients<float>{};
  }
  // A thread's pieces of grad_y are of the same columns, too.
  static_assert(kBlockThreads % kRowPieces == 0);
  constexpr int kRowsY = kBlockThreads / kRowPieces;
  const int output = threadIdx.x % kRowPieces * kPiece<T>;
  const bool output_exists = first_output + output < sizes.outputs;
  const bool pieces_are_whole = z.aligned && sizes.channels % kPiece<T> == 0;
  const auto copy = [&](int i) {
    if (i < total) {
      const int64_t tile = begin + static_cast<int64_t>(i) * sizes.tile_rows;
      copy_stretch<T>(reinterpret_cast<uint4*>(stage(i)), z, sizes.images, tile, stretch, channel,
                      count_z, pieces_are_whole, kBlockThreads);
      const auto rows = static_cast<int>(min(end - tile, int64_t(sizes.tile_rows)));
      const int own_row = threadIdx.x / kRowPieces;
      T* to_y = reinterpret_cast<T*>(stage(i) + layout.grad_y) + own_row * kPitch_ + output;
      const T* from_y = grad_y.at(tile + own_row, first_output + output);
      for (int r = own_row; r < sizes.tile_rows; r += kRowsY) {
        copy_async_if<kPieceBytes>(output_exists && r < rows, to_y, from_y);
        to_y += kRowsY * kPitch_;
        from_y += kRowsY * grad_y.stride;
      }
    }
    commit_copies();
  };
  copy(0);
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int blocks = gridDim.x * gridDim.y * gridDim.z;
  add_left<T>(sums_left, block, blocks);
  add_left<T>(parts_left, block, blocks);
  if (threadIdx.x < kPieces) zeros[threadIdx.x] = {};

  const TapLoads<T> loads(lane, first_tile, dy, sizes.images.width);
  float sums[3][S::kOwnTiles][kTiles][4] = {};
  for (int i = 0; i < total; ++i) {
    wait_for_copies<0>();
    auto* const zs = reinterpret_cast<uint4*>(stage(i));
    for (int s = threadIdx.x / kPieces; s < stretch; s += kBlockThreads / kPieces) {
      uint4& at = zs[swizzled(s, piece)];
      at = normalised<T>(at, channels);
    }
    auto* const inside = reinterpret_cast<uint32_t*>(stage(i) + layout.inside);
    const int64_t tile = begin + static_cast<int64_t>(i) * sizes.tile_rows;
    for (int r = threadIdx.x; r < sizes.tile_rows; r += kBlockThreads) {
      inside[r] = sizes.images.taps_inside(tile + r, end);
    }
    __syncthreads();  // this tile is ready, and nobody reads the one before
    copy(i + 1);
    const T* const ys = reinterpret_cast<const T*>(stage(i) + layout.grad_y);
    for (int row = part * kStep<T>; row < sizes.tile_rows; row += S::kParts * kStep<T>) {
      uint32_t b[kTiles][2];
      load_grad_y<T, kTiles>(b, ys + row * kPitch_, lane);
      uint32_t taps_inside[TapLoads<T>::kOwnRows];
#pragma unroll
      for (int k = 0; k < TapLoads<T>::kOwnRows; ++k) {
        taps_inside[k] = inside[row + loads.own + 4 * k];
      }
#pragma unroll
      for (int dx = 0; dx < 3; ++dx) {
        uint32_t a[S::kOwnTiles][4];
        loads.load(a, taps_inside, zs, zeros, row, dx);
#pragma unroll
        for (int m = 0; m < S::kOwnTiles; ++m) {
#pragma unroll
          for (int j = 0; j < kTiles; ++j) mma<T>(sums[dx][m][j], a[m], b[j]);
        }
      }
    }
  }

  // The parts of the rows, in order: [output][tap][channel].
  wait_for_copies<0>();
  float* const all = reinterpret_cast<float*>(bytes);
  for (int p = 0; p < S::kParts; ++p) {
    __syncthreads();
    if (p != part) continue;
#pragma unroll
    for (int dx = 0; dx < 3; ++dx) {
#pragma unroll
      for (int m = 0; m < S::kOwnTiles; ++m) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int n = j * kTileColumns + lane % 4 * 2 + k % 2;
            const int c = (first_tile + m) * kTileRows + lane / 4 + k / 2 * 8;
            float& sum = all[(n * kTaps + dy * 3 + dx) * kPitchSum<T> + c];
            sum = p == 0 ? sums[dx][m][j][k] : sum + sums[dx][m][j][k];
          }
        }
      }
    }
  }
  __syncthreads();
  constexpr int kOwnQuads = kChannelChunk<T> / 4;
  const int taps = min(kColumns, sizes.outputs - first_output) * kTaps;  // of all outputs
  const int64_t first_tap = int64_t(blockIdx.y) * sizes.outputs * kTaps + first_output * kTaps;
  for (int i = threadIdx.x; i < taps * kOwnQuads; i += kBlockThreads) {
    const int tap = i / kOwnQuads, c = i % kOwnQuads * 4;
    store_row(parts + (first_tap + tap) * sizes.channels + first_channel + c,
              *reinterpret_cast<const Words<float, 4>*>(all + tap * kPitchSum<T> + c),
              sizes.channels % 4 == 0, count_before<4>(sizes.channels, first_channel + c));
  }
#endif
}

// Groups of k that leave the accumulators enough registers.
int groups_of(int64_t outputs) {
  return static_cast<int>(ceil_div(outputs, kMostTiles * kTileColumns));
}

int tiles_of(int64_t outputs) {
  return conv3x3_tiles(false, ceil_div(outputs, groups_of(outputs)));
}

int64_t shared_bytes(Element element, int tiles, int tile_rows, int64_t width) {
  const int size = element_size(element), pad = size == 4 ? 8 : kPieceBytes / size;
  const SharedLayout layout(static_cast<int>(tile_rows + 2 * width + 2), tile_rows,
                            (tiles * kTileColumns + pad) * size);
  const int64_t pitch_sum = kPieces * kPieceBytes / size + 4;
  const int64_t sums = int64_t(tiles) * kTileColumns * kTaps * pitch_sum * sizeof(float);
  return std::max<int64_t>(kZeros + 2 * int64_t(layout.stage), sums);
}

constexpr int kFewestRows = 32;

}  // namespace

int64_t conv3x3_grad_weight_bytes(Element element, int64_t outputs, int64_t width) {
  return shared_bytes(element, tiles_of(outputs), kFewestRows, width);
}

void bn_relu_conv3x3_grad_weight(const KernelArgs& args, const BatchNorm& bn,
                                 const ImageSize& image, int64_t outputs, const View& grad_y,
                                 const WeightGradient& grad_weight, WeightParts* parts_left,
                                 const NormSumsLeft& sums_left) {
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const int64_t rows = args.rows.count;
  const int tiles = tiles_of(outputs), groups = groups_of(outputs);
  dispatch_operand(args.element, [&](auto element) {
    using T = decltype(element);
    const int64_t channel_chunks = ceil_div(args.channels, kChannelChunk<T>);
    const int64_t row_blocks = std::max<int64_t>(1, kBlocks / (channel_chunks * groups));
    int tile_rows = 256;
    while (tile_rows > kFewestRows &&
           (rows < row_blocks * tile_rows ||
            2 * shared_bytes(args.element, tiles, tile_rows, image.width) > shared_memory())) {
      tile_rows /= 2;
    }
    const int64_t bytes = shared_bytes(args.element, tiles, tile_rows, image.width);
    const int64_t rows_per_block = ceil_div(ceil_div(rows, tile_rows), row_blocks) * tile_rows;
    const int parts = static_cast<int>(ceil_div(rows, rows_per_block));
    const Sizes sizes{ImageRows(args, image), rows_per_block, tile_rows,
                      static_cast<int>(args.channels), static_cast<int>(outputs)};
    const WeightParts own = make_weight_parts(args, outputs, kTaps, parts, grad_weight);
    dispatch_conv3x3_tiles(tiles, [&](auto tag) {
      if constexpr (decltype(tag)::value <= kMostTiles) {
        constexpr auto kKernel = bn_relu_conv3x3_grad_weight_kernel<T, decltype(tag)::value>;
        allow_shared<kKernel>();
        kKernel<<<dim3(channel_chunks, parts, groups), kBlockThreads, bytes, stream>>>(
            sizes, Rows<const T>(args.features[0].x), bn, Rows<const T>(grad_y), own.memory,
            *parts_left, sums_left);
        check(cudaGetLastError(), "bn_relu_conv3x3_grad_weight_kernel");
      }
    });
    *parts_left = own;
  });
}

}  // namespace efficient_densenet::cuda
