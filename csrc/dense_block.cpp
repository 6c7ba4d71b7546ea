// The operators beneath efficient_densenet.dense_block: a whole dense block forward, backward, and
// the update of running statistics. The loop over layers is here; the mathematics is in
// docs/design.md, "The dense block".
//
// Notation: M rows (pixels of all images), L layers, k new channels per layer, B channels of a
// bottleneck, C_l = C_0 + l k channels that layer l reads, C = C_L in all. Everything is a matrix
// of M rows with its channels next to each other:
//
//   features [M, C]   x of layer l: its first C_l columns; its new features: the next k
//   z        [M, B]   the bottleneck of a layer
//   a1, a2            relu(norm1(x)), relu(norm2(z)): scratch, never kept
//
// Norms are numbered: norm1 of each layer, norm2 of each layer, the norm of the block's last reader
// where it is part of the call. Numbers per channel come packed, in that order: `affine` [2, .]
// weights and biases, `frozen` [2, .] mean and var of the norms that do not normalise by the batch.
// `statistics` [2, C + L B] holds mean and var of the batch: of the features, then of each z.
#include "dense_block.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "aten.h"
#include "bn_relu_conv1x1.h"
#include "bn_relu_conv3x3.h"
#include "tensors.h"

namespace efficient_densenet {
namespace {

using Sizes = std::vector<int64_t>;

// The normalised rows of so many bytes are multiplied while they are still in the cache.
constexpr int64_t kChunkBytesCuda = 32 << 20, kChunkBytesCpu = 1 << 20;

// How the 1x1 convolutions run; numbered as in dense_block.py.
enum class Conv1x1 : int64_t { kConvolution, kProduct, kTensorCores };

// What the last reader averages; numbered as in dense_block.py.
enum class Pool : int64_t { kNone, kWindows, kImages };

// What forward and backward of a block are called with alike.
struct Arguments {
  const char* op;
  Tensor features;               // [N, C, *spatial], channels-last
  std::optional<Tensor> z;       // [L, M, B]: kept; none: each z is scratch
  Tensor statistics;             // [2, C + L B], float64
  Tensor conv1;                  // [B (C_0 + ... + C_(L-1))]: the [B, C_l] one after the other
  Tensor conv2;                  // [L, k, *kernel, B]
  Tensor affine;                 // [2, channels of all norms]
  std::optional<Tensor> frozen;  // [2, channels of the frozen norms], float64
  std::vector<int64_t> frozen_norms;
  std::vector<double> eps;             // of each norm
  std::optional<Tensor> dropout_mask;  // [L, N, *spatial, k], bool
  double dropout_scale;
  Conv1x1 conv1x1;
  bool conv3x3;  // the second convolutions run on kernels of our own, too
  Pool pool;
};

class Block {
 public:
  explicit Block(const Arguments& arguments);

  void forward(bool inference, const std::optional<Tensor>& y);
  void backward(const Tensor& grad_features, const std::optional<Tensor>& grad_y,
                const std::optional<Tensor>& grad_x, const Tensor& grad_affine,
                const std::optional<Tensor>& grad_conv1, const std::vector<int64_t>& wants_conv1,
                const std::optional<Tensor>& grad_conv2, const std::vector<int64_t>& wants_conv2);

 private:
  struct Norm {
    BatchNorm bn;
    int64_t channels, affine_begin;
    bool batch_statistics;
  };

  // Rows [begin, begin + count).
  struct Chunk {
    int64_t begin, count;
    bool first, last;
  };

  // Rows and columns of a tensor from `offset` elements behind its first one.
  struct Matrix {
    const Tensor* tensor;  // outlives the matrix
    int64_t offset, row_stride;
  };

  struct Backward {
    Matrix grad_features;
    double *sums, *s1, *s2;
    Tensor grad_affine;
    bool first_reader;
    Tensors grad_conv2;  // ATen's, of the layers that want one, the last layer first
  };

  // Weights of all layers as kernels read them, and where each begins.
  struct Packed {
    std::optional<Tensor> memory;
    std::vector<int64_t> begins;

    char* allocate(const std::vector<int64_t>& bytes, const Device& device);
    const void* at(int64_t layer) const;
  };

  int64_t channels_before(int64_t layer) const { return channels_in_ + layer * growth_; }
  Matrix scratch(std::optional<Tensor>* memory, int64_t elements, int64_t channels);
  Matrix z(int64_t layer);
  Matrix at(const Matrix& matrix, int64_t row, int64_t channel) const;
  View view(const Matrix& matrix) const;
  Problem problem(const Matrix& x, int64_t rows, int64_t channels) const;
  int64_t chunk_elements() const;
  std::vector<Chunk> chunks(int64_t channels) const;
  char* affine(const Tensor& tensor, int row, int64_t begin) const;
  void add_norm(int64_t channels, double* mean, double* var);

  Tensor matrix_tensor(const Matrix& matrix, int64_t rows, int64_t channels) const;
  Tensor row_image(const Matrix& matrix, int64_t rows, int64_t channels) const;
  Tensor images(const Matrix& matrix, int64_t channels) const;
  Matrix matrix_of(const Tensor& images) const;
  Tensor conv1(const Tensor& packed, int64_t layer) const;
  bool on_tensor_cores() const { return arguments_.conv1x1 == Conv1x1::kTensorCores; }
  void check_tensor_cores() const;
  void fold_norm2();
  void pack_conv1(WeightLayout layout);
  void pack_conv2(bool grad_input);
  ImageSize image() const { return {spatial_[0], spatial_[1]}; }
  Tensor conv2(const Tensor& packed, int64_t layer, int64_t count) const;
  Tensor dropout_mask(int64_t layer) const;

  void take_statistics(const Matrix& x, int64_t channels, double* mean, double* var,
                       const View* copy);
  void normalise(const Norm& norm, const Matrix& x, int64_t rows, const Matrix& y);
  void bottleneck(int64_t layer, const Matrix& z, const Statistics* moments);
  void forward_layer(int64_t layer);
  Pooling pooling() const;
  void check_dense(const Tensor& tensor, int64_t elements, ScalarType dtype,
                   const char* what) const;
  void check_reader(const Tensor& y, const char* what) const;

