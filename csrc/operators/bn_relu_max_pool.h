// y = max_pool(relu(bn(x))) with window 3, stride 2 and padding 1 in each spatial dimension, and
// its backward pass: what follows the first convolution of a DenseNet for large images.
//
// In each dimension, place k = 0, 1, 2 of window o is pixel 2 o - 1 + k, where there is one:
//
//   pixel      -1   0   1   2   3   4   5      pixel 2 o      is in window o      at place 1
//   window 0  [         ]                      pixel 2 o + 1  is in window o      at place 2
//   window 1            [         ]                           and in window o + 1 at place 0
//   window 2                      [         ]
//
// Of equal values the first one wins, in the order of places, as in torch. A byte per pooled
// element keeps which one won. It takes 1 byte per 2^dims elements of x, written once and read
// twice: in two dimensions and 16 bits 6 % of the bytes that forward and backward pass move. A
// search instead would normalise the 25 pixels in the windows of 4 pixels, twice, which costs two
// to three times as long as reading x does.
//
// `KernelArgs` has one feature, x, and always four row dimensions: images and three spatial ones.
// What is lacking is in front, of size 1 (a window then holds its own pixel, at place 1). Views of
// pooled tensors have the pooled rows; y, grad_y and winners of a call have the same strides.
#pragma once

#include "common/kernel_args.h"

#ifdef __CUDACC__
#define EFFICIENT_DENSENET_HOST_DEVICE __host__ __device__
#else
#define EFFICIENT_DENSENET_HOST_DEVICE
#endif

namespace efficient_densenet {

constexpr int kPlaces = 3;  // of a window, in one dimension

EFFICIENT_DENSENET_HOST_DEVICE inline int64_t pixel_at(int64_t window, int place) {
  return 2 * window - 1 + place;
}

// The place that pixel 2 o + parity has in window o + next; `next` is at most `parity`.
EFFICIENT_DENSENET_HOST_DEVICE constexpr int place_in(int parity, int next) {
  return 1 + parity - 2 * next;
}

// A place in all dimensions.
EFFICIENT_DENSENET_HOST_DEVICE constexpr int joint_place(int d, int h, int w) {
  return (d * kPlaces + h) * kPlaces + w;
}

inline RowSpace pooled_rows(const RowSpace& rows) {
  RowSpace pooled{kMaxRowDims, {rows.sizes[0]}, rows.sizes[0]};
  for (int d = 1; d < kMaxRowDims; ++d) {
    pooled.sizes[d] = (rows.sizes[d] + 1) / 2;
    pooled.count *= pooled.sizes[d];
  }
  return pooled;
}

// Of an [N, C, *pooled] pair: a result or its gradient, and a byte per element, the joint place of
// the pixel that won.
struct Pooled {
  View y;        // or grad_y
  View winners;  // data is null where no backward pass will need them
};

namespace cpu {
void bn_relu_max_pool(const KernelArgs& args, const BatchNorm& bn, const Pooled& pooled);
// `gradients` are those of x, whose grad_y is not used: pooled.y is.
void bn_relu_max_pool_backward(const KernelArgs& args, const BatchNorm& bn, const Pooled& pooled,
                               const Gradients& gradients);
}  // namespace cpu

namespace cuda {
void bn_relu_max_pool(const KernelArgs& args, const BatchNorm& bn, const Pooled& pooled);
void bn_relu_max_pool_backward(const KernelArgs& args, const BatchNorm& bn, const Pooled& pooled,
                               const Gradients& gradients);
}  // namespace cuda

}  // namespace efficient_densenet
