#include "dense_block/matrix.h"

namespace efficient_densenet {

View TensorMatrix::view() const {
  char* const data = static_cast<char*>(tensor->data_ptr());
  return {data + offset * static_cast<int64_t>(tensor->element_size()), 1, {row_stride}};
}

Tensor TensorMatrix::as_matrix(int64_t rows, int64_t channels) const {
  return reinterpret(*tensor, offset, {rows, channels}, {row_stride, 1});
}

Tensor TensorMatrix::as_line(int64_t rows, int64_t channels) const {
  return reinterpret(*tensor, offset, {1, channels, 1, rows},
                     {rows * row_stride, 1, rows * row_stride, row_stride});
}

Tensor TensorMatrix::as_images(int64_t images, int64_t channels, const Sizes& spatial) const {
  return reinterpret(*tensor, offset, with_sizes(images, channels, spatial),
                     channels_last_strides(row_stride, spatial));
}

Tensor transpose(const Tensor& matrix) {
  return reinterpret(matrix, 0, {matrix.size(1), matrix.size(0)},
                     {matrix.stride(1), matrix.stride(0)});
}

Tensor as_convolution(const Tensor& matrix, int64_t dims) {
  const Sizes ones(dims, 1);
  Sizes strides = with_sizes(matrix.size(1), 1, ones);
  return reinterpret(matrix, 0, with_sizes(matrix.size(0), matrix.size(1), ones), strides);
}

Sizes with_sizes(int64_t first, int64_t second, const Sizes& sizes) {
  Sizes all{first, second};
  all.insert(all.end(), sizes.begin(), sizes.end());
  return all;
}

Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return strides;
}

Sizes channels_last_strides(int64_t row_stride, const Sizes& sizes) {
  Sizes strides(2 + sizes.size(), 1);
  int64_t stride = row_stride;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[2 + d] = stride;
    stride *= sizes[d];
  }
  strides[0] = stride;
  return strides;
}

Tensor with_inner_channels(const Tensor& tensor, const Sizes& sizes) {
  const Sizes expected = channels_last_strides(tensor.size(1), sizes);
  bool fits = true;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected[d]) fits = false;
  }
  if (fits) return tensor;
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(
      tensor, sizes.size() == 3 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast);
}

TensorMatrix matrix_of(const Tensor& images) { return {&images, 0, images.size(1)}; }

}  // namespace efficient_densenet