  void read(Backward& state, const Norm& norm, const Chunk& chunk, const View& grad_y,
            const Pooling* pooling, const void* packed_conv1 = nullptr);
  Matrix finalise(Backward& state, int64_t begin, int64_t channels, const Matrix& to);
  Gradients gradients_of(Backward& state, const Norm& norm, const Matrix& grad) const;
  void backward_norm2(Backward& state, const Norm& norm, const Matrix& z, const Matrix& grad);
  Tensor multiply_back(const Matrix& grad_z, const Matrix& a1, int64_t rows, const Tensor& weight,
                       const std::optional<Tensor>& grad_weight);
  void backward_conv1(Backward& state, int64_t layer, const Matrix& grad_z, bool a1_is_ready,
                      const std::optional<Tensor>& grad_weight);
  Matrix backward_conv2(Backward& state, int64_t layer, const Matrix& z,
                        const std::optional<Tensor>& grad_weight);
  void backward_conv2_input(Backward& state, int64_t layer, Problem& p, const Matrix& grad_added);
  Tensor backward_aten_conv2(Backward& state, int64_t layer, const Matrix& z, bool wants_weight);
  void backward_layer(Backward& state, int64_t layer, const std::optional<Tensor>& grad_conv1,
                      const std::optional<Tensor>& grad_conv2);

  const Arguments& arguments_;
  Device device_;
  Launcher launch_;
  Element element_;
  ScalarType dtype_;
  int64_t element_size_;
  int64_t layers_, growth_, bottleneck_, channels_in_, channels_, rows_, images_;
  Sizes spatial_, kernel_;
  Matrix features_;
  double *mean_, *var_;
  std::vector<Norm> norms_;
  bool uses_batch_statistics_ = false;  // in any norm
  int64_t affine_count_ = 0, frozen_count_ = 0;
  std::optional<Tensor> a1_, a2_, z_, grad_z_, added_;  // scratch
  std::optional<Tensor> folded_;  // norm2 of each layer: scale, bias [2, L, B]
  Packed packed_conv1_[2];        // by WeightLayout
  Packed packed_conv2_[2];        // by whether it is for the gradient
};

void check(bool condition, const Arguments& arguments, const char* what) {
  EFFICIENT_DENSENET_CHECK(condition, arguments.op, what);
}

bool is_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns &&
         tensor.is_contiguous();
}

Block::Block(const Arguments& arguments)
    : arguments_(arguments),
      device_(arguments.features.device()),
      launch_(device_),
      element_(element_of(arguments.op, "features", arguments.features)),
      dtype_(arguments.features.scalar_type()),
      element_size_(arguments.features.element_size()) {
  const Tensor &x = arguments.features, &w1 = arguments.conv1, &w2 = arguments.conv2;
  Geometry geometry(arguments.op, "features", x);
  check(w2.dim() == x.dim() + 1 && w2.is_contiguous() && w2.size(0) > 0, arguments,
        "conv2: expected contiguous [L, k, *kernel, B]");
  layers_ = w2.size(0);
  growth_ = w2.size(1);
  bottleneck_ = w2.size(w2.dim() - 1);
  channels_ = x.size(1);
  channels_in_ = channels_ - layers_ * growth_;
  check(channels_in_ > 0, arguments, "features: too few channels for so many layers");
  View features_view{};
  geometry.add("features", x, &features_view);
  const RowSpace rows = geometry.merge_rows();
  rows_ = rows.count;
  images_ = x.size(0);
  check(rows_ > 0, arguments, "features: expected at least one element");
  for (const Tensor& other : {arguments.statistics, w1, w2, arguments.affine}) {
    check(other.device() == device_, arguments, "features: expected all tensors on its device");
  }
  check(rows.dims == 1 && features_view.channel_stride == 1, arguments,
        "features: expected channels-last memory");
  features_ = {&x, 0, features_view.row_strides[0]};
  if (x.dim() == 3) spatial_ = kernel_ = {1};  // convolutions of two dimensions know the layout
  for (int64_t d = 2; d < x.dim(); ++d) spatial_.push_back(x.size(d));
  for (int64_t d = 2; d < w2.dim() - 1; ++d) kernel_.push_back(w2.size(d));

  int64_t all_inputs = 0;
  for (int64_t l = 0; l < layers_; ++l) all_inputs += channels_before(l);
  check(w1.is_contiguous() && w1.numel() == bottleneck_ * all_inputs, arguments,
        "conv1: expected B times the sum of C_l elements");
  check(w1.scalar_type() == dtype_ && w2.scalar_type() == dtype_, arguments,
        "conv1, conv2: expected the dtype of features");
  const int64_t all_statistics = channels_ + layers_ * bottleneck_;
  check(is_matrix(arguments.statistics, 2, all_statistics), arguments,
        "statistics: expected [2, C + L B]");
  check(!arguments.z || (arguments.z->is_contiguous() && arguments.z->scalar_type() == dtype_ &&
                         arguments.z->numel() == layers_ * rows_ * bottleneck_),
        arguments, "bottlenecks: expected contiguous [L, M, B] of the dtype of features");
  mean_ = static_cast<double*>(arguments.statistics.data_ptr());
  var_ = mean_ + all_statistics;
  for (int64_t l = 0; l < layers_; ++l) add_norm(channels_before(l), mean_, var_);
  for (int64_t l = 0; l < layers_; ++l) {
    const int64_t begin = channels_ + l * bottleneck_;
    add_norm(bottleneck_, mean_ + begin, var_ + begin);
  }
  if (static_cast<int64_t>(arguments.eps.size()) > 2 * layers_) add_norm(channels_, mean_, var_);
  check(arguments.eps.size() == norms_.size(), arguments, "eps: expected one number per norm");
  check(is_matrix(arguments.affine, 2, affine_count_) &&
            arguments.affine.scalar_type() == parameter_type(element_),
        arguments, "affine: expected [2, channels of all norms], float64 or float32");
  check(frozen_count_ == 0 || (arguments.frozen && is_matrix(*arguments.frozen, 2, frozen_count_) &&
                               arguments.frozen->scalar_type() == ScalarType::Double),
        arguments, "frozen: expected float64 [2, channels of the frozen norms]");
  check(!arguments.dropout_mask || (arguments.dropout_mask->scalar_type() == ScalarType::Bool &&
                                    arguments.dropout_mask->is_contiguous() &&
                                    arguments.dropout_mask->numel() == layers_ * rows_ * growth_),
        arguments, "dropout_mask: expected contiguous bool [L, N, *spatial, k]");
  check(on_tensor_cores() || !arguments.conv3x3, arguments, "conv3x3: needs conv1x1 = 2");
  if (on_tensor_cores()) check_tensor_cores();
  // The arrays' second rows begin where the counts are known only now.
  int64_t frozen_begin = 0;
  for (size_t n = 0; n < norms_.size(); ++n) {
    Norm& norm = norms_[n];
    norm.bn.weight = affine(arguments.affine, 0, norm.affine_begin);
    norm.bn.bias = affine(arguments.affine, 1, norm.affine_begin);
    norm.bn.eps = arguments.eps[n];
    if (norm.batch_statistics) continue;
    norm.bn.mean = static_cast<double*>(arguments.frozen->data_ptr()) + frozen_begin;
    norm.bn.var = norm.bn.mean + frozen_count_;
    frozen_begin += norm.channels;
  }
}

void Block::check_tensor_cores() const {
  check(!launch_.is_cpu(), arguments_, "conv1x1: tensor cores need CUDA tensors");
  const std::string why =
      cuda::why_no_tensor_cores(device_.index(), element_, bottleneck_, channels_);
  EFFICIENT_DENSENET_CHECK(why.empty(), arguments_.op, "conv1x1: no tensor cores: ", why);
  if (!arguments_.conv3x3) return;
  const bool is_3x3 = spatial_.size() == 2 && kernel_ == Sizes{3, 3} && !arguments_.dropout_mask;
  check(is_3x3, arguments_, "conv3x3: expected images, 3x3 convolutions and no dropout");
  const std::string why_not =
      cuda::why_no_conv3x3(device_.index(), element_, growth_, bottleneck_, spatial_[1]);
  EFFICIENT_DENSENET_CHECK(why_not.empty(), arguments_.op, "conv3x3: ", why_not);
}

void Block::add_norm(int64_t channels, double* mean, double* var) {
  const auto& frozen = arguments_.frozen_norms;
  const auto index = static_cast<int64_t>(norms_.size());
  const bool is_frozen = std::find(frozen.begin(), frozen.end(), index) != frozen.end();
  norms_.push_back({{mean, var, nullptr, nullptr, 0}, channels, affine_count_, !is_frozen});
  affine_count_ += channels;
  if (is_frozen) frozen_count_ += channels;
  uses_batch_statistics_ |= !is_frozen;
}

char* Block::affine(const Tensor& tensor, int row, int64_t begin) const {
  const int64_t size = is_double(element_) ? sizeof(double) : sizeof(float);
  return static_cast<char*>(tensor.data_ptr()) + (row * affine_count_ + begin) * size;
}

// ---------------------------------------------------------------------------------------------
// Matrices and tensors on them

View Block::view(const Matrix& matrix) const {
  char* const data = static_cast<char*>(matrix.tensor->data_ptr());
  const auto size = static_cast<int64_t>(matrix.tensor->element_size());  // G's is another
  return {data + matrix.offset * size, 1, {matrix.row_stride}};
}

Block::Matrix Block::at(const Matrix& matrix, int64_t row, int64_t channel) const {
  return {matrix.tensor, matrix.offset + row * matrix.row_stride + channel, matrix.row_stride};
}

// Memory of one of the matrices that every layer overwrites, allocated by the first.
Block::Matrix Block::scratch(std::optional<Tensor>* memory, int64_t elements, int64_t channels) {
  if (!memory->has_value()) *memory = empty({elements}, dtype_, device_);
  return {&**memory, 0, channels};
}

Block::Matrix Block::z(int64_t layer) {
  if (!arguments_.z) return scratch(&z_, rows_ * bottleneck_, bottleneck_);
  return {&*arguments_.z, layer * rows_ * bottleneck_, bottleneck_};
}

Problem Block::problem(const Matrix& x, int64_t rows, int64_t channels) const {
  Problem problem{};
  problem.element = element_;
  problem.rows = {1, {rows, 1, 1, 1}, rows};
  problem.channels = channels;
  problem.features = {{view(x), {}, 0, channels}};
  return problem;
}

int64_t Block::chunk_elements() const {
  const int64_t bytes = launch_.is_cpu() ? kChunkBytesCpu : kChunkBytesCuda;
  return std::min(std::max(channels_, bytes / element_size_), rows_ * channels_);
}

std::vector<Block::Chunk> Block::chunks(int64_t channels) const {
  const int64_t most = std::max<int64_t>(1, chunk_elements() / channels);
  const int64_t count = (rows_ + most - 1) / most;
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = rows_ * i / count, end = rows_ * (i + 1) / count;
    chunks.push_back({begin, end - begin, i == 0, i + 1 == count});
  }
  return chunks;
}

