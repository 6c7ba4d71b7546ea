// The kernels of a dense block: formulas in dense_block/kernels.h. All tensors are matrices,
// channels inner; tiling and sums over rows as in tile.cuh and sums.cuh, sums in an order that
// depends on shapes, strides and alignment alone.
//
// Bytes per element of x, of s bytes; one of G has g = 4 (8 for double):
//   accumulate  2 s + g read (x, grad_y, G), g written (G); the first reader of a block does not
//               read G. With pooling, grad_y is a quarter (2-d) of that and comes from the cache.
//   apply_bn_correction    s + g read (x, G), s written
//   pool        1 read, 1 / 2^dims written; averages of images: dense_block_average.cu
// Limit: memory bandwidth. Shared memory: 32 KB at V = 8 for the sums of accumulate.
#include "cuda/elementwise/dense_block_average.cuh"
#include "cuda/elementwise/sums.cuh"

namespace efficient_densenet::cuda {
namespace {

// ---------------------------------------------------------------------------------------------
// accumulate

// The gradient of the normalised rows as it is.
template <typename T, int V>
struct DirectSource {
  static constexpr bool kPooled = false;
  ThreadView<T, V, 1> grad_y;

  __device__ DirectSource(const View& view, const Pooling&, const RowSpace& rows, int64_t channel)
      : grad_y(view, rows, channel) {}
  __device__ Pack<T, V> load(int64_t row) const { return *grad_y.at(row); }
};

// Of a pixel, its share of the gradient of its window's average; 0 where no window covers it.
template <typename T, int V>
struct PooledSource {
  static constexpr bool kPooled = true;
  const T* base;
  int64_t row_stride;
  const Pooling& pooling;

  __device__ PooledSource(const View& view, const Pooling& pooling, const RowSpace&,
                          int64_t channel)
      : base(static_cast<const T*>(view.data) + channel),
        row_stride(view.row_strides[0]),
        pooling(pooling) {}

  __device__ Pack<T, V> load(int64_t row) const {
    int64_t pooled_row = 0, pooled_size = 1;
#pragma unroll
    for (int d = kMaxRowDims - 2; d >= 0; --d) {
      if (d >= pooling.dims) continue;
      const int64_t outer = divide(row, pooling.sizes[d]);
      const int64_t windows = divide(pooling.sizes[d], pooling.window);
      const int64_t window = divide(row - outer * pooling.sizes[d], pooling.window);
      if (window >= windows) return {};
      pooled_row += window * pooled_size;
      pooled_size *= windows;
      row = outer;
    }
    pooled_row += row * pooled_size;
    return *reinterpret_cast<const Pack<T, V>*>(base + pooled_row * row_stride);
  }
};

template <typename T, int V, template <typename, int> class Source_>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(const __grid_constant__ Matrix matrix, const __grid_constant__ RowSpace rows,
                      RowChunking chunking, BatchNorm bn, const __grid_constant__ View grad_y_view,
                      const __grid_constant__ Pooling pooling,
                      const __grid_constant__ View grad_features_view,
                      const __grid_constant__ Partials partials,
                      const __grid_constant__ SumsOfBlocks<ReaderGradients<acc_t<T>>> result) {
  using Acc = acc_t<T>;
  using T_ = Tile<V, true>;
  using Source = Source_<T, V>;
  const T_ tile(matrix, rows, chunking);
  const bool active = tile.channel < matrix.end_channel();
  NormCoefficients<Acc> channels[V];
  load_per_channel<NormCoefficients<Acc>, T_>(
      matrix, channels, [&](int64_t c) { return NormCoefficients<Acc>::load(bn, c); });
  Sums<Acc> sums[V] = {};
  if (active) {
    const ThreadView<T, V, 1> x(matrix.feature.x, rows, tile.channel);
    const ThreadView<Acc, V, 1> grad_features(grad_features_view, rows, tile.channel);
    const Source grad_y(grad_y_view, pooling, rows, tile.channel);
    Acc share = 1;
    if constexpr (Source::kPooled) {
      for (int d = 0; d < pooling.dims; ++d) share /= static_cast<Acc>(pooling.window);
    }
    tile.template for_each_group<2>([&](int64_t row, auto steps) {
      constexpr int kSteps = decltype(steps)::value;
      Pack<T, V> x_packs[kSteps], grad_packs[kSteps];
      Pack<Acc, V> sum_packs[kSteps] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        x_packs[s] = *x.at(row + s * tile.row_step);
        grad_packs[s] = grad_y.load(row + s * tile.row_step);
        if (!result.result.args.first_reader)
          sum_packs[s] = *grad_features.at(row + s * tile.row_step);
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const Acc value = widen(x_packs[s].values[i]);
          const Acc dz = masked<T>(channels[i], value, share * widen(grad_packs[s].values[i]));
          sums[i].add(dz, dz * (value - channels[i].mean));
          Acc& sum = sum_packs[s].values[i];
          sum = fma(channels[i].scale, dz, sum);
        }
        *grad_features.at(row + s * tile.row_step) = sum_packs[s];
      }
    });
  }
  write_partial_sums(sums, active, tile.channel, partials);
  add_in_last_block(partials, blockIdx.x, blockIdx.y, T_::first_of_block(matrix),
                    T_::end_of_block(matrix), result);
}

