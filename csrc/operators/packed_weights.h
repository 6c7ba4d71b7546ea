// Weights as the tensor-core kernels read them: cut into the pieces that the lanes of a warp hold,
// padded by zeros. All that a block needs are packed in one launch.
#pragma once

#include "common/kernel_args.h"
#include "common/weights.h"

namespace efficient_densenet {

// Which kernel reads a weight: the forward one, or that of the gradient of the input.
enum class WeightLayout { kForward, kGradInput };

// One weight per layer: the l-th is [outputs, channels + l growth], or with 3x3 behind that.
struct WeightsToPack {
  WeightLayout layout;
  bool is_3x3;
  WeightViews views;
  int64_t outputs, channels, growth;
};

struct PackJob {
  WeightsToPack weights;
  void* packed;  // all of them, one after the other
};

// Memory that is to be 0 before the next kernels run: the same launch sees to that. Whole pieces of
// 16 bytes.
struct ZeroMemory {
  void* data;
  int64_t bytes;
};

namespace cuda {

// Bytes of the l-th of them for M rows: the layout depends on how many.
int64_t packed_bytes(Element element, int64_t rows, const WeightsToPack& weights, int64_t layer);

void pack_weights(Element element, int64_t rows, const std::vector<PackJob>& jobs,
                  const ZeroMemory& zeros, void* stream);

}  // namespace cuda
}  // namespace efficient_densenet
