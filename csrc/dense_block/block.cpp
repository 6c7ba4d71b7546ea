#include "dense_block/block.h"

#include <algorithm>

namespace efficient_densenet {
namespace {

// The normalised rows of so many bytes are multiplied while they are still in the cache.
constexpr int64_t kChunkBytesCuda = 32 << 20, kChunkBytesCpu = 1 << 20;

// With so few rows or columns of a result, the CPU's matrix products add one number after the other
// to a sum, whose rounding error grows with their count; so they get few rows at a time.
constexpr int64_t kNarrow = 4, kNarrowProductRows = 512;

}  // namespace

Block::Block(const BlockArguments& arguments)
    : arguments_(arguments),
      device_(arguments.features.device()),
      checks_(arguments.op, device_),
      launch_(device_),
      element_(element_of(arguments.op, "features", arguments.features)),
      dtype_(arguments.features.scalar_type()),
      element_size_(static_cast<int64_t>(arguments.features.element_size())) {
  take_sizes();
  check_weights();
  take_norms();
  check_norm_tensors();
  take_path();
}

// ---------------------------------------------------------------------------------------------
// Checks, sizes, numbers of norms

void Block::take_sizes() {
  const Tensor& x = arguments_.features;
  checks_.expect(x.dim() >= 3 && x.dim() <= 5 && x.numel() > 0, "features", x,
                 "[N, C, *spatial] with 1 to 3 spatial dimensions and at least one element");
  checks_.check(!arguments_.conv2.empty(), "conv2: expected one weight per layer, got none");
  const Tensor& w2 = arguments_.conv2[0];
  checks_.expect(w2.dim() == x.dim() && w2.numel() > 0, "conv2", w2, "[k, B, *kernel]");
  layers_ = static_cast<int64_t>(arguments_.conv2.size());
  growth_ = w2.size(0);
  bottleneck_ = w2.size(1);
  channels_ = x.size(1);
  images_ = x.size(0);
  rows_ = x.numel() / channels_;
  checks_.expect(layers_ < channels_ && growth_ <= (channels_ - 1) / layers_, "features", x,
                 "more than L k channels for ", layers_, " layers of ", growth_);
  channels_in_ = channels_ - layers_ * growth_;
  features_ = images_matrix("features", x, channels_, dtype_);
  if (x.dim() == 3) spatial_ = kernel_ = {1};  // convolutions of two dimensions know the layout
  for (int64_t d = 2; d < x.dim(); ++d) spatial_.push_back(x.size(d));
  for (int64_t d = 2; d < w2.dim(); ++d) {
    checks_.expect(w2.size(d) % 2 == 1, "conv2", w2, "odd kernel sizes, [k, B, *kernel]");
    kernel_.push_back(w2.size(d));
  }
}

// All weights of a list have one dtype: that of the features, or float32.
void Block::check_weight(const char* list, const Tensors& weights, int64_t layer,
                         const Sizes& sizes) const {
  const std::string name = std::string(list) + "[" + std::to_string(layer) + "]";
  const Tensor& weight = weights[layer];
  const ScalarType dtype =
      weights[0].scalar_type() == ScalarType::Float ? ScalarType::Float : dtype_;
  checks_.has_sizes(name.c_str(), weight, sizes);
  checks_.any_strides(name.c_str(), weight, dtype, Access::kRead);
}

void Block::check_weights() const {
  checks_.check(static_cast<int64_t>(arguments_.conv1.size()) == layers_, "conv1: expected ",
                layers_, " weights, one per layer, got ", arguments_.conv1.size());
  const Sizes ones(arguments_.features.dim() - 2, 1), kernel = given_kernel();
  for (int64_t l = 0; l < layers_; ++l) {
    check_weight("conv1", arguments_.conv1, l, with_sizes(bottleneck_, channels_before(l), ones));
    check_weight("conv2", arguments_.conv2, l, with_sizes(growth_, bottleneck_, kernel));
  }
  if (!arguments_.projection) return;
  const Tensor& projection = *arguments_.projection;
  checks_.expect(projection.dim() == arguments_.features.dim() &&
                     projection.size(0) == channels_in_ && projection.size(1) > 0,
                 "projection", projection, "[C_0, P, 1...] with C_0 = ", channels_in_);
  checks_.contiguous("projection", projection, dtype_, channels_in_ * projection.size(1));
}

void Block::check_x() {
  const Tensor& x = arguments_.x;
  if (arguments_.projection) {
    x_ = images_matrix("x", x, arguments_.projection->size(1), dtype_);
    return;
  }
  element_of(arguments_.op, "x", x);
  checks_.has_sizes("x", x, sizes_with(channels_in_));
  checks_.any_strides("x", x, x.scalar_type(), Access::kRead);
}

Sizes Block::sizes_with(int64_t channels) const {
  return with_sizes(images_, channels, given_spatial());
}

Sizes Block::given_kernel() const {
  return arguments_.features.dim() == 3 ? Sizes{kernel_[1]} : kernel_;
}

Sizes Block::given_spatial() const {
  return arguments_.features.dim() == 3 ? Sizes{spatial_[1]} : spatial_;
}

TensorMatrix Block::images_matrix(const char* name, const Tensor& tensor, int64_t channels,
                                  ScalarType dtype) const {
  Sizes sizes{images_, channels};
  for (int64_t d = 2; d < arguments_.features.dim(); ++d) {
    sizes.push_back(arguments_.features.size(d));
  }
  return {&tensor, 0, checks_.channels_last(name, tensor, dtype, sizes)};
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

void Block::take_norms() {
  const int64_t all = channels_ + layers_ * bottleneck_;
  mean_ = static_cast<double*>(
      checks_.contiguous("statistics", arguments_.statistics, ScalarType::Double, {2, all}));
  var_ = mean_ + all;
  for (int64_t l = 0; l < layers_; ++l) add_norm(channels_before(l), mean_, var_);
  for (int64_t l = 0; l < layers_; ++l) {
    const int64_t begin = channels_ + l * bottleneck_;
    add_norm(bottleneck_, mean_ + begin, var_ + begin);
  }
  const auto count = static_cast<int64_t>(arguments_.eps.size());
  if (count > 2 * layers_) add_norm(channels_, mean_, var_);
  checks_.check(arguments_.eps.size() == norms_.size(), "eps: expected ", 2 * layers_,
                " numbers, or one more with the last reader, got ", count);
  for (const int64_t index : arguments_.frozen_norms) {
    checks_.check(index >= 0 && index < count, "frozen_norms: expected numbers of norms, below ",
                  count, ", got ", index);
  }
}

void Block::check_norm_tensors() {
  checks_.contiguous("affine", arguments_.affine, parameter_type(element_), {2, affine_count_});
  checks_.check(frozen_count_ == 0 || arguments_.frozen.has_value(),
                "frozen: expected mean and var of the norms in frozen_norms, got None");
  double* frozen = nullptr;
  if (frozen_count_ > 0) {
    frozen = static_cast<double*>(
        checks_.contiguous("frozen", *arguments_.frozen, ScalarType::Double, {2, frozen_count_}));
  }
  for (size_t n = 0; n < norms_.size(); ++n) {
    Norm& norm = norms_[n];
    norm.bn.weight = affine(arguments_.affine, 0, norm.affine_begin);
    norm.bn.bias = affine(arguments_.affine, 1, norm.affine_begin);
    norm.bn.eps = arguments_.eps[n];
    if (norm.batch_statistics) continue;
    norm.bn.mean = frozen;
    norm.bn.var = frozen + frozen_count_;
    frozen += norm.channels;
  }
}

void Block::take_path() {
  if (arguments_.z) {
    checks_.contiguous("bottlenecks", *arguments_.z, dtype_, layers_ * rows_ * bottleneck_);
  }
  if (arguments_.dropout_mask) {
    checks_.contiguous("dropout_mask", *arguments_.dropout_mask, ScalarType::Bool,
                       layers_ * rows_ * growth_);
  }
  path_ = choose_kernel_path(arguments_.settings,
                             {device_.is_cpu() ? "cpu" : "cuda", static_cast<int>(device_.index()),
                              element_, sizes_with(channels_), growth_, bottleneck_, given_kernel(),
                              arguments_.dropout_mask.has_value()});
}

Sizes Block::reader_sizes() const {
  Sizes sizes = sizes_with(channels_);
  for (size_t d = 2; d < sizes.size() && arguments_.pool != Pool::kNone; ++d) {
    sizes[d] = arguments_.pool == Pool::kImages ? 1 : sizes[d] / 2;
  }
  return sizes;
}

TensorMatrix Block::reader_matrix(const char* name, const Tensor& y) const {
  checks_.check(static_cast<int64_t>(arguments_.eps.size()) > 2 * layers_,
                "eps: expected a number for the last reader's norm");
  const Sizes sizes = reader_sizes();
  checks_.check(std::find(sizes.begin(), sizes.end(), 0) == sizes.end(), name,
                ": images of the features are smaller than a pooling window");
  return {&y, 0, checks_.channels_last(name, y, dtype_, sizes)};
}

// ---------------------------------------------------------------------------------------------
// Where things are

char* Block::affine(const Tensor& tensor, int row, int64_t begin) const {
  const int64_t size = is_double(element_) ? sizeof(double) : sizeof(float);
  return static_cast<char*>(tensor.data_ptr()) + (row * affine_count_ + begin) * size;
}

// Memory of one of the matrices that every layer overwrites, allocated by the first.
TensorMatrix Block::scratch(std::optional<Tensor>* memory, int64_t elements, int64_t channels) {
  if (!memory->has_value()) *memory = empty({elements}, dtype_, device_);
  return {&**memory, 0, channels};
}

TensorMatrix Block::z(int64_t layer) {
  if (!arguments_.z) return scratch(&z_, rows_ * bottleneck_, bottleneck_);
  return {&*arguments_.z, layer * rows_ * bottleneck_, bottleneck_};
}

KernelArgs Block::kernel_args(const TensorMatrix& x, int64_t rows, int64_t channels) const {
  KernelArgs args{};
  args.element = element_;
  args.rows = {1, {rows, 1, 1, 1}, rows};
  args.channels = channels;
  args.features = {{x.view(), {}, 0, channels}};
  return args;
}

int64_t Block::chunk_elements() const {
  const int64_t bytes = launch_.is_cpu() ? kChunkBytesCpu : kChunkBytesCuda;
  return std::min(std::max(channels_, bytes / element_size_), rows_ * channels_);
}

std::vector<Block::RowChunk> Block::row_chunks(int64_t channels, int64_t most) const {
  most = std::max<int64_t>(1, std::min(most, chunk_elements() / channels));
  const int64_t count = (rows_ + most - 1) / most;
  std::vector<RowChunk> chunks;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = rows_ * i / count, end = rows_ * (i + 1) / count;
    chunks.push_back({begin, end - begin, i == 0, i + 1 == count});
  }
  return chunks;
}

std::vector<Block::RowChunk> Block::backward_chunks(int64_t channels) const {
  const bool narrow = launch_.is_cpu() && std::min(bottleneck_, channels) <= kNarrow;
  return row_chunks(channels, narrow ? kNarrowProductRows : rows_);
}

// Weights of all layers, one after the other, as a copy of these sizes and strides: two launches,
// whatever their number.
Tensor Block::pack(const Tensors& weights, const Sizes& sizes, const Sizes& strides) const {
  int64_t count = 0;
  for (const Tensor& weight : weights) count += weight.numel();
  Tensor joined = empty({count}, weights[0].scalar_type(), device_);
  joined = reinterpret(joined, 0, sizes, contiguous_strides(sizes));
  aten::cat_out(weights, joined);
  const Tensor packed = empty({count}, dtype_, device_);
  aten::copy(joined, reinterpret(packed, 0, sizes, strides));
  return packed;
}

Tensors Block::all_conv1() const {
  const Tensors& weights = arguments_.conv1;
  const auto as_read = [&](const Tensor& weight) {
    return weight.scalar_type() == dtype_ && weight.stride(1) == 1 &&
           (bottleneck_ == 1 || weight.stride(0) == weight.size(1));
  };
  Tensors all;
  if (std::all_of(weights.begin(), weights.end(), as_read)) {
    for (const Tensor& weight : weights) {
      all.push_back(reinterpret(weight, 0, {bottleneck_, weight.size(1)}, {weight.size(1), 1}));
    }
    return all;
  }
  Tensors rows;
  for (const Tensor& weight : weights) {
    rows.push_back(reinterpret(torch::stable::contiguous(weight), 0, {weight.numel()}, {1}));
  }
  const Tensor copied = pack(rows, {bottleneck_ * total_inputs(layers_)}, {1});
  for (int64_t l = 0; l < layers_; ++l) all.push_back(packed_conv1(copied, l));
  return all;
}

Tensors Block::all_conv2() const {
  const Tensors& weights = arguments_.conv2;
  const Sizes inner = channels_last_strides(bottleneck_, given_kernel());
  const auto as_read = [&](const Tensor& weight) {
    bool fits = weight.scalar_type() == dtype_;
    for (int64_t d = 0; d < weight.dim(); ++d) {
      fits = fits && (weight.size(d) == 1 || weight.stride(d) == inner[d]);
    }
    return fits;
  };
  Tensors all;
  if (std::all_of(weights.begin(), weights.end(), as_read)) {
    for (const Tensor& weight : weights) all.push_back(packed_conv2(weight, 0));
    return all;
  }
  const Sizes sizes = with_sizes(layers_ * growth_, bottleneck_, given_kernel());
  const Tensor copied = pack(weights, sizes, inner);
  for (int64_t l = 0; l < layers_; ++l) all.push_back(packed_conv2(copied, l));
  return all;
}

const Tensor& Block::conv1(int64_t layer) {
  if (conv1_.empty()) conv1_ = all_conv1();
  return conv1_[layer];
}

const Tensor& Block::conv2(int64_t layer) {
  if (conv2_.empty()) conv2_ = all_conv2();
  return conv2_[layer];
}

// Of weights, or of their gradients.
Tensor Block::packed_conv1(const Tensor& packed, int64_t layer) const {
  const int64_t channels = channels_before(layer);
  const int64_t begin = bottleneck_ * total_inputs(layer);
  return reinterpret(packed, begin, {bottleneck_, channels}, {channels, 1});
}

Tensor Block::packed_conv2(const Tensor& packed, int64_t layer) const {
  return reinterpret(packed, layer * arguments_.conv2[0].numel(),
                     with_sizes(growth_, bottleneck_, kernel_),
                     channels_last_strides(bottleneck_, kernel_));
}

Tensor Block::dropout_mask(int64_t layer) const {
  return reinterpret(*arguments_.dropout_mask, layer * rows_ * growth_,
                     with_sizes(images_, growth_, spatial_),
                     channels_last_strides(growth_, spatial_));
}

Pooling Block::pooling() const {
  const Tensor& x = arguments_.features;
  const int64_t pixels = rows_ / images_;
  if (arguments_.pool == Pool::kImages) return {1, {pixels}, images_, pixels};
  Pooling pooling{static_cast<int>(x.dim() - 2), {}, images_, 2};
  for (int d = 0; d < pooling.dims; ++d) pooling.sizes[d] = x.size(2 + d);
  return pooling;
}

// Whether a norm that normalises by the batch reads this channel of the features. Where none does,
// there is nothing to correct, and nothing may be computed: 0 times an infinite feature is NaN.
bool Block::has_batch_statistics_reader(int64_t channel) const {
  const auto reads = [&](const Norm& norm) {
    return norm.batch_statistics && channel < norm.channels;
  };
  return std::any_of(norms_.begin(), norms_.begin() + layers_, reads) ||
         std::any_of(norms_.begin() + 2 * layers_, norms_.end(), reads);
}

void* Block::PackedWeights::allocate(const std::vector<int64_t>& bytes, const Device& device) {
  int64_t total = 0;
  begins.clear();
  for (const int64_t count : bytes) {
    begins.push_back(total);
    total += count;
  }
  memory = empty({total}, ScalarType::Byte, device);
  return memory->data_ptr();
}

const void* Block::packed_weight(WeightLayout layout, bool is_3x3, int64_t layer) {
  const PackedWeights& packed = packed_weights(layout, is_3x3);
  return static_cast<const char*>(packed.memory->data_ptr()) + packed.begins[layer];
}

}  // namespace efficient_densenet
