// The operators of ATen that a block needs, called through the dispatcher of the stable ABI.
//
// They follow torch's settings (TF32, cudnn.benchmark, deterministic algorithms), and a failure
// keeps its text where this torch can tell it (2.13 and later). None of them may take a Scalar,
// which that dispatcher does not pass on: no addmm, no add.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "common/tensors.h"

namespace efficient_densenet {

// A tensor in the memory of another one, without the dispatcher.
Tensor reinterpret(const Tensor& tensor, int64_t offset, const Sizes& sizes, const Sizes& strides);

}  // namespace efficient_densenet

namespace efficient_densenet::aten {

// Turns gradients off for as long as it lives: the operators write to memory of their caller, which
// ATen refuses for tensors that require gradients.
class GradModeOff {
 public:
  GradModeOff() : before_(aoti_torch_grad_mode_is_enabled()) {
    aoti_torch_grad_mode_set_enabled(false);
  }
  ~GradModeOff() { aoti_torch_grad_mode_set_enabled(before_); }
  GradModeOff(const GradModeOff&) = delete;
  GradModeOff& operator=(const GradModeOff&) = delete;

 private:
  bool before_;
};

// out = a b
void mm_out(const Tensor& a, const Tensor& b, const Tensor& out);

// The same where `out` is of a wider type, so that sums of 16-bit products are not rounded.
void wide_mm_out(const Tensor& a, const Tensor& b, const Tensor& out);

// A view of x's memory from an element on.
Tensor as_strided(const Tensor& x, const Sizes& sizes, const Sizes& strides, int64_t offset);

// Of the dtype and device of x.
Tensor new_empty_strided(const Tensor& x, const Sizes& sizes, const Sizes& strides);

// out = x, whatever the dtypes and strides.
void copy(const Tensor& x, const Tensor& out);

// out = the tensors one after the other along their first dimension.
void cat_out(const Tensors& tensors, const Tensor& out);

// out = the sum of x over its first dimension.
void sum_out(const Tensor& x, const Tensor& out);

// Stride 1, zero padding of half the kernel ("same" for odd kernels), no bias.
Tensor convolution(const Tensor& x, const Tensor& weight);

struct ConvolutionGradients {
  std::optional<Tensor> x, weight;  // those that were asked for
};
ConvolutionGradients convolution_backward(const Tensor& grad_y, const Tensor& x,
                                          const Tensor& weight, bool needs_x, bool needs_weight);

// x where the mask is set, times scale, else 0: forward and backward of dropout.
Tensor apply_dropout(const Tensor& x, const Tensor& mask, double scale);

}  // namespace efficient_densenet::aten
