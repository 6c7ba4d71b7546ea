// The Python module `efficient_densenet._C`. Importing it registers the operators (the library
// initialisers of the other files run); its functions say how it was built and what it can run.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef EFFICIENT_DENSENET_CUDA
#include <cuda_runtime_api.h>
#endif

#include <string>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "dense_block/kernel_path.h"
#include "operators/bn_relu_conv1x1.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = EFFICIENT_DENSENET_VERSION;
  info["torch"] = EFFICIENT_DENSENET_TORCH;
#ifdef EFFICIENT_DENSENET_CUDA
  info["cuda"] =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["architectures"] = EFFICIENT_DENSENET_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["architectures"] = "CPU only";
#endif
  return info;
}

// `itemsize` is that of the dtype; both of 16 bits have the same limits.
efficient_densenet::Element element_of(int itemsize) {
  using efficient_densenet::Element;
  return itemsize == 8 ? Element::kDouble : itemsize == 4 ? Element::kFloat : Element::kBFloat16;
}

// How a block with such features [N, C, *spatial] runs: the way of its 1x1 convolutions; why they
// are not on tensor cores; why its second convolutions are not.
std::tuple<std::string, std::string, std::string> kernel_path(
    const std::string& device_type, int device_index, int itemsize, bool allow_tf32,
    bool products_match_convolutions, const std::vector<int64_t>& sizes, int64_t growth,
    int64_t bottleneck, const std::vector<int64_t>& kernel, bool drops) {
  using namespace efficient_densenet;
  EFFICIENT_DENSENET_CHECK(sizes.size() >= 2, "kernel_path", "sizes: expected [N, C, *spatial]");
  const KernelPath path = choose_kernel_path(
      {allow_tf32, products_match_convolutions},
      {device_type, device_index, element_of(itemsize), sizes, growth, bottleneck, kernel, drops});
  const char* const names[] = {"convolutions", "matrix products", "tensor cores"};
  return {names[static_cast<int>(path.conv1)], path.why_not_conv1, path.why_not_conv2};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &build_info, "How this module was built.");
  module.def("kernel_path", &kernel_path, py::arg("device_type"), py::arg("device_index"),
             py::arg("itemsize"), py::arg("allow_tf32"), py::arg("products_match_convolutions"),
             py::arg("sizes"), py::arg("growth"), py::arg("bottleneck"), py::arg("kernel"),
             py::arg("drops"),
             "How a dense block's convolutions run, and why not on tensor cores.");
  module.def("limit_shared_memory", &efficient_densenet::cuda::limit_shared_memory,
             "For tests: as on a device with less shared memory, in bytes; 0 ends that.");
}
