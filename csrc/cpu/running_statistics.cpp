// Formula in ../operators/running_statistics.h. Norms move one after the other, so one that is in
// the list twice moves twice. They are few numbers: no threads.
#include "operators/running_statistics.h"

#include "cpu/rows.h"

namespace efficient_densenet::cpu {
namespace {

void move(const RunningBuffer& running, int64_t channels, double momentum, const double* batch,
          double factor) {
  if (running.data == nullptr) return;
  dispatch(running.element, [&](auto element) {
    using T = decltype(element);
    for (int64_t c = 0; c < channels; ++c) {
      T& average = static_cast<T*>(running.data)[c * running.stride];
      average = static_cast<T>((1 - momentum) * static_cast<acc_t<T>>(average) +
                               momentum * (batch[c] * factor));
    }
  });
}

}  // namespace

void update_running_statistics(const std::vector<RunningStatistics>& norms) {
  for (const RunningStatistics& norm : norms) {
    double momentum = norm.cumulative ? 0 : norm.momentum;
    if (norm.num_batches_tracked != nullptr) {
      ++*norm.num_batches_tracked;
      if (norm.cumulative) momentum = 1 / static_cast<double>(*norm.num_batches_tracked);
    }
    move(norm.running_mean, norm.channels, momentum, norm.mean, 1);
    move(norm.running_var, norm.channels, momentum, norm.var, norm.unbiased);
  }
}

}  // namespace efficient_densenet::cpu
