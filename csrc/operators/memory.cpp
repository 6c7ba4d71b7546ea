// For the operators that are written in Python: torch's own functions read past the end of a tensor
// whose storage was made smaller, as `storage.resize_(0)` does.
#include <torch/csrc/stable/library.h>

#include "common/arguments.h"

namespace efficient_densenet {
namespace {

// The index of the first of the tensors without memory for its elements, or -1.
int64_t first_without_memory(const Tensors& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!has_memory_for_all(tensors[i])) return static_cast<int64_t>(i);
  }
  return -1;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(efficient_densenet, m) {
  m.def("first_without_memory(Tensor[] tensors) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CPU, m) {
  m.impl("first_without_memory", TORCH_BOX(&first_without_memory));
}
STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CUDA, m) {
  m.impl("first_without_memory", TORCH_BOX(&first_without_memory));
}

}  // namespace efficient_densenet
