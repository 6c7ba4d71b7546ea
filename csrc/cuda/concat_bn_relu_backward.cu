// Gradients of y = relu((x - mean) * scale + bias), per channel c over M rows:
//
//   dz = grad_y where the ReLU was open, else 0     (recomputed from x; y is not read)
//   grad_bias = sum(dz)      grad_weight = sum(dz * (x - mean)) * inverse_std
//   grad_x = scale * (dz - grad_bias / M - xhat * grad_weight / M)   with batch statistics
//   grad_x = scale * dz                                              with running statistics
//
// Tiling: tile.cuh. First kernel: partial sums [C, chunks] of each block, merged by one warp per
// channel. Second kernel: elementwise. A feature whose gradient nobody wants is skipped there.
// Bytes: x and grad_y are read twice and grad_x written once, 5 * sizeof(T) per element. The sums
// are needed before the first grad_x, and x and grad_y exceed the caches, so a single pass is not
// possible.
// Limit: memory bandwidth. Shared memory: 19 KB at V = 4. Sums: a thread's in the arithmetic type,
// all others in double; fixed order everywhere.
#include "tile.cuh"

namespace efficient_densenet::cuda {
namespace {

template <typename T>
__device__ acc_t<T> masked(const Channel<acc_t<T>>& channel, acc_t<T> x, T grad_y) {
  return relu_is_open<T>(channel.normalise(x)) ? widen(grad_y) : acc_t<T>(0);
}

// Sums over rows, of one channel.
template <typename Real>
struct Sums {
  Real dz, dz_centred;  // dz, dz * (x - rounded mean)

  __device__ void add(Real other_dz, Real other_dz_centred) {
    dz += other_dz;
    dz_centred += other_dz_centred;
  }
};

template <typename T, int V, bool kChannelsInner, int kChannels>
__device__ void thread_sums(const Tile<V, kChannelsInner>& tile, const Window<T, V>& x,
                            const Window<T, V>& grad_y,
                            const Channel<acc_t<T>> (&channels)[kChannels],
                            Sums<acc_t<T>> (&sums)[kChannels]) {
  using Acc = acc_t<T>;
  tile.for_each_group([&](int64_t row, auto steps) {
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
        constexpr auto channel_of = Tile<V, kChannelsInner>::channel_of;
        const Channel<Acc>& channel = channels[channel_of(i)];
        const Acc value = widen(x_packs[s].values[i]);
        const Acc dz = masked<T>(channel, value, grad_packs[s].values[i]);
        group[channel_of(i)].add(dz, dz * (value - channel.mean));
      }
    }
#pragma unroll
    for (int k = 0; k < kChannels; ++k) sums[k].add(group[k].dz, group[k].dz_centred);
  });
}

template <typename T, int V, bool kChannelsInner>
__global__ void __launch_bounds__(kThreads)
    backward_sums_kernel(const __grid_constant__ FeatureList list,
                         const __grid_constant__ RowSpace rows, Chunking chunking, BatchNorm bn,
                         const __grid_constant__ View grad_y_view, double* partial_dz,
                         double* partial_dz_centred) {
  using Acc = acc_t<T>;
  using T_ = Tile<V, kChannelsInner>;
  constexpr int kChannels = T_::kChannels;
  __shared__ double shared_dz[kChannels][kThreads], shared_dz_centred[kChannels][kThreads];

  // 1. Each thread: its own rows.
  const T_ tile(list, rows, chunking);
  const bool active = T_::in_list(list, tile.channel);
  Sums<double> sums[kChannels] = {};
  Channel<Acc> channels[kChannels];
  load_per_channel<Channel<Acc>, T_>(list, channels,
                                     [&](int64_t c) { return Channel<Acc>::load(bn, c); });
  if (active) {
    const Feature& feature = find_feature(list, tile.channel);
    const Window<T, V> x(feature.x, rows, tile.channel - feature.first_channel);
    const Window<T, V> grad_y(grad_y_view, rows, tile.channel);
    Sums<Acc> own[kChannels] = {};
    thread_sums<T, V, kChannelsInner, kChannels>(tile, x, grad_y, channels, own);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) sums[k].add(own[k].dz, own[k].dz_centred);
  }

  // 2. The threads of a channel: a tree over threadIdx.y.
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    if (threadIdx.y >= half && threadIdx.y < 2 * half) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        shared_dz[k][thread] = sums[k].dz;
        shared_dz_centred[k][thread] = sums[k].dz_centred;
      }
    }
    __syncthreads();
    if (threadIdx.y < half) {
      const int other = thread + half * blockDim.x;
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        sums[k].add(shared_dz[k][other], shared_dz_centred[k][other]);
      }
    }
    __syncthreads();
  }

  // 3. One partial result per channel and chunk.
  if (active && threadIdx.y == 0) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const int64_t i = partial_index(chunking, tile.channel + k);
      partial_dz[i] = sums[k].dz;
      partial_dz_centred[i] = sums[k].dz_centred;
    }
  }
}

