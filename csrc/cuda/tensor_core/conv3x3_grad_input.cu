// What a 3x3 convolution and the norm before it send back to z, on tensor cores:
//
//   grad_y = G - (S1 + (y - mean) S2) / M          gathered as apply_bn_correction does
//   grad_a = conv3x3(grad_y) with W transposed     [M, 9 k] times [9 k, B]
//   dz = grad_a where the ReLU was open            recomputed from z; stored
//   sums over the rows of dz and of dz (z - rounded mean)
//
//              | grad_y of a stretch of rows |       | B, 48 or 64 columns at a time |
//   4 or 8       in shared memory, all of k            accumulators, mask, sums, dz
//   warps        W of the columns and a chunk of k beside it, copied one ahead
//
// From these sums follows the gradient of z, which the reader of dz makes of it on the way
// (conv1x1_grad_input.cu). A block has one tile of rows, 16 or 32 per warp (conv3x3.cuh), and all
// or one group of the columns. It also writes grad_y of its own rows, which the weight's gradient
// reads. Sums: a lane's rows, the lanes of a column, the warps in order; one partial result per
// channel and block, added up in double by the kernel behind (left_over.cuh).
//
// Bytes: G (4 per element) and y once, times 1 + (2 W + 2) / R, most of that from the L2 cache; z
// once; dz and grad_y written once. W, 18 B k, from the L2 cache once per block.
// Operations: 18 M B k. Limit: the tensor cores and shared memory.
#include "cuda/tensor_core/conv3x3.cuh"
#include "cuda/tensor_core/left_over.cuh"

namespace efficient_densenet::cuda {
namespace {

constexpr int64_t kFewBlocks = 132;  // fewer share the columns

struct Sizes {
  ImageRows images;
  int channels, outputs, pitch;  // B, k and elements of a row of grad_y
  int groups_per_block;
};

struct Gather {
  const double* mean;  // null: there is nothing to correct, and y is not read
  Correction correction;
};

// Pieces: numbers of the norm (of all groups of columns), the warps' sums and the correction
// of grad_y; zeros, grad_y, two stages of weights.
struct SharedLayout {
  int numbers, grad_y, stage;

  __host__ __device__ SharedLayout(int warps, int columns, int channel_chunks, int stretch,
                                   int weights)
      : numbers(((SharedNorm::kNumbers + 2 * warps) * columns +
                 kMaxConv3x3Outputs * static_cast<int>(sizeof(CorrectionCoefficients<float>) / 4)) /
                4),
        grad_y(channel_chunks * stretch * kPieces),
        stage(weights) {}