// A view of a tensor's memory, without the dispatcher.
Tensor reinterpret(const Tensor& tensor, int64_t offset, const Sizes& sizes, const Sizes& strides) {
  AtenTensorHandle result = nullptr;
  if (aoti_torch__reinterpret_tensor(tensor.get(), sizes.size(), sizes.data(), strides.data(),
                                     offset, &result) != 0) {
    fail("efficient_densenet", "aoti_torch__reinterpret_tensor failed");
  }
  return Tensor(result);
}

Tensor Block::matrix_tensor(const Matrix& matrix, int64_t rows, int64_t channels) const {
  return reinterpret(*matrix.tensor, matrix.offset, {rows, channels}, {matrix.row_stride, 1});
}

Tensor transpose(const Tensor& matrix) {
  return reinterpret(matrix, 0, {matrix.size(1), matrix.size(0)},
                     {matrix.stride(1), matrix.stride(0)});
}

// The rows as one image of one line.
Tensor Block::row_image(const Matrix& matrix, int64_t rows, int64_t channels) const {
  const int64_t stride = matrix.row_stride;
  return reinterpret(*matrix.tensor, matrix.offset, {1, channels, 1, rows},
                     {rows * stride, 1, rows * stride, stride});
}

// A matrix [B, C] as the weight of a 1x1 convolution.
Tensor as_convolution(const Tensor& matrix) {
  return reinterpret(matrix, 0, {matrix.size(0), matrix.size(1), 1, 1}, {matrix.size(1), 1, 1, 1});
}

// Channels-last strides of [images, channels, *sizes].
Sizes channels_last_strides(int64_t channels, const Sizes& sizes) {
  Sizes strides(2 + sizes.size(), 1);
  int64_t stride = channels;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[2 + d] = stride;
    stride *= sizes[d];
  }
  strides[0] = stride;
  return strides;
}

