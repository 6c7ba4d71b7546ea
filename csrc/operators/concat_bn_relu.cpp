// The three operators beneath efficient_densenet.concat_bn_relu: schemas, checks, dispatch.
//
// They are called by the Python autograd function, which checks arguments with friendlier messages;
// the checks here keep anybody else from reading or writing memory out of bounds. All large memory
// is allocated by the caller, in Python, so that running out of it reaches the user as
// torch.OutOfMemoryError.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/tensors.h"

namespace efficient_densenet {
namespace {

// A call on a list of features: `args` is complete after `merge_rows`.
struct Call {
  Call(const char* op, const Tensors& features)
      : op(op),
        geometry(op, "features", first_of(op, features)),
        device(features[0].device()),
        launch(device) {
    args.element = element_of(op, "features", features[0]);
    args.features.resize(features.size());
    args.channels = 0;
    for (size_t i = 0; i < features.size(); ++i) {
      const Tensor& tensor = features[i];
      Feature& feature = args.features[i];
      feature.channels = tensor.dim() > 1 ? tensor.size(1) : 0;
      geometry.add("features", tensor, feature.channels, Access::kRead, &feature.x);
      feature.grad_x.data = nullptr;
      feature.first_channel = args.channels;
      args.channels += feature.channels;
    }
  }

  // Of the concatenation.
  void add(const char* name, const Tensor& tensor, Access access, View* view) {
    geometry.add(name, tensor, args.channels, access, view);
  }

  void merge_rows() { args.rows = geometry.merge_rows(); }

  void check_not_empty(const Tensor& first) const {
    ArgumentChecks(op, device)
        .expect(args.rows.count > 0 && args.channels > 0, "features", first,
                "at least one element");
  }

  ChannelArrays arrays() const { return {op, args.element, args.channels, device}; }

  const char* op;
  KernelArgs args;
  Geometry geometry;
  Device device;
  Launcher launch;

 private:
  static const Tensor& first_of(const char* op, const Tensors& features) {
    EFFICIENT_DENSENET_CHECK(!features.empty(), op, "features: expected at least one tensor");
    return features[0];
  }
};

std::tuple<Tensor, Tensor> concat_bn_stats(const Tensors& features) {
  Call call("efficient_densenet::concat_bn_stats", features);
  call.merge_rows();
  call.check_not_empty(features[0]);
  Tensor mean = call.arrays().make(ScalarType::Double);
  Tensor var = call.arrays().make(ScalarType::Double);
  const Statistics statistics{static_cast<double*>(mean.data_ptr()),
                              static_cast<double*>(var.data_ptr()), nullptr};
  call.launch(cpu::concat_bn_stats, cuda::concat_bn_stats, call.args, statistics);
  return {mean, var};
}

void concat_bn_relu(const Tensors& features, const Tensor& mean, const Tensor& var,
                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                    double eps, const Tensor& y) {
  Call call("efficient_densenet::concat_bn_relu", features);
  View y_view{};
  call.add("y", y, Access::kWrite, &y_view);
  call.merge_rows();
  const BatchNorm bn = call.arrays().batch_norm(mean, var, weight, bias, eps);
  if (y.numel() == 0) return;
  call.launch(cpu::concat_bn_relu, cuda::concat_bn_relu, call.args, bn, y_view);
}

// grad_features[i] is the gradient of features[needs_grad[i]].
void add_grad_features(Call& call, const std::vector<int64_t>& needs_grad,
                       const Tensors& grad_features) {
  EFFICIENT_DENSENET_CHECK(needs_grad.size() == grad_features.size(), call.op,
                           "needs_grad: expected ", grad_features.size(), " indices, got ",
                           needs_grad.size());
  const auto count = static_cast<int64_t>(call.args.features.size());
  for (size_t i = 0; i < needs_grad.size(); ++i) {
    EFFICIENT_DENSENET_CHECK(needs_grad[i] >= 0 && needs_grad[i] < count, call.op,
                             "needs_grad: expected indices of features, got ", needs_grad[i]);
    Feature& feature = call.args.features[needs_grad[i]];
    EFFICIENT_DENSENET_CHECK(feature.grad_x.data == nullptr, call.op,
                             "needs_grad: expected each index once, got ", needs_grad[i], " twice");
    call.geometry.add("grad_features", grad_features[i], feature.channels, Access::kWrite,
                      &feature.grad_x);
  }
}

std::tuple<Tensor, Tensor> concat_bn_relu_backward(
    const Tensor& grad_y, const Tensors& features, const Tensor& mean, const Tensor& var,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
    bool batch_statistics, const std::vector<int64_t>& needs_grad, const Tensors& grad_features) {
  Call call("efficient_densenet::concat_bn_relu_backward", features);
  Gradients gradients{};
  gradients.batch_statistics = batch_statistics;
  call.add("grad_y", grad_y, Access::kRead, &gradients.grad_y);
  add_grad_features(call, needs_grad, grad_features);
  call.merge_rows();
  call.check_not_empty(features[0]);
  const BatchNorm bn = call.arrays().batch_norm(mean, var, weight, bias, eps);
  Tensor grad_weight = call.arrays().make_parameter();
  Tensor grad_bias = call.arrays().make_parameter();
  gradients.grad_weight = grad_weight.data_ptr();
  gradients.grad_bias = grad_bias.data_ptr();
  call.launch(cpu::concat_bn_relu_backward, cuda::concat_bn_relu_backward, call.args, bn,
              gradients);
  return {grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY(efficient_densenet, m) {
  m.def("concat_bn_stats(Tensor[] features) -> (Tensor mean, Tensor var)");
  m.def(
      "concat_bn_relu(Tensor[] features, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
      "float eps, Tensor(a!) y) -> ()");
  m.def(
      "concat_bn_relu_backward(Tensor grad_y, Tensor[] features, Tensor mean, Tensor var, "
      "Tensor? weight, Tensor? bias, float eps, bool batch_statistics, int[] needs_grad, "
      "Tensor(a!)[] grad_features) -> (Tensor grad_weight, Tensor grad_bias)");
}

#define EFFICIENT_DENSENET_IMPLEMENTATIONS(m)             \
  m.impl("concat_bn_stats", TORCH_BOX(&concat_bn_stats)); \
  m.impl("concat_bn_relu", TORCH_BOX(&concat_bn_relu));   \
  m.impl("concat_bn_relu_backward", TORCH_BOX(&concat_bn_relu_backward))

STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CPU, m) { EFFICIENT_DENSENET_IMPLEMENTATIONS(m); }
// Also in a build without CUDA, where csrc/cpu_only.cpp answers with what to do.
STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CUDA, m) { EFFICIENT_DENSENET_IMPLEMENTATIONS(m); }

}  // namespace efficient_densenet
