// What concat_bn_relu_backward.cu does after the sums, for kernels that take those themselves.
#pragma once

#include "cuda/elementwise/sums.cuh"

namespace efficient_densenet::cuda {

// The gradients of weight and bias, from the partial results [C, chunks] of the sums.
void merge_gradients(const KernelArgs& args, const BatchNorm& bn, const Gradients& gradients,
                     const RowChunking& chunking, const double* partial_dz,
                     const double* partial_dz_centred);

// grad_x from grad_y, whose elements behind a closed ReLU may be 0 already, and those gradients.
void backward_elementwise(const KernelArgs& args, const BatchNorm& bn, const Gradients& gradients);

}  // namespace efficient_densenet::cuda