  int64_t bytes() const { return (numbers + kPieces + grad_y + 2 * int64_t(stage)) * kPieceBytes; }
};

constexpr int kBatch = 6;  // loads under way per thread and tensor

template <typename T, int kRowTiles, int kTiles>
__global__ void __launch_bounds__(kMaxRowWarps* kWarp, 2)
    bn_relu_conv3x3_grad_input_kernel(const __grid_constant__ Sizes sizes,
                                      const __grid_constant__ Rows<const float> grad_features,
                                      const __grid_constant__ Rows<const T> y, Gather gather,
                                      const __grid_constant__ Rows<const T> z, BatchNorm bn,
                                      const uint4* weight, const __grid_constant__ Rows<T> grad_y,
                                      const __grid_constant__ Rows<T> grad_z, double* partial_dz,
                                      double* partial_dz_centred) {
#ifdef EFFICIENT_DENSENET_TENSOR_CORES
  constexpr int kWeights = kConv3x3Stage<kTiles>;
  constexpr int kColumns = kTiles * kTileColumns, kOwnRows = 2 * kRowTiles;
  extern __shared__ __align__(128) uint4 shared[];
  const int warps = blockDim.x / kWarp, block_rows = warps * kRowTiles * kTileRows;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, t = lane % kPieces;
  const int channel_chunks = (sizes.outputs + kChannelChunk<T> - 1) / kChannelChunk<T>;
  const int columns = sizes.groups_per_block * kColumns;
  const int all_groups = (sizes.channels + kColumns - 1) / kColumns;
  const int first_group = blockIdx.y * sizes.groups_per_block;
  const int groups = min(sizes.groups_per_block, all_groups - first_group);
  const int first_channel = first_group * kColumns;
  const int stretch = sizes.images.stretch(block_rows);
  const SharedLayout layout(warps, columns, channel_chunks, stretch, kWeights);
  float* const floats = reinterpret_cast<float*>(shared);
  const SharedNorm norm(floats, columns);
  float* const warp_sums = floats + SharedNorm::kNumbers * columns;
  auto* const corrections =
      reinterpret_cast<CorrectionCoefficients<float>*>(warp_sums + 2 * warps * columns);
  uint4 *const zeros = shared + layout.numbers, *const operands = zeros + kPieces;
  uint4* const stages = operands + layout.grad_y;

  const int total = groups * channel_chunks;
  weight += static_cast<int64_t>(first_group) * channel_chunks * kWeights;
  const auto copy = [&](int i) {
    if (i < total) {
      const uint4* const from = weight + static_cast<int64_t>(i) * kWeights;
      for (int k = threadIdx.x; k < kWeights; k += blockDim.x) {
        copy_async(stages + i % 2 * kWeights + k, from + k);
      }
    }
    commit_copies();
  };
  copy(0);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * block_rows;
  const int64_t end = min(first_row + block_rows, sizes.images.rows);
  prefetch_rows(z, first_row + warp * kRowTiles * kTileRows, kRowTiles * kTileRows, end,
                first_channel, min(groups * kColumns, sizes.channels - first_channel));
  norm.load(bn, first_channel, columns, sizes.channels);
  if (threadIdx.x < kPieces) zeros[threadIdx.x] = {};
  for (int n = threadIdx.x; n < sizes.outputs; n += blockDim.x) {
    corrections[n] =
        CorrectionCoefficients<float>::load(gather.mean, gather.correction, sizes.images.rows, n);
  }
  __syncthreads();

  // grad_y, four channels at a time.
  const int64_t stretch_begin = sizes.images.stretch_begin(first_row);
  const auto first_stretch = static_cast<int>(max(-stretch_begin, int64_t(0)));
  const auto end_stretch =
      static_cast<int>(min(sizes.images.rows - stretch_begin, int64_t(stretch)));
  const int first_own = sizes.images.width + 1;  // row of the stretch: those between are around
  const int end_own = first_own + static_cast<int>(end - first_row);
  constexpr int kFours = kChannelChunk<T> / 4;
  const int in_chunk = threadIdx.x % kFours * 4, own_s = threadIdx.x / kFours;
  const int apart = blockDim.x / kFours;
  const auto make_grad_y = [&](auto whole) {
    constexpr bool kWhole = decltype(whole)::value;  // pieces of four are, and aligned
    for (int channel_chunk = 0; channel_chunk < channel_chunks; ++channel_chunk) {
      const int n = channel_chunk * kChannelChunk<T> + in_chunk,
                count_n = count_before<4>(sizes.outputs, n);
      CorrectionCoefficients<float> channels[4] = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (k < count_n) channels[k] = corrections[n + k];
      }
      T* const operand =
          reinterpret_cast<T*>(operands + channel_chunk * stretch * kPieces) + in_chunk % kPiece<T>;
      const bool writes = blockIdx.y == 0 && n < sizes.pitch;
      const float* from_g = grad_features.at(stretch_begin + own_s, n);
      const T* from_y = y.at(stretch_begin + own_s, n);
      T* to = grad_y.at(stretch_begin + own_s, n);
      for (int first = own_s; first < stretch; first += kBatch * apart) {
        Words<float, 4> g[kBatch];
        Words<T, 4> values[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int s = first + j * apart,
                    count = s >= first_stretch && s < end_stretch ? count_n : 0;
          const int count_y = gather.mean == nullptr ? 0 : count;
          const float* const at_g = from_g + j * apart * grad_features.stride;
          const T* const at_y = from_y + j * apart * y.stride;
          if constexpr (kWhole) {
            g[j] = {};
            values[j] = {};
            if (count > 0) g[j] = *reinterpret_cast<const Words<float, 4>*>(at_g);
            if (count_y > 0) values[j] = *reinterpret_cast<const Words<T, 4>*>(at_y);
          } else {
            g[j] = load_row<4>(at_g, grad_features.aligned, count);
            values[j] = load_row<4>(at_y, y.aligned, count_y);
          }
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int s = first + j * apart;
          if (s >= stretch) break;
          const bool exists = s >= first_stretch && s < end_stretch;
          float gradients[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float gradient = channels[k].gradient(g[j].get(k), values[j].get(k));
            gradients[k] = exists ? gradient : 0.0f;
          }
          values[j].put(0, gradients[0], gradients[1]);
          values[j].put(2, gradients[2], gradients[3]);
          values[j] = to_operands(values[j]);
          *reinterpret_cast<Words<T, 4>*>(operand + swizzled(s, in_chunk / kPiece<T>) * kPiece<T>) =
              values[j];
          if (writes && s >= first_own && s < end_own) {
            *reinterpret_cast<Words<T, 4>*>(to + j * apart * grad_y.stride) = values[j];
          }
        }
        from_g += kBatch * apart * grad_features.stride;
        from_y += kBatch * apart * y.stride;
        to += kBatch * apart * grad_y.stride;
      }
    }
  };
  if (grad_features.aligned && y.aligned && sizes.outputs % 4 == 0) {
    make_grad_y(std::true_type{});
  } else {
    make_grad_y(std::false_type{});
  }

