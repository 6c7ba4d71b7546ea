// How the convolutions of a dense block run. Both operators choose here, once per call, from
// torch's settings and the sizes; nothing else chooses.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/kernel_args.h"

namespace efficient_densenet {

// What torch's settings say of float32.
struct PrecisionSettings {
  bool allow_tf32;                   // its convolutions may use TF32
  bool products_match_convolutions;  // its matrix products have the same setting
};

// What else the choice depends on.
struct BlockShape {
  std::string device_type;
  int device_index;  // of a CUDA device
  Element element;
  std::vector<int64_t> sizes;  // of the features, [N, C, *spatial]
  int64_t growth, bottleneck;
  std::vector<int64_t> kernel;  // of the second convolutions
  bool drops;                   // dropout follows them
};

// kConvolution is torch's, for float32 whose products have another setting than its convolutions.
enum class Conv1x1 { kConvolution, kProduct, kTensorCores };

struct KernelPath {
  Conv1x1 conv1;
  bool projection_multiplies;  // else it is a convolution of torch's
  bool conv2_on_tensor_cores;
  bool conv2_grad_input_on_tensor_cores;  // else by torch, although the other kernels are ours
  // Empty, or why a convolution does not run on tensor cores.
  std::string why_not_conv1, why_not_conv2;
};

// Whether a 1x1 convolution may be a matrix product.
bool projection_multiplies(const PrecisionSettings& settings, Element element);

KernelPath choose_kernel_path(const PrecisionSettings& settings, const BlockShape& shape);

}  // namespace efficient_densenet
