// The tensor-core kernels of bn_relu_conv3x3.h as operators of their own, on matrices. A dense
// block calls the kernels directly (../dense_block); these are for tests and benchmarks of each.
#include "operators/bn_relu_conv3x3.h"

#include "common/kernel_call.h"
#include "operators/bn_relu_conv1x1.h"

namespace efficient_densenet {
namespace {

class Call : public KernelCall {
 public:
  Call(const char* op, const Tensor& z, const NormTensors& norm, const Tensor& conv2,
       int64_t height, int64_t width)
      : KernelCall(op, "z", z, norm), conv2_(conv2), image_{height, width} {
    checks().expect(conv2.dim() == 4 && conv2.numel() > 0, "conv2", conv2, "[k, 3, 3, B]");
    outputs_ = conv2.size(0);
    checks().check(
        height > 0 && width > 0 && height <= rows() / width && rows() % (height * width) == 0,
        "height, width: expected images that the ", rows(), " rows of z are made of");
    check_kernels(cuda::why_no_tensor_cores(device_index(), element(), channels(), outputs_));
    check_kernels(cuda::why_no_conv3x3(device_index(), element(), outputs_, channels(), width));
    numbers("conv2", conv2, dtype(), outputs_ * 9 * channels());
  }

  Tensor packed(WeightLayout layout) const {
    const int64_t inner = channels();
    const WeightViews views{{{conv2_.data_ptr(), {9 * inner, 1, 3 * inner, inner}}}, false};
    return KernelCall::packed({layout, true, views, outputs_, inner, 0});
  }

  int64_t outputs() const { return outputs_; }
  const ImageSize& image() const { return image_; }

 private:
  const Tensor& conv2_;
  int64_t outputs_;
  ImageSize image_;
};

void bn_relu_conv3x3(const Tensor& z, const Tensor& mean, const Tensor& var,
                     const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                     double eps, const Tensor& conv2, int64_t height, int64_t width,
                     const Tensor& y, const std::optional<Tensor>& moments) {
  Call call("efficient_densenet::bn_relu_conv3x3", z, {mean, var, weight, bias, eps}, conv2, height,
            width);
  const View y_view = call.check_matrix("y", y, call.dtype(), call.rows(), call.outputs());
  Statistics statistics{};
  if (moments) statistics = call.statistics("moments", *moments, call.outputs());
  const Tensor packed = call.packed(WeightLayout::kForward);
  const void* const data = packed.data_ptr();
  const Statistics* const needed = moments ? &statistics : nullptr;
  MomentsLeft* const leaves_nothing = nullptr;
  call.run(cuda::bn_relu_conv3x3, false, call.image(), data, call.outputs(), y_view, needed,
           MomentsLeft{}, leaves_nothing);
}

// grad_a: that of relu(bn(z)), 0 behind a closed ReLU. coefficients [5, B]: what makes the gradient
// of z of it, see Gradients.
void bn_relu_conv3x3_backward(const Tensor& grad_features, const Tensor& y, const Tensor& y_mean,
                              const Tensor& correction, const Tensor& z, const Tensor& mean,
                              const Tensor& var, const std::optional<Tensor>& weight,
                              const std::optional<Tensor>& bias, double eps, const Tensor& conv2,
                              int64_t height, int64_t width, const Tensor& grad_a,
                              const Tensor& grad_affine, const Tensor& coefficients,
                              bool batch_statistics, const std::optional<Tensor>& grad_conv2) {
  Call call("efficient_densenet::bn_relu_conv3x3_backward", z, {mean, var, weight, bias, eps},
            conv2, height, width);
  const int64_t rows = call.rows(), channels = call.channels(), outputs = call.outputs();
  auto* const sums =
      static_cast<double*>(call.numbers("correction", correction, ScalarType::Double, 2 * outputs));
  const Gathered gathered{
      call.check_matrix("grad_features", grad_features, ScalarType::Float, rows, outputs),
      call.check_matrix("y", y, call.dtype(), rows, outputs),
      static_cast<const double*>(call.numbers("y_mean", y_mean, ScalarType::Double, outputs)),
      {sums, sums + outputs}};
  const auto floats = [&](const char* name, const Tensor& tensor, int64_t count) {
    return static_cast<float*>(call.numbers(name, tensor, ScalarType::Float, count));
  };
  float* const affine = floats("grad_affine", grad_affine, 2 * channels);
  const Gradients gradients{call.check_matrix("grad_a", grad_a, call.dtype(), rows, channels),
                            affine, affine + channels, batch_statistics,
                            floats("coefficients", coefficients, 5 * channels)};
  WeightGradient to{nullptr, {9 * channels, 1, 3 * channels, channels}, false};
  if (grad_conv2) {
    to.data = call.numbers("grad_conv2", *grad_conv2, call.dtype(), outputs * 9 * channels);
  }
  const Tensor packed = call.packed(WeightLayout::kGradInput);
  const void* const data = packed.data_ptr();
  const int64_t pitch = cuda::conv3x3_grad_pitch(call.element(), outputs);
  const Tensor grad_y = empty({rows, pitch}, call.dtype(), z.device());
  const View grad_y_view{grad_y.data_ptr(), 1, {pitch}};
  NormSumsLeft sums_left{};
  call.run(cuda::bn_relu_conv3x3_grad_input, call.image(), data, outputs, gathered, grad_y_view,
           gradients, &sums_left);
  if (!grad_conv2) return call.run_without_norm(cuda::add_norm_sums, sums_left);
  WeightParts parts{};
  call.run(cuda::bn_relu_conv3x3_grad_weight, call.image(), outputs, grad_y_view, to, &parts,
           sums_left);
  call.run_without_norm(cuda::add_weight_parts, parts);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(efficient_densenet, m) {
  m.def(
      "bn_relu_conv3x3(Tensor z, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "Tensor conv2, int height, int width, Tensor(a!) y, Tensor(b!)? moments) -> ()");
  m.def(
      "bn_relu_conv3x3_backward(Tensor grad_features, Tensor y, Tensor y_mean, Tensor correction, "
      "Tensor z, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor conv2, "
      "int height, int width, Tensor(a!) grad_a, Tensor(b!) grad_affine, Tensor(c!) coefficients, "
      "bool batch_statistics, Tensor(d!)? grad_conv2) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CUDA, m) {
  m.impl("bn_relu_conv3x3", TORCH_BOX(&bn_relu_conv3x3));
  m.impl("bn_relu_conv3x3_backward", TORCH_BOX(&bn_relu_conv3x3_backward));
}

}  // namespace efficient_densenet
