// mean[c] and biased var[c] over the rows of each channel of a list of tensors, and the update of
// the running statistics.
//
// Method: x is taken relative to the channel's first value; the moments of each group of
// kUnroll accesses are formed in registers (mean first, then squares about it) and merged into the
// thread's moments, threads' into the block's, blocks' into the channel's (Chan, Golub and LeVeque
// 1983). So neither a mean of many standard deviations nor many rows cost accuracy, and the order
// of all sums depends on the shape alone.
// Tiling: tile.cuh; partial results [C, chunks], then one warp per channel.
// Bytes: each element is read once, sizeof(T) per element; 16 bytes per channel and chunk besides.
// Limit: memory bandwidth. Shared memory: 20 KB at V = 8.
#include "tile.cuh"

namespace efficient_densenet::cuda {
namespace {

template <typename Real>
struct Moments {
  Real count, mean, m2;  // m2: sum of squares about the mean

  __device__ void merge(Real other_count, Real other_mean, Real other_m2) {
    const Real total = count + other_count;
    if (other_count == Real(0)) return;
    const Real fraction = other_count / total;
    const Real delta = other_mean - mean;
    mean += delta * fraction;
    m2 += other_m2 + delta * delta * (count * fraction);
    count = total;
  }
};

// The moments of `n` values in registers.
template <typename Acc, int n>
__device__ Moments<Acc> moments_of(const Acc (&values)[n]) {
  Acc sum = 0;
#pragma unroll
  for (int i = 0; i < n; ++i) sum += values[i];
  Moments<Acc> result{Acc(n), sum / Acc(n), Acc(0)};
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const Acc centred = values[i] - result.mean;
    result.m2 = fma(centred, centred, result.m2);
  }
  return result;
}

// The sum of a thread's rows: moments of each of its channels, relative to shift.
template <typename T, int V, bool kChannelsInner, int kChannels>
__device__ void thread_moments(const Tile<V, kChannelsInner>& tile, const Window<T, V>& x,
                               const acc_t<T> (&shift)[kChannels],
                               Moments<acc_t<T>> (&moments)[kChannels]) {
  using Acc = acc_t<T>;
  tile.for_each_group([&](int64_t row, auto steps) {
    constexpr int kSteps = decltype(steps)::value;
    constexpr int kValues = kSteps * V / kChannels;  // per channel
    Pack<T, V> packs[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) packs[s] = *x.at(row + s * tile.row_step);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      Acc values[kValues];
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        const Pack<T, V>& pack = packs[kChannelsInner ? j : j / V];
        values[j] = widen(pack.values[kChannelsInner ? k : j % V]) - shift[k];
      }
      const Moments<Acc> group = moments_of<Acc, kValues>(values);
      moments[k].merge(group.count, group.mean, group.m2);
    }
  });
}

template <typename T, int V, bool kChannelsInner>
__global__ void __launch_bounds__(kThreads)
    concat_bn_stats_kernel(const __grid_constant__ FeatureList list,
                           const __grid_constant__ RowSpace rows, Chunking chunking,
                           double* partial_mean, double* partial_m2) {
  using Acc = acc_t<T>;
  using T_ = Tile<V, kChannelsInner>;
  constexpr int kChannels = T_::kChannels;
  __shared__ Acc shared_mean[kChannels][kThreads], shared_m2[kChannels][kThreads];
  __shared__ Acc shared_count[kThreads];

  // 1. Each thread: its own rows.
  const T_ tile(list, rows, chunking);
  const bool active = T_::in_list(list, tile.channel);
  Acc shift[kChannels];
  Moments<Acc> moments[kChannels] = {};
  if (active) {
    const Feature& feature = find_feature(list, tile.channel);
    const int64_t channel = tile.channel - feature.first_channel;
    const Window<T, V> x(feature.x, rows, channel);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      shift[k] = widen(static_cast<const T*>(feature.x.data)[(channel + k) *
                                                             feature.x.channel_stride]);
    }
    thread_moments<T, V, kChannelsInner, kChannels>(tile, x, shift, moments);
  }

  // 2. The threads of a channel: a tree over threadIdx.y.
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    if (threadIdx.y >= half && threadIdx.y < 2 * half) {
      shared_count[thread] = moments[0].count;
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        shared_mean[k][thread] = moments[k].mean;
        shared_m2[k][thread] = moments[k].m2;
      }
    }
    __syncthreads();
    if (threadIdx.y < half) {
      const int other = thread + half * blockDim.x;
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        moments[k].merge(shared_count[other], shared_mean[k][other], shared_m2[k][other]);
      }
    }
    __syncthreads();
  }

  // 3. One partial result per channel and chunk.
  if (active && threadIdx.y == 0) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const int64_t i = partial_index(chunking, tile.channel + k);
      partial_mean[i] = static_cast<double>(shift[k]) + moments[k].mean;
      partial_m2[i] = moments[k].m2;
    }
  }
}

