// mean[c] and biased var[c] over the rows of each channel of a list of tensors; on request, all
// channels are copied to one tensor on the way (how a dense block appends features).
//
// Method: x is taken relative to the channel's first value; the moments of each group of
// kUnroll accesses are formed in registers (mean first, then squares about it) and merged into the
// thread's moments, threads' into the block's, blocks' into the channel's (Chan, Golub and LeVeque
// 1983). So neither a mean of many standard deviations nor many rows cost accuracy, and the order
// of all sums depends on shapes, strides and alignment alone.
// Tiling: tile.cuh; partial results of blocks are added up in the last one (last_block.cuh).
// Bytes: each element is read once (and written once where it is copied), sizeof(T) per element; 16
// bytes per channel and block besides.
// Limit: memory bandwidth. Shared memory: 20 KB at V = 8.
#include "cuda/elementwise/moments.cuh"

namespace efficient_densenet::cuda {
namespace {

// The moments of all values in the registers of one group of accesses, relative to shift.
template <typename T, int V, bool kChannelsInner, int kSteps, int kChannels>
__device__ Moments<acc_t<T>, kChannels> group_moments(const Pack<T, V> (&packs)[kSteps],
                                                      const acc_t<T> (&shift)[kChannels]) {
  using Acc = acc_t<T>;
  constexpr int kValues = kSteps * V / kChannels;  // per channel
  Moments<Acc, kChannels> group;
  group.count = kValues;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    Acc values[kValues], sum = 0;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      values[j] = widen(packs[kChannelsInner ? j : j / V].values[kChannelsInner ? c : j % V]);
      values[j] -= shift[c];
      sum += values[j];
    }
    group.mean[c] = sum * (Acc(1) / Acc(kValues));
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const Acc centred = values[j] - group.mean[c];
      group.m2[c] = fma(centred, centred, group.m2[c]);
    }
  }
  return group;
}

template <typename T, int V, bool kChannelsInner, typename Inputs>
__global__ void __launch_bounds__(kThreads)
    concat_bn_stats_kernel(const __grid_constant__ Inputs inputs,
                           const __grid_constant__ RowSpace rows, RowChunking chunking,
                           const __grid_constant__ View copy,
                           const __grid_constant__ Partials partials, MomentsOfBlocks result) {
  using Acc = acc_t<T>;
  using T_ = Tile<V, kChannelsInner>;
  constexpr int kChannels = T_::kChannels;
  __shared__ Acc shared_mean[kChannels][kThreads], shared_m2[kChannels][kThreads];
  __shared__ Acc shared_count[kThreads];

  // 1. Each thread: its own rows.
  const T_ tile(inputs, rows, chunking);
  const bool active = tile.channel < inputs.end_channel();
  Acc shift[kChannels];
  Moments<Acc, kChannels> moments;
  if (active) {
    const Feature& feature = inputs.find(tile.channel);
    const int64_t channel = tile.channel - feature.first_channel;
    using W = ThreadView<T, V, Inputs::kRowDims>;
    const W x(feature.x, rows, channel);
    const W to(copy, rows, tile.channel);
    const T* const first_row = static_cast<const T*>(feature.x.data);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      shift[k] = widen(first_row[(channel + k) * feature.x.channel_stride]);
    }
    tile.template for_each_group<kUnroll>([&](int64_t row, auto steps) {
      constexpr int kSteps = decltype(steps)::value;
      Pack<T, V> packs[kSteps];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) packs[s] = *x.at(row + s * tile.row_step);
      if (copy.data != nullptr) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) *to.at(row + s * tile.row_step) = packs[s];
      }
      const auto group = group_moments<T, V, kChannelsInner>(packs, shift);
      moments.merge(
          group.count, [&](int k) { return group.mean[k]; }, [&](int k) { return group.m2[k]; });
    });
  }

  // 2. The threads of a channel, relative to the first one's mean: it is nearer to the result than
  // a single value is, and so loses less to rounding.
  Acc base[kChannels];
  if (threadIdx.y == 0) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) shared_mean[k][threadIdx.x] = moments.mean[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    base[k] = shared_mean[k][threadIdx.x];
    moments.mean[k] -= base[k];
  }
  __syncthreads();
  reduce_threads(
      [&](int i) {
        shared_count[i] = moments.count;
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
          shared_mean[k][i] = moments.mean[k];
          shared_m2[k][i] = moments.m2[k];
        }
      },
      [&](int i) {
        moments.merge(
            shared_count[i], [&](int k) { return shared_mean[k][i]; },
            [&](int k) { return shared_m2[k][i]; });
      });

  // 3. One partial result per channel and block.
  if (active && threadIdx.y == 0) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const int64_t i = partials.at(blockIdx.y, tile.channel + k);
      partials.first[i] = static_cast<double>(shift[k]) + base[k] + moments.mean[k];
      partials.second[i] = moments.m2[k];
    }
  }
  add_in_last_block(partials, blockIdx.x, blockIdx.y, T_::first_of_block(inputs),
                    T_::end_of_block(inputs), result);
}

}  // namespace

void concat_bn_stats(const KernelArgs& args, const Statistics& statistics) {
  const LaunchGeometry geometry(args, statistics.copy, LaunchGeometry::kReductionBlocks);
  const View copy = statistics.copy == nullptr ? View{} : *statistics.copy;
  const MomentsOfBlocks result = moments_of_blocks(args.rows.count, geometry.chunking, &statistics);
  const auto kernel = [](auto element, auto access) {
    using W = decltype(access);
    return concat_bn_stats_kernel<decltype(element), W::vector, W::channels_inner,
                                  typename W::Inputs>;
  };
  launch_over_inputs("concat_bn_stats_kernel", kernel, args, geometry, copy,
                     geometry.partials(args), result);
}

}  // namespace efficient_densenet::cuda
