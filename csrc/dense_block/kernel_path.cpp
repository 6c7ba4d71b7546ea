#include "dense_block/kernel_path.h"

#include "operators/bn_relu_conv1x1.h"
#include "operators/bn_relu_conv3x3.h"

namespace efficient_densenet {
namespace {

using Sizes = std::vector<int64_t>;

// As Python writes a tuple.
std::string tuple_text(const Sizes& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

std::string why_not_conv1(const PrecisionSettings& settings, const BlockShape& shape) {
  if (shape.device_type != "cuda") return "the features are on " + shape.device_type;
  if (shape.element == Element::kFloat && !settings.allow_tf32) {
    return "TF32 is off for convolutions";
  }
  return cuda::why_no_tensor_cores(shape.device_index, shape.element, shape.bottleneck,
                                   shape.sizes[1]);
}

std::string why_not_conv2(const BlockShape& shape) {
  if (shape.sizes.size() != 4 || shape.kernel != Sizes{3, 3}) {
    return "convolutions of size " + tuple_text(shape.kernel) + " of " +
           std::to_string(shape.sizes.size() - 2) + " spatial dimensions";
  }
  if (shape.drops) return "dropout follows the convolutions";
  return cuda::why_no_conv3x3(shape.device_index, shape.element, shape.growth, shape.bottleneck,
                              shape.sizes[3]);
}

// Whether our kernel for the gradient of conv2's input is faster than cuDNN with the passes over
// memory around it: measured on an H100 (benchmarks/results/kernels.md). With few output channels
// most of cuDNN's tile is padding, and with few rows it is bound by latency. cuDNN can read the
// gathered gradient only where its rows are not padded.
bool conv2_grad_input_is_faster(const BlockShape& shape) {
  const int64_t rows = shape.sizes[0] * shape.sizes[2] * shape.sizes[3];
  const bool is_slow = shape.growth > 32 || (shape.growth > 16 && rows > 262144);
  return !is_slow || cuda::conv3x3_grad_pitch(shape.element, shape.growth) != shape.growth;
}

}  // namespace

bool projection_multiplies(const PrecisionSettings& settings, Element element) {
  return element != Element::kFloat || settings.products_match_convolutions;
}

KernelPath choose_kernel_path(const PrecisionSettings& settings, const BlockShape& shape) {
  KernelPath path{};
  path.projection_multiplies = projection_multiplies(settings, shape.element);
  path.why_not_conv1 = why_not_conv1(settings, shape);
  if (path.why_not_conv1.empty()) {
    path.conv1 = Conv1x1::kTensorCores;
    path.why_not_conv2 = why_not_conv2(shape);
  } else {
    path.conv1 = path.projection_multiplies ? Conv1x1::kProduct : Conv1x1::kConvolution;
    path.why_not_conv2 = path.why_not_conv1;
  }
  path.conv2_on_tensor_cores = path.why_not_conv2.empty();
  path.conv2_grad_input_on_tensor_cores =
      path.conv2_on_tensor_cores && conv2_grad_input_is_faster(shape);
  return path;
}

}  // namespace efficient_densenet
