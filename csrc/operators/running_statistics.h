// Running statistics of many norms, of a whole network say, move by one batch of each:
//
//   running_mean = (1 - m) running_mean + m mean
//   running_var  = (1 - m) running_var  + m var rows / (rows - 1)
//
// where rows are the values per channel that mean and var are of, and m is the momentum, or 1 /
// num_batches_tracked for a cumulative average.
#pragma once

#include "common/kernel_args.h"

namespace efficient_densenet {

// One running mean or variance, [channels]; data is null where a norm has none.
struct RunningBuffer {
  void* data;
  int64_t stride;
  Element element;
};

struct RunningStatistics {
  const double* mean;  // of the batch, [channels]
  const double* var;   // biased
  double unbiased;     // rows / (rows - 1)
  RunningBuffer running_mean, running_var;
  int64_t* num_batches_tracked;  // null: not counted
  int64_t channels;
  double momentum;
  bool cumulative;  // the momentum is 1 / num_batches_tracked; 0 where that is not counted
};

namespace cpu {
void update_running_statistics(const std::vector<RunningStatistics>& norms);
}  // namespace cpu

namespace cuda {
// No buffer may belong to two of the norms: they move at the same time.
void update_running_statistics(const std::vector<RunningStatistics>& norms, void* stream);
}  // namespace cuda

}  // namespace efficient_densenet