  const int64_t tile_row = first_row + warp * kRowTiles * kTileRows;
  uint32_t inside[kRowTiles];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    inside[m] = sizes.images.taps_inside(tile_row + m * kTileRows + lane % 16, end);
  }
  float sums[kRowTiles][kTiles][4] = {};
  int channel_chunk = 0, first_column = 0;  // of the group
  for (int i = 0; i < total; ++i) {
    wait_for_copies<0>();
    __syncthreads();  // these weights (and grad_y) are there, and nobody reads those before
    copy(i + 1);
    const int left = sizes.outputs - channel_chunk * kChannelChunk<T>;
    multiply_taps<T>(sums, operands + channel_chunk * stretch * kPieces, zeros,
                     stages + (i & 1) * kWeights, sizes.images, warp * kRowTiles * kTileRows,
                     inside, left > kStep<T> ? 2 : 1);
    if (++channel_chunk < channel_chunks) continue;

    const int64_t row = tile_row + lane / kPieces;
    const int own = first_column + 4 * t;
    const T* const from_z = z.at(row, first_channel + own);
    T* const to_z = grad_z.at(row, first_channel + own);
    const bool pieces_are_whole = z.aligned && grad_z.aligned &&
                                  tile_row + kRowTiles * kTileRows <= end &&
                                  first_channel + first_column + kColumns <= sizes.channels;
    const auto finish_columns = [&](auto whole) {
      constexpr bool kWhole = decltype(whole)::value;
      const auto count_of = [&](int place, int r) {
        return row + r * 8 < end ? count_before<4>(sizes.channels, first_channel + own + place) : 0;
      };
      const auto load = [&](Words<T, 4>(&values)[kOwnRows], int place) {
        if constexpr (kWhole) {
#pragma unroll
          for (int r = 0; r < kOwnRows; ++r) {
            values[r] = *reinterpret_cast<const Words<T, 4>*>(from_z + r * 8 * z.stride + place);
          }
        } else {
#pragma unroll
          for (int r = 0; r < kOwnRows; ++r) {
            values[r] =
                load_row<4>(from_z + r * 8 * z.stride + place, z.aligned, count_of(place, r));
          }
        }
      };
      const auto store = [&](const Words<T, 4>(&values)[kOwnRows], int place) {
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) {
          T* const to = to_z + r * 8 * grad_z.stride + place;
          if constexpr (kWhole) {
            *reinterpret_cast<Words<T, 4>*>(to) = values[r];
          } else {
            store_row(to, values[r], grad_z.aligned, count_of(place, r));
          }
        }
      };
      Words<T, 4> next[kOwnRows];
      load(next, 0);
#pragma unroll
      for (int pair = 0; pair < kTiles / 2; ++pair) {
        const int place = pair * 2 * kTileColumns;
        Words<T, 4> values[kOwnRows];
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) values[r] = next[r];
        if (pair + 1 < kTiles / 2) load(next, place + 2 * kTileColumns);
        NormCoefficients<float> channels[4];
        norm.get(channels, own + place);
        float dz_sums[4] = {}, dz_centred_sums[4] = {};
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) {
          const Words<T, 4> at = values[r];
#pragma unroll
          for (int k = 0; k < 4; k += 2) {  // of rows and columns that do not exist, dz is 0
            float* const own_sums = sums[r / 2][2 * pair + k / 2] + r % 2 * 2;
            values[r].put(k, masked<T>(channels[k], at.get(k), own_sums[0]),
                          masked<T>(channels[k + 1], at.get(k + 1), own_sums[1]));
            own_sums[0] = own_sums[1] = 0;
          }
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float dz = values[r].get(k);
            dz_sums[k] += dz;
            dz_centred_sums[k] = fma(dz, at.get(k) - channels[k].mean, dz_centred_sums[k]);
          }
        }
        store(values, place);
        const int column = own + place + add_lanes(dz_sums, dz_centred_sums);
        if (!(lane & 4)) {
          warp_sums[warp * 2 * columns + column] = dz_sums[0];
          warp_sums[(warp * 2 + 1) * columns + column] = dz_centred_sums[0];
        }
      }
    };
    if (pieces_are_whole) {
      finish_columns(std::true_type{});
    } else {
      finish_columns(std::false_type{});
    }
    channel_chunk = 0;
    first_column += kColumns;
  }
  wait_for_copies<0>();
  __syncthreads();
  for (int i = threadIdx.x; i < groups * kColumns; i += blockDim.x) {
    const int64_t c = first_channel + i;
    if (c >= sizes.channels) continue;
    float dz = 0, dz_centred = 0;
    for (int w = 0; w < warps; ++w) {
      dz += warp_sums[w * 2 * columns + i];
      dz_centred += warp_sums[(w * 2 + 1) * columns + i];
    }
    const int64_t to = int64_t(blockIdx.x) * sizes.channels + c;
    partial_dz[to] = dz;
    partial_dz_centred[to] = dz_centred;
  }
