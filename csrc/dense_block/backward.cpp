#include <algorithm>

#include "common/aten.h"
#include "dense_block/block.h"

namespace efficient_densenet {
namespace {

// That of one layer, among those of all that need one.
WeightGradient gradient_of(const Tensor& gradients, int64_t layer) {
  const auto size = static_cast<int64_t>(gradients.element_size());
  char* const data = static_cast<char*>(gradients.data_ptr());
  WeightGradient gradient{
      data + layer * gradients.stride(0) * size, {}, gradients.scalar_type() == ScalarType::Float};
  for (int64_t d = 0; d < std::min<int64_t>(gradients.dim() - 1, 4); ++d) {
    gradient.strides[d] = gradients.stride(1 + d);
  }
  return gradient;
}

}  // namespace

void Block::check_gradients(const BlockGradients& gradients) {
  images_matrix("grad_features", gradients.features, channels_, parameter_type(element_));
  checks_.contiguous("grad_affine", gradients.affine, parameter_type(element_), {2, affine_count_});
  if (gradients.x) images_matrix("grad_x", *gradients.x, channels_in_, dtype_);
  check_conv_gradients(gradients);
}

void Block::check_conv_gradients(const BlockGradients& gradients) const {
  const auto layers = static_cast<size_t>(layers_);
  const auto count = [&](const char* name, const std::vector<int64_t>& needs) {
    checks_.check(needs.size() == layers, name, ": expected one number per layer, ", layers,
                  ", got ", needs.size());
    return std::count_if(needs.begin(), needs.end(), [](int64_t need) { return need != 0; });
  };
  if (count("needs_conv1", gradients.needs_conv1) > 0) {
    checks_.check(gradients.conv1.has_value(), "grad_conv1: expected a tensor, got None");
    checks_.contiguous("grad_conv1", *gradients.conv1, parameter_type(element_),
                       bottleneck_ * total_inputs(layers_));
  }
  const int64_t needed = count("needs_conv2", gradients.needs_conv2);
  if (needed == 0) return;
  checks_.check(gradients.conv2.has_value(), "grad_conv2: expected a tensor, got None");
  const Tensor& conv2 = *gradients.conv2;
  Sizes sizes = with_sizes(growth_, bottleneck_, given_kernel());
  sizes.insert(sizes.begin(), needed);
  checks_.has_sizes("grad_conv2", conv2, sizes);
  checks_.any_strides("grad_conv2", conv2,
                      conv2.scalar_type() == ScalarType::Float ? ScalarType::Float : dtype_,
                      Access::kWrite);
}

// One norm's share of G, S1 and S2, and the gradients of its weight and bias.
NormGradArgs Block::norm_grad_args(Backward& state, const Norm& norm, const RowChunk& chunk,
                                   const View& grad_y, const Pooling* pooling) const {
  return {grad_y,
          pooling,
          state.grad_features.at(chunk.begin, 0).view(),
          state.sums,
          affine(state.grad_affine, 0, norm.affine_begin),
          affine(state.grad_affine, 1, norm.affine_begin),
          {state.s1, state.s2},
          chunk.first,
          chunk.last,
          state.first_reader,
          norm.batch_statistics};
}

void Block::accumulate_norm_grad(Backward& state, const Norm& norm, const RowChunk& chunk,
                                 const View& grad_y, const Pooling* pooling) {
  KernelArgs args = kernel_args(features_.at(chunk.begin, 0), chunk.count, norm.channels);
  launch_(cpu::accumulate_norm_grad, cuda::accumulate_norm_grad, args, norm.bn,
          norm_grad_args(state, norm, chunk, grad_y, pooling));
}

// The gradient of channels whose readers have all added to G.
TensorMatrix Block::apply_bn_correction(Backward& state, int64_t begin, int64_t channels,
                                        const TensorMatrix& to) {
  const TensorMatrix from = state.grad_features.at(0, begin);
  if (!has_batch_statistics_reader(begin)) {
    aten::copy(from.as_matrix(rows_, channels), to.as_matrix(rows_, channels));
    return to;
  }
  KernelArgs args = kernel_args(features_.at(0, begin), rows_, channels);
  args.features[0].grad_x = to.view();
  const double* const mean = mean_ + begin;
  launch_(cpu::apply_bn_correction, cuda::apply_bn_correction, args, from.view(), mean,
          Correction{state.s1 + begin, state.s2 + begin});
  return to;
}

// Those of norm2: `grad` is the gradient of a2. On tensor cores conv1's kernel makes that of z of
// it.
Gradients Block::gradients_of(Backward& state, const Norm& norm, const TensorMatrix& grad) {
  Gradients gradients{grad.view(), affine(state.grad_affine, 0, norm.affine_begin),
                      affine(state.grad_affine, 1, norm.affine_begin), norm.batch_statistics};
  if (on_tensor_cores()) {
    if (!coefficients_) coefficients_ = empty({5 * bottleneck_}, ScalarType::Float, device_);
    gradients.coefficients = static_cast<float*>(coefficients_->data_ptr());
  }
  return gradients;
}

// From the gradient of a2 to that of z, in place; on tensor cores only what is needed for it.
void Block::backward_norm2(Backward& state, const Norm& norm, const TensorMatrix& z,
                           const TensorMatrix& grad) {
  KernelArgs args = kernel_args(z, rows_, bottleneck_);
  const Gradients gradients = gradients_of(state, norm, grad);
  if (on_tensor_cores()) {
    return launch_(cuda::concat_bn_relu_backward_sums, args, norm.bn, gradients);
  }
  args.features[0].grad_x = grad.view();
  launch_(cpu::concat_bn_relu_backward, cuda::concat_bn_relu_backward, args, norm.bn, gradients);
}

// The gradients of conv1's weight and of a1, and norm1's share of what its channels get back. Of
// the gradient of a2, which becomes that of z on the way.
void Block::backward_conv1_on_tensor_cores(Backward& state, int64_t layer,
                                           const TensorMatrix& grad_a2,
                                           const std::optional<Tensor>& grad_weight) {
  const Norm &norm1 = norms_[layer], &norm2 = norms_[layers_ + layer];
  TensorMatrix grad_z = grad_a2;
  if (cuda::conv1x1_grad_input_shares_rows(element_, rows_, bottleneck_, norm1.channels)) {
    grad_z = scratch(&grad_z_, rows_ * bottleneck_, bottleneck_);
  }
  const NormGradient grad{grad_a2.view(), z(layer).view(),
                          static_cast<const float*>(coefficients_->data_ptr()),
                          norm2.batch_statistics, grad_z.view()};
  KernelArgs args = kernel_args(features_, rows_, norm1.channels);
  ReaderSumsLeft sums{};
  launch_(cuda::bn_relu_conv1x1_grad_input, args, norm1.bn,
          packed_weight(WeightLayout::kGradInput, false, layer), bottleneck_, grad,
          norm_grad_args(state, norm1, {0, rows_, true, true}, grad_z.view(), nullptr), &sums);
  if (!grad_weight) return launch_(cuda::add_reader_sums, args, sums);
  const WeightGradient gradient{grad_weight->data_ptr(), {norm1.channels, 1, 0, 0}, true};
  launch_(cuda::bn_relu_conv1x1_grad_weight, args, norm1.bn, bottleneck_, grad_z.view(), gradient,
          &state.weight_parts, sums);
}

// The same by ATen's products or convolutions.
void Block::backward_conv1(Backward& state, int64_t layer, const TensorMatrix& grad_z,
                           bool a1_is_ready, const std::optional<Tensor>& grad_weight) {
  const Norm& norm = norms_[layer];
  const int64_t channels = norm.channels;
  const Tensor& weight = conv1(layer);
  const std::vector<RowChunk> chunks = backward_chunks(channels);
  std::optional<Tensor> partial;  // the weight's gradient, one sum per chunk
  if (grad_weight && chunks.size() > 1) {
    partial = empty({static_cast<int64_t>(chunks.size()), bottleneck_, channels},
                    grad_weight->scalar_type(), device_);
  }
  for (size_t i = 0; i < chunks.size(); ++i) {
    const RowChunk& chunk = chunks[i];
    const TensorMatrix a1 = scratch(&a1_, chunk_elements(), channels);
    if (grad_weight && !a1_is_ready) {
      normalise(norm, features_.at(chunk.begin, 0), chunk.count, a1);
    }
    std::optional<Tensor> sum = grad_weight;
    if (partial) sum = torch::stable::select(*partial, 0, i);
    const Tensor grad_a1 = multiply_back(grad_z.at(chunk.begin, 0), a1, chunk.count, weight, sum);
    const View grad_y = TensorMatrix{&grad_a1, 0, channels}.view();
    accumulate_norm_grad(state, norm, chunk, grad_y, nullptr);
  }
  if (partial) aten::sum_out(*partial, *grad_weight);
}

// grad_weight = grad_z^T a1; returns grad_a1 = grad_z weight, which may take the place of a1.
Tensor Block::multiply_back(const TensorMatrix& grad_z, const TensorMatrix& a1, int64_t rows,
                            const Tensor& weight, const std::optional<Tensor>& grad_weight) {
  const int64_t channels = weight.size(1);
  if (path_.conv1 == Conv1x1::kProduct) {
    const Tensor dz = grad_z.as_matrix(rows, bottleneck_);
    const Tensor a1_rows = a1.as_matrix(rows, channels);
    if (grad_weight) aten::wide_mm_out(transpose(dz), a1_rows, *grad_weight);
    aten::mm_out(dz, weight, a1_rows);
    return a1_rows;
  }
  const auto gradients =
      aten::convolution_backward(grad_z.as_line(rows, bottleneck_), a1.as_line(rows, channels),
                                 as_convolution(weight), true, grad_weight.has_value());
  if (grad_weight) aten::copy(*gradients.weight, as_convolution(*grad_weight));
  const Tensor& grad_a1 = *gradients.x;
  if (grad_a1.stride(1) == 1 && grad_a1.stride(3) == channels) return grad_a1;
  const Tensor inner = a1.as_line(rows, channels);
  aten::copy(grad_a1, inner);
  return inner;
}

// The gradients of conv2's weight and of a2, by kernels of our own; that of a2 by cuDNN where this
// is faster. Also what makes that of z of it: backward_norm2.
TensorMatrix Block::backward_conv2(Backward& state, int64_t layer, const TensorMatrix& z,
                                   const std::optional<WeightGradient>& grad_weight) {
  const Norm& norm = norms_[layers_ + layer];
  const int64_t pitch = cuda::conv3x3_grad_pitch(element_, growth_);
  const TensorMatrix grad_new = scratch(&grad_new_, rows_ * pitch, pitch);
  KernelArgs args = kernel_args(z, rows_, bottleneck_);
  NormSumsLeft sums{};
  if (path_.conv2_grad_input_on_tensor_cores) {
    backward_conv2_input(state, layer, args, grad_new, &sums);
  } else {
    apply_bn_correction(state, channels_before(layer), growth_, grad_new);
    // Only the shape of the input matters here: its values are not read for its own gradient.
    const auto gradients = aten::convolution_backward(
        images(grad_new, growth_), images(z, bottleneck_), conv2(layer), true, false);
    grad_a2_ = with_inner_channels(*gradients.x, spatial_);
    backward_norm2(state, norm, z, matrix_of(*grad_a2_));
  }
  if (grad_weight) {
    launch_(cuda::bn_relu_conv3x3_grad_weight, args, norm.bn, image(), growth_, grad_new.view(),
            *grad_weight, &state.weight_parts, sums);
  } else {
    launch_(cuda::add_norm_sums, args, sums);
  }
  return {&*grad_a2_, 0, bottleneck_};
}

void Block::backward_conv2_input(Backward& state, int64_t layer, KernelArgs& args,
                                 const TensorMatrix& grad_new, NormSumsLeft* sums) {
  const Norm& norm = norms_[layers_ + layer];
  const int64_t begin = channels_before(layer);
  const TensorMatrix grad_a2 = scratch(&grad_a2_, rows_ * bottleneck_, bottleneck_);
  const Gathered gathered{state.grad_features.at(0, begin).view(),
                          features_.at(0, begin).view(),
                          has_batch_statistics_reader(begin) ? mean_ + begin : nullptr,
                          {state.s1 + begin, state.s2 + begin}};
  launch_(cuda::bn_relu_conv3x3_grad_input, args, norm.bn, image(),
          packed_weight(WeightLayout::kGradInput, true, layer), growth_, gathered, grad_new.view(),
          gradients_of(state, norm, grad_a2), sums);
}

// The same by ATen's convolutions; the weight's gradient goes to state.grad_conv2.
Tensor Block::backward_aten_conv2(Backward& state, int64_t layer, const TensorMatrix& z,
                                  bool needs_weight) {
  const Norm& norm2 = norms_[layers_ + layer];
  const TensorMatrix grad_matrix = apply_bn_correction(
      state, channels_before(layer), growth_, scratch(&grad_new_, rows_ * growth_, growth_));
  Tensor grad_new = images(grad_matrix, growth_);
  if (arguments_.dropout_mask) {
    grad_new = aten::apply_dropout(grad_new, dropout_mask(layer), arguments_.dropout_scale);
  }
  const TensorMatrix a2 = scratch(&a2_, rows_ * bottleneck_, bottleneck_);
  if (needs_weight) normalise(norm2, z, rows_, a2);
  const auto gradients = aten::convolution_backward(grad_new, images(a2, bottleneck_), conv2(layer),
                                                    true, needs_weight);
  if (needs_weight) {
    const Tensor weight = with_inner_channels(*gradients.weight, kernel_);
    const int64_t size = weight.numel();
    state.grad_conv2.push_back(reinterpret(weight, 0, {1, size}, {size, 1}));
  }
  const Tensor grad_a2 = with_inner_channels(*gradients.x, spatial_);
  backward_norm2(state, norm2, z, matrix_of(grad_a2));
  return grad_a2;
}

void Block::backward_layer(Backward& state, int64_t layer, const std::optional<Tensor>& grad_conv1,
                           const std::optional<WeightGradient>& grad_conv2) {
  const TensorMatrix z = this->z(layer);
  if (!arguments_.z) bottleneck(layer, z, nullptr, {}, nullptr);
  if (path_.conv2_on_tensor_cores) {
    const TensorMatrix grad_a2 = backward_conv2(state, layer, z, grad_conv2);
    return backward_conv1_on_tensor_cores(state, layer, grad_a2, grad_conv1);
  }
  const bool a1_is_ready = !arguments_.z && backward_chunks(channels_before(layer)).size() == 1;
  const Tensor grad = backward_aten_conv2(state, layer, z, grad_conv2.has_value());
  if (on_tensor_cores()) {
    return backward_conv1_on_tensor_cores(state, layer, matrix_of(grad), grad_conv1);
  }
  backward_conv1(state, layer, matrix_of(grad), a1_is_ready, grad_conv1);
}

void Block::backward_layers(Backward& state, const BlockGradients& gradients) {
  const auto& needs = gradients.needs_conv2;
  const auto needed = std::count_if(needs.begin(), needs.end(), [](int64_t n) { return n != 0; });
  int64_t left = needed;  // of gradients.conv2
  for (int64_t l = layers_ - 1; l >= 0; --l) {
    std::optional<Tensor> weight1;
    std::optional<WeightGradient> weight2;
    if (gradients.needs_conv1[l]) weight1 = packed_conv1(*gradients.conv1, l);
    if (needs[l]) weight2 = gradient_of(*gradients.conv2, --left);
    backward_layer(state, l, weight1, weight2);
  }
  if (state.weight_parts.memory != nullptr) {
    KernelArgs args = kernel_args(features_, rows_, channels_);
    launch_(cuda::add_weight_parts, args, state.weight_parts);
  }
  if (state.grad_conv2.empty()) return;
  std::reverse(state.grad_conv2.begin(), state.grad_conv2.end());
  const int64_t size = gradients.conv2->numel() / needed;
  const Tensor joined = empty({needed, size}, dtype_, device_);
  aten::cat_out(state.grad_conv2, joined);
  const Sizes kernel = given_kernel();
  Sizes sizes = with_sizes(growth_, bottleneck_, kernel);
  Sizes strides = channels_last_strides(bottleneck_, kernel);
  sizes.insert(sizes.begin(), needed);
  strides.insert(strides.begin(), size);
  aten::copy(reinterpret(joined, 0, sizes, strides), *gradients.conv2);
}

// Of all layers: where their statistics are known.
void Block::make_norm_numbers() {
  norm_numbers_ = empty({3 * affine_count_}, ScalarType::Float, device_);
  auto* const numbers = static_cast<float*>(norm_numbers_->data_ptr());
  std::vector<KnownNorm> known;
  for (int64_t n = 0; n < 2 * layers_; ++n) {
    Norm& norm = norms_[n];
    known.push_back({norm.bn, norm.channels, norm.affine_begin});
    norm.bn.numbers = numbers + norm.affine_begin;
    norm.bn.numbers_stride = affine_count_;
  }
  cuda::norm_numbers(known, numbers, affine_count_, launch_.stream());
}

Block::Backward Block::start_backward(const BlockGradients& gradients) {
  std::vector<WeightsToPack> weights;
  if (on_tensor_cores()) {
    make_norm_numbers();
    if (!arguments_.z) weights.push_back(conv1_weights(WeightLayout::kForward));
    weights.push_back(conv1_weights(WeightLayout::kGradInput));
  }
  if (path_.conv2_grad_input_on_tensor_cores) {
    weights.push_back(conv2_weights(WeightLayout::kGradInput));
  }
  double* const sums = pack_weights(weights, 4 * channels_);
  const TensorMatrix grad_features =
      images_matrix("grad_features", gradients.features, channels_, parameter_type(element_));
  return {grad_features,
          sums,
          sums + 2 * channels_,
          sums + 3 * channels_,
          gradients.affine,
          false,
          {},
          {}};
}

// Begins G: with the gradient of the features, or with what the last reader adds.
void Block::backward_result(Backward& state, const Tensor& grad_result,
                            const std::optional<TensorMatrix>& grad_y) {
  if (!grad_y) {
    return aten::copy(grad_result,
                      state.grad_features.as_images(images_, channels_, given_spatial()));
  }
  const Pooling pooling = this->pooling();
  state.first_reader = true;
  accumulate_norm_grad(state, norms_.back(), {0, rows_, true, true}, grad_y->view(),
                       arguments_.pool == Pool::kNone ? nullptr : &pooling);
  state.first_reader = false;
}

void Block::backward(const Tensor& grad_result, bool has_reader, const BlockGradients& gradients) {
  check_gradients(gradients);
  std::optional<TensorMatrix> grad_y;
  if (has_reader) {
    grad_y = reader_matrix("grad_result", grad_result);
  } else {
    element_of(arguments_.op, "grad_result", grad_result);
    checks_.has_sizes("grad_result", grad_result, sizes_with(channels_));
    checks_.any_strides("grad_result", grad_result, grad_result.scalar_type(), Access::kRead);
  }
  Backward state = start_backward(gradients);
  backward_result(state, grad_result, grad_y);
  backward_layers(state, gradients);
  if (!gradients.x) return;
  apply_bn_correction(state, 0, channels_in_,
                      images_matrix("grad_x", *gradients.x, channels_in_, dtype_));
}

}  // namespace efficient_densenet
