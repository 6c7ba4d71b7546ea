// The stream that torch uses on a device.
//
// The module has no link to libtorch_cuda, so that it also loads beside a CPU torch: the function
// is looked up in the library that torch has loaded already.
#include <dlfcn.h>

#include <cstdint>

#include "common/checks.h"
#include "common/kernel_args.h"

namespace efficient_densenet::cuda {
namespace {

using CurrentStream = int32_t (*)(int32_t device_index, void** stream);

CurrentStream find_current_stream() {
  void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* const symbol =
      library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  EFFICIENT_DENSENET_CHECK(symbol != nullptr, "efficient_densenet",
                           "got CUDA tensors, but the torch in use has no CUDA library");
  return reinterpret_cast<CurrentStream>(symbol);
}

}  // namespace

void* current_stream(int device_index) {
  static const CurrentStream torch_current_stream = find_current_stream();
  void* stream = nullptr;
  EFFICIENT_DENSENET_CHECK(torch_current_stream(device_index, &stream) == 0, "efficient_densenet",
                           "no current CUDA stream on device ", device_index);
  return stream;
}

}  // namespace efficient_densenet::cuda
