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
    Tensor memory =
        new_bytes(cuda::packed_conv1x1_bytes(element(), layout, rows(), outputs_, channels()));
    cuda::pack_conv1x1(element(), layout, rows(), {conv1_.data_ptr(), 1, outputs_, channels(), 0},
                       memory.data_ptr(), stream());
    return memory;
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
  call.run(cuda::bn_relu_conv1x1, data, call.outputs(), no_norm2, z_view, needed);
}

void bn_relu_conv1x1_backward(const Tensor& grad_z, const Tensor& x, const Tensor& mean,
                              const Tensor& var, const std::optional<Tensor>& weight,
                              const std::optional<Tensor>& bias, double eps, const Tensor& conv1,
                              const Tensor& grad_features, const Tensor& grad_affine,
                              const Tensor& correction, bool batch_statistics,
                              const std::optional<Tensor>& grad_conv1) {
  Call call("efficient_densenet::bn_relu_conv1x1_backward", x, {mean, var, weight, bias, eps},
            conv1);
  const int64_t channels = call.channels();
  const View grad_view =
      call.check_matrix("grad_z", grad_z, call.dtype(), call.rows(), call.outputs());
  auto* const affine = static_cast<float*>(
      call.numbers("grad_affine", grad_affine, ScalarType::Float, 2 * channels));
  auto* const sums = static_cast<double*>(
      call.numbers("correction", correction, ScalarType::Double, 2 * channels));
  const View features =
      call.check_matrix("grad_features", grad_features, ScalarType::Float, call.rows(), channels);
  if (grad_conv1) {
    auto* const to = static_cast<float*>(
        call.numbers("grad_conv1", *grad_conv1, ScalarType::Float, call.outputs() * channels));
    call.run(cuda::bn_relu_conv1x1_grad_weight, call.outputs(), grad_view, to);
  }
  const Tensor packed = call.packed(WeightLayout::kGradInput);
  const void* const data = packed.data_ptr();
  const NormGradArgs norm_grad{grad_view,
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
  call.run(cuda::bn_relu_conv1x1_grad_input, data, call.outputs(), norm_grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(efficient_densenet, m) {
  m.def(
      "bn_relu_conv1x1(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "Tensor conv1, Tensor(a!) z, Tensor(b!)? moments) -> ()");
  m.def(
      "bn_relu_conv1x1_backward(Tensor grad_z, Tensor x, Tensor mean, Tensor var, Tensor? weight, "
      "Tensor? bias, float eps, Tensor conv1, Tensor(a!) grad_features, Tensor(b!) grad_affine, "
      "Tensor(c!) correction, bool batch_statistics, Tensor(d!)? grad_conv1) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CUDA, m) {
  m.impl("bn_relu_conv1x1", TORCH_BOX(&bn_relu_conv1x1));
  m.impl("bn_relu_conv1x1_backward", TORCH_BOX(&bn_relu_conv1x1_backward));
}

}  // namespace efficient_densenet
