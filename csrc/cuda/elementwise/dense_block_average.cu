// y[n, c] = mean of relu((x - mean[c]) * scale[c] + bias[c]) over the rows of image n: the head.
//
// Tiling: tile.cuh over the rows of one image. Blocks share channels (x), the chunks of an image
// (y: one, where images and channels fill the GPU) and images (z). Sums: a thread's in the
// arithmetic type, those of a block and of chunks in double, in an order that depends on shapes,
// strides and alignment alone. Bytes: each element is read once, sizeof(T); 8 per channel and chunk
// of an image besides, where there are several. Limit: memory bandwidth; with small images (7 x 7)
// latency, as a thread has few rows. Shared memory: 21 KB at V = 8. Why not one thread per image
// and channel, without a sum over threads: the head of DenseNet-121 has 64 x 1024 of them, 8
// channels to a thread, which is 2 warps per multiprocessor.
#include "cuda/elementwise/dense_block_average.cuh"
#include "cuda/elementwise/sums.cuh"

namespace efficient_densenet::cuda {
namespace {

template <typename T>
struct Averages {
  T* y;
  int64_t row_stride, pixels;

  __device__ void write(int64_t image, int64_t channel, double sum) const {
    y[image * row_stride + channel] = narrow<T>(static_cast<acc_t<T>>(sum / pixels));
  }
};

// Of one image, from the sums of its chunks: a result of SumsOfBlocks.
template <typename T>
struct AverageOfImage {
  Averages<T> averages;
  int64_t image;

  struct Nothing {};
  __device__ Nothing prepare(int64_t) const { return {}; }
  __device__ void write(const Sums<double>& sums, Nothing, int64_t c) const {
    averages.write(image, c, sums.dz);
  }
};

// The sum over the threads of each channel, with threadIdx.y = 0.
template <typename Acc, int V>
__device__ void sum_over_threads(const Acc (&own)[V], double (&sums)[V]) {
  __shared__ double shared[V][kThreads];
#pragma unroll
  for (int k = 0; k < V; ++k) sums[k] = own[k];
  reduce_threads(
      [&](int i) {
#pragma unroll
        for (int k = 0; k < V; ++k) shared[k][i] = sums[k];
      },
      [&](int i) {
#pragma unroll
        for (int k = 0; k < V; ++k) sums[k] += shared[k][i];
      });
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    average_kernel(const __grid_constant__ Matrix matrix,
                   const __grid_constant__ RowSpace image_rows, int64_t images,
                   RowChunking chunking, BatchNorm bn, Averages<T> averages,
                   const __grid_constant__ Partials all_partials) {
  using Acc = acc_t<T>;
  using T_ = Tile<V, true>;
  const T_ tile(matrix, image_rows, chunking);
  const bool active = tile.channel < matrix.end_channel();
  NormCoefficients<Acc> channels[V];
  load_per_channel<NormCoefficients<Acc>, T_>(
      matrix, channels, [&](int64_t c) { return NormCoefficients<Acc>::load(bn, c); });
  for (int64_t image = blockIdx.z; image < images; image += gridDim.z) {
    Acc own[V] = {};
    if (active) {
      const ThreadView<T, V, 1> x(matrix.feature.x, image_rows, tile.channel);
      const int64_t first = image * image_rows.count;
      tile.template for_each_group<kUnroll>([&](int64_t row, auto steps) {
        constexpr int kSteps = decltype(steps)::value;
        Pack<T, V> packs[kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) packs[s] = *x.at(first + row + s * tile.row_step);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
#pragma unroll
          for (int k = 0; k < V; ++k) {
            own[k] += relu(channels[k].normalise(widen(packs[s].values[k])));
          }
        }
      });
    }
    double sums[V];
    sum_over_threads(own, sums);
    const bool has_sums = active && threadIdx.y == 0;
    if (all_partials.blocks == 1) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (has_sums) averages.write(image, tile.channel + k, sums[k]);
      }
      continue;
    }
    Partials partials = all_partials;  // of the image: one number each, which both pointers are
    partials.first += image * (partials.blocks + partials.teams) * partials.channels;
    partials.second = partials.first;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (has_sums) partials.first[partials.at(blockIdx.y, tile.channel + k)] = sums[k];
    }
    add_in_last_block(partials, static_cast<int>(image * gridDim.x + blockIdx.x), blockIdx.y,
                      T_::first_of_block(matrix), T_::end_of_block(matrix),
                      SumsOfBlocks<AverageOfImage<T>>{{averages, image}});
  }
}

}  // namespace

void average_images(const KernelArgs& args, const BatchNorm& bn, const Pooling& pooling,
                    const View& y) {
  KernelArgs image = args;
  image.rows = {1, {pooling.window, 1, 1, 1}, pooling.window};
  const LaunchGeometry geometry(image, nullptr,
                                ceil_div(LaunchGeometry::kReductionBlocks, pooling.images));
  const Matrix matrix{args.features[0]};
  const int chunks = geometry.chunking.chunks;
  const auto stream = static_cast<cudaStream_t>(args.stream);
  dim3 grid = geometry.grid(matrix);
  const int teams = Partials::teams_of(chunks, ceil_div(args.channels, grid.x));
  Partials partials{nullptr, nullptr, args.channels, chunks, teams, nullptr};  // [images] of them
  if (chunks > 1) {
    partials.first = args.workspace(pooling.images * (chunks + teams) * args.channels);
    partials.tickets = args.tickets(pooling.images * grid.x * Partials::group_tickets(teams));
  }
  grid.z = static_cast<unsigned>(std::min<int64_t>(pooling.images, 65535));
  dispatch_matrix(args.element, geometry.access.vector, [&](auto element, auto access) {
    using T = decltype(element);
    const Averages<T> averages{static_cast<T*>(y.data), y.row_strides[0], pooling.window};
    average_kernel<T, decltype(access)::vector><<<grid, geometry.block, 0, stream>>>(
        matrix, image.rows, pooling.images, geometry.chunking, bn, averages, partials);
    check(cudaGetLastError(), "average_kernel");
  });
}

}  // namespace efficient_densenet::cuda
