// The three operators beneath efficient_densenet.concat_bn_relu: schemas, checks, dispatch.
//
// They are called by the Python autograd function, which checks arguments with friendlier
// messages; the checks here only keep a direct caller of torch.ops from reading or writing
// memory out of bounds. All large memory is allocated by the caller, in Python, so that running
// out of it reaches the user as torch.OutOfMemoryError.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/kernel_args.h"
#include "common/tensors.h"

namespace efficient_densenet {
namespace {

// A call on a list of features: `args` is complete after `merge_rows`.
struct Call {
  Call(const char* op, const Tensors& features)
      : op(op),
        geometry(op, "features[0]", first_of(op, features)),
        device(features[0].device()),
        launch(device) {
    args.element = element_of(op, "features", features[0]);
    args.features.resize(features.size());
    args.channels = 0;
    for (size_t i = 0; i < features.size(); ++i) {
      Feature& feature = args.features[i];
      geometry.add("features", features[i], &feature.x);
      feature.grad_x.data = nullptr;
      feature.first_channel = args.channels;
      feature.channels = features[i].size(1);
      args.channels += feature.channels;
    }
  }

  void merge_rows() { args.rows = geometry.merge_rows(); }

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
  EFFICIENT_DENSENET_CHECK(call.args.rows.count > 0, call.op,
                           "features: expected at least one element");
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
  call.geometry.add("y", y, &y_view);
  call.merge_rows();
  EFFICIENT_DENSENET_CHECK(y.size(1) == call.args.channels, call.op, "y: expected ",
                           call.args.channels, " channels, got ", y.size(1));
  const BatchNorm bn = call.arrays().batch_norm(mean, var, weight, bias, eps);
  if (y.numel() == 0) return;
  call.launch(cpu::concat_bn_relu, cuda::concat_bn_relu, call.args, bn, y_view);
}

std::tuple<Tensor, Tensor> concat_bn_relu_backward(
    const Tensor& grad_y, const Tensors& features, const Tensor& mean, const Tensor& var,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
    bool batch_statistics, const std::vector<int64_t>& wanted, const Tensors& grad_features) {
  Call call("efficient_densenet::concat_bn_relu_backward", features);
  Gradients gradients{};
  gradients.batch_statistics = batch_statistics;
  call.geometry.add("grad_y", grad_y, &gradients.grad_y);
  EFFICIENT_DENSENET_CHECK(grad_y.size(1) == call.args.channels, call.op, "grad_y: expected ",
                           call.args.channels, " channels, got ", grad_y.size(1));
  EFFICIENT_DENSENET_CHECK(wanted.size() == grad_features.size(), call.op, "wanted: expected ",
                           grad_features.size(), " indices, got ", wanted.size());
  for (size_t i = 0; i < wanted.size(); ++i) {
    EFFICIENT_DENSENET_CHECK(wanted[i] >= 0 && wanted[i] < static_cast<int64_t>(features.size()),
                             call.op, "wanted: expected indices of features, got ", wanted[i]);
    Feature& feature = call.args.features[wanted[i]];
    EFFICIENT_DENSENET_CHECK(grad_features[i].size(1) == feature.channels, call.op,
                             "grad_features: expected ", feature.channels, " channels, got ",
                             grad_features[i].size(1));
    call.geometry.add("grad_features", grad_features[i], &feature.grad_x);
  }
  call.merge_rows();
  const BatchNorm bn = call.arrays().batch_norm(mean, var, weight, bias, eps);
  EFFICIENT_DENSENET_CHECK(grad_y.numel() > 0, call.op, "grad_y: expected at least one element");
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
      "Tensor? weight, Tensor? bias, float eps, bool batch_statistics, int[] wanted, "
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
