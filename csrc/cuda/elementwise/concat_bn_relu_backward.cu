// Gradients of y = relu((x - mean) * scale + bias), per channel c over M rows:
//
//   dz = grad_y where the ReLU was open, else 0     (recomputed from x; y is not read)
//   grad_bias = sum(dz)      grad_weight = sum(dz * (x - mean)) * inverse_std
//   grad_x = scale * (dz - grad_bias / M - xhat * grad_weight / M)   with batch statistics
//   grad_x = scale * dz                                              with running statistics
//
// Tiling: tile.cuh. First kernel: sums of each block, added up in the last one (last_block.cuh).
// Second kernel: elementwise. A feature whose gradient is not needed is skipped there.
// Bytes: x and grad_y are read twice and grad_x written once, 5 * sizeof(T) per element. The sums
// are needed before the first grad_x, and x and grad_y exceed the caches, so a single pass is not
// possible.
// Limit: memory bandwidth. Shared memory: 19 KB at V = 4. Sums: a thread's in the arithmetic type,
// all others in double; fixed order everywhere.
#include "cuda/elementwise/sums.cuh"

namespace efficient_densenet::cuda {
namespace {

template <typename T, int V, bool kChannelsInner, typename Inputs>
__global__ void __launch_bounds__(kThreads)
    backward_sums_kernel(const __grid_constant__ Inputs inputs,
                         const __grid_constant__ RowSpace rows, RowChunking chunking, BatchNorm bn,
                         const __grid_constant__ View grad_y_view,
                         const __grid_constant__ Partials partials,
                         const __grid_constant__ SumsOfBlocks<NormGradients<acc_t<T>>> result) {
  using Acc = acc_t<T>;
  using T_ = Tile<V, kChannelsInner>;
  constexpr int kChannels = T_::kChannels;
  const T_ tile(inputs, rows, chunking);
  const bool active = tile.channel < inputs.end_channel();
  NormCoefficients<Acc> channels[kChannels];
  load_per_channel<NormCoefficients<Acc>, T_>(
      inputs, channels, [&](int64_t c) { return NormCoefficients<Acc>::load(bn, c); });
  Sums<Acc> sums[kChannels] = {};
  if (active) {
    const Feature& feature = inputs.find(tile.channel);
    using W = ThreadView<T, V, Inputs::kRowDims>;
    const W x(feature.x, rows, tile.channel - feature.first_channel);
    const W grad_y(grad_y_view, rows, tile.channel);
    tile.template for_each_group<kUnrollOfSeveral<V>>([&](int64_t row, auto steps) {
      constexpr int kSteps = decltype(steps)::value;
      Pack<T, V> x_packs[kSteps], grad_packs[kSteps];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        x_packs[s] = *x.at(row + s * tile.row_step);
        grad_packs[s] = *grad_y.at(row + s * tile.row_step);
      }
      Sums<Acc> group[kChannels] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const NormCoefficients<Acc>& channel = channels[T_::channel_of(i)];
          const Acc value = widen(x_packs[s].values[i]);
          const Acc dz = masked<T>(channel, value, widen(grad_packs[s].values[i]));
          group[T_::channel_of(i)].add(dz, dz * (value - channel.mean));
        }
      }
#pragma unroll
      for (int k = 0; k < kChannels; ++k) sums[k].add(group[k].dz, group[k].dz_centred);
    });
  }
  write_partial_sums(sums, active, tile.channel, partials);
  add_in_last_block(partials, blockIdx.x, blockIdx.y, T_::first_of_block(inputs),
                    T_::end_of_block(inputs), result);
}

template <typename T, int V, bool kChannelsInner, typename Inputs>
__global__ void __launch_bounds__(kThreads)
    grad_features_kernel(const __grid_constant__ Inputs inputs,
                         const __grid_constant__ RowSpace rows, RowChunking chunking, BatchNorm bn,
                         const __grid_constant__ Gradients gradients) {
  using Acc = acc_t<T>;
  using T_ = Tile<V, kChannelsInner>;
  const T_ tile(inputs, rows, chunking);
  NormGradCoefficients<Acc> channels[T_::kChannels];
  load_per_channel<NormGradCoefficients<Acc>, T_>(inputs, channels, [&](int64_t c) {
    return NormGradCoefficients<Acc>::load(bn, gradients, c, rows.count);
  });
  if (tile.channel >= inputs.end_channel()) return;
  const Feature& feature = inputs.find(tile.channel);
  if (feature.grad_x.data == nullptr) return;

  const int64_t first = tile.channel - feature.first_channel;
  using W = ThreadView<T, V, Inputs::kRowDims>;
  const W x(feature.x, rows, first);
  const W grad_x(feature.grad_x, rows, first);
  const W grad_y(gradients.grad_y, rows, tile.channel);

  tile.template for_each_group<kUnrollOfSeveral<V>>([&](int64_t row, auto steps) {
    constexpr int kSteps = decltype(steps)::value;
    Pack<T, V> x_packs[kSteps], grad_packs[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      x_packs[s] = *x.at(row + s * tile.row_step);
      grad_packs[s] = *grad_y.at(row + s * tile.row_step);
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const NormGradCoefficients<Acc>& channel = channels[T_::channel_of(i)];
        const Acc value = widen(x_packs[s].values[i]);
        const Acc dz = masked<T>(channel, value, widen(grad_packs[s].values[i]));
        grad_packs[s].values[i] = narrow<T>(channel.grad_x(value, dz, gradients.batch_statistics));
      }
      *grad_x.at(row + s * tile.row_step) = grad_packs[s];
    }
  });
}

}  // namespace

void concat_bn_relu_backward_features(const KernelArgs& args, const BatchNorm& bn,
                                      const Gradients& gradients) {
  const LaunchGeometry geometry(args, &gradients.grad_y, LaunchGeometry::kElementwiseBlocks);
  const auto kernel = [](auto element, auto access) {
    using W = decltype(access);
    return grad_features_kernel<decltype(element), W::vector, W::channels_inner,
                                typename W::Inputs>;
  };
  launch_over_inputs("grad_features_kernel", kernel, args, geometry, bn, gradients);
}

void concat_bn_relu_backward_sums(const KernelArgs& args, const BatchNorm& bn,
                                  const Gradients& gradients) {
  const LaunchGeometry geometry(args, &gradients.grad_y, LaunchGeometry::kReductionBlocks);
  const Partials partials = geometry.partials(args);
  dispatch(args, geometry.access, [&](auto element, auto access) {
    using T = decltype(element);
    using W = decltype(access);
    const SumsOfBlocks<NormGradients<acc_t<T>>> result{
        {bn, gradients, args.channels, args.rows.count}};
    for_each_inputs<typename W::Inputs>(args, [&](const auto& inputs) {
      backward_sums_kernel<T, W::vector, W::channels_inner>
          <<<geometry.grid(inputs), geometry.block, 0, static_cast<cudaStream_t>(args.stream)>>>(
              inputs, args.rows, geometry.chunking, bn, gradients.grad_y, partials, result);
      check(cudaGetLastError(), "backward_sums_kernel");
    });
  });
}

void concat_bn_relu_backward(const KernelArgs& args, const BatchNorm& bn,
                             const Gradients& gradients) {
  concat_bn_relu_backward_sums(args, bn, gradients);
  concat_bn_relu_backward_features(args, bn, gradients);
}

}  // namespace efficient_densenet::cuda
