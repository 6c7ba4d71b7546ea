// Running statistics of several norms move by one batch:
//
//   running_mean = (1 - m) running_mean + m mean
//   running_var  = (1 - m) running_var  + m var rows / (rows - 1)
//
// where m is the momentum, or 1 / num_batches_tracked for a cumulative average.
#pragma once

#include "common/kernel_args.h"

namespace efficient_densenet {

// One running mean or variance, [channels]; data is null where a norm has none.
struct RunningBuffer {
  void* data;
  Element element;
};

struct RunningStatistics {
  const double* mean;  // of the batch, [channels]
  const double* var;   // biased
  RunningBuffer running_mean, running_var;
  int64_t* num_batches_tracked;  // null: not counted
  int64_t channels;
  double momentum;
  bool cumulative;  // the momentum is 1 / num_batches_tracked; 0 where that is not counted
};

namespace cpu {
void update_running_statistics(const std::vector<RunningStatistics>& norms, int64_t rows);
}  // namespace cpu

namespace cuda {
// No buffer may belong to two of the norms: they move at the same time.
void update_running_statistics(const std::vector<RunningStatistics>& norms, int64_t rows,
                               void* stream);
}  // namespace cuda

}  // namespace efficient_densenet
