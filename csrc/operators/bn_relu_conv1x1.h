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

namespace efficient_densenet {

constexpr int64_t kMaxConv1x1Outputs = 256;  // what a warp's registers hold of a row of z

// W as the kernels read it: cut into the pieces that the lanes of a warp hold, padded by zeros.
enum class WeightLayout { kForward, kGradInput };

// L weights one after the other, the l-th [N, C_0 + l k].
struct Conv1x1Weights {
  const void* data;
  int64_t layers, outputs, channels_in, growth;
};

// L norms of N channels each, one after the other; bn.eps is not used.
struct Norms {
  BatchNorm bn;
  const std::vector<double>& eps;  // [L]
  int64_t channels;                // N
};

namespace cuda {

// Empty, or why the kernels cannot run on a device.
std::string why_no_tensor_cores(int device_index, Element element, int64_t outputs,
                                int64_t channels);
// For tests: as on a device whose blocks have no more shared memory. 0 ends that.
void limit_shared_memory(int64_t bytes);

// Bytes of one packed weight [outputs, channels] for M rows: the layout depends on how many.
int64_t packed_conv1x1_bytes(Element element, WeightLayout layout, int64_t rows, int64_t outputs,
                             int64_t channels);
// All weights, packed one after the other.
void pack_conv1x1(Element element, WeightLayout layout, int64_t rows, const Conv1x1Weights& weights,
                  void* packed, void* stream);

// `weight` is packed, kForward. `moments` (without copy) may be null: they are of z as stored. With
// a norm2, relu(norm2(z)) is stored, as an operand.
void bn_relu_conv1x1(const KernelArgs& args, const BatchNorm& bn, const void* weight,
                     int64_t outputs, const FoldedNorm& norm2, const View& z,
                     const Statistics* moments);

// The scale and bias of FoldedNorm for all layers, [L, N].
void fold_norms(const Norms& norms, float* scale, float* bias, void* stream);

// `weight` is packed, kGradInput. Of the reader, which is not the first one, grad_y is grad_z,
// whose rows are all of M.
void bn_relu_conv1x1_grad_input(const KernelArgs& args, const BatchNorm& bn, const void* weight,
                                int64_t outputs, const NormGradArgs& norm_grad);

// grad_weight [N, C], contiguous.
void bn_relu_conv1x1_grad_weight(const KernelArgs& args, const BatchNorm& bn, int64_t outputs,
                                 const View& grad_z, float* grad_weight);

}  // namespace cuda
}  // namespace efficient_densenet
