// The tensor-core kernels of bn_relu_conv1x1.h as operators of their own, on matrices. A dense
// block calls the kernels directly (../dense_block); these are for tests and benchmarks of each.
#include "operators/bn_relu_conv1x1.h"

#include "common/kernel_call.h"

namespace efficient_densenet {
namespace {

class Call : public KernelCall {
 public:
  Call(const char* op, const Tensor& x, const NormTensors& norm, const Tensor& conv1)
      : KernelCall(op, "x", x, norm), conv1_(conv1) {
    checks().expect(conv1.dim() >= 2 && conv1.numel() > 0, "conv1", conv1, "[N, C]");
    outputs_ = conv1.size(0);
    check_kernels(cuda::why_no_tensor_cores(device_index(), element(), outputs_, channels()));
    numbers("conv1", conv1, dtype(), outputs_ * channels());
  }

  Tensor packed(WeightLayout layout) const {
    const WeightViews views{{{conv1_.data_ptr(), {channels(), 1}}}, false};
    return KernelCall::packed({layout, false, views, outputs_, channels(), 0});
  }

  int64_t outputs() const { return outputs_; }

 private:
  const Tensor& conv1_;
  int64_t outputs_;
};

void bn_relu_conv1x1(const Tensor& x, const Tensor& mean, const Tensor& var,
                     const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                     double eps, const Tensor& conv1, const Tensor& z,
                     const std::optional<Tensor>& moments) {
  Call call("efficient_densenet::bn_relu_conv1x1", x, {mean, var, weight, bias, eps}, conv1);
  const View z_view = call.check_matrix("z", z, call.dtype(), call.rows(), call.outputs());
  Statistics statistics{};
  if (moments) statistics = call.statistics("moments", *moments, call.outputs());
  const Tensor packed = call.packed(WeightLayout::kForward);
  const void* const data = packed.data_ptr();
  const Statistics* const needed = moments ? &statistics : nullptr;
  const FoldedNorm no_norm2{};
  MomentsLeft* const leaves_nothing = nullptr;
  call.run(cuda::bn_relu_conv1x1, data, call.outputs(), no_norm2, z_view, needed, MomentsLeft{},
           leaves_nothing);
}

// From the gradient of relu(norm2(z)); coefficients [5, N] as in Gradients::coefficients.
void bn_relu_conv1x1_backward(const Tensor& grad_a2, const Tensor& z, const Tensor& coefficients,
                              bool corrects, const Tensor& x, const Tensor& mean, const Tensor& var,
                              const std::optional<Tensor>& weight,
                              const std::optional<Tensor>& bias, double eps, const Tensor& conv1,
                              const Tensor& grad_z, const Tensor& grad_features,
                              const Tensor& grad_affine, const Tensor& correction,
                              bool batch_statistics, const std::optional<Tensor>& grad_conv1) {
  Call call("efficient_densenet::bn_relu_conv1x1_backward", x, {mean, var, weight, bias, eps},
            conv1);
  const int64_t channels = call.channels(), outputs = call.outputs();
  const auto matrix = [&](const char* name, const Tensor& tensor) {
    return call.check_matrix(name, tensor, call.dtype(), call.rows(), outputs);
  };
  const auto floats = [&](const char* name, const Tensor& tensor, int64_t count) {
    return static_cast<float*>(call.numbers(name, tensor, ScalarType::Float, count));
  };
  const NormGradient grad{matrix("grad_a2", grad_a2), matrix("z", z),
                          floats("coefficients", coefficients, 5 * outputs), corrects,
                          matrix("grad_z", grad_z)};
  float* const affine = floats("grad_affine", grad_affine, 2 * channels);
  auto* const sums = static_cast<double*>(
      call.numbers("correction", correction, ScalarType::Double, 2 * channels));
  const View features =
      call.check_matrix("grad_features", grad_features, ScalarType::Float, call.rows(), channels);
  WeightGradient to{nullptr, {channels, 1, 0, 0}, true};
  if (grad_conv1) to.data = floats("grad_conv1", *grad_conv1, outputs * channels);
  const Tensor packed = call.packed(WeightLayout::kGradInput);
  const void* const data = packed.data_ptr();
  const NormGradArgs norm_grad{grad.grad_z,
                               nullptr,
                               features,
                               nullptr,
                               affine,
                               affine + channels,
                               {sums, sums + channels},
                               true,
                               true,
                               false,
                               batch_statistics};
  ReaderSumsLeft sums_left{};
  call.run(cuda::bn_relu_conv1x1_grad_input, data, outputs, grad, norm_grad, &sums_left);
  if (!grad_conv1) return call.run_without_norm(cuda::add_reader_sums, sums_left);
  WeightParts parts{};
  call.run(cuda::bn_relu_conv1x1_grad_weight, outputs, grad.grad_z, to, &parts, sums_left);
  call.run_without_norm(cuda::add_weight_parts, parts);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(efficient_densenet, m) {
  m.def(
      "bn_relu_conv1x1(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "Tensor conv1, Tensor(a!) z, Tensor(b!)? moments) -> ()");
  m.def(
      "bn_relu_conv1x1_backward(Tensor grad_a2, Tensor z, Tensor coefficients, bool corrects, "
      "Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor conv1, "
      "Tensor(a!) grad_z, Tensor(b!) grad_features, Tensor(c!) grad_affine, Tensor(d!) correction, "
      "bool batch_statistics, Tensor(e!)? grad_conv1) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CUDA, m) {
  m.impl("bn_relu_conv1x1", TORCH_BOX(&bn_relu_conv1x1));
  m.impl("bn_relu_conv1x1_backward", TORCH_BOX(&bn_relu_conv1x1_backward));
}

}  // namespace efficient_densenet