// ---------------------------------------------------------------------------------------------
// apply_bn_correction

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    apply_bn_correction_kernel(const __grid_constant__ Matrix matrix,
                               const __grid_constant__ RowSpace rows, RowChunking chunking,
                               const __grid_constant__ View grad_features_view, const double* mean,
                               Correction sums) {
  using Acc = acc_t<T>;
  using T_ = Tile<V, true>;
  const T_ tile(matrix, rows, chunking);
  CorrectionCoefficients<Acc> channels[V];
  load_per_channel<CorrectionCoefficients<Acc>, T_>(matrix, channels, [&](int64_t c) {
    return CorrectionCoefficients<Acc>::load(mean, sums, rows.count, c);
  });
  if (tile.channel >= matrix.end_channel()) return;
  const ThreadView<T, V, 1> x(matrix.feature.x, rows, tile.channel);
  const ThreadView<T, V, 1> grad_x(matrix.feature.grad_x, rows, tile.channel);
  const ThreadView<Acc, V, 1> grad_features(grad_features_view, rows, tile.channel);
  tile.template for_each_group<kUnrollOfSeveral<V>>([&](int64_t row, auto steps) {
    constexpr int kSteps = decltype(steps)::value;
    Pack<T, V> x_packs[kSteps];
    Pack<Acc, V> grad_packs[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      x_packs[s] = *x.at(row + s * tile.row_step);
      grad_packs[s] = *grad_features.at(row + s * tile.row_step);
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const Acc value = widen(x_packs[s].values[i]);
        x_packs[s].values[i] = narrow<T>(channels[i].gradient(grad_packs[s].values[i], value));
      }
      *grad_x.at(row + s * tile.row_step) = x_packs[s];
    }
  });
}

// ---------------------------------------------------------------------------------------------
// pool: a thread owns V channels of one pooled row after the other

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    pool_kernel(const __grid_constant__ Matrix matrix, const __grid_constant__ RowSpace pooled_rows,
                RowChunking chunking, BatchNorm bn, const __grid_constant__ Pooling pooling,
                const __grid_constant__ View y_view) {
  using Acc = acc_t<T>;
  using T_ = Tile<V, true>;
  const T_ tile(matrix, pooled_rows, chunking);
  NormCoefficients<Acc> channels[V];
  load_per_channel<NormCoefficients<Acc>, T_>(
      matrix, channels, [&](int64_t c) { return NormCoefficients<Acc>::load(bn, c); });
  if (tile.channel >= matrix.end_channel()) return;
  const ThreadView<T, V, 1> y(y_view, pooled_rows, tile.channel);
  const int64_t stride = matrix.feature.x.row_strides[0];
  const T* const x = static_cast<const T*>(matrix.feature.x.data) + tile.channel;
  const Acc share = Acc(1) / Acc(1 << pooling.dims);
  tile.template for_each_group<1>([&](int64_t row, auto) {
    // First pixel of the window, and the distance of its pixels in each dimension.
    int64_t first = 0, steps[kMaxRowDims - 1] = {}, size = 1, rest = row;
#pragma unroll
    for (int d = kMaxRowDims - 2; d >= 0; --d) {
      if (d >= pooling.dims) continue;
      const int64_t windows = pooling.sizes[d] / 2, outer = divide(rest, windows);
      first += 2 * (rest - outer * windows) * size;
      steps[d] = size;
      size *= pooling.sizes[d];
      rest = outer;
    }
    first += rest * size;
    Acc sums[V] = {};
    for (int corner = 0; corner < 1 << pooling.dims; ++corner) {
      int64_t pixel = first;
#pragma unroll
      for (int d = 0; d < kMaxRowDims - 1; ++d) pixel += (corner >> d & 1) * steps[d];
      const auto pack = *reinterpret_cast<const Pack<T, V>*>(x + pixel * stride);
#pragma unroll
      for (int i = 0; i < V; ++i) sums[i] += relu(channels[i].normalise(widen(pack.values[i])));
    }
    Pack<T, V> result;
#pragma unroll
    for (int i = 0; i < V; ++i) result.values[i] = narrow<T>(share * sums[i]);
    *y.at(row) = result;
  });
}

