// mean[c] and biased var[c] over the rows of each channel of a list of tensors; on request, all
// channels are copied to one tensor on the way (how a dense block appends features).
//
// Method: x is taken relative to the channel's first value; the moments of each group of
// kUnroll accesses are formed in registers (mean first, then squares about it) and merged into the
// thread's moments, threads' into the block's, blocks' into the channel's (Chan, Golub and LeVeque
// 1983). So neither a mean of many standard deviations nor many rows cost accuracy, and the order
// of all sums depends on shapes, strides and alignment alone.
// Tiling: tile.cuh; partial results [C, chunks], then one warp per channel.
// Bytes: each element is read once (and written once where it is copied), sizeof(T) per element; 16
// bytes per channel and chunk besides.
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
                           const __grid_constant__ View copy, double* partial_mean,
                           double* partial_m2) {
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

  // 3. One partial result per channel and chunk.
  if (active && threadIdx.y == 0) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const int64_t i = partial_index(chunking, tile.channel + k);
      partial_mean[i] = static_cast<double>(shift[k]) + base[k] + moments.mean[k];
      partial_m2[i] = moments.m2[k];
    }
  }
}

// First the mean over all chunks, then the squares about it: no division per chunk, and the loads
// of a pass do not wait for one another.
__global__ void merge_moments_kernel(int64_t channels, int64_t row_count, RowChunking chunking,
                                     const double* partial_mean, const double* partial_m2,
                                     Statistics statistics) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.y;
  if (c >= channels) return;
  const double* const means = partial_mean + c * chunking.chunks;
  const double* const m2s = partial_m2 + c * chunking.chunks;
  const auto count = [&](int chunk) {
    const int64_t begin = chunk * chunking.rows_per_chunk;
    return static_cast<double>(min(chunking.rows_per_chunk, row_count - begin));
  };
  const auto sum = [&](const auto& term) {
    double total = 0;
#pragma unroll 4
    for (int chunk = threadIdx.x; chunk < chunking.chunks; chunk += kWarp) total += term(chunk);
    for (int half = kWarp / 2; half > 0; half /= 2) total += __shfl_xor_sync(~0u, total, half);
    return total;
  };
  const double first = means[0];  // sums relative to it keep the digits of a large mean
  const double mean = first + sum([&](int i) { return count(i) * (means[i] - first); }) / row_count;
  const double m2 = sum([&](int i) {
    const double delta = means[i] - mean;
    return fma(count(i) * delta, delta, m2s[i]);
  });
  if (threadIdx.x != 0) return;
  statistics.mean[c] = mean;
  statistics.var[c] = m2 / row_count;
}

}  // namespace

void merge_moments(int64_t channels, int64_t row_count, const RowChunking& chunking,
                   const double* partial_mean, const double* partial_m2,
                   const Statistics& statistics, void* stream) {
  merge_moments_kernel<<<merge_grid(channels), merge_block(), 0,
                         static_cast<cudaStream_t>(stream)>>>(channels, row_count, chunking,
                                                              partial_mean, partial_m2, statistics);
  check(cudaGetLastError(), "merge_moments_kernel");
}

void concat_bn_stats(const KernelArgs& args, const Statistics& statistics) {
  const LaunchGeometry geometry(args, statistics.copy, LaunchGeometry::kReductionBlocks);
  const View copy = statistics.copy == nullptr ? View{} : *statistics.copy;
  double* const partial_mean = geometry.workspace(args);
  double* const partial_m2 = partial_mean + args.channels * geometry.chunking.chunks;
  const auto kernel = [](auto element, auto access) {
    using W = decltype(access);
    return concat_bn_stats_kernel<decltype(element), W::vector, W::channels_inner,
                                  typename W::Inputs>;
  };
  launch_over_inputs("concat_bn_stats_kernel", kernel, args, geometry, copy, partial_mean,
                     partial_m2);
  merge_moments(args.channels, args.rows.count, geometry.chunking, partial_mean, partial_m2,
                statistics, args.stream);
}

}  // namespace efficient_densenet::cuda
