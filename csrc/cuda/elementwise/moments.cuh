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

// The moments of each channel, from those of the blocks that share its rows (last_block.cuh): pairs
// are a mean and the squares about it. Means are taken about the first one, which keeps the digits
// of a large mean; in double, the squares then lose nothing that counts when they move to the mean
// of all. So there is no division per block, and no load waits for another.
struct MomentsOfBlocks {
  int64_t rows, rows_per_block;
  double *mean, *var;  // out, [channels]; null where nobody asks

  // Those of blocks first, first + step, ...; all but the last have the same number.
  __device__ double rows_of(int first, int step, int blocks) const {
    const int last = blocks - 1;
    int64_t count = ((last - first) / step + 1) * rows_per_block;
    if (last % step == first) count += rows - blocks * rows_per_block;
    return static_cast<double>(count);
  }

  __device__ Pair add(const Partials& partials, const Members& members, const Sharing& sharing,
                      int64_t c) const {
    const double about = partials.first[partials.at(members.base + members.first, c)];
    const auto load = [&](int i) { return partials.load(members.base + i, c); };
    const Pair sums = sharing.sum(members, load, [&](int i, const Pair& pair) {
      const double count = rows_of(i, members.end, partials.blocks), delta = pair.first - about;
      return Pair{count * delta, fma(count * delta, delta, pair.second)};
    });
    const double delta = sums.first / rows_of(members.first, members.step, partials.blocks);
    return {about + delta, fma(-delta, sums.first, sums.second)};
  }

  __device__ double variance(const Pair& moments) const {
    return moments.second < 0 ? 0 : moments.second / rows;  // NaN stays
  }
  __device__ void finish(const Pair& moments, int64_t c) const {
    mean[c] = moments.first;
    var[c] = variance(moments);
  }
};

inline MomentsOfBlocks moments_of_blocks(int64_t rows, const RowChunking& chunking,
                                         const Statistics* statistics) {
  if (statistics == nullptr) return {rows, chunking.rows_per_chunk, nullptr, nullptr};
  return {rows, chunking.rows_per_chunk, statistics->mean, statistics->var};
}

}  // namespace efficient_densenet::cuda
