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
                        const Tensor& statistics, const Tensor& conv1, const Tensor& conv2,
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
    const Tensor& grad_result, const Tensor& x, const std::optional<Tensor>& projection,
    const Tensor& features, const std::optional<Tensor>& bottlenecks, const Tensor& statistics,
    const Tensor& conv1, const Tensor& conv2, const Tensor& affine,
    const std::optional<Tensor>& frozen, const std::vector<int64_t>& frozen_norms,
    const std::vector<double>& eps, const std::optional<Tensor>& dropout_mask, double dropout_scale,
    int64_t pool, bool allow_tf32, bool products_match_convolutions, bool has_reader,
    const Tensor& grad_features, const std::optional<Tensor>& grad_x,
    const std::optional<Tensor>& grad_projection, const Tensor& grad_affine,
    const std::optional<Tensor>& grad_conv1, const std::vector<int64_t>& needs_conv1,
    const std::optional<Tensor>& grad_conv2, const std::vector<int64_t>& needs_conv2) {
  const char* const op = "efficient_densenet::dense_block_layers_backward";
  const BlockArguments arguments = arguments_of(
      op, pool, {allow_tf32, products_match_convolutions}, x, projection, features, bottlenecks,
      statistics, conv1, conv2, affine, frozen, frozen_norms, eps, dropout_mask, dropout_scale);
  Block(arguments).backward(grad_result, has_reader,
                            {grad_features, grad_x, grad_projection, grad_affine, grad_conv1,
                             needs_conv1, grad_conv2, needs_conv2});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(efficient_densenet, m) {
  m.def(
      "dense_block_layers(Tensor x, Tensor? projection, Tensor(a!) features, "
      "Tensor(b!)? bottlenecks, Tensor(c!) statistics, Tensor conv1, Tensor conv2, Tensor affine, "
      "Tensor? frozen, int[] frozen_norms, float[] eps, Tensor? dropout_mask, "
      "float dropout_scale, int pool, bool allow_tf32, bool products_match_convolutions, "
      "bool inference, Tensor(d!)? y) -> ()");
  m.def(
      "dense_block_layers_backward(Tensor grad_result, Tensor x, Tensor? projection, "
      "Tensor features, Tensor? bottlenecks, Tensor statistics, Tensor conv1, Tensor conv2, "
      "Tensor affine, Tensor? frozen, int[] frozen_norms, float[] eps, Tensor? dropout_mask, "
      "float dropout_scale, int pool, bool allow_tf32, bool products_match_convolutions, "
      "bool has_reader, Tensor(a!) grad_features, Tensor(b!)? grad_x, "
      "Tensor(c!)? grad_projection, Tensor(d!) grad_affine, Tensor(e!)? grad_conv1, "
      "int[] needs_conv1, Tensor(f!)? grad_conv2, int[] needs_conv2) -> ()");
}

#define EFFICIENT_DENSENET_IMPLEMENTATIONS(m)                   \
  m.impl("dense_block_layers", TORCH_BOX(&dense_block_layers)); \
  m.impl("dense_block_layers_backward", TORCH_BOX(&dense_block_layers_backward))

STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CPU, m) { EFFICIENT_DENSENET_IMPLEMENTATIONS(m); }
// Also in a build without CUDA, where csrc/cpu_only.cpp answers with what to do.
STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CUDA, m) { EFFICIENT_DENSENET_IMPLEMENTATIONS(m); }

}  // namespace efficient_densenet