Sizes with_sizes(int64_t first, int64_t second, const Sizes& sizes) {
  Sizes all{first, second};
  all.insert(all.end(), sizes.begin(), sizes.end());
  return all;
}

Tensor Block::images(const Matrix& matrix, int64_t channels) const {
  return reinterpret(*matrix.tensor, matrix.offset, with_sizes(images_, channels, spatial_),
                     channels_last_strides(channels, spatial_));
}

// Some of ATen's convolutions answer in contiguous memory.
Tensor with_inner_channels(const Tensor& tensor, const Sizes& sizes) {
  const Sizes wanted = channels_last_strides(tensor.size(1), sizes);
  bool fits = true;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != wanted[d]) fits = false;
  }
  if (fits) return tensor;
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(
      tensor, sizes.size() == 3 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast);
}

Block::Matrix Block::matrix_of(const Tensor& images) const { return {&images, 0, images.size(1)}; }

// The weights of a layer, in packed ones or in their gradients.
Tensor Block::conv1(const Tensor& packed, int64_t layer) const {
  int64_t begin = 0;
  for (int64_t l = 0; l < layer; ++l) begin += bottleneck_ * channels_before(l);
  const int64_t channels = channels_before(layer);
  return reinterpret(packed, begin, {bottleneck_, channels}, {channels, 1});
}

// The weights of a layer of so many, likewise.
Tensor Block::conv2(const Tensor& packed, int64_t layer, int64_t count) const {
  return reinterpret(packed, layer * (packed.numel() / count),
                     with_sizes(growth_, bottleneck_, kernel_),
                     channels_last_strides(bottleneck_, kernel_));
}

Tensor Block::dropout_mask(int64_t layer) const {
  return reinterpret(*arguments_.dropout_mask, layer * rows_ * growth_,
                     with_sizes(images_, growth_, spatial_),
                     channels_last_strides(growth_, spatial_));
}

// ---------------------------------------------------------------------------------------------
// Forward

void Block::take_statistics(const Matrix& x, int64_t channels, double* mean, double* var,
                            const View* copy) {
  Problem p = problem(x, rows_, channels);
  launch_(cpu::concat_bn_stats, cuda::concat_bn_stats, p, Statistics{mean, var, copy});
}

void Block::normalise(const Norm& norm, const Matrix& x, int64_t rows, const Matrix& y) {
  Problem p = problem(x, rows, norm.channels);
  launch_(cpu::concat_bn_relu, cuda::concat_bn_relu, p, norm.bn, view(y));
}

char* Block::Packed::allocate(const std::vector<int64_t>& bytes, const Device& device) {
  int64_t total = 0;
  begins.clear();
  for (const int64_t count : bytes) {
    begins.push_back(total);
    total += count;
  }
  memory = empty({total}, ScalarType::Byte, device);
  return static_cast<char*>(memory->data_ptr());
}

const void* Block::Packed::at(int64_t layer) const {
  return static_cast<const char*>(memory->data_ptr()) + begins[layer];
}

// All layers' convolutions as the tensor-core kernels read them.
void Block::pack_conv1(WeightLayout layout) {
  std::vector<int64_t> bytes;
  for (int64_t l = 0; l < layers_; ++l) {
    bytes.push_back(
        cuda::packed_conv1x1_bytes(element_, layout, rows_, bottleneck_, channels_before(l)));
  }
  cuda::pack_conv1x1(element_, layout, rows_,
                     {arguments_.conv1.data_ptr(), layers_, bottleneck_, channels_in_, growth_,
                      folded_ ? static_cast<const float*>(folded_->data_ptr()) : nullptr},
                     packed_conv1_[static_cast<int>(layout)].allocate(bytes, device_),
                     launch_.stream());
}

void Block::pack_conv2(bool grad_input) {
  const std::vector<int64_t> bytes(
      layers_, cuda::packed_conv3x3_bytes(element_, grad_input, growth_, bottleneck_));
  cuda::pack_conv3x3(element_, grad_input,
                     {arguments_.conv2.data_ptr(), layers_, growth_, bottleneck_},
                     packed_conv2_[grad_input].allocate(bytes, device_), launch_.stream());
}

// Where each norm2 has its statistics and nobody keeps z, conv1 writes relu(norm2(z)): the scale
// goes into its weight, and the rest is a bias.
void Block::fold_norm2() {
  folded_ = empty({2 * layers_ * bottleneck_}, ScalarType::Float, device_);
  auto* const scale = static_cast<float*>(folded_->data_ptr());
  const std::vector<double> eps(arguments_.eps.begin() + layers_,
                                arguments_.eps.begin() + 2 * layers_);
  // Their numbers lie one after the other.
  cuda::fold_norms({norms_[layers_].bn, eps, bottleneck_}, scale, scale + layers_ * bottleneck_,
                   launch_.stream());
}

// z = relu(norm1(x)) conv1, and its moments where they are wanted.
void Block::bottleneck(int64_t layer, const Matrix& z, const Statistics* moments) {
  const int64_t channels = channels_before(layer);
  if (on_tensor_cores()) {
    Problem p = problem(features_, rows_, channels);
    const float* bias = nullptr;
    if (folded_) {
      bias = static_cast<const float*>(folded_->data_ptr()) + (layers_ + layer) * bottleneck_;
    }
    return launch_(cuda::bn_relu_conv1x1, p, norms_[layer].bn,
                   packed_conv1_[static_cast<int>(WeightLayout::kForward)].at(layer), bottleneck_,
                   bias, view(z), moments);
  }
  const Tensor weight = conv1(arguments_.conv1, layer);
  const Tensor transposed = transpose(weight);
  for (const Chunk& chunk : chunks(channels)) {
    const Matrix a1 = scratch(&a1_, chunk_elements(), channels);
    const Matrix z_rows = at(z, chunk.begin, 0);
    normalise(norms_[layer], at(features_, chunk.begin, 0), chunk.count, a1);
    if (arguments_.conv1x1 == Conv1x1::kProduct) {
      aten::mm_out(matrix_tensor(a1, chunk.count, channels), transposed,
                   matrix_tensor(z_rows, chunk.count, bottleneck_));
    } else {
      aten::copy(aten::convolution(row_image(a1, chunk.count, channels), as_convolution(weight)),
                 row_image(z_rows, chunk.count, bottleneck_));
    }
  }
  if (moments != nullptr) take_statistics(z, bottleneck_, moments->mean, moments->var, nullptr);
}

