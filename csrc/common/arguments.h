// Checks of an operator's tensors. Anybody may call the operators of torch.ops with anything, so
// everything that a kernel relies on is checked before anything is computed or written: dimensions,
// sizes, dtype, device, strides, and that the memory exists. A message names the operator, the
// argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "common/checks.h"

namespace efficient_densenet {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Sizes = std::vector<int64_t>;

std::string describe(ScalarType dtype);
std::string describe(const Device& device);
std::string describe(const Sizes& sizes);
// Such as "float32 [2, 3] with strides [3, 1] on cpu".
std::string describe(const Tensor& tensor);

// Whether its storage holds all of its elements.
bool has_memory_for_all(const Tensor& tensor);

enum class Access { kRead, kWrite };

class ArgumentChecks {
 public:
  ArgumentChecks(const char* op, const Device& device) : op_(op), device_(device) {}

  // Fails unless the condition holds; `expected` are the parts of a text.
  template <typename... Parts>
  void expect(bool condition, const char* name, const Tensor& tensor,
              const Parts&... expected) const {
    if (!condition) fail(op_, name, ": expected ", expected..., ", got ", describe(tensor));
  }

  template <typename... Parts>
  void check(bool condition, const Parts&... message) const {
    if (!condition) fail(op_, message...);
  }

  // Each fails unless the tensor has this dtype, is on the device of the call and has memory for
  // all of its elements, and ...
  // ... no two elements that are written share memory, whatever the strides.
  void any_strides(const char* name, const Tensor& tensor, ScalarType dtype, Access access) const;
  // ... these sizes, in contiguous memory. Returns the memory.
  void* contiguous(const char* name, const Tensor& tensor, ScalarType dtype,
                   const Sizes& sizes) const;
  // ... as many elements, in contiguous memory. Returns the memory.
  void* contiguous(const char* name, const Tensor& tensor, ScalarType dtype, int64_t count) const;
  // ... these sizes [N, C, *spatial] (or [M, C]), the channels next to each other and the rows
  // evenly apart. Returns the distance of the rows.
  int64_t channels_last(const char* name, const Tensor& tensor, ScalarType dtype,
                        const Sizes& sizes) const;
  void has_sizes(const char* name, const Tensor& tensor, const Sizes& sizes) const;
  void on_device(const char* name, const Tensor& tensor) const;

 private:
  void has_memory(const char* name, const Tensor& tensor, ScalarType dtype) const;

  const char* op_;
  Device device_;
};

}  // namespace efficient_densenet
