// The tensor-core kernels of bn_relu_conv1x1.h as operators of their own, on matrices. A dense
// block calls the kernels directly (dense_block.cpp); these are for tests and benchmarks of each.
#include "bn_relu_conv1x1.h"

#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace efficient_densenet {
namespace {

// The operands that forward and backward share.
class Call {
 public:
  Call(const char* op, const Tensor& x, const Tensor& mean, const Tensor& var,
       const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
       const Tensor& conv1)
      : op_(op), x_(x), conv1_(conv1), launch_(x.device()) {
    element_ = element_of(op, "x", x);
    rows_ = x.size(0);
    channels_ = x.size(1);
    outputs_ = conv1.size(0);
    check(rows_ > 0 && channels_ > 0 && outputs_ > 0, "x", ": expected rows, channels and outputs");
    const std::string why =
        cuda::why_no_tensor_cores(x.device().index(), element_, outputs_, channels_);
    check(why.empty(), "no tensor cores: ", why.c_str());
    check_matrix("x", x, x.scalar_type(), rows_, channels_);
    check_matrix("conv1", conv1, x.scalar_type(), outputs_, channels_);
    check(conv1.is_contiguous(), "conv1", ": expected contiguous memory");
    bn_ = {static_cast<const double*>(numbers("mean", mean, ScalarType::Double, channels_)),
           static_cast<const double*>(numbers("var", var, ScalarType::Double, channels_)),
           weight ? numbers("weight", *weight, ScalarType::Float, channels_) : nullptr,
           bias ? numbers("bias", *bias, ScalarType::Float, channels_) : nullptr, eps};
    problem_.element = element_;
    problem_.rows = {1, {rows_, 1, 1, 1}, rows_};
    problem_.channels = channels_;
    problem_.features = {{matrix(x), {}, 0, channels_}};
  }

  void check(bool condition, const char* name, const char* what) const {
    EFFICIENT_DENSENET_CHECK(condition, op_, name, what);
  }

  // A matrix on the device of x; its rows may be apart.
  View check_matrix(const char* name, const Tensor& tensor, ScalarType dtype, int64_t rows,
                    int64_t columns) const {
    check(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name,
          ": expected a matrix of other sizes");
    check(tensor.scalar_type() == dtype && tensor.device() == x_.device() &&
              (tensor.stride(1) == 1 || columns == 1),
          name, ": expected another dtype or device, or columns next to each other");
    return matrix(tensor);
  }

  void* numbers(const char* name, const Tensor& tensor, ScalarType dtype, int64_t count) const {
    check(tensor.numel() == count && tensor.is_contiguous() && tensor.scalar_type() == dtype &&
              tensor.device() == x_.device(),
          name, ": expected one contiguous number per channel, of another dtype or count");
    return tensor.data_ptr();
  }

  Tensor packed(WeightLayout layout) {
    const int64_t bytes = cuda::packed_conv1x1_bytes(element_, layout, rows_, outputs_, channels_);
    Tensor memory = empty({bytes}, ScalarType::Byte, x_.device());
    cuda::pack_conv1x1(element_, layout, rows_, {conv1_.data_ptr(), 1, outputs_, channels_, 0},
                       memory.data_ptr(), launch_.stream());
    return memory;
  }

  template <typename Kernel, typename... Args>
  void run(Kernel kernel, const Args&... args) {
    launch_(kernel, problem_, bn_, args...);
  }

  int64_t rows() const { return rows_; }
  int64_t channels() const { return channels_; }
  int64_t outputs() const { return outputs_; }

 private:
  static View matrix(const Tensor& tensor) { return {tensor.data_ptr(), 1, {tensor.stride(0)}}; }

  const char* op_;
  const Tensor &x_, &conv1_;
  Launcher launch_;
  Element element_;
  int64_t rows_, channels_, outputs_;
  BatchNorm bn_;
  Problem problem_{};
};

void bn_relu_conv1x1(const Tensor& x, const Tensor& mean, const Tensor& var,
                     const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                     double eps, const Tensor& conv1, const Tensor& z,
                     const std::optional<Tensor>& moments) {
  Call call("efficient_densenet::bn_relu_conv1x1", x, mean, var, weight, bias, eps, conv1);
  const View z_view = call.check_matrix("z", z, x.scalar_type(), call.rows(), call.outputs());
  Statistics statistics{};
  if (moments) {
    auto* const numbers = static_cast<double*>(
        call.numbers("moments", *moments, ScalarType::Double, 2 * call.outputs()));
    statistics = {numbers, numbers + call.outputs(), nullptr};
  }
  const Tensor packed = call.packed(WeightLayout::kForward);
  const void* const data = packed.data_ptr();
  const Statistics* const wanted = moments ? &statistics : nullptr;
  call.run(cuda::bn_relu_conv1x1, data, call.outputs(), z_view, wanted);
}

void bn_relu_conv1x1_backward(const Tensor& grad_z, const Tensor& x, const Tensor& mean,
                              const Tensor& var, const std::optional<Tensor>& weight,
                              const std::optional<Tensor>& bias, double eps, const Tensor& conv1,
                              const Tensor& grad_features, const Tensor& grad_affine,
                              const Tensor& correction, bool first_reader, bool batch_statistics,
                              const std::optional<Tensor>& grad_conv1) {
  Call call("efficient_densenet::bn_relu_conv1x1_backward", x, mean, var, weight, bias, eps, conv1);
  const int64_t channels = call.channels();
  const View grad_view =
      call.check_matrix("grad_z", grad_z, x.scalar_type(), call.rows(), call.outputs());
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
  const Reader reader{grad_view,
                      nullptr,
                      features,
                      nullptr,
                      affine,
                      affine + channels,
                      {sums, sums + channels},
                      true,
                      true,
                      first_reader,
                      batch_statistics};
  call.run(cuda::bn_relu_conv1x1_grad_input, data, call.outputs(), reader);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(efficient_densenet, m) {
  m.def(
      "bn_relu_conv1x1(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "Tensor conv1, Tensor(a!) z, Tensor(b!)? moments) -> ()");
  m.def(
      "bn_relu_conv1x1_backward(Tensor grad_z, Tensor x, Tensor mean, Tensor var, Tensor? weight, "
      "Tensor? bias, float eps, Tensor conv1, Tensor(a!) grad_features, Tensor(b!) grad_affine, "
      "Tensor(c!) correction, bool first_reader, bool batch_statistics, Tensor(d!)? grad_conv1) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CUDA, m) {
  m.impl("bn_relu_conv1x1", TORCH_BOX(&bn_relu_conv1x1));
  m.impl("bn_relu_conv1x1_backward", TORCH_BOX(&bn_relu_conv1x1_backward));
}

}  // namespace efficient_densenet
