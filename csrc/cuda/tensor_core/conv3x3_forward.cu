// y = conv3x3(relu(bn(z))) on tensor cores, [M, 9 B] times [9 B, k] to [M, k] with the rows of the
// left matrix never written, and the moments of y.
//
//                  B, chunk by chunk ->             k, all of it
//              | z of a stretch of rows |       | 9 taps of y: accumulators of the warp
//   4 or 8       in shared memory, normalised
//   warps        there once, read by all 9 taps
//                W of the chunk beside it
//
// A warp owns 16 or 32 rows for all outputs. The stretch and its taps: conv3x3.cuh. Copies of
// the next chunk are under way while this one is multiplied, also across tiles of rows: a block
// takes one tile after the other. Moments and their order: product.cuh.
//
// Bytes: z once, times 1 + (2 W + 2) / R for the rows around a tile, most of those from the L2
// cache; y once; W, 18 B k, from the L2 cache once per tile. Operations: 18 M B k.
// Limit: the tensor cores and shared memory, which reads an operand once per k / 8 products.
#include "cuda/tensor_core/conv3x3.cuh"
#include "cuda/tensor_core/product.cuh"

namespace efficient_densenet::cuda {
namespace {

constexpr int64_t kBlocks = 264;  // at most; two per multiprocessor of a large GPU
constexpr int kMaxStages = 4;

struct Sizes {
  ImageRows images;
  int64_t rows_per_block;
  int channels, outputs, stages;
};

// Pieces: numbers of the norm, zeros, stages.
struct SharedLayout {
  int numbers, stage;

  __host__ __device__ SharedLayout(int channels, int channel_chunk, int stretch, int weights)
      : numbers(SharedNorm::kNumbers * ((channels + channel_chunk - 1) / channel_chunk) *
                channel_chunk / 4),
        stage(stretch * kPieces + weights) {}

