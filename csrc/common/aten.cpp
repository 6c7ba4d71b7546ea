#include "common/aten.h"

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <string>

namespace efficient_densenet::aten {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;
using Sizes = std::vector<int64_t>;

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

struct Convolution {
  Sizes stride, padding, dilation, output_padding;

  explicit Convolution(const Tensor& weight) {
    for (int64_t d = 2; d < weight.dim(); ++d) padding.push_back(weight.size(d) / 2);
    stride = dilation = Sizes(padding.size(), 1);
    output_padding = Sizes(padding.size(), 0);
  }
};

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
  std::array<StableIValue, 9> stack{from(x),        from(weight),           from(std::nullopt),
                                    from(c.stride), from(c.padding),        from(c.dilation),
                                    from(false),    from(c.output_padding), from(int64_t(1))};
  call("aten::convolution", "", stack);
  return to<Tensor>(stack[0]);
}

ConvolutionGradients convolution_backward(const Tensor& grad_y, const Tensor& x,
                                          const Tensor& weight, bool wants_x, bool wants_weight) {
  if (x.device().is_cpu() && x.dim() == 5 && x.scalar_type() == ScalarType::BFloat16 &&
      !x.is_contiguous()) {
    // With channels-last memory, torch 2.11 to 2.14 leave the weight's gradient unwritten where
    // images are smaller than the kernel.
    using torch::stable::contiguous;
    return convolution_backward(contiguous(grad_y), contiguous(x), contiguous(weight), wants_x,
                                wants_weight);
  }
  const Convolution c(weight);
  const bool wanted[] = {wants_x, wants_weight, false};
  std::array<StableIValue, 11> stack{from(grad_y),
                                     from(x),
                                     from(weight),
                                     from(std::nullopt),
                                     from(c.stride),
                                     from(c.padding),
                                     from(c.dilation),
                                     from(false),
                                     from(c.output_padding),
                                     from(int64_t(1)),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted))};
  call("aten::convolution_backward", "", stack);
  ConvolutionGradients gradients;
  std::array<Tensor, 3> results{to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  if (wants_x) gradients.x = results[0];
  if (wants_weight) gradients.weight = results[1];
  return gradients;
}

Tensor apply_dropout(const Tensor& x, const Tensor& mask, double scale) {
  std::array<StableIValue, 3> stack{from(x), from(mask), from(scale)};
  call("aten::native_dropout_backward", "", stack);
  return to<Tensor>(stack[0]);
}

}  // namespace efficient_densenet::aten
