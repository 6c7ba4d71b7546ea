#include <algorithm>

#include "common/aten.h"
#include "dense_block/block.h"

namespace efficient_densenet {
namespace {

WeightViews views_of(const Tensors& weights) {
  WeightViews views{{}, weights[0].scalar_type() == ScalarType::Float};
  for (const Tensor& weight : weights) {
    WeightView view{weight.data_ptr(), {}};
    for (int64_t d = 0; d < std::min<int64_t>(weight.dim(), 4); ++d) {
      view.strides[d] = weight.stride(d);
    }
    views.layers.push_back(view);
  }
  return views;
}

}  // namespace

// The first C_0 columns of the features.
void Block::write_input() {
  const Tensor columns = features_.as_images(images_, channels_in_, given_spatial());
  if (!arguments_.projection) return aten::copy(arguments_.x, columns);
  const Tensor& weight = *arguments_.projection;
  if (!path_.projection_multiplies) {
    return aten::copy(aten::convolution(arguments_.x, weight), columns);
  }
  const int64_t inputs = weight.size(1);
  const Tensor matrix = reinterpret(weight, 0, {channels_in_, inputs}, {inputs, 1});
  aten::mm_out(x_.as_matrix(rows_, inputs), transpose(matrix),
               features_.as_matrix(rows_, channels_in_));
}

void Block::take_statistics(const TensorMatrix& x, int64_t channels, double* mean, double* var,
                            const View* copy) {
  KernelArgs args = kernel_args(x, rows_, channels);
  launch_(cpu::concat_bn_stats, cuda::concat_bn_stats, args, Statistics{mean, var, copy});
}

void Block::normalise(const Norm& norm, const TensorMatrix& x, int64_t rows,
                      const TensorMatrix& y) {
  KernelArgs args = kernel_args(x, rows, norm.channels);
  launch_(cpu::concat_bn_relu, cuda::concat_bn_relu, args, norm.bn, y.view());
}

WeightsToPack Block::conv1_weights(WeightLayout layout) const {
  return {layout, false, views_of(arguments_.conv1), bottleneck_, channels_in_, growth_};
}

WeightsToPack Block::conv2_weights(WeightLayout layout) const {
  return {layout, true, views_of(arguments_.conv2), growth_, bottleneck_, 0};
}

// Packs what the tensor-core kernels will read, of all layers. Returns so many doubles that are 0:
// they are filled by the same launch, as are the tickets of all kernels of this call.
double* Block::pack_weights(const std::vector<WeightsToPack>& weights, int64_t zeros) {
  if (!on_tensor_cores()) {
    zeros_ = empty({zeros}, ScalarType::Double, device_);
    torch::stable::zero_(*zeros_);
    return static_cast<double*>(zeros_->data_ptr());
  }
  zeros_ = empty({zeros + Launcher::kTickets / 2}, ScalarType::Double, device_);
  auto* const data = static_cast<double*>(zeros_->data_ptr());
  launch_.use_tickets(data + zeros, Launcher::kTickets);
  std::vector<PackJob> jobs;
  for (const WeightsToPack& job : weights) {
    std::vector<int64_t> bytes;
    for (int64_t l = 0; l < layers_; ++l) {
      bytes.push_back(cuda::packed_bytes(element_, rows_, job, l));
    }
    jobs.push_back({job, packed_weights(job.layout, job.is_3x3).allocate(bytes, device_)});
  }
  const int64_t bytes = zeros_->numel() * static_cast<int64_t>(sizeof(double));
  cuda::pack_weights(element_, rows_, jobs, {data, bytes}, launch_.stream());
  return data;
}

// Where each norm2 has its statistics and nobody keeps z, conv1's kernel applies it to its sums and
// writes relu(norm2(z)).
void Block::fold_norm2() {
  folded_ = empty({2 * layers_ * bottleneck_}, ScalarType::Float, device_);
  auto* const scale = static_cast<float*>(folded_->data_ptr());
  std::vector<KnownNorm> known;
  for (int64_t l = 0; l < layers_; ++l) {
    known.push_back({norms_[layers_ + l].bn, bottleneck_, l * bottleneck_});
  }
  cuda::fold_norms(known, scale, scale + layers_ * bottleneck_, launch_.stream());
}

// z = relu(norm1(x)) conv1, and its moments where they are asked for.
void Block::bottleneck(int64_t layer, const TensorMatrix& z, const Statistics* moments,
                       const MomentsLeft& x_left, MomentsLeft* z_left) {
  const int64_t channels = channels_before(layer);
  if (on_tensor_cores()) {
    KernelArgs args = kernel_args(features_, rows_, channels);
    FoldedNorm norm2{};
    if (folded_) {
      norm2.scale = static_cast<const float*>(folded_->data_ptr()) + layer * bottleneck_;
      norm2.bias = norm2.scale + layers_ * bottleneck_;
    }
    return launch_(cuda::bn_relu_conv1x1, args, norms_[layer].bn,
                   packed_weight(WeightLayout::kForward, false, layer), bottleneck_, norm2,
                   z.view(), moments, x_left, z_left);
  }
  const Tensor& weight = conv1(layer);
  const Tensor transposed = transpose(weight);
  for (const RowChunk& chunk : row_chunks(channels, rows_)) {
    const TensorMatrix a1 = scratch(&a1_, chunk_elements(), channels);
    const TensorMatrix z_rows = z.at(chunk.begin, 0);
    normalise(norms_[layer], features_.at(chunk.begin, 0), chunk.count, a1);
    if (path_.conv1 == Conv1x1::kProduct) {
      aten::mm_out(a1.as_matrix(chunk.count, channels), transposed,
                   z_rows.as_matrix(chunk.count, bottleneck_));
    } else {
      aten::copy(aten::convolution(a1.as_line(chunk.count, channels), as_convolution(weight)),
                 z_rows.as_line(chunk.count, bottleneck_));
    }
  }
  if (moments != nullptr) take_statistics(z, bottleneck_, moments->mean, moments->var, nullptr);
}

void Block::forward_layer(int64_t layer, MomentsLeft* left) {
  const Norm& norm2 = norms_[layers_ + layer];
  const TensorMatrix z = this->z(layer);
  const int64_t z_begin = channels_ + layer * bottleneck_;
  const Statistics moments{mean_ + z_begin, var_ + z_begin, nullptr};
  MomentsLeft z_left{};
  const bool leaves_z = path_.conv2_on_tensor_cores && norm2.batch_statistics;
  bottleneck(layer, z, norm2.batch_statistics ? &moments : nullptr, *left,
             leaves_z ? &z_left : nullptr);
  *left = {};
  const int64_t begin = channels_before(layer);
  const View to = features_.at(0, begin).view();
  if (path_.conv2_on_tensor_cores) {
    const Statistics of_new{mean_ + begin, var_ + begin, nullptr};
    const Statistics* const asked = uses_batch_statistics_ ? &of_new : nullptr;
    KernelArgs args = kernel_args(z, rows_, bottleneck_);
    const bool leaves = layer + 1 < layers_ && norms_[layer + 1].batch_statistics;
    launch_(cuda::bn_relu_conv3x3, args, norm2.bn, folded_.has_value(), image(),
            packed_weight(WeightLayout::kForward, true, layer), growth_, to, asked, z_left,
            leaves ? left : nullptr);
    left->begin = begin;
    return;
  }
  const TensorMatrix a2 = scratch(&a2_, rows_ * bottleneck_, bottleneck_);
  normalise(norm2, z, rows_, a2);
  Tensor new_features = aten::convolution(images(a2, bottleneck_), conv2(layer));
  if (arguments_.dropout_mask) {
    new_features = aten::apply_dropout(new_features, dropout_mask(layer), arguments_.dropout_scale);
  }
  new_features = with_inner_channels(new_features, spatial_);
  take_statistics(matrix_of(new_features), growth_, mean_ + begin, var_ + begin, &to);
}

// y = relu(norm(features)) of the last reader, averaged where that is asked for.
void Block::forward_reader(const TensorMatrix& y) {
  const Norm& norm = norms_.back();
  if (arguments_.pool == Pool::kNone) return normalise(norm, features_, rows_, y);
  KernelArgs args = kernel_args(features_, rows_, channels_);
  launch_(cpu::average_pool, cuda::average_pool, args, norm.bn, pooling(), y.view());
}

void Block::forward(bool inference, const std::optional<Tensor>& y) {
  check_x();
  std::optional<TensorMatrix> y_matrix;
  if (y) y_matrix = reader_matrix("y", *y);
  write_input();
  if (inference && path_.conv2_on_tensor_cores && !uses_batch_statistics_) fold_norm2();
  if (on_tensor_cores()) {
    if (!uses_batch_statistics_) make_norm_numbers();
    std::vector<WeightsToPack> weights{conv1_weights(WeightLayout::kForward)};
    if (path_.conv2_on_tensor_cores) weights.push_back(conv2_weights(WeightLayout::kForward));
    pack_weights(weights, 0);
  }
  if (uses_batch_statistics_) take_statistics(features_, channels_in_, mean_, var_, nullptr);
  MomentsLeft left{};
  for (int64_t l = 0; l < layers_; ++l) forward_layer(l, &left);
  if (y_matrix) forward_reader(*y_matrix);
}

}  // namespace efficient_densenet