void Block::forward_layer(int64_t layer) {
  const Norm& norm2 = norms_[layers_ + layer];
  const Matrix z = this->z(layer);
  const int64_t z_begin = channels_ + layer * bottleneck_;
  const Statistics moments{mean_ + z_begin, var_ + z_begin, nullptr};
  bottleneck(layer, z, norm2.batch_statistics ? &moments : nullptr);
  const int64_t begin = channels_before(layer);
  const View to = view(at(features_, 0, begin));
  if (arguments_.conv3x3) {
    const Statistics added{mean_ + begin, var_ + begin, nullptr};
    const Statistics* const wanted = uses_batch_statistics_ ? &added : nullptr;
    Problem p = problem(z, rows_, bottleneck_);
    return launch_(cuda::bn_relu_conv3x3, p, norm2.bn, folded_.has_value(), image(),
                   packed_conv2_[false].at(layer), growth_, to, wanted);
  }
  const Matrix a2 = scratch(&a2_, rows_ * bottleneck_, bottleneck_);
  normalise(norm2, z, rows_, a2);
  Tensor added =
      aten::convolution(images(a2, bottleneck_), conv2(arguments_.conv2, layer, layers_));
  if (arguments_.dropout_mask) {
    added = aten::apply_dropout(added, dropout_mask(layer), arguments_.dropout_scale);
  }
  added = with_inner_channels(added, spatial_);
  take_statistics(matrix_of(added), growth_, mean_ + begin, var_ + begin, &to);
}

void Block::check_dense(const Tensor& tensor, int64_t elements, ScalarType dtype,
                        const char* what) const {
  check(tensor.numel() == elements && tensor.scalar_type() == dtype && tensor.stride(1) == 1,
        arguments_, what);
}

void Block::check_reader(const Tensor& y, const char* what) const {
  check(static_cast<int64_t>(arguments_.eps.size()) > 2 * layers_, arguments_,
        "eps: expected a number for the last reader's norm");
  int64_t rows = rows_;
  if (arguments_.pool != Pool::kNone) {
    const Pooling pooling = this->pooling();
    rows = images_;
    for (int d = 0; d < pooling.dims; ++d) rows *= pooling.sizes[d] / pooling.window;
  }
  check_dense(y, rows * channels_, dtype_, what);
}

Pooling Block::pooling() const {
  const Tensor& x = arguments_.features;
  const int64_t pixels = rows_ / images_;
  if (arguments_.pool == Pool::kImages) return {1, {pixels}, images_, pixels};
  Pooling pooling{static_cast<int>(x.dim() - 2), {}, images_, 2};
  for (int d = 0; d < pooling.dims; ++d) pooling.sizes[d] = x.size(2 + d);
  return pooling;
}

void Block::forward(bool inference, const std::optional<Tensor>& y) {
  if (inference && arguments_.conv3x3 && !uses_batch_statistics_) fold_norm2();
  if (on_tensor_cores()) pack_conv1(WeightLayout::kForward);
  if (arguments_.conv3x3) pack_conv2(false);
  if (uses_batch_statistics_) take_statistics(features_, channels_in_, mean_, var_, nullptr);
  for (int64_t l = 0; l < layers_; ++l) forward_layer(l);
  if (!y) return;
  check_reader(*y, "y: expected the rows and channels of the last reader's result");
  const Norm& norm = norms_.back();
  const Matrix to{&*y, 0, channels_};
  if (arguments_.pool == Pool::kNone) return normalise(norm, features_, rows_, to);
  Problem p = problem(features_, rows_, channels_);
  launch_(cpu::dense_block_pool, cuda::dense_block_pool, p, norm.bn, pooling(), view(to));
}

// ---------------------------------------------------------------------------------------------
// Backward

// One norm's share of G, S1 and S2, and the gradients of its weight and bias. With packed_conv1,
// grad_y is the gradient of what that makes of the normalised rows.
void Block::read(Backward& state, const Norm& norm, const Chunk& chunk, const View& grad_y,
                 const Pooling* pooling, const void* packed_conv1) {
  Problem p = problem(at(features_, chunk.begin, 0), chunk.count, norm.channels);
  const Reader reader{grad_y,
                      pooling,
                      view(at(state.grad_features, chunk.begin, 0)),
                      state.sums,
                      affine(state.grad_affine, 0, norm.affine_begin),
                      affine(state.grad_affine, 1, norm.affine_begin),
                      {state.s1, state.s2},
                      chunk.first,
                      chunk.last,
                      state.first_reader,
                      norm.batch_statistics};
  if (packed_conv1 != nullptr) {
    return launch_(cuda::bn_relu_conv1x1_grad_input, p, norm.bn, packed_conv1, bottleneck_, reader);
  }
  launch_(cpu::dense_block_accumulate, cuda::dense_block_accumulate, p, norm.bn, reader);
}

// The gradient of channels whose readers have all been heard.
Block::Matrix Block::finalise(Backward& state, int64_t begin, int64_t channels, const Matrix& to) {
  Problem p = problem(at(features_, 0, begin), rows_, channels);
  p.features[0].grad_x = view(to);
  const double* const mean = mean_ + begin;
  launch_(cpu::dense_block_finalise, cuda::dense_block_finalise, p,
          view(at(state.grad_features, 0, begin)), mean,
          Correction{state.s1 + begin, state.s2 + begin});
  return to;
}

// Of a norm whose readers' gradient is in the place of its own.
Gradients Block::gradients_of(Backward& state, const Norm& norm, const Matrix& grad) const {
  return {view(grad), affine(state.grad_affine, 0, norm.affine_begin),
          affine(state.grad_affine, 1, norm.affine_begin), norm.batch_statistics};
}

// In place: from the gradient of a2 to that of z.
void Block::backward_norm2(Backward& state, const Norm& norm, const Matrix& z, const Matrix& grad) {
  Problem p = problem(z, rows_, bottleneck_);
  p.features[0].grad_x = view(grad);
  launch_(cpu::concat_bn_relu_backward, cuda::concat_bn_relu_backward, p, norm.bn,
          gradients_of(state, norm, grad));
}