template <typename Acc>
__global__ void merge_sums_kernel(int64_t channels, Chunking chunking, const double* partial_dz,
                                  const double* partial_dz_centred, BatchNorm bn,
                                  Gradients gradients) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.y;
  if (c >= channels) return;
  Sums<double> sums{};
  for (int chunk = threadIdx.x; chunk < chunking.chunks; chunk += kWarp) {
    const int64_t i = c * chunking.chunks + chunk;
    sums.add(partial_dz[i], partial_dz_centred[i]);
  }
  for (int half = kWarp / 2; half > 0; half /= 2) {
    sums.add(__shfl_down_sync(~0u, sums.dz, half), __shfl_down_sync(~0u, sums.dz_centred, half));
  }
  if (threadIdx.x != 0) return;
  static_cast<Acc*>(gradients.grad_bias)[c] = static_cast<Acc>(sums.dz);
  const double inverse_std = Channel<Acc>::inverse_sqrt(bn.var[c] + bn.eps);
  const double rest = Channel<Acc>::load(bn, c).rest;
  static_cast<Acc*>(gradients.grad_weight)[c] =
      static_cast<Acc>((sums.dz_centred - rest * sums.dz) * inverse_std);
}

// grad_x = scale * dz - offset - (x - rounded mean) * slope; the last two are what the batch
// statistics send back, 0 for running statistics.
template <typename Acc>
struct GradChannel : Channel<Acc> {
  Acc offset, slope;

  __device__ static GradChannel load(const BatchNorm& bn, const Gradients& gradients, int64_t c,
                                     int64_t row_count) {
    GradChannel channel{Channel<Acc>::load(bn, c), Acc(0), Acc(0)};
    if (!gradients.batch_statistics) return channel;
    const Acc per_row = channel.scale / static_cast<Acc>(row_count);
    const Acc grad_weight = static_cast<const Acc*>(gradients.grad_weight)[c];
    channel.slope = per_row * channel.inverse_std * grad_weight;
    channel.offset = per_row * static_cast<const Acc*>(gradients.grad_bias)[c];
    channel.offset = fma(-channel.rest, channel.slope, channel.offset);
    return channel;
  }
};

template <typename T, int V, bool kChannelsInner>
__global__ void __launch_bounds__(kThreads)
    grad_features_kernel(const __grid_constant__ FeatureList list,
                         const __grid_constant__ RowSpace rows, Chunking chunking, BatchNorm bn,
                         const __grid_constant__ Gradients gradients) {
  using Acc = acc_t<T>;
  using T_ = Tile<V, kChannelsInner>;
  constexpr int kChannels = T_::kChannels;
  const T_ tile(list, rows, chunking);
  GradChannel<Acc> channels[kChannels];
  load_per_channel<GradChannel<Acc>, T_>(list, channels, [&](int64_t c) {
    return GradChannel<Acc>::load(bn, gradients, c, rows.count);
  });
  if (!T_::in_list(list, tile.channel)) return;
  const Feature& feature = find_feature(list, tile.channel);
  if (feature.grad_x.data == nullptr) return;

  const int64_t first = tile.channel - feature.first_channel;
  const Window<T, V> x(feature.x, rows, first);
  const Window<T, V> grad_x(feature.grad_x, rows, first);
  const Window<T, V> grad_y(gradients.grad_y, rows, tile.channel);

  tile.for_each_group([&](int64_t row, auto steps) {
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
        const GradChannel<Acc>& channel = channels[T_::channel_of(i)];
        const Acc value = widen(x_packs[s].values[i]);
        const Acc dz = masked<T>(channel, value, grad_packs[s].values[i]);
        const Acc direct = fma(channel.scale, dz, -channel.offset);
        grad_packs[s].values[i] = narrow<T>(fma(channel.mean - value, channel.slope, direct));
      }
      *grad_x.at(row + s * tile.row_step) = grad_packs[s];
    }
  });
}

// Elements per access. 8 would leave registers for one block per multiprocessor; its gain where it
// fits (10 % for k=32 in bfloat16) is not worth the extra kernels, see docs/design.md.
constexpr int kWidest = 4;

}  // namespace

void concat_bn_relu_backward(const Problem& problem, const BatchNorm& bn,
                             const Gradients& gradients) {
  const Plan sums_plan(problem, &gradients.grad_y, Plan::kReductionBlocks, kWidest);
  const Plan grad_plan(problem, &gradients.grad_y, Plan::kElementwiseBlocks, kWidest);
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  double* const partial_dz = sums_plan.workspace(problem);
  double* const partial_dz_centred = partial_dz + problem.channels * sums_plan.chunking.chunks;
  dispatch<kWidest>(problem, sums_plan.walk, [&](auto element, auto walk) {
    using T = decltype(element);
    using W = decltype(walk);
    for_each_list(problem, [&](const FeatureList& list) {
      backward_sums_kernel<T, W::vector, W::channels_inner>
          <<<sums_plan.grid(list), sums_plan.block, 0, stream>>>(
              list, problem.rows, sums_plan.chunking, bn, gradients.grad_y, partial_dz,
              partial_dz_centred);
      check(cudaGetLastError(), "backward_sums_kernel");
    });
    merge_sums_kernel<acc_t<T>><<<merge_grid(problem), merge_block(), 0, stream>>>(
        problem.channels, sums_plan.chunking, partial_dz, partial_dz_centred, bn, gradients);
    check(cudaGetLastError(), "merge_sums_kernel");
    for_each_list(problem, [&](const FeatureList& list) {
      grad_features_kernel<T, W::vector, W::channels_inner>
          <<<grad_plan.grid(list), grad_plan.block, 0, stream>>>(list, problem.rows,
                                                                 grad_plan.chunking, bn, gradients);
      check(cudaGetLastError(), "grad_features_kernel");
    });
  });
}

}  // namespace efficient_densenet::cuda
