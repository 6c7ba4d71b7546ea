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

// What efficient_densenet/remembered.py compares in every step, of modules and all inside of them:
// each one's class, whether it has hooks, a forward of its own and a bias, and the attributes that
// `names_of[class]` names (None where there is none). No tensor and no module is among them.
py::tuple module_facts(const std::vector<py::object>& roots, const py::object& names_of,
                       const std::vector<py::str>& hooks) {
  const py::str modules_name("_modules"), parameters_name("_parameters"), forward_name("forward"),
      bias_name("bias");
  std::vector<py::object> facts, level = roots;
  const auto attributes_of = [](const py::object& module) {
    PyObject* const attributes = PyObject_GenericGetDict(module.ptr(), nullptr);
    if (attributes == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::dict>(attributes);
  };
  const auto find = [](const py::dict& attributes, const py::handle& name) {
    PyObject* const found = PyDict_GetItemWithError(attributes.ptr(), name.ptr());
    if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return py::handle(found == nullptr ? Py_None : found);
  };
  while (!level.empty()) {
    std::vector<py::object> children;
    for (const py::object& module : level) {
      const py::dict own = attributes_of(module);
      const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(module.ptr())));
      bool has_hooks = false;
      for (const py::str& name : hooks) has_hooks |= py::len(find(own, name)) > 0;
      facts.push_back(py::reinterpret_borrow<py::object>(type));
      facts.push_back(py::bool_(has_hooks));
      facts.push_back(py::bool_(own.contains(forward_name)));
      // The replicas of nn.DataParallel have plain attributes instead of parameters.
      const auto parameters = py::reinterpret_borrow<py::dict>(find(own, parameters_name));
      facts.push_back(
          py::bool_(!find(parameters, bias_name).is_none() || !find(own, bias_name).is_none()));
      for (const py::handle name : names_of[type]) {
        facts.push_back(py::reinterpret_borrow<py::object>(find(own, name)));
      }
      const py::handle modules = find(own, modules_name);
      for (const auto& [name, child] : py::reinterpret_borrow<py::dict>(modules)) {
        if (!child.is_none()) children.push_back(py::reinterpret_borrow<py::object>(child));
      }
    }
    level = std::move(children);
  }
  py::tuple result(facts.size());
  for (size_t i = 0; i < facts.size(); ++i) result[i] = std::move(facts[i]);
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("module_facts", &module_facts, py::arg("roots"), py::arg("names_of"), py::arg("hooks"),
             "Of modules and all inside of them, what decides how they run.");
  module.def("build_info", &build_info, "How this module was built.");
  module.def("kernel_path", &kernel_path, py::arg("device_type"), py::arg("device_index"),
             py::arg("itemsize"), py::arg("allow_tf32"), py::arg("products_match_convolutions"),
             py::arg("sizes"), py::arg("growth"), py::arg("bottleneck"), py::arg("kernel"),
             py::arg("drops"),
             "How a dense block's convolutions run, and why not on tensor cores.");
  module.def("limit_shared_memory", &efficient_densenet::cuda::limit_shared_memory,
             "For tests: as on a device with less shared memory, in bytes; 0 ends that.");
}
