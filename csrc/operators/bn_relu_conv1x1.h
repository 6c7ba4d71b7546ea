// A 1x1 convolution of normalised features on tensor cores, forward and backward. The normalised
// features and their gradient never reach memory:
//
//   z = a W^T,  a = relu(bn(x))           x [M, C], W [N, C], z [M, N]; moments of z on the way
//   grad_a = grad_z W                     added, as in dense_block/kernels.h, to G and its sums
//   grad_W = grad_z^T a
//
// For 16-bit elements and for float, whose products are TF32: `a`, W and grad_z are rounded to it.
// Sums are float. `KernelArgs` has one feature, x, a window of columns of a matrix.
#pragma once

#include <string>

#include "dense_block/kernels.h"
#include "operators/left_over.h"
#include "operators/packed_weights.h"

namespace efficient_densenet {

constexpr int64_t kMaxConv1x1Outputs = 256;  // what a warp's registers hold of a row of z

namespace cuda {

// Empty, or why the kernels cannot run on a device.
std::string why_no_tensor_cores(int device_index, Element element, int64_t outputs,
                                int64_t channels);
// For tests: as on a device whose blocks have no more shared memory. 0 ends that.
void limit_shared_memory(int64_t bytes);

// `weight` is packed, kForward. `moments` (without copy) may be null: they are of z as stored. With
// a norm2, relu(norm2(z)) is stored, as an operand.
void bn_relu_conv1x1(const KernelArgs& args, const BatchNorm& bn, const void* weight,
                     int64_t outputs, const FoldedNorm& norm2, const View& z,
                     const Statistics* moments, const MomentsLeft& x_left, MomentsLeft* z_left);

// `weight` is packed, kGradInput. Of the reader, which is not the first one, grad_y is not used: it
// is what `grad` makes, whose rows are all of M; its sums are `left`.
void bn_relu_conv1x1_grad_input(const KernelArgs& args, const BatchNorm& bn, const void* weight,
                                int64_t outputs, const NormGradient& grad,
                                const NormGradArgs& norm_grad, ReaderSumsLeft* left);
// Whether blocks share rows, so that grad_z must have memory of its own. Else it may be grad_a's.
bool conv1x1_grad_input_shares_rows(Element element, int64_t rows, int64_t outputs,
                                    int64_t channels);

// Adds up what kernels before have left; its own parts then stand there.
void bn_relu_conv1x1_grad_weight(const KernelArgs& args, const BatchNorm& bn, int64_t outputs,
                                 const View& grad_z, const WeightGradient& grad_weight,
                                 WeightParts* parts_left, const ReaderSumsLeft& sums_left);

}  // namespace cuda
}  // namespace efficient_densenet
