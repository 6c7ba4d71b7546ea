// The three operators beneath efficient_densenet.concat_bn_relu: schemas, checks, dispatch.
//
// They are called by the Python autograd function, which checks arguments with friendlier
// messages; the checks here only keep a direct caller of torch.ops from reading or writing
// memory out of bounds. All large memory is allocated by the caller, in Python, so that running
// out of it reaches the user as torch.OutOfMemoryError.
#include "concat_bn_relu.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "checks.h"

namespace efficient_densenet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

Element element_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return Element::kDouble;
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      fail(op, "features: expected float64, float32, float16 or bfloat16, got another dtype");
  }
}

ScalarType parameter_type(Element element) {
  return is_double(element) ? ScalarType::Double : ScalarType::Float;
}

bool same_rows(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (d != 1 && a.size(d) != b.size(d)) return false;
  }
  return true;
}

// Adds the tensors of a call one after the other, then merges the row dimensions of all.
class Geometry {
 public:
  Geometry(const char* op, const Tensor& first) : op_(op), first_(first) {
    EFFICIENT_DENSENET_CHECK(first.dim() >= 2 && first.dim() <= 1 + kMaxRowDims, op,
                             "features: expected [N, C, *spatial] with 0 to 3 spatial "
                             "dimensions, got ",
                             first.dim(), " dimensions");
  }

  void add(const char* name, const Tensor& tensor, View* view) {
    EFFICIENT_DENSENET_CHECK(same_rows(first_, tensor), op_, name,
                             ": batch or spatial sizes differ from features[0]");
    EFFICIENT_DENSENET_CHECK(tensor.scalar_type() == first_.scalar_type(), op_, name,
                             ": dtype differs from features[0]");
    EFFICIENT_DENSENET_CHECK(tensor.device() == first_.device(), op_, name,
                             ": device differs from features[0]");
    view->data = tensor.data_ptr();
    view->channel_stride = tensor.stride(1);
    tensors_.push_back(tensor);
    views_.push_back(view);
  }

  // Call once all tensors were added; fills the row strides of their views.
  RowSpace merge_rows() {
    RowSpace rows{1, {1, 1, 1, 1}, 1};
    for (View* view : views_) view->row_strides[0] = 0;
    bool first = true;
    for (int64_t d = 0; d < first_.dim(); ++d) {
      const int64_t size = first_.size(d);
      if (d == 1) continue;
      rows.count *= size;
      if (size == 1) continue;
      const bool new_dim = first || !can_merge(rows.dims - 1, d);
      if (new_dim && !first) ++rows.dims;
      const int last = rows.dims - 1;
      rows.sizes[last] = new_dim ? size : rows.sizes[last] * size;
      for (size_t i = 0; i < views_.size(); ++i) {
        views_[i]->row_strides[last] = tensors_[i].stride(d);
      }
      first = false;
    }
    return rows;
  }

 private:
  bool can_merge(int outer, int64_t inner) const {
    for (size_t i = 0; i < views_.size(); ++i) {
      if (views_[i]->row_strides[outer] != tensors_[i].stride(inner) * first_.size(inner)) {
        return false;
      }
    }
    return true;
  }

  const char* op_;
  Tensor first_;
  Tensors tensors_;
  std::vector<View*> views_;
};

// A call on a list of features: `problem` is complete after `merge_rows`.
struct Call {
  Call(const char* op, const Tensors& features)
      : op(op), geometry(op, first_of(op, features)), device(features[0].device()) {
    problem.element = element_of(op, features[0]);
    problem.features.resize(features.size());
    problem.channels = 0;
    for (size_t i = 0; i < features.size(); ++i) {
      Feature& feature = problem.features[i];
      geometry.add("features", features[i], &feature.x);
      feature.grad_x.data = nullptr;
      feature.first_channel = problem.channels;
      feature.channels = features[i].size(1);
      problem.channels += feature.channels;
    }
  }

  void merge_rows() { problem.rows = geometry.merge_rows(); }

  void* per_channel(const char* name, const Tensor& tensor, ScalarType dtype) const {
    EFFICIENT_DENSENET_CHECK(
        tensor.dim() == 1 && tensor.size(0) == problem.channels && tensor.is_contiguous(), op, name,
        ": expected a contiguous tensor of length ", problem.channels);
    EFFICIENT_DENSENET_CHECK(tensor.scalar_type() == dtype, op, name,
                             ": expected float64 for mean, var and float64 features, else float32");
    EFFICIENT_DENSENET_CHECK(tensor.device() == device, op, name,
                             ": device differs from features[0]");
    return tensor.data_ptr();
  }

  void* per_channel(const char* name, const std::optional<Tensor>& tensor) const {
    return tensor.has_value() ? per_channel(name, *tensor, parameter_type(problem.element))
                              : nullptr;
  }

  BatchNorm batch_norm(const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias, double eps) const {
    return {static_cast<const double*>(per_channel("mean", mean, ScalarType::Double)),
            static_cast<const double*>(per_channel("var", var, ScalarType::Double)),
            per_channel("weight", weight), per_channel("bias", bias), eps};
  }

  Tensor new_per_channel(ScalarType dtype) const {
    return torch::stable::empty({problem.channels}, dtype, std::nullopt, device);
  }

