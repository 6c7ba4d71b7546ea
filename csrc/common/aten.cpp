#include "common/aten.h"

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <string>

namespace efficient_densenet {

Tensor reinterpret(const Tensor& tensor, int64_t offset, const Sizes& sizes, const Sizes& strides) {
  AtenTensorHandle result = nullptr;
  if (aoti_torch__reinterpret_tensor(tensor.get(), sizes.size(), sizes.data(), strides.data(),
                                     offset, &result) != 0) {
    fail("efficient_densenet", "aoti_torch__reinterpret_tensor failed");
  }
  return Tensor(result);
}

}  // namespace efficient_densenet

namespace efficient_densenet::aten {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// The function is newer than the oldest torch that this module runs beside.
std::string last_error() {
  using What = const char* (*)();
  static const auto what = [] {
    void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    void* const symbol =
        library == nullptr ? nullptr : dlsym(library, "torch_exception_get_what_without_backtrace");
    return reinterpret_cast<What>(symbol);
  }();
  const char* const text = what == nullptr ? nullptr : what();
  return text == nullptr ? "torch has printed why" : text;
}

template <size_t n>
void call(const char* name, const char* overload, std::array<StableIValue, n>& stack) {
  if (torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) != 0) {
    fail("efficient_densenet", name, " failed: ", last_error());
  }
}

// The result is an argument as well; its second reference is released.
template <size_t n>
void call_and_drop_result(const char* name, const char* overload,
                          std::array<StableIValue, n>& stack) {
  call(name, overload, stack);
  to<Tensor>(stack[0]);
}

// Under autocast, torch's convolutions answer in its dtype, whatever they were given.
const Tensor& in_dtype_of(const Tensor& x, const Tensor& result) {
  EFFICIENT_DENSENET_CHECK(result.scalar_type() == x.scalar_type(), "efficient_densenet",
                           "a convolution of ", describe(x.scalar_type()), " answered in ",
                           describe(result.scalar_type()),
                           ": call the operator where autocast is disabled");
  return result;
}

struct Convolution {
  Sizes stride, padding, dilation, output_padding;

  explicit Convolution(const Tensor& weight) {
    for (int64_t d = 2; d < weight.dim(); ++d) padding.push_back(weight.size(d) / 2);
    stride = dilation = Sizes(padding.size(), 1);
    output_padding = Sizes(padding.size(), 0);
  }
};

// A convolution's operand as torch computes it rightly. In bfloat16, on the CPU, torch 2.11 to 2.14
// convolve three dimensions wrongly with channels-last strides where images are smaller than the
// kernel, and write the weight's gradient out of bounds. They take the strides of a single channel,
// which fit both formats, for channels-last. So such tensors get contiguous memory and its strides.
Tensor operand(const Tensor& tensor) {
  if (!tensor.device().is_cpu() || tensor.dim() != 5 ||
      tensor.scalar_type() != ScalarType::BFloat16) {
    return tensor;
  }
  Sizes sizes(5), strides(5);
  int64_t stride = 1;
  for (int64_t d = 4; d >= 0; --d) {
    sizes[d] = tensor.size(d);
    strides[d] = stride;
    stride *= sizes[d];
  }
  return reinterpret(torch::stable::contiguous(tensor), 0, sizes, strides);
}

}  // namespace

void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  call_and_drop_result("aten::mm", "out", stack);
}

void wide_mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (a.scalar_type() == out.scalar_type()) return mm_out(a, b, out);
  if (a.device().is_cpu()) {  // has no product of a wider type
    std::array<StableIValue, 2> stack{from(a), from(b)};
    call("aten::mm", "", stack);
    return copy(to<Tensor>(stack[0]), out);
  }
  std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
  call_and_drop_result("aten::mm", "dtype_out", stack);
}

Tensor as_strided(const Tensor& x, const Sizes& sizes, const Sizes& strides, int64_t offset) {
  std::array<StableIValue, 4> stack{from(x), from(sizes), from(strides),
                                    from(std::optional(offset))};
  call("aten::as_strided", "", stack);
  return to<Tensor>(stack[0]);
}

Tensor new_empty_strided(const Tensor& x, const Sizes& sizes, const Sizes& strides) {
  std::array<StableIValue, 7> stack{from(x),
                                    from(sizes),
                                    from(strides),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt)};
  call("aten::new_empty_strided", "", stack);
  return to<Tensor>(stack[0]);
}

void copy(const Tensor& x, const Tensor& out) {
  std::array<StableIValue, 3> stack{from(out), from(x), from(false)};
  call_and_drop_result("aten::copy_", "", stack);
}

void cat_out(const Tensors& tensors, const Tensor& out) {
  std::array<StableIValue, 3> stack{from(tensors), from(int64_t(0)), from(out)};
  call_and_drop_result("aten::cat", "out", stack);
}

void sum_out(const Tensor& x, const Tensor& out) {
  std::array<StableIValue, 5> stack{from(x), from(std::optional(Sizes{0})), from(false),
                                    from(std::nullopt), from(out)};
  call_and_drop_result("aten::sum", "IntList_out", stack);
}

Tensor convolution(const Tensor& x, const Tensor& weight) {
  const Convolution c(weight);
  std::array<StableIValue, 9> stack{from(operand(x)), from(operand(weight)),  from(std::nullopt),
                                    from(c.stride),   from(c.padding),        from(c.dilation),
                                    from(false),      from(c.output_padding), from(int64_t(1))};
  call("aten::convolution", "", stack);
  return in_dtype_of(x, to<Tensor>(stack[0]));
}

ConvolutionGradients convolution_backward(const Tensor& grad_y, const Tensor& x,
                                          const Tensor& weight, bool needs_x, bool needs_weight) {
  const Convolution c(weight);
  const bool needs[] = {needs_x, needs_weight, false};
  std::array<StableIValue, 11> stack{from(operand(grad_y)),
                                     from(operand(x)),
                                     from(operand(weight)),
                                     from(std::nullopt),
                                     from(c.stride),
                                     from(c.padding),
                                     from(c.dilation),
                                     from(false),
                                     from(c.output_padding),
                                     from(int64_t(1)),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(needs))};
  call("aten::convolution_backward", "", stack);
  ConvolutionGradients gradients;
  std::array<Tensor, 3> results{to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  if (needs_x) gradients.x = in_dtype_of(x, results[0]);
  if (needs_weight) gradients.weight = in_dtype_of(x, results[1]);
  return gradients;
}

Tensor apply_dropout(const Tensor& x, const Tensor& mask, double scale) {
  std::array<StableIValue, 3> stack{from(x), from(mask), from(scale)};
  call("aten::native_dropout_backward", "", stack);
  return to<Tensor>(stack[0]);
}

}  // namespace efficient_densenet::aten
