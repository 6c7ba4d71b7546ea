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
    T* const averages = static_cast<T*>(running.data);
    for (int64_t c = 0; c < channels; ++c) {
      averages[c] = static_cast<T>((1 - momentum) * static_cast<acc_t<T>>(averages[c]) +
                                   momentum * (batch[c] * factor));
    }
  });
}

}  // namespace

void update_running_statistics(const std::vector<RunningStatistics>& norms, int64_t rows) {
  const double unbiased = static_cast<double>(rows) / static_cast<double>(rows - 1);
  for (const RunningStatistics& norm : norms) {
    double momentum = norm.cumulative ? 0 : norm.momentum;
    if (norm.num_batches_tracked != nullptr) {
      ++*norm.num_batches_tracked;
      if (norm.cumulative) momentum = 1 / static_cast<double>(*norm.num_batches_tracked);
    }
    move(norm.running_mean, norm.channels, momentum, norm.mean, 1);
    move(norm.running_var, norm.channels, momentum, norm.var, unbiased);
  }
}

}  // namespace efficient_densenet::cpu
