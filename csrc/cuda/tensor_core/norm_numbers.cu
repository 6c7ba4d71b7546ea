// Numbers per channel of many norms in one launch (norm_numbers.h): a thread has one channel.
//
// Bytes: 24 read and 12 written per channel, a few hundred KB per block of a network. Limit: the
// launch.
#include <algorithm>

#include "cuda/elementwise/launch.cuh"
#include "operators/norm_numbers.h"

namespace efficient_densenet::cuda {
namespace {

constexpr int kMostNorms = 80;  // of a launch: they are a kernel parameter

struct Entry {
  const double *mean, *var;
  const float *weight, *bias;
  double eps;
  int channels, begin;
};

struct Entries {
  Entry norms[kMostNorms];
};

struct WriteNumbers {
  float* numbers;
  int64_t stride;

  __device__ void operator()(const BatchNorm& bn, int64_t c, int64_t to) const {
    const auto channel = NormCoefficients<float>::load(bn, c);
    numbers[to] = channel.mean;
    numbers[stride + to] = channel.scale;
    numbers[2 * stride + to] = channel.bias;
  }
};

struct WriteFolded {
  float *scale, *bias;

  __device__ void operator()(const BatchNorm& bn, int64_t c, int64_t to) const {
    const double inverse_std = 1 / sqrt(bn.var[c] + bn.eps);
    const double factor = static_cast<const float*>(bn.weight)[c] * inverse_std;
    scale[to] = static_cast<float>(factor);
    bias[to] = static_cast<float>(static_cast<const float*>(bn.bias)[c] - bn.mean[c] * factor);
  }
};

// Blocks share the channels of a norm (x) and the norms (y).
template <typename Write>
__global__ void __launch_bounds__(kThreads)
    norm_numbers_kernel(const __grid_constant__ Entries entries, Write write) {
  const Entry& norm = entries.norms[blockIdx.y];
  const int c = blockIdx.x * kThreads + threadIdx.x;
  if (c >= norm.channels) return;
  write(BatchNorm{norm.mean, norm.var, norm.weight, norm.bias, norm.eps}, c, norm.begin + c);
}

template <typename Write>
void launch(const std::vector<KnownNorm>& norms, const Write& write, void* stream) {
  for (size_t first = 0; first < norms.size(); first += kMostNorms) {
    const size_t count = std::min<size_t>(norms.size() - first, kMostNorms);
    Entries entries{};
    int64_t channels = 0;
    for (size_t i = 0; i < count; ++i) {
      const KnownNorm& norm = norms[first + i];
      entries.norms[i] = {norm.bn.mean,
                          norm.bn.var,
                          static_cast<const float*>(norm.bn.weight),
                          static_cast<const float*>(norm.bn.bias),
                          norm.bn.eps,
                          static_cast<int>(norm.channels),
                          static_cast<int>(norm.begin)};
      channels = std::max(channels, norm.channels);
    }
    const dim3 grid(static_cast<unsigned>(ceil_div(channels, kThreads)),
                    static_cast<unsigned>(count));
    norm_numbers_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(entries, write);
    check(cudaGetLastError(), "norm_numbers_kernel");
  }
}

}  // namespace

void norm_numbers(const std::vector<KnownNorm>& norms, float* numbers, int64_t stride,
                  void* stream) {
  launch(norms, WriteNumbers{numbers, stride}, stream);
}

void fold_norms(const std::vector<KnownNorm>& norms, float* scale, float* bias, void* stream) {
  launch(norms, WriteFolded{scale, bias}, stream);
}

}  // namespace efficient_densenet::cuda