#endif
}

int64_t shared_bytes(Element element, const RowCut& cut, int64_t outputs, int64_t channels,
                     int64_t width) {
  const int channel_chunk = kPieces * kPieceBytes / element_size(element);
  const int tiles = conv3x3_tiles(true, channels), columns = tiles * kTileColumns;
  return SharedLayout(cut.warps, static_cast<int>(ceil_div(channels, columns)) * columns,
                      static_cast<int>(ceil_div(outputs, channel_chunk)),
                      static_cast<int>(cut.rows() + 2 * width + 2), kTaps * tiles * kWarp)
      .bytes();
}

}  // namespace

int64_t conv3x3_grad_pitch(Element element, int64_t outputs) {
  const int piece = kPieceBytes / element_size(element);
  return ceil_div(outputs, piece) * piece;
}

int64_t conv3x3_grad_input_bytes(Element element, int64_t outputs, int64_t channels,
                                 int64_t width) {
  return shared_bytes(element, {4, 1}, outputs, channels, width);
}

void bn_relu_conv3x3_grad_input(const KernelArgs& args, const BatchNorm& bn, const ImageSize& image,
                                const void* weight, int64_t outputs, const Gathered& gathered,
                                const View& grad_y, const Gradients& gradients,
                                NormSumsLeft* left) {
  const auto bytes = [&](const RowCut& cut) {
    return shared_bytes(args.element, cut, outputs, args.channels, image.width);
  };
  const RowCut cut = choose_row_cut(args.rows.count, image.width, [&](const RowCut& cut) {
    return bytes(cut) <= shared_memory();
  });
  const int tiles = conv3x3_tiles(true, args.channels);
  const int groups = static_cast<int>(ceil_div(args.channels, tiles * kTileColumns));
  const RowChunking chunking{cut.rows(), static_cast<int>(ceil_div(args.rows.count, cut.rows()))};
  const int splits = chunking.chunks < kFewBlocks ? groups : 1;
  const Sizes sizes{ImageRows(args, image), static_cast<int>(args.channels),
                    static_cast<int>(outputs),
                    static_cast<int>(conv3x3_grad_pitch(args.element, outputs)), groups / splits};
  *left = make_sums_left(args, bn, chunking.chunks, gradients);
  const View& grad_z = gradients.grad_y;
  const auto launch = [&](auto element, auto row_tiles, auto tiles_tag) {
    using T = decltype(element);
    constexpr auto kKernel = bn_relu_conv3x3_grad_input_kernel<T, decltype(row_tiles)::value,
                                                               decltype(tiles_tag)::value>;
    allow_shared<kKernel>();
    kKernel<<<dim3(chunking.chunks, splits), cut.warps * kWarp, bytes(cut),
              static_cast<cudaStream_t>(args.stream)>>>(
        sizes, Rows<const float>(gathered.grad_features, 4), Rows<const T>(gathered.y, 4),
        Gather{gathered.mean, gathered.correction}, Rows<const T>(args.features[0].x, 4), bn,
        static_cast<const uint4*>(weight), Rows<T>(grad_y, 4), Rows<T>(grad_z, 4), left->dz,
        left->dz_centred);
    check(cudaGetLastError(), "bn_relu_conv3x3_grad_input_kernel");
  };
  dispatch_operand(args.element, [&](auto element) {
    dispatch_conv3x3_tiles(tiles, [&](auto tag) {
      if (cut.row_tiles == 2) return launch(element, std::integral_constant<int, 2>{}, tag);
      launch(element, std::integral_constant<int, 1>{}, tag);
    });
  });
}

}  // namespace efficient_densenet::cuda