  const char* op;
  Problem problem;
  Geometry geometry;
  torch::stable::Device device;

 private:
  static const Tensor& first_of(const char* op, const Tensors& features) {
    EFFICIENT_DENSENET_CHECK(!features.empty(), op, "features: expected at least one tensor");
    return features[0];
  }
};

// Runs the kernels of the call's device; CUDA ones on the current stream of that device.
template <typename... Args>
void launch(Call& call, void (*cpu_kernel)(const Problem&, const Args&...),
            void (*cuda_kernel)(const Problem&, const Args&...), const Args&... args) {
  if (call.device.is_cpu()) return cpu_kernel(call.problem, args...);
  const int index = call.device.index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  call.problem.stream = cuda::current_stream(index);
  // Freed on return, in stream order: whoever gets the memory next is queued behind the kernels.
  Tensors workspaces;
  call.problem.workspace = [&](int64_t doubles) {
    workspaces.push_back(
        torch::stable::empty({doubles}, ScalarType::Double, std::nullopt, call.device));
    return static_cast<double*>(workspaces.back().data_ptr());
  };
  cuda_kernel(call.problem, args...);
}

std::tuple<Tensor, Tensor> concat_bn_stats(const Tensors& features,
                                           const std::optional<Tensor>& running_mean,
                                           const std::optional<Tensor>& running_var,
                                           double momentum) {
  Call call("efficient_densenet::concat_bn_stats", features);
  call.merge_rows();
  EFFICIENT_DENSENET_CHECK(call.problem.rows.count > 1, call.op,
                           "features: expected more than 1 value per channel, got ",
                           call.problem.rows.count);
  void* const running_mean_data = call.per_channel("running_mean", running_mean);
  void* const running_var_data = call.per_channel("running_var", running_var);
  Tensor mean = call.new_per_channel(ScalarType::Double);
  Tensor var = call.new_per_channel(ScalarType::Double);
  const Statistics statistics{static_cast<double*>(mean.data_ptr()),
                              static_cast<double*>(var.data_ptr()), running_mean_data,
                              running_var_data, momentum};
  launch(call, cpu::concat_bn_stats, cuda::concat_bn_stats, statistics);
  return {mean, var};
}

void concat_bn_relu(const Tensors& features, const Tensor& mean, const Tensor& var,
                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                    double eps, const Tensor& y) {
  Call call("efficient_densenet::concat_bn_relu", features);
  View y_view{};
  call.geometry.add("y", y, &y_view);
  call.merge_rows();
  EFFICIENT_DENSENET_CHECK(y.size(1) == call.problem.channels, call.op, "y: expected ",
                           call.problem.channels, " channels, got ", y.size(1));
  const BatchNorm bn = call.batch_norm(mean, var, weight, bias, eps);
  if (y.numel() == 0) return;
  launch(call, cpu::concat_bn_relu, cuda::concat_bn_relu, bn, y_view);
}

std::tuple<Tensor, Tensor> concat_bn_relu_backward(
    const Tensor& grad_y, const Tensors& features, const Tensor& mean, const Tensor& var,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
    bool batch_statistics, const std::vector<int64_t>& wanted, const Tensors& grad_features) {
  Call call("efficient_densenet::concat_bn_relu_backward", features);
  Gradients gradients{};
  gradients.batch_statistics = batch_statistics;
  call.geometry.add("grad_y", grad_y, &gradients.grad_y);
  EFFICIENT_DENSENET_CHECK(grad_y.size(1) == call.problem.channels, call.op, "grad_y: expected ",
                           call.problem.channels, " channels, got ", grad_y.size(1));
  EFFICIENT_DENSENET_CHECK(wanted.size() == grad_features.size(), call.op, "wanted: expected ",
                           grad_features.size(), " indices, got ", wanted.size());
  for (size_t i = 0; i < wanted.size(); ++i) {
    EFFICIENT_DENSENET_CHECK(wanted[i] >= 0 && wanted[i] < static_cast<int64_t>(features.size()),
                             call.op, "wanted: expected indices of features, got ", wanted[i]);
    Feature& feature = call.problem.features[wanted[i]];
    EFFICIENT_DENSENET_CHECK(grad_features[i].size(1) == feature.channels, call.op,
                             "grad_features: expected ", feature.channels, " channels, got ",
                             grad_features[i].size(1));
    call.geometry.add("grad_features", grad_features[i], &feature.grad_x);
  }
  call.merge_rows();
  const BatchNorm bn = call.batch_norm(mean, var, weight, bias, eps);
  EFFICIENT_DENSENET_CHECK(grad_y.numel() > 0, call.op, "grad_y: expected at least one element");
  Tensor grad_weight = call.new_per_channel(parameter_type(call.problem.element));
  Tensor grad_bias = call.new_per_channel(parameter_type(call.problem.element));
  gradients.grad_weight = grad_weight.data_ptr();
  gradients.grad_bias = grad_bias.data_ptr();
  launch(call, cpu::concat_bn_relu_backward, cuda::concat_bn_relu_backward, bn, gradients);
  return {grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY(efficient_densenet, m) {
  m.def(
      "concat_bn_stats(Tensor[] features, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "float momentum) -> (Tensor mean, Tensor var)");
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