// The gradients of conv1's weight and of a1, and norm1's share of what its channels get back.
void Block::backward_conv1(Backward& state, int64_t layer, const Matrix& grad_z, bool a1_is_ready,
                           const std::optional<Tensor>& grad_weight) {
  const Norm& norm = norms_[layer];
  const int64_t channels = norm.channels;
  if (on_tensor_cores()) {
    if (grad_weight) {
      Problem p = problem(features_, rows_, channels);
      launch_(cuda::bn_relu_conv1x1_grad_weight, p, norm.bn, bottleneck_, view(grad_z),
              static_cast<float*>(grad_weight->data_ptr()));
    }
    return read(state, norm, {0, rows_, true, true}, view(grad_z), nullptr,
                packed_conv1_[static_cast<int>(WeightLayout::kGradInput)].at(layer));
  }
  const Tensor weight = conv1(arguments_.conv1, layer);
  const std::vector<Chunk> all = chunks(channels);
  std::optional<Tensor> partial;  // the weight's gradient, one sum per chunk
  if (grad_weight && all.size() > 1) {
    partial = empty({static_cast<int64_t>(all.size()), bottleneck_, channels},
                    grad_weight->scalar_type(), device_);
  }
  for (size_t i = 0; i < all.size(); ++i) {
    const Chunk& chunk = all[i];
    const Matrix a1 = scratch(&a1_, chunk_elements(), channels);
    if (grad_weight && !a1_is_ready) {
      normalise(norm, at(features_, chunk.begin, 0), chunk.count, a1);
    }
    std::optional<Tensor> sum = grad_weight;
    if (partial) sum = torch::stable::select(*partial, 0, i);
    const Tensor grad_a1 = multiply_back(at(grad_z, chunk.begin, 0), a1, chunk.count, weight, sum);
    read(state, norm, chunk, view({&grad_a1, 0, channels}), nullptr);
  }
  if (partial) aten::sum_out(*partial, *grad_weight);
}

// grad_weight = grad_z^T a1; returns grad_a1 = grad_z weight, which may take the place of a1.
Tensor Block::multiply_back(const Matrix& grad_z, const Matrix& a1, int64_t rows,
                            const Tensor& weight, const std::optional<Tensor>& grad_weight) {
  const int64_t channels = weight.size(1);
  if (arguments_.conv1x1 == Conv1x1::kProduct) {
    const Tensor dz = matrix_tensor(grad_z, rows, bottleneck_);
    const Tensor a1_rows = matrix_tensor(a1, rows, channels);
    if (grad_weight) aten::wide_mm_out(transpose(dz), a1_rows, *grad_weight);
    aten::mm_out(dz, weight, a1_rows);
    return a1_rows;
  }
  const auto gradients = aten::convolution_backward(
      row_image(grad_z, rows, bottleneck_), row_image(a1, rows, channels), as_convolution(weight),
      true, grad_weight.has_value());
  if (grad_weight) aten::copy(*gradients.weight, as_convolution(*grad_weight));
  const Tensor& grad_a1 = *gradients.x;
  if (grad_a1.stride(1) == 1 && grad_a1.stride(3) == channels) return grad_a1;
  const Tensor inner = row_image(a1, rows, channels);
  aten::copy(grad_a1, inner);
  return inner;
}

// The gradients of conv2's weight and of z, by kernels of our own; that of z by cuDNN and batch
// norm where these are faster.
Block::Matrix Block::backward_conv2(Backward& state, int64_t layer, const Matrix& z,
                                    const std::optional<Tensor>& grad_weight) {
  const Norm& norm = norms_[layers_ + layer];
  const int64_t begin = channels_before(layer);
  const int64_t pitch = cuda::conv3x3_grad_pitch(element_, growth_);
  const Matrix grad_added = scratch(&added_, rows_ * pitch, pitch);
  Problem p = problem(z, rows_, bottleneck_);
  if (pitch == growth_ && cuda::conv3x3_grad_input_is_slow(rows_, growth_)) {
    finalise(state, begin, growth_, grad_added);
    // Of the input, the shape counts.
    const auto gradients =
        aten::convolution_backward(images(grad_added, growth_), images(z, bottleneck_),
                                   conv2(arguments_.conv2, layer, layers_), true, false);
    grad_z_ = with_inner_channels(*gradients.x, spatial_);
    backward_norm2(state, norm, z, matrix_of(*grad_z_));
  } else {
    backward_conv2_input(state, layer, p, grad_added);
  }
  if (grad_weight) {
    launch_(cuda::bn_relu_conv3x3_grad_weight, p, norm.bn, image(), growth_, view(grad_added),
            grad_weight->data_ptr());
  }
  return {&*grad_z_, 0, bottleneck_};
}

void Block::backward_conv2_input(Backward& state, int64_t layer, Problem& p,
                                 const Matrix& grad_added) {
  const Norm& norm = norms_[layers_ + layer];
  const int64_t begin = channels_before(layer);
  const Matrix grad_z = scratch(&grad_z_, rows_ * bottleneck_, bottleneck_);
  const Gathered gathered{view(at(state.grad_features, 0, begin)),
                          view(at(features_, 0, begin)),
                          mean_ + begin,
                          {state.s1 + begin, state.s2 + begin}};
  p.features[0].grad_x = view(grad_z);
  launch_(cuda::bn_relu_conv3x3_grad_input, p, norm.bn, image(), packed_conv2_[true].at(layer),
          growth_, gathered, view(grad_added), gradients_of(state, norm, grad_z));
}

// The same by ATen's convolutions; the weight's gradient goes to state.grad_conv2.
Tensor Block::backward_aten_conv2(Backward& state, int64_t layer, const Matrix& z,
                                  bool wants_weight) {
  const Norm& norm2 = norms_[layers_ + layer];
  const Matrix added =
      finalise(state, channels_before(layer), growth_, scratch(&added_, rows_ * growth_, growth_));
  Tensor grad_added = images(added, growth_);
  if (arguments_.dropout_mask) {
    grad_added = aten::apply_dropout(grad_added, dropout_mask(layer), arguments_.dropout_scale);
  }
  const Matrix a2 = scratch(&a2_, rows_ * bottleneck_, bottleneck_);
  if (wants_weight) normalise(norm2, z, rows_, a2);
  const auto gradients =
      aten::convolution_backward(grad_added, images(a2, bottleneck_),
                                 conv2(arguments_.conv2, layer, layers_), true, wants_weight);
  if (wants_weight) {
    const Tensor weight = with_inner_channels(*gradients.weight, kernel_);
    const int64_t size = weight.numel();
    state.grad_conv2.push_back(reinterpret(weight, 0, {1, size}, {size, 1}));
  }
  const Tensor grad_z = with_inner_channels(*gradients.x, spatial_);
  backward_norm2(state, norm2, z, matrix_of(grad_z));
  return grad_z;
}

