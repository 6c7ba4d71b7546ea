// The Python module `efficient_densenet._C`. Importing it registers the operators (the library
// initialisers of the other files run); its functions say how it was built and what it can run.

#include <pybind11/pybind11.h>

#ifdef EFFICIENT_DENSENET_CUDA
#include <cuda_runtime_api.h>
#endif

#include <string>

#include "bn_relu_conv1x1.h"
#include "bn_relu_conv3x3.h"

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

std::string why_no_tensor_cores(int device_index, int itemsize, int64_t outputs, int64_t channels) {
  return efficient_densenet::cuda::why_no_tensor_cores(device_index, element_of(itemsize), outputs,
                                                       channels);
}

std::string why_no_conv3x3(int device_index, int itemsize, int64_t outputs, int64_t channels,
                           int64_t width) {
  return efficient_densenet::cuda::why_no_conv3x3(device_index, element_of(itemsize), outputs,
                                                  channels, width);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &build_info, "How this module was built.");
  module.def("why_no_tensor_cores", &why_no_tensor_cores,
             "Empty, or why the tensor-core kernels cannot run on a CUDA device.");
  module.def("why_no_conv3x3", &why_no_conv3x3,
             "Empty, or why the kernels of 3x3 convolutions cannot run where the others can.");
  module.def("limit_shared_memory", &efficient_densenet::cuda::limit_shared_memory,
             "For tests: as on a device with less shared memory, in bytes; 0 ends that.");
}
