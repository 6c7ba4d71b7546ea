// The operators beneath efficient_densenet.bn_relu_max_pool: schemas, bounds, dispatch. The
// statistics of the batch are taken by concat_bn_stats.
#include "operators/bn_relu_max_pool.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/tensors.h"

namespace efficient_densenet {
namespace {

// What both operators are called with.
struct Call {
  Call(const char* op, const Tensor& x, const Tensor& mean, const Tensor& var,
       const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps)
      : op(op),
        x(x),
        checks(op, x.device()),
        arrays{op, element_of(op, "x", x), x.dim() > 1 ? x.size(1) : 0, x.device()},
        launch(x.device()) {
    checks.expect(x.dim() >= 3 && x.dim() <= 1 + kMaxRowDims && x.numel() > 0, "x", x,
                  "[N, C, *spatial] with 1 to 3 spatial dimensions and at least one element");
    checks.any_strides("x", x, x.scalar_type(), Access::kRead);
    args.element = arrays.element;
    args.channels = arrays.channels;
    args.rows = rows_of(x);
    args.features = {{view(x), {}, 0, args.channels}};
    bn = arrays.batch_norm(mean, var, weight, bias, eps);
  }

  // Batch and spatial dimensions; those that the tensor lacks are of size 1.
  static RowSpace rows_of(const Tensor& tensor) {
    RowSpace rows{kMaxRowDims, {tensor.size(0), 1, 1, 1}, tensor.numel() / tensor.size(1)};
    for (int64_t d = 2; d < tensor.dim(); ++d) rows.sizes[row_dim(tensor, d)] = tensor.size(d);
    return rows;
  }

  static View view(const Tensor& tensor) {
    const auto stride = [&](int64_t d) { return tensor.size(d) == 1 ? 0 : tensor.stride(d); };
    View view{tensor.data_ptr(), tensor.stride(1), {stride(0)}};
    for (int64_t d = 2; d < tensor.dim(); ++d) view.row_strides[row_dim(tensor, d)] = stride(d);
    return view;
  }

  // A pooled tensor that has the dtype of x, and the winners that belong to it.
  Pooled pooled(const char* name, const Tensor& y, const std::optional<Tensor>& winners,
                Access access) const {
    check_pooled(name, y, x.scalar_type(), access);
    Pooled pooled{view(y), view(y)};
    pooled.winners.data = nullptr;
    if (!winners) return pooled;
    check_pooled("winners", *winners, ScalarType::Byte, access);
    for (int64_t d = 0; d < y.dim(); ++d) {
      checks.expect(y.size(d) == 1 || y.stride(d) == winners->stride(d), "winners", *winners,
                    "the strides of ", name);
    }
    pooled.winners.data = winners->data_ptr();
    return pooled;
  }

  const char* op;
  const Tensor& x;
  ArgumentChecks checks;
  ChannelArrays arrays;
  Launcher launch;
  KernelArgs args{};
  BatchNorm bn{};

 private:
  static int64_t row_dim(const Tensor& tensor, int64_t d) { return kMaxRowDims - tensor.dim() + d; }

  // The batch and channels of x, and half of its spatial sizes, rounded up.
  void check_pooled(const char* name, const Tensor& tensor, ScalarType dtype, Access access) const {
    Sizes sizes{x.size(0), x.size(1)};
    for (int64_t d = 2; d < x.dim(); ++d) sizes.push_back((x.size(d) + 1) / 2);
    checks.has_sizes(name, tensor, sizes);
    checks.any_strides(name, tensor, dtype, access);
  }
};

void bn_relu_max_pool(const Tensor& x, const Tensor& mean, const Tensor& var,
                      const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                      double eps, const Tensor& y, const std::optional<Tensor>& winners) {
  Call call("efficient_densenet::bn_relu_max_pool", x, mean, var, weight, bias, eps);
  const Pooled pooled = call.pooled("y", y, winners, Access::kWrite);
  call.launch(cpu::bn_relu_max_pool, cuda::bn_relu_max_pool, call.args, call.bn, pooled);
}

std::tuple<Tensor, Tensor> bn_relu_max_pool_backward(const Tensor& grad_y, const Tensor& winners,
                                                     const Tensor& x, const Tensor& mean,
                                                     const Tensor& var,
                                                     const std::optional<Tensor>& weight,
                                                     const std::optional<Tensor>& bias, double eps,
                                                     bool batch_statistics, const Tensor& grad_x) {
  Call call("efficient_densenet::bn_relu_max_pool_backward", x, mean, var, weight, bias, eps);
  const Pooled pooled = call.pooled("grad_y", grad_y, winners, Access::kRead);
  Sizes sizes;
  for (int64_t d = 0; d < x.dim(); ++d) sizes.push_back(x.size(d));
  call.checks.has_sizes("grad_x", grad_x, sizes);
  call.checks.any_strides("grad_x", grad_x, x.scalar_type(), Access::kWrite);
  call.args.features[0].grad_x = Call::view(grad_x);
  Tensor grad_weight = call.arrays.make_parameter(), grad_bias = call.arrays.make_parameter();
  const Gradients gradients{{}, grad_weight.data_ptr(), grad_bias.data_ptr(), batch_statistics};
  call.launch(cpu::bn_relu_max_pool_backward, cuda::bn_relu_max_pool_backward, call.args, call.bn,
              pooled, gradients);
  return {grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(efficient_densenet, m) {
  m.def(
      "bn_relu_max_pool(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
      "float eps, Tensor(a!) y, Tensor(b!)? winners) -> ()");
  m.def(
      "bn_relu_max_pool_backward(Tensor grad_y, Tensor winners, Tensor x, Tensor mean, Tensor var, "
      "Tensor? weight, Tensor? bias, float eps, bool batch_statistics, Tensor(a!) grad_x) "
      "-> (Tensor grad_weight, Tensor grad_bias)");
}

#define EFFICIENT_DENSENET_IMPLEMENTATIONS(m)               \
  m.impl("bn_relu_max_pool", TORCH_BOX(&bn_relu_max_pool)); \
  m.impl("bn_relu_max_pool_backward", TORCH_BOX(&bn_relu_max_pool_backward))

STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CPU, m) { EFFICIENT_DENSENET_IMPLEMENTATIONS(m); }
// Also in a build without CUDA, where csrc/cpu_only.cpp answers with what to do.
STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CUDA, m) { EFFICIENT_DENSENET_IMPLEMENTATIONS(m); }

}  // namespace efficient_densenet
