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
        arrays{op, element_of(op, "x", x), x.dim() > 1 ? x.size(1) : 0, x.device()},
        launch(x.device()) {
    EFFICIENT_DENSENET_CHECK(x.dim() >= 3 && x.dim() <= 1 + kMaxRowDims, op,
                             "x: expected [N, C, *spatial] with 1 to 3 spatial dimensions, got ",
                             x.dim(), " dimensions");
    EFFICIENT_DENSENET_CHECK(x.numel() > 0, op, "x: expected at least one element");
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
  Pooled pooled(const char* name, const Tensor& y, const std::optional<Tensor>& winners) const {
    check_pooled(name, y, x.scalar_type());
    Pooled pooled{view(y), view(y)};
    pooled.winners.data = nullptr;
    if (!winners) return pooled;
    check_pooled("winners", *winners, ScalarType::Byte);
    for (int64_t d = 0; d < y.dim(); ++d) {
      EFFICIENT_DENSENET_CHECK(y.size(d) == 1 || y.stride(d) == winners->stride(d), op,
                               "winners: expected the strides of ", name);
    }
    pooled.winners.data = winners->data_ptr();
    return pooled;
  }

  const char* op;
  const Tensor& x;
  ChannelArrays arrays;
  Launcher launch;
  KernelArgs args{};
  BatchNorm bn{};

 private:
  static int64_t row_dim(const Tensor& tensor, int64_t d) { return kMaxRowDims - tensor.dim() + d; }

  void check_pooled(const char* name, const Tensor& tensor, ScalarType dtype) const {
    bool fits = tensor.dim() == x.dim();
    for (int64_t d = 0; fits && d < x.dim(); ++d) {
      fits = tensor.size(d) == (d < 2 ? x.size(d) : (x.size(d) + 1) / 2);
    }
    EFFICIENT_DENSENET_CHECK(fits, op, name, ": expected the batch and channels of x, and half of ",
                             "its spatial sizes, rounded up");
    EFFICIENT_DENSENET_CHECK(tensor.scalar_type() == dtype && tensor.device() == x.device(), op,
                             name, ": expected the dtype (winners: uint8) and device of x");
  }
};

void bn_relu_max_pool(const Tensor& x, const Tensor& mean, const Tensor& var,
                      const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                      double eps, const Tensor& y, const std::optional<Tensor>& winners) {
  Call call("efficient_densenet::bn_relu_max_pool", x, mean, var, weight, bias, eps);
  const Pooled pooled = call.pooled("y", y, winners);
  call.launch(cpu::bn_relu_max_pool, cuda::bn_relu_max_pool, call.args, call.bn, pooled);
}

std::tuple<Tensor, Tensor> bn_relu_max_pool_backward(const Tensor& grad_y, const Tensor& winners,
                                                     const Tensor& x, const Tensor& mean,
                                                     const Tensor& var,
                                                     const std::optional<Tensor>& weight,
                                                     const std::optional<Tensor>& bias, double eps,
                                                     bool batch_statistics, const Tensor& grad_x) {
  Call call("efficient_densenet::bn_relu_max_pool_backward", x, mean, var, weight, bias, eps);
  const Pooled pooled = call.pooled("grad_y", grad_y, winners);
  EFFICIENT_DENSENET_CHECK(grad_x.dim() == x.dim() && grad_x.size(1) == x.size(1) &&
                               same_rows(grad_x, x) && grad_x.scalar_type() == x.scalar_type() &&
                               grad_x.device() == x.device(),
                           call.op, "grad_x: expected the shape, dtype and device of x");
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
