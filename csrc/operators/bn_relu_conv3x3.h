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

namespace efficient_densenet {

constexpr int64_t kMaxConv3x3Outputs = 64, kMaxConv3x3Channels = 256;

// All layers' weights of a block, [L, k, 3, 3, B], contiguous.
struct Conv3x3Weights {
  const void* data;
  int64_t layers, outputs, channels;
};

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

// Bytes of one layer's packed weight: `grad_input` tells which kernel reads it.
int64_t packed_conv3x3_bytes(Element element, bool grad_input, int64_t outputs, int64_t channels);
// All layers, packed one after the other.
void pack_conv3x3(Element element, bool grad_input, const Conv3x3Weights& weights, void* packed,
                  void* stream);

// In all of these the feature is z. `moments` are of y as stored; null: not needed. Where z
// `is_normalised`, it holds relu(bn(z)) already, as operands.
void bn_relu_conv3x3(const KernelArgs& args, const BatchNorm& bn, bool is_normalised,
                     const ImageSize& image, const void* weight, int64_t outputs, const View& y,
                     const Statistics* moments);

// Elements from row to row of grad_y below.
int64_t conv3x3_grad_pitch(Element element, int64_t outputs);

// args.features[0].grad_x and gradients.grad_y are both the gradient of z: first it holds that
// of relu(bn(z)), then the result. grad_y [M, pitch] becomes the gathered gradient of y.
void bn_relu_conv3x3_grad_input(const KernelArgs& args, const BatchNorm& bn, const ImageSize& image,
                                const void* weight, int64_t outputs, const Gathered& gathered,
                                const View& grad_y, const Gradients& gradients);

// grad_weight [k, 3, 3, B], contiguous, of the dtype of z; grad_y as made above.
void bn_relu_conv3x3_grad_weight(const KernelArgs& args, const BatchNorm& bn,
                                 const ImageSize& image, int64_t outputs, const View& grad_y,
                                 void* grad_weight);

}  // namespace cuda
}  // namespace efficient_densenet