  int64_t bytes(int stages) const {
    return (numbers + kPieces + stages * int64_t(stage)) * kPieceBytes;
  }
};

template <typename T, int kRowTiles, int kTiles, bool kIsNormalised>
__global__ void __launch_bounds__(kMaxRowWarps* kWarp, 2)
    bn_relu_conv3x3_kernel(const __grid_constant__ Sizes sizes,
                           const __grid_constant__ Rows<const T> z, BatchNorm bn,
                           const uint4* weight, const __grid_constant__ Rows<T> y,
                           const __grid_constant__ Partials partials, MomentsOfBlocks result,
                           const __grid_constant__ MomentsLeft z_left, bool leaves) {
#ifdef EFFICIENT_DENSENET_TENSOR_CORES
  constexpr int kWeights = kConv3x3Stage<kTiles>;
  extern __shared__ __align__(128) uint4 shared[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int block_rows = blockDim.x / kWarp * kRowTiles * kTileRows;
  const int channel_chunks = (sizes.channels + kChannelChunk<T> - 1) / kChannelChunk<T>;
  const int stretch = sizes.images.stretch(block_rows);
  const SharedLayout layout(sizes.channels, kChannelChunk<T>, stretch, kWeights);
  const SharedNorm norm(reinterpret_cast<float*>(shared), channel_chunks * kChannelChunk<T>);
  uint4 *const zeros = shared + layout.numbers, *const stages = zeros + kPieces;

  const int64_t begin = blockIdx.x * sizes.rows_per_block;
  const int64_t end = min(begin + sizes.rows_per_block, sizes.images.rows);
  const int total = static_cast<int>((end - begin + block_rows - 1) / block_rows) * channel_chunks;
  const int piece = threadIdx.x % kPieces;  // of every row that the thread copies

  const bool pieces_are_whole = z.aligned && sizes.channels % kPiece<T> == 0;
  // The next stage to copy: its number, chunk, place and first row.
  int copied = 0, copied_channel_chunk = 0, copied_stage = 0;
  int64_t copied_tile = begin;
  const auto copy_next = [&] {
    if (copied < total) {
      uint4* const stage = stages + copied_stage * layout.stage;
      const uint4* const from = weight + static_cast<int64_t>(copied_channel_chunk) * kWeights;
      for (int k = threadIdx.x; k < kWeights; k += blockDim.x) {
        copy_async(stage + stretch * kPieces + k, from + k);
      }
      const int channel = copied_channel_chunk * kChannelChunk<T> + piece * kPiece<T>;
      copy_stretch<T>(stage, z, sizes.images, copied_tile, stretch, channel,
                      count_before<kPiece<T>>(sizes.channels, channel), pieces_are_whole,
                      blockDim.x);
      if (++copied_stage == sizes.stages) copied_stage = 0;
      if (++copied_channel_chunk == channel_chunks) {
        copied_channel_chunk = 0;
        copied_tile += block_rows;
      }
    }
    ++copied;
    commit_copies();
  };
  for (int i = 0; i + 1 < sizes.stages; ++i) copy_next();
  if constexpr (!kIsNormalised) {
    load_norm(norm, bn, channel_chunks * kChannelChunk<T>, sizes.channels, z_left);
  }
  if (threadIdx.x < kPieces) zeros[threadIdx.x] = {};

  float sums[kRowTiles][kTiles][4] = {};
  uint32_t inside[kRowTiles];
  WarpMoments<kTiles> moments;
  int channel_chunk = 0, stage_index = 0;
  int64_t tile_row = begin + warp * kRowTiles * kTileRows;
  for (int i = 0; i < total; ++i) {
    if (channel_chunk == 0) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        inside[m] = sizes.images.taps_inside(tile_row + m * kTileRows + lane % 16, end);
      }
    }
    uint4* const stage = stages + stage_index * layout.stage;
    if (++stage_index == sizes.stages) stage_index = 0;
    if (i == 0) __syncthreads();  // the norm's numbers
    wait_for_all_but(sizes.stages - 2);
    if constexpr (!kIsNormalised) {  // each thread, what it has copied
      NormCoefficients<float> channels[kPiece<T>];
      norm.get(channels, channel_chunk * kChannelChunk<T> + piece * kPiece<T>);
      for (int s = threadIdx.x / kPieces; s < stretch; s += blockDim.x / kPieces) {
        uint4& at = stage[swizzled(s, piece)];
        at = normalised<T>(at, channels);
      }
    }
    __syncthreads();  // this stage is ready, and nobody reads the one before
    copy_next();
    multiply_taps<T>(sums, stage, zeros, stage + stretch * kPieces, sizes.images,
                     warp * kRowTiles * kTileRows, inside, 2);
    if (++channel_chunk < channel_chunks) continue;
    store_tile<T>(sums, y, tile_row + lane / kPieces, end, 0, sizes.outputs, FoldedNorm{},
                  result.mean ? &moments : nullptr);
    channel_chunk = 0;
    tile_row += block_rows;
  }
  if (result.mean == nullptr) return;
  wait_for_copies<0>();
  __syncthreads();
  moments.write(reinterpret_cast<float*>(stages), 0, sizes.outputs, partials);
  add_in_last_block(partials, 0, blockIdx.x, 0, sizes.outputs, result, leaves);
#endif
}

SharedLayout layout_for(Element element, const RowCut& cut, int64_t outputs, int64_t channels,
                        int64_t width) {
  const int channel_chunk = kPieces * kPieceBytes / element_size(element);
  const int tiles = conv3x3_tiles(false, outputs);
  return SharedLayout(static_cast<int>(channels), channel_chunk,
                      static_cast<int>(cut.rows() + 2 * width + 2), kTaps * tiles * kWarp);
}

}  // namespace

