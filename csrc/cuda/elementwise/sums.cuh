// Shared by the backward kernels: where the ReLU lets the gradient through, and the sums over rows
//
//   sum(dz)  and  sum(dz * (x - rounded mean))
//
// of each channel, from which follow the gradients of weight and bias and what the statistics of
// the batch send back. A thread's sums, and those of a whole block of a tensor-core kernel, are in
// the arithmetic type, all others in double, in an order that depends on shapes,
// strides and alignment alone.
#pragma once

#include "cuda/elementwise/launch.cuh"
#include "dense_block/kernels.h"

namespace efficient_densenet::cuda {

template <typename T>
__device__ acc_t<T> masked(const NormCoefficients<acc_t<T>>& channel, acc_t<T> x, acc_t<T> grad_y) {
  return relu_is_open<T>(channel.normalise(x)) ? grad_y : acc_t<T>(0);
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

// A block's sums, from those of its threads: one partial result per channel and chunk.
template <typename Acc, int kChannels>
__device__ void write_partial_sums(const Sums<Acc> (&own)[kChannels], bool active, int64_t channel,
                                   const RowChunking& chunking, double* partial_dz,
                                   double* partial_dz_centred) {
  __shared__ double shared_dz[kChannels][kThreads], shared_dz_centred[kChannels][kThreads];
  Sums<double> sums[kChannels] = {};
#pragma unroll
  for (int k = 0; k < kChannels; ++k) sums[k].add(own[k].dz, own[k].dz_centred);
  reduce_threads(
      [&](int i) {
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
          shared_dz[k][i] = sums[k].dz;
          shared_dz_centred[k][i] = sums[k].dz_centred;
        }
      },
      [&](int i) {
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
          sums[k].add(shared_dz[k][i], shared_dz_centred[k][i]);
        }
      });
  if (!active || threadIdx.y != 0) return;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    const int64_t i = partial_index(chunking, channel + k);
    partial_dz[i] = sums[k].dz;
    partial_dz_centred[i] = sums[k].dz_centred;
  }
}

// Adds the sums of the 8 lanes that have the same columns: lanes 4 apart, as an mma leaves them
// (fragments.cuh). Each step halves the columns of a lane. Returns which of them the lane is left
// with; of 4 columns, two lanes have the same.
template <int kColumns>
__device__ int add_lanes(float (&dz)[kColumns], float (&dz_centred)[kColumns]) {
  static_assert(kColumns == 4 || kColumns == 8);
  int column = 0;
#pragma unroll
  for (int half = kColumns / 2; half > 0; half /= 2) {
    const int bit = kWarp / kColumns * half;
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? dz[i] : dz[i + half];
      const float sent_centred = upper ? dz_centred[i] : dz_centred[i + half];
      dz[i] = (upper ? dz[i + half] : dz[i]) + __shfl_xor_sync(~0u, sent, bit);
      dz_centred[i] =
          (upper ? dz_centred[i + half] : dz_centred[i]) + __shfl_xor_sync(~0u, sent_centred, bit);
    }
    column += upper ? half : 0;
  }
  if constexpr (kColumns == 4) {
    dz[0] += __shfl_xor_sync(~0u, dz[0], 4);
    dz_centred[0] += __shfl_xor_sync(~0u, dz_centred[0], 4);
  }
  return column;
}

// The sums of channel c over all chunks, with the first thread of a warp.
__device__ inline Sums<double> merged_sums(int64_t c, const RowChunking& chunking,
                                           const double* partial_dz,
                                           const double* partial_dz_centred) {
  Sums<double> sums{};
  for (int chunk = threadIdx.x; chunk < chunking.chunks; chunk += kWarp) {
    const int64_t i = c * chunking.chunks + chunk;
    sums.add(partial_dz[i], partial_dz_centred[i]);
  }
  for (int half = kWarp / 2; half > 0; half /= 2) {
    sums.add(__shfl_down_sync(~0u, sums.dz, half), __shfl_down_sync(~0u, sums.dz_centred, half));
  }
  return sums;
}

// What follows from the sums of channel c over all rows.
template <typename Acc>
struct ChannelGradients {
  double grad_bias, grad_weight, inverse_std;

  __device__ ChannelGradients(const Sums<double>& sums, const BatchNorm& bn, int64_t c) {
    inverse_std = NormCoefficients<Acc>::inverse_sqrt(bn.var[c] + bn.eps);
    const double mean_residual = NormCoefficients<Acc>::load(bn, c).mean_residual;
    grad_bias = sums.dz;
    grad_weight = (sums.dz_centred - mean_residual * sums.dz) * inverse_std;
  }

  __device__ void write(void* grad_weights, void* grad_biases, int64_t c) const {
    static_cast<Acc*>(grad_biases)[c] = static_cast<Acc>(grad_bias);
    static_cast<Acc*>(grad_weights)[c] = static_cast<Acc>(grad_weight);
  }
};

// The gradient of a channel whose readers have all been heard:
//
//   grad_x = G - (offset + ((x - rounded mean) * slope + rest of offset))
//
// An error that is the same in every row adds up in sums over the rows. So what the rounded offset
// lacks comes in here, and G is rounded only once, against a number that differs in every row.
template <typename Acc>
struct CorrectionCoefficients {
  Acc mean, offset, offset_residual, slope;

  __device__ static CorrectionCoefficients load(const double* mean, const Correction& correction,
                                                int64_t row_count, int64_t c) {
    if (mean == nullptr) return {};  // nothing to correct
    const auto rounded = static_cast<Acc>(mean[c]);
    const double slope = correction.s2[c] / row_count;
    const double exact = correction.s1[c] / row_count - (mean[c] - rounded) * slope;
    const auto offset = static_cast<Acc>(exact);
    return {rounded, offset, static_cast<Acc>(exact - offset), static_cast<Acc>(slope)};
  }

  __device__ Acc gradient(Acc g, Acc x) const {
    return g - (offset + fma(x - mean, slope, offset_residual));
  }
};

// grad_x = scale * dz - offset - (x - rounded mean) * slope; the last two are what the batch
// statistics send back, 0 for running statistics.
template <typename Acc>
struct NormGradCoefficients : NormCoefficients<Acc> {
  Acc offset, slope;

  __device__ static NormGradCoefficients load(const BatchNorm& bn, const Gradients& gradients,
                                              int64_t c, int64_t row_count) {
    NormGradCoefficients channel{NormCoefficients<Acc>::load(bn, c), Acc(0), Acc(0)};
    if (!gradients.batch_statistics) return channel;
    const Acc per_row = channel.scale / static_cast<Acc>(row_count);
    const Acc grad_weight = static_cast<const Acc*>(gradients.grad_weight)[c];
    channel.slope = per_row * channel.inverse_std * grad_weight;
    channel.offset = per_row * static_cast<const Acc*>(gradients.grad_bias)[c];
    channel.offset = fma(-channel.mean_residual, channel.slope, channel.offset);
    return channel;
  }

  // `corrects` is that of load. Without it x is not touched: 0 times an infinite x is NaN.
  __device__ Acc grad_x(Acc x, Acc dz, bool corrects) const {
    const Acc own = fma(this->scale, dz, -offset);
    return corrects ? fma(this->mean - x, slope, own) : own;
  }
};

// What a reader's sums over all rows lead to, from the partial results [C, chunks] of a kernel that
// has added to G: one warp per channel. In dense_block.cu.
void merge_norm_grad(const KernelArgs& args, const BatchNorm& bn, const NormGradArgs& norm_grad,
                     const RowChunking& chunking, const double* partial_dz,
                     const double* partial_dz_centred);

}  // namespace efficient_densenet::cuda
