#include "common/arguments.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <utility>

namespace efficient_densenet {
namespace {

Sizes sizes_of(const Tensor& tensor) {
  Sizes sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  return sizes;
}

// Elements from the first to behind the last one.
int64_t extent_of(const Tensor& tensor) {
  int64_t extent = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) extent += (tensor.size(d) - 1) * tensor.stride(d);
  return extent;
}

// Whether every element has a place of its own: sorted by strides, each dimension steps over all
// that the ones before it reach.
bool elements_are_apart(const Tensor& tensor) {
  if (tensor.numel() <= 1) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return false;
    reach += stride * (size - 1);
  }
  return true;
}

// The distance of the rows, or -1 where they are not evenly apart.
int64_t even_row_stride(const Tensor& tensor) {
  int64_t stride = -1, next = 0;
  for (int64_t i = tensor.dim() - 1; i >= 1; --i) {
    const int64_t d = i == 1 ? 0 : i;  // images are the outermost
    if (tensor.size(d) == 1) continue;
    if (stride < 0) {
      stride = tensor.stride(d);
    } else if (tensor.stride(d) != next) {
      return -1;
    }
    next = tensor.stride(d) * tensor.size(d);
  }
  return stride < 0 ? tensor.size(1) : stride;  // of a single row
}

}  // namespace

bool has_memory_for_all(const Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  int64_t bytes = 0;
  if (aoti_torch_get_storage_size(tensor.get(), &bytes) != 0) return false;
  const int64_t end = tensor.storage_offset() + extent_of(tensor);
  return end <= bytes / static_cast<int64_t>(tensor.element_size());
}

std::string describe(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

std::string describe(const Device& device) {
  if (device.is_cpu()) return "cpu";
  if (device.is_cuda()) return "cuda:" + std::to_string(device.index());
  return "another type of device";
}

std::string describe(const Sizes& sizes) {
  std::string text = "[";
  for (size_t d = 0; d < sizes.size(); ++d) {
    text += (d == 0 ? "" : ", ") + std::to_string(sizes[d]);
  }
  return text + "]";
}

std::string describe(const Tensor& tensor) {
  Sizes strides;
  for (int64_t d = 0; d < tensor.dim(); ++d) strides.push_back(tensor.stride(d));
  return describe(tensor.scalar_type()) + " " + describe(sizes_of(tensor)) + " with strides " +
         describe(strides) + " on " + describe(tensor.device()) +
         (has_memory_for_all(tensor) ? "" : ", without memory for its elements");
}

void ArgumentChecks::on_device(const char* name, const Tensor& tensor) const {
  if (tensor.device() == device_) return;
  expect(false, name, tensor, "a tensor on ", describe(device_));
}

void ArgumentChecks::has_memory(const char* name, const Tensor& tensor, ScalarType dtype) const {
  if (tensor.scalar_type() != dtype) expect(false, name, tensor, describe(dtype));
  on_device(name, tensor);
  expect(has_memory_for_all(tensor), name, tensor, "memory");
}

void ArgumentChecks::has_sizes(const char* name, const Tensor& tensor, const Sizes& sizes) const {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; fits && d < sizes.size(); ++d) {
    fits = tensor.size(static_cast<int64_t>(d)) == sizes[d];
  }
  if (!fits) expect(false, name, tensor, "the sizes ", describe(sizes));
}

void ArgumentChecks::any_strides(const char* name, const Tensor& tensor, ScalarType dtype,
                                 Access access) const {
  has_memory(name, tensor, dtype);
  expect(access == Access::kRead || elements_are_apart(tensor), name, tensor,
         "elements that share no memory");
}

void* ArgumentChecks::contiguous(const char* name, const Tensor& tensor, ScalarType dtype,
                                 const Sizes& sizes) const {
  has_sizes(name, tensor, sizes);
  return contiguous(name, tensor, dtype, tensor.numel());
}

void* ArgumentChecks::contiguous(const char* name, const Tensor& tensor, ScalarType dtype,
                                 int64_t count) const {
  expect(tensor.numel() == count, name, tensor, count, " elements");
  has_memory(name, tensor, dtype);
  expect(tensor.is_contiguous(), name, tensor, "contiguous memory");
  return tensor.data_ptr();
}

int64_t ArgumentChecks::channels_last(const char* name, const Tensor& tensor, ScalarType dtype,
                                      const Sizes& sizes) const {
  has_sizes(name, tensor, sizes);
  has_memory(name, tensor, dtype);
  const int64_t stride = even_row_stride(tensor);
  expect((tensor.size(1) == 1 || tensor.stride(1) == 1) && stride >= tensor.size(1), name, tensor,
         "channels-last memory");
  return stride;
}

}  // namespace efficient_densenet
