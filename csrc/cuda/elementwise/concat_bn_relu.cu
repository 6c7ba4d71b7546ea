// y[r, c] = relu((x[r, c] - mean[c]) * scale[c] + bias[c]), scale = weight / sqrt(var + eps),
// for the channels c of a list of tensors, without concatenating them.
//
// Tiling: tile.cuh; a thread keeps the numbers of its channels in registers and walks over the
// rows of its chunk, kUnroll reads in flight. Neighbouring threads write neighbouring channels of
// the result also where they read from different features.
// Bytes: each element is read once and written once, 2 * sizeof(T) per element of the result.
// Limit: memory bandwidth. Shared memory: the per-channel numbers of a block, 5 KB at most.
// Why not one launch per feature: k-channel pieces of a channels-last row are narrower than a
// memory sector, and a launch costs more than the kernel for most features.
#include "cuda/elementwise/launch.cuh"

namespace efficient_densenet::cuda {
namespace {

template <typename T, int V, bool kChannelsInner, typename Inputs>
__global__ void __launch_bounds__(kThreads)
    concat_bn_relu_kernel(const __grid_constant__ Inputs inputs,
                          const __grid_constant__ RowSpace rows, RowChunking chunking, BatchNorm bn,
                          const __grid_constant__ View y_view) {
  using Acc = acc_t<T>;
  using T_ = Tile<V, kChannelsInner>;
  const T_ tile(inputs, rows, chunking);
  NormCoefficients<Acc> channels[T_::kChannels];
  load_per_channel<NormCoefficients<Acc>, T_>(
      inputs, channels, [&](int64_t c) { return NormCoefficients<Acc>::load(bn, c); });
  if (tile.channel >= inputs.end_channel()) return;

  const Feature& feature = inputs.find(tile.channel);
  using W = ThreadView<T, V, Inputs::kRowDims>;
  const W x(feature.x, rows, tile.channel - feature.first_channel);
  const W y(y_view, rows, tile.channel);

  tile.template for_each_group<kUnroll>([&](int64_t row, auto steps) {
    constexpr int kSteps = decltype(steps)::value;
    Pack<T, V> packs[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) packs[s] = *x.at(row + s * tile.row_step);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const Acc value = widen(packs[s].values[i]);
        packs[s].values[i] = narrow<T>(relu(channels[T_::channel_of(i)].normalise(value)));
      }
      *y.at(row + s * tile.row_step) = packs[s];
    }
  });
}

}  // namespace

void concat_bn_relu(const KernelArgs& args, const BatchNorm& bn, const View& y) {
  const LaunchGeometry geometry(args, &y, LaunchGeometry::kElementwiseBlocks);
  const auto kernel = [](auto element, auto access) {
    using W = decltype(access);
    return concat_bn_relu_kernel<decltype(element), W::vector, W::channels_inner,
                                 typename W::Inputs>;
  };
  launch_over_inputs("concat_bn_relu_kernel", kernel, args, geometry, bn, y);
}

}  // namespace efficient_densenet::cuda
