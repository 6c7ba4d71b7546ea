// Formula in operators/running_statistics.h: one block per norm, a thread per channel.
#include <algorithm>

#include "cuda/elementwise/launch.cuh"
#include "operators/running_statistics.h"

namespace efficient_densenet::cuda {
namespace {

// Norms of one launch, which are among the kernel's parameters: 4 KB of them on any driver, and 32
// on those that CUDA 13 needs.
constexpr int kSmallList = 36;
constexpr int kLargeList = CUDART_VERSION >= 13000 ? 312 : kSmallList;

template <int size>
struct NormList {
  RunningStatistics items[size];
};
static_assert(sizeof(NormList<kSmallList>) <= 4096 && sizeof(NormList<kLargeList>) <= 32764);

template <typename T>
__device__ void move_all(T* running, int64_t stride, int64_t channels, double momentum,
                         const double* batch, double factor) {
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    T& average = running[c * stride];
    const double moved =
        (1 - momentum) * static_cast<double>(widen(average)) + momentum * (batch[c] * factor);
    average = narrow<T>(static_cast<acc_t<T>>(moved));
  }
}

__device__ void move(const RunningBuffer& running, int64_t channels, double momentum,
                     const double* batch, double factor) {
  if (running.data == nullptr) return;
  const auto as = [&](auto element) {
    move_all(static_cast<decltype(element)*>(running.data), running.stride, channels, momentum,
             batch, factor);
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

template <int size>
__global__ void update_running_statistics_kernel(const __grid_constant__ NormList<size> norms) {
  const RunningStatistics& norm = norms.items[blockIdx.x];
  const bool counts = norm.num_batches_tracked != nullptr;
  const int64_t count = counts ? *norm.num_batches_tracked + 1 : 0;
  __syncthreads();  // everybody has read the count
  if (counts && threadIdx.x == 0) *norm.num_batches_tracked = count;
  double momentum = norm.momentum;
  if (norm.cumulative) momentum = counts ? 1.0 / static_cast<double>(count) : 0.0;
  move(norm.running_mean, norm.channels, momentum, norm.mean, 1);
  move(norm.running_var, norm.channels, momentum, norm.var, norm.unbiased);
}

template <int size>
void launch(const RunningStatistics* norms, int64_t count, void* stream) {
  NormList<size> list;
  std::copy_n(norms, count, list.items);
  update_running_statistics_kernel<<<count, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(list);
  check(cudaGetLastError(), "update_running_statistics_kernel");
}

}  // namespace

void update_running_statistics(const std::vector<RunningStatistics>& norms, void* stream) {
  for (size_t begin = 0; begin < norms.size(); begin += kLargeList) {
    const size_t count = std::min<size_t>(kLargeList, norms.size() - begin);
    const auto launch = count <= kSmallList ? cuda::launch<kSmallList> : cuda::launch<kLargeList>;
    launch(&norms[begin], count, stream);
  }
}

}  // namespace efficient_densenet::cuda
