// Weights of the layers of a block, and their gradients, where their owner keeps them: kernels read
// parameters as they are, and write gradients with the strides of these.
#pragma once

#include <cstdint>
#include <vector>

namespace efficient_densenet {

// Memory of one weight [N, C] or [k, B, height, width]; strides in elements.
struct WeightView {
  const void* data;
  int64_t strides[4];
};

// One per layer. The elements are those of the features, or float.
struct WeightViews {
  std::vector<WeightView> layers;
  bool is_float;
};

// Memory of the gradient of one weight [k, B, height, width]; strides in elements. They are those
// of the features, or float.
struct WeightGradient {
  void* data;
  int64_t strides[4];
  bool is_float;
};

}  // namespace efficient_densenet
