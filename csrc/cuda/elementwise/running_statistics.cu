// Formula in operators/running_statistics.h: one block per norm, a thread per channel.
#include <algorithm>

#include "cuda/elementwise/launch.cuh"
#include "operators/running_statistics.h"

namespace efficient_densenet::cuda {
namespace {

constexpr int kMaxNorms = 48;  // 3.5 KB of kernel parameters

struct NormList {
  RunningStatistics items[kMaxNorms];
};

template <typename T>
__device__ void move_all(T* running, int64_t channels, double momentum, const double* batch,
                         double factor) {
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    const double moved =
        (1 - momentum) * static_cast<double>(widen(running[c])) + momentum * (batch[c] * factor);
    running[c] = narrow<T>(static_cast<acc_t<T>>(moved));
  }
}

__device__ void move(const RunningBuffer& running, int64_t channels, double momentum,
                     const double* batch, double factor) {
  if (running.data == nullptr) return;
  const auto as = [&](auto element) {
    move_all(static_cast<decltype(element)*>(running.data), channels, momentum, batch, factor);
  };
  switch (running.element) {
    case Element::kDouble:
      return as(double{});
    case Element::kFloat:
      return as(float{});
    case Element::kHalf:
      return as(__half{});
    case Element::kBFloat16:
      return as(__nv_bfloat16{});
  }
}

__global__ void update_running_statistics_kernel(const __grid_constant__ NormList norms,
                                                 double unbiased) {
  const RunningStatistics& norm = norms.items[blockIdx.x];
  const bool counts = norm.num_batches_tracked != nullptr;
  const int64_t count = counts ? *norm.num_batches_tracked + 1 : 0;
  __syncthreads();  // everybody has read the count
  if (counts && threadIdx.x == 0) *norm.num_batches_tracked = count;
  double momentum = norm.momentum;
  if (norm.cumulative) momentum = counts ? 1.0 / static_cast<double>(count) : 0.0;
  move(norm.running_mean, norm.channels, momentum, norm.mean, 1);
  move(norm.running_var, norm.channels, momentum, norm.var, unbiased);
}

}  // namespace

void update_running_statistics(const std::vector<RunningStatistics>& norms, int64_t rows,
                               void* stream) {
  const double unbiased = static_cast<double>(rows) / static_cast<double>(rows - 1);
  for (size_t begin = 0; begin < norms.size(); begin += kMaxNorms) {
    const size_t count = std::min<size_t>(kMaxNorms, norms.size() - begin);
    NormList list;
    std::copy_n(norms.begin() + begin, count, list.items);
    update_running_statistics_kernel<<<count, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        list, unbiased);
    check(cudaGetLastError(), "update_running_statistics_kernel");
  }
}

}  // namespace efficient_densenet::cuda
