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
#include "cuda/elementwise/launch.cuh"

namespace efficient_densenet::cuda {
namespace {

// Where the chunks of images end up: [images, C, chunks], or y where there is one chunk.
template <typename T>
struct Averages {
  T* y;
  int64_t row_stride;
  double* partial;
  int64_t channels, pixels;
  int chunks;

  __device__ void put(int64_t image, int64_t channel, int chunk, double sum) const {
    if (chunks > 1) {
      partial[(image * channels + channel) * chunks + chunk] = sum;
    } else {
      write(image, channel, sum);
    }
  }

  __device__ void write(int64_t image, int64_t channel, double sum) const {
    y[image * row_stride + channel] = narrow<T>(static_cast<acc_t<T>>(sum / pixels));
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
                   RowChunking chunking, BatchNorm bn, Averages<T> averages) {
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
    if (!active || threadIdx.y != 0) continue;
#pragma unroll
    for (int k = 0; k < V; ++k) averages.put(image, tile.channel + k, blockIdx.y, sums[k]);
  }
}

// One warp per image and channel.
template <typename T>
__global__ void merge_averages_kernel(int64_t count, Averages<T> averages) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.y;
  if (i >= count) return;
  double sum = 0;
  for (int chunk = threadIdx.x; chunk < averages.chunks; chunk += kWarp) {
    sum += averages.partial[i * averages.chunks + chunk];
  }
  for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_down_sync(~0u, sum, half);
  const int64_t image = i / averages.channels;
  if (threadIdx.x == 0) averages.write(image, i - image * averages.channels, sum);
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
  const int64_t count = pooling.images * args.channels;
  double* const partial = chunks > 1 ? args.workspace(count * chunks) : nullptr;
  dim3 grid = geometry.grid(matrix);
  grid.z = static_cast<unsigned>(std::min<int64_t>(pooling.images, 65535));
  dispatch_matrix(args.element, geometry.access.vector, [&](auto element, auto access) {
    using T = decltype(element);
    const Averages<T> averages{static_cast<T*>(y.data), y.row_strides[0], partial,
                               args.channels,           pooling.window,   chunks};
    average_kernel<T, decltype(access)::vector><<<grid, geometry.block, 0, stream>>>(
        matrix, image.rows, pooling.images, geometry.chunking, bn, averages);
    check(cudaGetLastError(), "average_kernel");
    if (chunks == 1) return;
    merge_averages_kernel<T><<<merge_grid(count), merge_block(), 0, stream>>>(count, averages);
    check(cudaGetLastError(), "merge_averages_kernel");
  });
}

}  // namespace efficient_densenet::cuda