void Block::backward_layer(Backward& state, int64_t layer, const std::optional<Tensor>& grad_conv1,
                           const std::optional<Tensor>& grad_conv2) {
  const Matrix z = this->z(layer);
  if (!arguments_.z) bottleneck(layer, z, nullptr);
  if (arguments_.conv3x3) {
    const Matrix grad_z = backward_conv2(state, layer, z, grad_conv2);
    return backward_conv1(state, layer, grad_z, false, grad_conv1);
  }
  const bool a1_is_ready = !arguments_.z && chunks(channels_before(layer)).size() == 1;
  const Tensor grad_z = backward_aten_conv2(state, layer, z, grad_conv2.has_value());
  backward_conv1(state, layer, matrix_of(grad_z), a1_is_ready, grad_conv1);
}

void Block::backward(const Tensor& grad_features, const std::optional<Tensor>& grad_y,
                     const std::optional<Tensor>& grad_x, const Tensor& grad_affine,
                     const std::optional<Tensor>& grad_conv1,
                     const std::vector<int64_t>& wants_conv1,
                     const std::optional<Tensor>& grad_conv2,
                     const std::vector<int64_t>& wants_conv2) {
  check(is_matrix(grad_affine, 2, affine_count_) &&
            grad_affine.scalar_type() == parameter_type(element_),
        arguments_, "grad_affine: expected the shape and dtype of affine");
  check_dense(grad_features, rows_ * channels_, parameter_type(element_),
              "grad_features: expected the shape of features, float64 or float32");
  if (grad_x) {
    check_dense(*grad_x, rows_ * channels_in_, dtype_, "grad_x: expected the shape of the input");
  }
  if (grad_y) check_reader(*grad_y, "grad_y: expected the shape of y");
  const auto layers = static_cast<size_t>(layers_);
  check(wants_conv1.size() == layers && wants_conv2.size() == layers, arguments_,
        "wants_conv1, wants_conv2: expected one number per layer");
  check(!grad_conv1 || grad_conv1->numel() == arguments_.conv1.numel(), arguments_,
        "grad_conv1: expected as many elements as conv1");
  const auto wanted =
      std::count_if(wants_conv2.begin(), wants_conv2.end(), [](int64_t w) { return w; });
  check(wanted == 0 || (grad_conv2 && grad_conv2->scalar_type() == dtype_ &&
                        grad_conv2->size(0) == wanted && grad_conv2->is_contiguous() &&
                        grad_conv2->numel() == wanted * (arguments_.conv2.numel() / layers_)),
        arguments_, "grad_conv2: expected contiguous [layers that want it, k, *kernel, B]");
  if (on_tensor_cores()) {
    if (!arguments_.z) pack_conv1(WeightLayout::kForward);
    pack_conv1(WeightLayout::kGradInput);
    check(!grad_conv1 || grad_conv1->scalar_type() == ScalarType::Float, arguments_,
          "grad_conv1: expected float32");
  }
  if (arguments_.conv3x3) pack_conv2(true);
  Tensor numbers = empty({4 * channels_}, ScalarType::Double, device_);
  torch::stable::zero_(numbers);
  double* const sums = static_cast<double*>(numbers.data_ptr());
  Backward state{{&grad_features, 0, channels_},
                 sums,
                 sums + 2 * channels_,
                 sums + 3 * channels_,
                 grad_affine,
                 grad_y.has_value(),
                 {}};
  if (grad_y) {
    const Pooling pooling = this->pooling();
    read(state, norms_.back(), {0, rows_, true, true}, view({&*grad_y, 0, channels_}),
         arguments_.pool == Pool::kNone ? nullptr : &pooling);
    state.first_reader = false;
  }
  int64_t left = wanted;  // of grad_conv2
  for (int64_t l = layers_ - 1; l >= 0; --l) {
    std::optional<Tensor> weight1, weight2;
    if (wants_conv1[l]) weight1 = conv1(*grad_conv1, l);
    if (wants_conv2[l]) weight2 = conv2(*grad_conv2, --left, wanted);
    backward_layer(state, l, weight1, weight2);
  }
  if (!state.grad_conv2.empty()) {
    std::reverse(state.grad_conv2.begin(), state.grad_conv2.end());
    const int64_t size = grad_conv2->numel() / grad_conv2->size(0);
    aten::cat_out(state.grad_conv2,
                  reinterpret(*grad_conv2, 0, {grad_conv2->size(0), size}, {size, 1}));
  }
  if (!grad_x) return;
  finalise(state, 0, channels_in_, {&*grad_x, 0, channels_in_});
}

Conv1x1 conv1x1_of(int64_t number) {
  EFFICIENT_DENSENET_CHECK(number >= 0 && number <= static_cast<int64_t>(Conv1x1::kTensorCores),
                           "efficient_densenet", "conv1x1: expected 0, 1 or 2, got ", number);
  return static_cast<Conv1x1>(number);
}

Pool pool_of(int64_t number) {
  EFFICIENT_DENSENET_CHECK(number >= 0 && number <= static_cast<int64_t>(Pool::kImages),
                           "efficient_densenet", "pool: expected 0, 1 or 2, got ", number);
  return static_cast<Pool>(number);
}

// fields: the others of Arguments, from `features` to `dropout_scale`.
template <typename... Fields>
Arguments arguments_of(const char* op, int64_t conv1x1, bool conv3x3, int64_t pool,
                       const Fields&... fields) {
  return {op, fields..., conv1x1_of(conv1x1), conv3x3, pool_of(pool)};
}

