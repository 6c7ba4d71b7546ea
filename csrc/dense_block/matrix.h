// Matrices in the memory of tensors, and tensors on that memory, without the dispatcher.
#pragma once

#include "common/aten.h"

namespace efficient_densenet {

// Rows and columns of a tensor from `offset` elements behind its first one.
struct TensorMatrix {
  const Tensor* tensor;  // outlives the matrix
  int64_t offset, row_stride;

  TensorMatrix at(int64_t row, int64_t channel) const {
    return {tensor, offset + row * row_stride + channel, row_stride};
  }
  View view() const;
  // [rows, channels]
  Tensor as_matrix(int64_t rows, int64_t channels) const;
  // The rows as one image of one line, [1, channels, 1, rows].
  Tensor as_line(int64_t rows, int64_t channels) const;
  // The rows as the pixels of images, [images, channels, *spatial].
  Tensor as_images(int64_t images, int64_t channels, const Sizes& spatial) const;
};

Tensor transpose(const Tensor& matrix);
// A matrix [B, C] as the weight of a 1x1 convolution of `dims` spatial dimensions.
Tensor as_convolution(const Tensor& matrix, int64_t dims = 2);

// [first, second, *sizes]
Sizes with_sizes(int64_t first, int64_t second, const Sizes& sizes);
Sizes contiguous_strides(const Sizes& sizes);
// Strides of [images, channels, *sizes] whose pixels are row_stride apart.
Sizes channels_last_strides(int64_t row_stride, const Sizes& sizes);
// The tensor with dense channels-last memory: some of ATen's convolutions answer in other strides.
Tensor with_inner_channels(const Tensor& tensor, const Sizes& sizes);
// Images whose memory is dense and channels-last.
TensorMatrix matrix_of(const Tensor& images);

}  // namespace efficient_densenet
