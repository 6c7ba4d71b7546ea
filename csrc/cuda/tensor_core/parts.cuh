// Sums of what blocks have left: partial results [parts, elements], added in order, in double.
#pragma once

#include "cuda/elementwise/launch.cuh"

namespace efficient_densenet::cuda {

template <typename T>
__global__ void add_parts_kernel(int64_t elements, int parts, const float* partial, T* sums) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= elements) return;
  double sum = 0;
  for (int part = 0; part < parts; ++part) sum += partial[part * elements + i];
  sums[i] = narrow<T>(static_cast<float>(sum));
}

template <typename T>
void add_parts(int64_t elements, int parts, const float* partial, T* sums, cudaStream_t stream) {
  add_parts_kernel<<<ceil_div(elements, kThreads), kThreads, 0, stream>>>(elements, parts, partial,
                                                                          sums);
  check(cudaGetLastError(), "add_parts_kernel");
}

}  // namespace efficient_densenet::cuda