std::string why_no_conv3x3(int device_index, Element element, int64_t outputs, int64_t channels,
                           int64_t width) {
  const auto too_many = [](const char* what, int64_t count, int64_t most) {
    return "the 3x3 convolution has " + std::to_string(count) + " " + what + ", more than " +
           std::to_string(most);
  };
  if (outputs > kMaxConv3x3Outputs) return too_many("outputs", outputs, kMaxConv3x3Outputs);
  if (channels > kMaxConv3x3Channels) return too_many("channels", channels, kMaxConv3x3Channels);
  const CurrentDevice current(device_index);
  const int64_t bytes = std::max({layout_for(element, {4, 1}, outputs, channels, width).bytes(2),
                                  conv3x3_grad_input_bytes(element, outputs, channels, width),
                                  conv3x3_grad_weight_bytes(element, outputs, width)});
  if (bytes > shared_memory()) {
    return "images " + std::to_string(width) + " wide need more shared memory than there is";
  }
  return "";
}

void bn_relu_conv3x3(const KernelArgs& args, const BatchNorm& bn, bool is_normalised,
                     const ImageSize& image, const void* weight, int64_t outputs, const View& y,
                     const Statistics* moments, const MomentsLeft& z_left, MomentsLeft* y_left) {
  const int64_t rows = args.rows.count;
  const auto layout = [&](const RowCut& cut) {
    return layout_for(args.element, cut, outputs, args.channels, image.width);
  };
  const RowCut cut = choose_row_cut(rows, image.width, [&](const RowCut& cut) {
    return layout(cut).bytes(2) <= shared_memory();
  });
  int stages = 2;  // more where two blocks still fit
  while (stages < kMaxStages && 2 * layout(cut).bytes(stages + 1) <= shared_memory()) ++stages;
  // Of few tiles one per block: blocks that are done make room for others.
  const int64_t tiles = ceil_div(rows, cut.rows());
  const int64_t rows_per_block = (tiles <= 2 * kBlocks ? 1 : ceil_div(tiles, kBlocks)) * cut.rows();
  const RowChunking chunking{rows_per_block, static_cast<int>(ceil_div(rows, rows_per_block))};
  const Sizes sizes{ImageRows(args, image), rows_per_block, static_cast<int>(args.channels),
                    static_cast<int>(outputs), stages};
  const Partials partials =
      moments == nullptr ? Partials{}
                         : make_partials(args, outputs, chunking.chunks, 1, y_left != nullptr);
  const MomentsOfBlocks result = moments_of_blocks(rows, chunking, moments);
  if (y_left != nullptr) *y_left = leave(partials, result);
  const auto launch = [&](auto element, auto row_tiles, auto tiles_tag, auto normalised_tag) {
    using T = decltype(element);
    constexpr auto kKernel =
        bn_relu_conv3x3_kernel<T, decltype(row_tiles)::value, decltype(tiles_tag)::value,
                               decltype(normalised_tag)::value>;
    allow_shared<kKernel>();
    kKernel<<<chunking.chunks, cut.warps * kWarp, layout(cut).bytes(stages),
              static_cast<cudaStream_t>(args.stream)>>>(
        sizes, Rows<const T>(args.features[0].x), bn, static_cast<const uint4*>(weight),
        Rows<T>(y, 4), partials, result, z_left, y_left != nullptr);
    check(cudaGetLastError(), "bn_relu_conv3x3_kernel");
  };
  dispatch_operand(args.element, [&](auto element) {
    dispatch_conv3x3_tiles(conv3x3_tiles(false, outputs), [&](auto tiles) {
      const auto with_row_tiles = [&](auto row_tiles) {
        if (is_normalised) return launch(element, row_tiles, tiles, std::true_type{});
        launch(element, row_tiles, tiles, std::false_type{});
      };
      if (cut.row_tiles == 2) return with_row_tiles(std::integral_constant<int, 2>{});
      with_row_tiles(std::integral_constant<int, 1>{});
    });
  });
}

}  // namespace efficient_densenet::cuda
