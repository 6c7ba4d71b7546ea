// Batch norm, ReLU and 3x3 convolution of images in one kernel each for forward, the gradient of
// the input and that of the weight, on tensor cores (compute capability 8.0 on; float16, bfloat16,
// float32 as TF32).
//
//   y = conv3x3(relu(bn(z)))     z [M, B], rows are the pixels of images; y [M, k]; padding of 1,
//                                which is 0 after the ReLU
//
// A pixel's neighbours are rows at fixed distances: tap (dy, dx) of row r reads row r + dy W + dx.
// So kernels work on stretches of rows, with W + 1 more on either side, and leave out the taps that
// fall off the image, whatever its size.
#pragma once

#include <string>

#include "dense_block/kernels.h"
#include "operators/left_over.h"
#include "operators/packed_weights.h"

namespace efficient_densenet {

constexpr int64_t kMaxConv3x3Outputs = 64, kMaxConv3x3Channels = 256;

struct ImageSize {
  int64_t height, width;
};

// The gradient of y where it is gathered: G of its channels, the correction, and y itself.
struct Gathered {
  View grad_features;  // G, float
  View y;
  const double* mean;  // of y, [k]; null where no norm with batch statistics reads y: no correction
  Correction correction;
};

namespace cuda {

// Empty, or why the kernels cannot run on a device.
std::string why_no_conv3x3(int device_index, Element element, int64_t outputs, int64_t channels,
                           int64_t width);

// In all of these the feature is z. `moments` are of y as stored; null: not needed. Where z
// `is_normalised`, it holds relu(bn(z)) already, as operands.
void bn_relu_conv3x3(const KernelArgs& args, const BatchNorm& bn, bool is_normalised,
                     const ImageSize& image, const void* weight, int64_t outputs, const View& y,
                     const Statistics* moments, const MomentsLeft& z_left, MomentsLeft* y_left);

// Elements from row to row of grad_y below.
int64_t conv3x3_grad_pitch(Element element, int64_t outputs);

// gradients.grad_y becomes the gradient of relu(bn(z)), 0 behind a closed ReLU, and the sums those
// of its rows; grad_y [M, pitch] becomes the gathered gradient of y.
void bn_relu_conv3x3_grad_input(const KernelArgs& args, const BatchNorm& bn, const ImageSize& image,
                                const void* weight, int64_t outputs, const Gathered& gathered,
                                const View& grad_y, const Gradients& gradients, NormSumsLeft* left);

// grad_y as made above. Adds up what kernels before have left; its own parts then stand there.
void bn_relu_conv3x3_grad_weight(const KernelArgs& args, const BatchNorm& bn,
                                 const ImageSize& image, int64_t outputs, const View& grad_y,
                                 const WeightGradient& grad_weight, WeightParts* parts_left,
                                 const NormSumsLeft& sums_left);

}  // namespace cuda
}  // namespace efficient_densenet
