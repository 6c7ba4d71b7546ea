// The operators beneath efficient_densenet.dense_block: a whole dense block forward and backward.
#include <torch/csrc/stable/library.h>

#include "dense_block/block.h"

namespace efficient_densenet {
namespace {

Pool pool_of(const char* op, int64_t number) {
  EFFICIENT_DENSENET_CHECK(number >= 0 && number <= static_cast<int64_t>(Pool::kImages), op,
                           "pool: expected 0, 1 or 2, got ", number);
  return static_cast<Pool>(number);
}

// fields: those of BlockArguments from `x` to `dropout_scale`.
template <typename... Fields>
BlockArguments arguments_of(const char* op, int64_t pool, const PrecisionSettings& settings,
                            const Fields&... fields) {
  return {op, fields..., pool_of(op, pool), settings};
}

void dense_block_layers(const Tensor& x, const std::optional<Tensor>& projection,
                        const Tensor& features, const std::optional<Tensor>& bottlenecks,
                        const Tensor& statistics, const Tensors& conv1, const Tensors& conv2,
                        const Tensor& affine, const std::optional<Tensor>& frozen,
                        const std::vector<int64_t>& frozen_norms, const std::vector<double>& eps,
                        const std::optional<Tensor>& dropout_mask, double dropout_scale,
                        int64_t pool, bool allow_tf32, bool products_match_convolutions,
                        bool inference, const std::optional<Tensor>& y) {
  const char* const op = "efficient_densenet::dense_block_layers";
  const BlockArguments arguments = arguments_of(
      op, pool, {allow_tf32, products_match_convolutions}, x, projection, features, bottlenecks,
      statistics, conv1, conv2, affine, frozen, frozen_norms, eps, dropout_mask, dropout_scale);
  Block(arguments).forward(inference, y);
}

void dense_block_layers_backward(
    const Tensor& grad_result, const Tensor& features, const std::optional<Tensor>& bottlenecks,
    const Tensor& statistics, const Tensors& conv1, const Tensors& conv2, const Tensor& affine,
    const std::optional<Tensor>& frozen, const std::vector<int64_t>& frozen_norms,
    const std::vector<double>& eps, const std::optional<Tensor>& dropout_mask, double dropout_scale,
    int64_t pool, bool allow_tf32, bool products_match_convolutions, bool has_reader,
    const Tensor& grad_features, const std::optional<Tensor>& grad_x, const Tensor& grad_affine,
    const std::optional<Tensor>& grad_conv1, const std::vector<int64_t>& needs_conv1,
    const std::optional<Tensor>& grad_conv2, const std::vector<int64_t>& needs_conv2) {
  const char* const op = "efficient_densenet::dense_block_layers_backward";
  const std::optional<Tensor> no_projection;  // the input is not read again
  const BlockArguments arguments =
      arguments_of(op, pool, {allow_tf32, products_match_convolutions}, features, no_projection,
                   features, bottlenecks, statistics, conv1, conv2, affine, frozen, frozen_norms,
                   eps, dropout_mask, dropout_scale);
  Block(arguments).backward(
      grad_result, has_reader,
      {grad_features, grad_x, grad_affine, grad_conv1, needs_conv1, grad_conv2, needs_conv2});
}

// From the gradient of a block's input, those of x and of the weight of the convolution that made
// it. It is an operator of its own, so that the memory of the block's backward pass is free by
// then.
void projection_backward(const Tensor& grad, const Tensor& x, const Tensor& projection,
                         bool products_match_convolutions, const std::optional<Tensor>& grad_x,
                         const std::optional<Tensor>& grad_projection) {
  const char* const op = "efficient_densenet::projection_backward";
  const ArgumentChecks checks(op, grad.device());
  const ScalarType dtype = grad.scalar_type();
  const Element element = element_of(op, "grad", grad);
  checks.expect(grad.dim() >= 3 && grad.dim() <= 1 + kMaxRowDims, "grad", grad,
                "[N, C_0, *spatial] with 1 to 3 spatial dimensions");
  checks.expect(projection.dim() == grad.dim() && projection.size(0) == grad.size(1), "projection",
                projection, "[C_0, P, 1...] with C_0 = ", grad.size(1));
  const int64_t outputs = grad.size(1), inputs = projection.size(1);
  checks.contiguous("projection", projection, dtype, outputs * inputs);
  Sizes sizes, spatial;
  for (int64_t d = 0; d < grad.dim(); ++d) sizes.push_back(d == 1 ? inputs : grad.size(d));
  for (int64_t d = 2; d < grad.dim(); ++d) spatial.push_back(grad.size(d));
  Sizes grad_sizes = sizes;
  grad_sizes[1] = outputs;
  const TensorMatrix grad_matrix{&grad, 0, checks.channels_last("grad", grad, dtype, grad_sizes)};
  const TensorMatrix x_matrix{&x, 0, checks.channels_last("x", x, dtype, sizes)};
  if (grad_x) {
    checks.channels_last("grad_x", *grad_x, dtype, sizes);
    checks.any_strides("grad_x", *grad_x, dtype, Access::kWrite);
  }
  if (grad_projection) {
    checks.contiguous("grad_projection", *grad_projection, dtype, outputs * inputs);
  }
  const aten::GradModeOff grad_mode_off;
  const PrecisionSettings settings{false, products_match_convolutions};
  if (grad.numel() == 0 || inputs == 0) {
    if (grad_projection) torch::stable::zero_(*const_cast<Tensor*>(&*grad_projection));
    return;
  }
  if (!projection_multiplies(settings, element)) {
    const auto found = aten::convolution_backward(grad, x, projection, grad_x.has_value(),
                                                  grad_projection.has_value());
    if (grad_x) aten::copy(*found.x, *grad_x);
    if (grad_projection) {
      aten::copy(reinterpret(torch::stable::contiguous(*found.weight), 0, {outputs * inputs}, {1}),
                 reinterpret(*grad_projection, 0, {outputs * inputs}, {1}));
    }
    return;
  }
  const int64_t rows = grad.numel() / outputs;
  const Tensor grad_rows = grad_matrix.as_matrix(rows, outputs);
  if (grad_x) {
    const TensorMatrix to{&*grad_x, 0, checks.channels_last("grad_x", *grad_x, dtype, sizes)};
    aten::mm_out(grad_rows, reinterpret(projection, 0, {outputs, inputs}, {inputs, 1}),
                 to.as_matrix(rows, inputs));
  }
  if (grad_projection) {
    aten::mm_out(transpose(grad_rows), x_matrix.as_matrix(rows, inputs),
                 reinterpret(*grad_projection, 0, {outputs, inputs}, {inputs, 1}));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(efficient_densenet, m) {
  m.def(
      "dense_block_layers(Tensor x, Tensor? projection, Tensor(a!) features, "
      "Tensor(b!)? bottlenecks, Tensor(c!) statistics, Tensor[] conv1, Tensor[] conv2, Tensor "
      "affine, "
      "Tensor? frozen, int[] frozen_norms, float[] eps, Tensor? dropout_mask, "
      "float dropout_scale, int pool, bool allow_tf32, bool products_match_convolutions, "
      "bool inference, Tensor(d!)? y) -> ()");
  m.def(
      "dense_block_layers_backward(Tensor grad_result, Tensor features, "
      "Tensor? bottlenecks, Tensor statistics, Tensor[] conv1, Tensor[] conv2, "
      "Tensor affine, Tensor? frozen, int[] frozen_norms, float[] eps, Tensor? dropout_mask, "
      "float dropout_scale, int pool, bool allow_tf32, bool products_match_convolutions, "
      "bool has_reader, Tensor(a!) grad_features, Tensor(b!)? grad_x, Tensor(c!) grad_affine, "
      "Tensor(d!)? grad_conv1, int[] needs_conv1, Tensor(e!)? grad_conv2, int[] needs_conv2) "
      "-> ()");
  m.def(
      "projection_backward(Tensor grad, Tensor x, Tensor projection, "
      "bool products_match_convolutions, Tensor(a!)? grad_x, Tensor(b!)? grad_projection) -> ()");
}

#define EFFICIENT_DENSENET_IMPLEMENTATIONS(m)                                     \
  m.impl("dense_block_layers", TORCH_BOX(&dense_block_layers));                   \
  m.impl("dense_block_layers_backward", TORCH_BOX(&dense_block_layers_backward)); \
  m.impl("projection_backward", TORCH_BOX(&projection_backward))

STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CPU, m) { EFFICIENT_DENSENET_IMPLEMENTATIONS(m); }
// Also in a build without CUDA, where csrc/cpu_only.cpp answers with what to do.
STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CUDA, m) { EFFICIENT_DENSENET_IMPLEMENTATIONS(m); }

}  // namespace efficient_densenet