// The pooled rows as the rows of a call.
RowSpace pooled_rows(const Pooling& pooling) {
  int64_t count = pooling.images;
  for (int d = 0; d < pooling.dims; ++d) count *= pooling.sizes[d] / 2;
  return {1, {count, 1, 1, 1}, count};
}

}  // namespace

void accumulate_norm_grad(const KernelArgs& args, const BatchNorm& bn,
                          const NormGradArgs& norm_grad) {
  // For the choice of accesses, G is the gradient of x.
  KernelArgs all = args;
  all.features[0].grad_x = norm_grad.grad_features;
  const LaunchGeometry geometry(all, &norm_grad.grad_y, LaunchGeometry::kReductionBlocks);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const Pooling pooling = norm_grad.pooling == nullptr ? Pooling{} : *norm_grad.pooling;
  const Partials partials = geometry.partials(args);
  const Matrix matrix{args.features[0]};
  dispatch_matrix(args.element, geometry.access.vector, [&](auto element, auto access) {
    using T = decltype(element);
    constexpr int V = decltype(access)::vector;
    const auto kernel = norm_grad.pooling == nullptr ? accumulate_kernel<T, V, DirectSource>
                                                     : accumulate_kernel<T, V, PooledSource>;
    kernel<<<geometry.grid(matrix), geometry.block, 0, stream>>>(
        matrix, args.rows, geometry.chunking, bn, norm_grad.grad_y, pooling,
        norm_grad.grad_features, partials,
        SumsOfBlocks<ReaderGradients<acc_t<T>>>{{bn, norm_grad, args.channels}});
    check(cudaGetLastError(), "accumulate_kernel");
  });
}

void apply_bn_correction(const KernelArgs& args, const View& grad_features, const double* mean,
                         const Correction& correction) {
  const LaunchGeometry geometry(args, &grad_features, LaunchGeometry::kElementwiseBlocks);
  const Matrix matrix{args.features[0]};
  dispatch_matrix(args.element, geometry.access.vector, [&](auto element, auto access) {
    apply_bn_correction_kernel<decltype(element), decltype(access)::vector>
        <<<geometry.grid(matrix), geometry.block, 0, static_cast<cudaStream_t>(args.stream)>>>(
            matrix, args.rows, geometry.chunking, grad_features, mean, correction);
    check(cudaGetLastError(), "apply_bn_correction_kernel");
  });
}

void average_pool(const KernelArgs& args, const BatchNorm& bn, const Pooling& pooling,
                  const View& y) {
  if (pooling.of_images()) return average_images(args, bn, pooling, y);
  KernelArgs pooled = args;
  pooled.rows = pooled_rows(pooling);
  const LaunchGeometry geometry(pooled, &y, LaunchGeometry::kElementwiseBlocks);
  const Matrix matrix{args.features[0]};
  dispatch_matrix(args.element, geometry.access.vector, [&](auto element, auto access) {
    pool_kernel<decltype(element), decltype(access)::vector>
        <<<geometry.grid(matrix), geometry.block, 0, static_cast<cudaStream_t>(args.stream)>>>(
            matrix, pooled.rows, geometry.chunking, bn, pooling, y);
    check(cudaGetLastError(), "pool_kernel");
  });
}

}  // namespace efficient_densenet::cuda
