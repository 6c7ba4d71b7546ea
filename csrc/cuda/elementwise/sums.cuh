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

// A block's sums, from those of its threads: one partial result per channel and block.
template <typename Acc, int kChannels>
__device__ void write_partial_sums(const Sums<Acc> (&own)[kChannels], bool active, int64_t channel,
                                   const Partials& partials) {
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
    const int64_t i = partials.at(blockIdx.y, channel + k);
    partials.first[i] = sums[k].dz;
    partials.second[i] = sums[k].dz_centred;
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

// The sums of each channel, from those of the blocks that share its rows (last_block.cuh), and what
// Result::write makes of them.
template <typename Result>
struct SumsOfBlocks {
  Result result;

  __device__ Pair add(const Partials& partials, const Members& members, const Sharing& sharing,
                      int64_t c) const {
    const auto load = [&](int i) { return partials.load(members.base + i, c); };
    return sharing.sum(members, load, [](int, const Pair& pair) { return pair; });
  }
  __device__ void finish(const Pair& sums, int64_t c) const {
    result.write({sums.first, sums.second}, result.prepare(c), c);
  }
};

// What follows from the sums of channel c over all rows.
template <typename Acc>
struct ChannelGradients {
  double grad_bias, grad_weight;

  __device__ ChannelGradients(const Sums<double>& sums, Acc mean_residual, double inverse_std)
      : grad_bias(sums.dz),
        grad_weight((sums.dz_centred - double(mean_residual) * sums.dz) * inverse_std) {}

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

  __device__ static NormGradCoefficients of(const NormCoefficients<Acc>& norm,
                                            bool batch_statistics, Acc grad_weight, Acc grad_bias,
                                            int64_t row_count) {
    NormGradCoefficients channel{norm, Acc(0), Acc(0)};
    if (!batch_statistics) return channel;
    const Acc per_row = channel.scale / static_cast<Acc>(row_count);
    channel.slope = per_row * channel.inverse_std * grad_weight;
    channel.offset = per_row * grad_bias;
    channel.offset = fma(-channel.mean_residual, channel.slope, channel.offset);
    return channel;
  }

  __device__ static NormGradCoefficients load(const BatchNorm& bn, const Gradients& gradients,
                                              int64_t c, int64_t row_count) {
    return of(NormCoefficients<Acc>::load(bn, c), gradients.batch_statistics,
              static_cast<const Acc*>(gradients.grad_weight)[c],
              static_cast<const Acc*>(gradients.grad_bias)[c], row_count);
  }

  // As numbers of their own, [kNumbers, channels], for kernels that apply them as they read dz.
  static constexpr int kNumbers = 5;

  __device__ void store(Acc* numbers, int64_t c, int64_t channels) const {
    const Acc own[kNumbers] = {this->mean, this->scale, this->bias, offset, slope};
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) numbers[i * channels + c] = own[i];
  }

  // `corrects` is that of load. Without it x is not touched: 0 times an infinite x is NaN.
  __device__ Acc grad_x(Acc x, Acc dz, bool corrects) const {
    const Acc centred = corrects ? this->mean - x : Acc(0);
    return fma(centred, slope, fma(this->scale, dz, -offset));
  }
};

// What a channel's sums are turned into results with: read before the sums are there, so that
// nobody waits for one after the other.
template <typename Acc>
struct ChannelNorm {
  NormCoefficients<Acc> norm;
  double inverse_std;

  __device__ static ChannelNorm load(const BatchNorm& bn, int64_t c) {
    return {NormCoefficients<Acc>::load(bn, c),
            NormCoefficients<Acc>::inverse_sqrt(bn.var[c] + bn.eps)};
  }
  __device__ ChannelGradients<Acc> gradients(const Sums<double>& sums) const {
    return {sums, norm.mean_residual, inverse_std};
  }
};

// The gradients of a norm's weight and bias, [C], and the coefficients where they are asked for.
template <typename Acc>
struct NormGradients {
  BatchNorm bn;
  Gradients gradients;
  int64_t channels, rows;

  __device__ ChannelNorm<Acc> prepare(int64_t c) const { return ChannelNorm<Acc>::load(bn, c); }

  __device__ void write(const Sums<double>& sums, const ChannelNorm<Acc>& channel,
                        int64_t c) const {
    const ChannelGradients<Acc> own = channel.gradients(sums);
    own.write(gradients.grad_weight, gradients.grad_bias, c);
    if constexpr (std::is_same_v<Acc, float>) {
      if (gradients.coefficients == nullptr) return;
      NormGradCoefficients<Acc>::of(channel.norm, gradients.batch_statistics,
                                    static_cast<Acc>(own.grad_weight),
                                    static_cast<Acc>(own.grad_bias), rows)
          .store(gradients.coefficients, c, channels);
    }
  }
};

// What a reader of the block's features sends back, of sums over the chunks of rows so far: with
// the last of them, also to S1 and S2.
template <typename Acc>
struct ReaderGradients {
  BatchNorm bn;
  NormGradArgs args;
  int64_t channels;

  struct Channel {
    ChannelNorm<Acc> norm;
    double weight, s1, s2;  // s1, s2: those of the readers before
  };

  __device__ Channel prepare(int64_t c) const {
    const double weight = bn.weight == nullptr ? 1 : static_cast<const Acc*>(bn.weight)[c];
    const bool adds = args.last_chunk && !args.first_reader;
    return {ChannelNorm<Acc>::load(bn, c), weight, adds ? args.correction.s1[c] : 0,
            adds ? args.correction.s2[c] : 0};
  }

  __device__ void write(Sums<double> sums, const Channel& channel, int64_t c) const {
    double &all_dz = args.sums[c], &all_dz_centred = args.sums[channels + c];
    if (!args.first_chunk) sums.add(all_dz, all_dz_centred);
    if (!args.last_chunk) {
      all_dz = sums.dz;
      all_dz_centred = sums.dz_centred;
      return;
    }
    const ChannelGradients<Acc> own = channel.norm.gradients(sums);
    own.write(args.grad_weight, args.grad_bias, c);
    // The sums of other norms may be infinite, so that 0 times them is NaN.
    const bool corrects = args.batch_statistics;
    const double scale = channel.weight * channel.norm.inverse_std;
    const double s1 = corrects ? scale * own.grad_bias : 0;
    const double s2 = corrects ? scale * channel.norm.inverse_std * own.grad_weight : 0;
    args.correction.s1[c] = args.first_reader ? s1 : channel.s1 + s1;
    args.correction.s2[c] = args.first_reader ? s2 : channel.s2 + s2;
  }
};

}  // namespace efficient_densenet::cuda
