// Mean and squares about the mean of channels, gathered group by group (Chan, Golub and LeVeque
// 1983): neither a mean of many standard deviations nor many rows cost accuracy.
#pragma once

#include "cuda/elementwise/launch.cuh"

namespace efficient_densenet::cuda {

// Moments of k channels over the same number of values.
template <typename Real, int k>
struct Moments {
  Real count = 0, mean[k] = {}, m2[k] = {};  // m2: sum of squares about the mean

  // Takes in other_count values with these moments; mean and m2 are functions of the channel.
  template <typename Mean, typename M2>
  __device__ void merge(Real other_count, const Mean& other_mean, const M2& other_m2) {
    if (other_count == Real(0)) return;
    const Real total = count + other_count;
    const Real fraction = other_count / total;
    const Real weight = count * fraction;
#pragma unroll
    for (int c = 0; c < k; ++c) {
      const Real delta = other_mean(c) - mean[c];
      mean[c] = fma(delta, fraction, mean[c]);
      m2[c] = fma(delta * delta, weight, m2[c] + other_m2(c));
    }
    count = total;
  }
};

// The moments of each channel from those of its chunks of rows, [channels, chunks] each: one warp
// per channel. In concat_bn_stats.cu.
void merge_moments(int64_t channels, int64_t row_count, const RowChunking& chunking,
                   const double* partial_mean, const double* partial_m2,
                   const Statistics& statistics, void* stream);

}  // namespace efficient_densenet::cuda