template <typename Acc>
__device__ void update_running(void* running, int64_t channel, double momentum, double value) {
  if (running == nullptr) return;
  Acc& average = static_cast<Acc*>(running)[channel];
  average = static_cast<Acc>((1 - momentum) * average + momentum * value);
}

template <typename Acc>
__global__ void merge_moments_kernel(int64_t channels, int64_t row_count, Chunking chunking,
                                     const double* partial_mean, const double* partial_m2,
                                     Statistics statistics) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.y;
  if (c >= channels) return;
  Moments<double> moments{};
  for (int chunk = threadIdx.x; chunk < chunking.chunks; chunk += kWarp) {
    const int64_t begin = chunk * chunking.rows_per_chunk;
    const int64_t i = c * chunking.chunks + chunk;
    const int64_t count = min(chunking.rows_per_chunk, row_count - begin);
    moments.merge(static_cast<double>(count), partial_mean[i], partial_m2[i]);
  }
  for (int half = kWarp / 2; half > 0; half /= 2) {
    const double count = __shfl_down_sync(~0u, moments.count, half);
    const double mean = __shfl_down_sync(~0u, moments.mean, half);
    const double m2 = __shfl_down_sync(~0u, moments.m2, half);
    moments.merge(count, mean, m2);
  }
  if (threadIdx.x != 0) return;
  statistics.mean[c] = moments.mean;
  static_cast<Acc*>(statistics.var)[c] = static_cast<Acc>(moments.m2 / moments.count);
  update_running<Acc>(statistics.running_mean, c, statistics.momentum, moments.mean);
  update_running<Acc>(statistics.running_var, c, statistics.momentum,
                      moments.m2 / (moments.count - 1));
}

}  // namespace

void concat_bn_stats(const Problem& problem, const Statistics& statistics) {
  const Plan plan(problem, nullptr, Plan::kReductionBlocks);
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  double* const partial_mean = plan.workspace(problem);
  double* const partial_m2 = partial_mean + problem.channels * plan.chunking.chunks;
  dispatch(problem, plan.walk, [&](auto element, auto walk) {
    using T = decltype(element);
    using W = decltype(walk);
    for_each_list(problem, [&](const FeatureList& list) {
      concat_bn_stats_kernel<T, W::vector, W::channels_inner>
          <<<plan.grid(list), plan.block, 0, stream>>>(list, problem.rows, plan.chunking,
                                                       partial_mean, partial_m2);
      check(cudaGetLastError(), "concat_bn_stats_kernel");
    });
    merge_moments_kernel<acc_t<T>>
        <<<merge_grid(problem), merge_block(), 0, stream>>>(problem.channels, problem.rows.count,
                                                            plan.chunking, partial_mean,
                                                            partial_m2, statistics);
    check(cudaGetLastError(), "merge_moments_kernel");
  });
}

}  // namespace efficient_densenet::cuda
