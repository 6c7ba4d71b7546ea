// What the backward kernels make of sums over rows: gradients of the parameters, and what batch
// statistics send back to the features, in the notation of dense_block/kernels.h.
#pragma once

#include "cpu/rows.h"
#include "dense_block/kernels.h"

namespace efficient_densenet::cpu {

// From `sums` [2, C], of dz and of dz * (x - rounded mean): the gradients of weight and bias. Adds
// to the correction of the features, or writes it where this is their first reader.
template <typename T>
void finish_sums(const NormCoefficients<T>& channels, const double* sums, void* grad_weight,
                 void* grad_bias, bool batch_statistics, bool first_reader,
                 const Correction& correction) {
  using Real = channel_t<T>;
  const int64_t count = channels.mean_residual.size();
  for (int64_t c = 0; c < count; ++c) {
    const double dz = sums[c], inverse_std = channels.inverse_std[c];
    const double dz_xhat = inverse_std * (sums[count + c] - channels.mean_residual[c] * dz);
    static_cast<Real*>(grad_weight)[c] = static_cast<Real>(dz_xhat);
    static_cast<Real*>(grad_bias)[c] = static_cast<Real>(dz);
    const double scale = channels.scale[c * channels.repeat];
    if (first_reader) correction.s1[c] = correction.s2[c] = 0;
    if (!batch_statistics) continue;
    correction.s1[c] += scale * dz;
    correction.s2[c] += scale * inverse_std * dz_xhat;
  }
}

// (S1 + (x - mean) * S2) / M = offset + ((x - rounded mean) * slope + offset_residual), where
// `offset_residual` is what the rounded offset lacks: an error that is the same in every row adds
// up in sums over the rows.
template <typename T>
struct BatchTerm {
  std::vector<acc_t<T>> offset, offset_residual, slope;

  BatchTerm(const Correction& correction, const std::vector<double>& mean_residual, int64_t rows,
            int64_t repeat)
      : offset(mean_residual.size() * repeat),
        offset_residual(offset.size()),
        slope(offset.size()) {
    const double m = static_cast<double>(rows);
    for (size_t c = 0; c < mean_residual.size(); ++c) {
      const double s1 = correction.s1[c], s2 = correction.s2[c];
      const double exact = (s1 - mean_residual[c] * s2) / m;
      const auto rounded = static_cast<acc_t<T>>(exact);
      std::fill_n(&offset[c * repeat], repeat, rounded);
      std::fill_n(&offset_residual[c * repeat], repeat, static_cast<acc_t<T>>(exact - rounded));
      std::fill_n(&slope[c * repeat], repeat, static_cast<acc_t<T>>(s2 / m));
    }
  }
};

}  // namespace efficient_densenet::cpu
