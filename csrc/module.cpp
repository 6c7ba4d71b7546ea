// The Python module `efficient_densenet._C`. Importing it registers the operators (the library
// initialisers of the other files run); its only function says how it was built.

#include <pybind11/pybind11.h>

#ifdef EFFICIENT_DENSENET_CUDA
#include <cuda_runtime_api.h>
#endif

#include <string>

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

PYBIND11_MODULE(_C, module) { module.def("build_info", &build_info, "How this module was built."); }