void dense_block(const Tensor& features, const std::optional<Tensor>& bottlenecks,
                 const Tensor& statistics, const Tensor& conv1, const Tensor& conv2,
                 const Tensor& affine, const std::optional<Tensor>& frozen,
                 const std::vector<int64_t>& frozen_norms, const std::vector<double>& eps,
                 const std::optional<Tensor>& dropout_mask, double dropout_scale, int64_t conv1x1,
                 bool conv3x3, bool inference, const std::optional<Tensor>& y, int64_t pool) {
  const Arguments arguments = arguments_of(
      "efficient_densenet::dense_block", conv1x1, conv3x3, pool, features, bottlenecks, statistics,
      conv1, conv2, affine, frozen, frozen_norms, eps, dropout_mask, dropout_scale);
  Block(arguments).forward(inference, y);
}

void dense_block_backward(const std::optional<Tensor>& grad_y, const Tensor& grad_features,
                          const std::optional<Tensor>& grad_x, const Tensor& features,
                          const std::optional<Tensor>& bottlenecks, const Tensor& statistics,
                          const Tensor& conv1, const Tensor& conv2, const Tensor& affine,
                          const std::optional<Tensor>& frozen,
                          const std::vector<int64_t>& frozen_norms, const std::vector<double>& eps,
                          const std::optional<Tensor>& dropout_mask, double dropout_scale,
                          int64_t conv1x1, bool conv3x3, int64_t pool, const Tensor& grad_affine,
                          const std::optional<Tensor>& grad_conv1,
                          const std::vector<int64_t>& wants_conv1,
                          const std::optional<Tensor>& grad_conv2,
                          const std::vector<int64_t>& wants_conv2) {
  const Arguments arguments = arguments_of(
      "efficient_densenet::dense_block_backward", conv1x1, conv3x3, pool, features, bottlenecks,
      statistics, conv1, conv2, affine, frozen, frozen_norms, eps, dropout_mask, dropout_scale);
  Block(arguments).backward(grad_features, grad_y, grad_x, grad_affine, grad_conv1, wants_conv1,
                            grad_conv2, wants_conv2);
}

// norms[i] of the batch's statistics mean and var begins at channel begins[i]. An empty tensor
// stands for a statistic or count that a norm does not have; a momentum of NaN for the cumulative
// average.
void update_running_statistics(const Tensor& mean, const Tensor& var, int64_t rows,
                               const std::vector<int64_t>& begins, const Tensors& running_mean,
                               const Tensors& running_var, const Tensors& num_batches_tracked,
                               const std::vector<double>& momentum) {
  const char* const op = "efficient_densenet::update_running_statistics";
  const size_t count = begins.size();
  EFFICIENT_DENSENET_CHECK(running_mean.size() == count && running_var.size() == count &&
                               num_batches_tracked.size() == count && momentum.size() == count,
                           op, "begins: expected one entry per norm");
  EFFICIENT_DENSENET_CHECK(mean.scalar_type() == ScalarType::Double && mean.is_contiguous() &&
                               var.scalar_type() == ScalarType::Double && var.is_contiguous() &&
                               var.numel() == mean.numel(),
                           op, "mean, var: expected contiguous float64 of one shape");
  const auto pointer = [&](const char* name, const Tensor& tensor) {
    EFFICIENT_DENSENET_CHECK(tensor.device() == mean.device() && tensor.is_contiguous(), op, name,
                             ": expected a contiguous tensor on the device of mean");
    return tensor.numel() == 0 ? nullptr : tensor.data_ptr();
  };
  std::vector<RunningStatistics> norms;
  for (size_t i = 0; i < count; ++i) {
    const int64_t channels = std::max(running_mean[i].numel(), running_var[i].numel());
    EFFICIENT_DENSENET_CHECK(begins[i] >= 0 && begins[i] + channels <= mean.numel(), op,
                             "begins: expected channels of mean, got ", begins[i]);
    EFFICIENT_DENSENET_CHECK(num_batches_tracked[i].scalar_type() == ScalarType::Long, op,
                             "num_batches_tracked: expected int64");
    norms.push_back({static_cast<const double*>(mean.data_ptr()) + begins[i],
                     static_cast<const double*>(var.data_ptr()) + begins[i],
                     pointer("running_mean", running_mean[i]),
                     pointer("running_var", running_var[i]),
                     static_cast<int64_t*>(pointer("num_batches_tracked", num_batches_tracked[i])),
                     channels, momentum[i], element_of(op, "running_mean", running_mean[i])});
  }
  const Launcher launcher(mean.device());
  if (launcher.is_cpu()) return cpu::update_running_statistics(norms, rows, nullptr);
  cuda::update_running_statistics(norms, rows, launcher.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(efficient_densenet, m) {
  m.def(
      "dense_block(Tensor(a!) features, Tensor(b!)? bottlenecks, Tensor(c!) statistics, "
      "Tensor conv1, Tensor conv2, Tensor affine, Tensor? frozen, int[] frozen_norms, "
      "float[] eps, Tensor? dropout_mask, float dropout_scale, int conv1x1, bool conv3x3, "
      "bool inference, Tensor(d!)? y, int pool) -> ()");
  m.def(
      "dense_block_backward(Tensor? grad_y, Tensor(a!) grad_features, Tensor(b!)? grad_x, "
      "Tensor features, Tensor? bottlenecks, Tensor statistics, Tensor conv1, Tensor conv2, "
      "Tensor affine, Tensor? frozen, int[] frozen_norms, float[] eps, Tensor? dropout_mask, "
      "float dropout_scale, int conv1x1, bool conv3x3, int pool, Tensor(c!) grad_affine, "
      "Tensor(d!)? grad_conv1, int[] wants_conv1, Tensor(e!)? grad_conv2, int[] wants_conv2) "
      "-> ()");
  m.def(
      "update_running_statistics(Tensor mean, Tensor var, int rows, int[] begins, "
      "Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor(c!)[] num_batches_tracked, "
      "float[] momentum) -> ()");
}

#define EFFICIENT_DENSENET_IMPLEMENTATIONS(m)                       \
  m.impl("dense_block", TORCH_BOX(&dense_block));                   \
  m.impl("dense_block_backward", TORCH_BOX(&dense_block_backward)); \
  m.impl("update_running_statistics", TORCH_BOX(&update_running_statistics))

STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CPU, m) { EFFICIENT_DENSENET_IMPLEMENTATIONS(m); }
// Also in a build without CUDA, where csrc/cpu_only.cpp answers with what to do.
STABLE_TORCH_LIBRARY_IMPL(efficient_densenet, CUDA, m) { EFFICIENT_DENSENET_IMPLEMENTATIONS(m); }

}  // namespace efficient_densenet
