// The Python module `efficient_densenet._C`. Importing it registers the operators (the library
// initialisers of the other files run); its functions say how it was built and what it can run.

#include <pybind11/pybind11.h>

#ifdef EFFICIENT_DENSENET_CUDA
#include <cuda_runtime_api.h>
#endif

#include <string>

#include "bn_relu_conv1x1.h"

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

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &build_info, "How this module was built.");
  module.def("why_no_tensor_cores", &efficient_densenet::cuda::why_no_tensor_cores,
             "Empty, or why the tensor-core kernels cannot run on a CUDA device.");
  module.attr("MAX_CONV1X1_OUTPUTS") = efficient_densenet::kMaxConv1x1Outputs;
  module.attr("MAX_CONV1X1_CHANNELS") = efficient_densenet::kMaxConv1x1Channels;
}
