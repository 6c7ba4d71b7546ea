// A whole dense block: the tensors that both operators take, where everything lies in memory, and
// the loops over layers. The mathematics is in docs/design.md, "The dense block".
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
#pragma once

#include "dense_block/kernel_path.h"
#include "dense_block/kernels.h"
#include "dense_block/matrix.h"
#include "operators/bn_relu_conv1x1.h"
#include "operators/bn_relu_conv3x3.h"
#include "operators/norm_numbers.h"

namespace efficient_densenet {

// What the last reader averages: nothing, windows of 2 in each dimension, or all pixels of an
// image.
enum class Pool : int64_t { kNone, kWindows, kImages };

// What forward and backward of a block are called with alike.
struct BlockArguments {
  const char* op;
  Tensor x;                          // the block's input, or what the projection makes it of
  std::optional<Tensor> projection;  // [C_0, P, 1...]: a 1x1 convolution of x
  Tensor features;                   // [N, C, *spatial], channels-last
  std::optional<Tensor> z;           // [L, M, B]: kept; none: each z is scratch
  Tensor statistics;                 // [2, C + L B], float64
  Tensors conv1;                     // of each layer, [B, C_l, 1...], any strides
  Tensors conv2;                     // of each layer, [k, B, *kernel], any strides
  Tensor affine;                     // [2, channels of all norms]
  std::optional<Tensor> frozen;      // [2, channels of the frozen norms], float64
  std::vector<int64_t> frozen_norms;
  std::vector<double> eps;             // of each norm
  std::optional<Tensor> dropout_mask;  // [L, N, *spatial, k], bool
  double dropout_scale;
  Pool pool;
  PrecisionSettings settings;
};

// Where the backward pass writes; those without a value are not needed.
struct BlockGradients {
  Tensor features;                   // G, [N, C, *spatial], at least float32: scratch
  std::optional<Tensor> x;           // of the first C_0 columns
  Tensor affine;                     // as this
  std::optional<Tensor> conv1;       // the [B, C_l] of all layers in a row; at least float32
  std::vector<int64_t> needs_conv1;  // of each layer
  std::optional<Tensor> conv2;       // [., k, B, *kernel], any strides: of the layers that need it;
                                     // of the dtype of the features, or float32
  std::vector<int64_t> needs_conv2;  // of each layer
};

class Block {
 public:
  // Checks all arguments, and writes nothing.
  explicit Block(const BlockArguments& arguments);

  void forward(bool inference, const std::optional<Tensor>& y);
  void backward(const Tensor& grad_result, bool has_reader, const BlockGradients& gradients);

 private:
  struct Norm {
    BatchNorm bn;
    int64_t channels, affine_begin;
    bool batch_statistics;
  };

  // Rows [begin, begin + count).
  struct RowChunk {
    int64_t begin, count;
    bool first, last;
  };

  struct Backward {
    TensorMatrix grad_features;
    double *sums, *s1, *s2;
    Tensor grad_affine;
    bool first_reader;         // nobody has written G yet
    Tensors grad_conv2;        // ATen's, of the layers that need one, the last layer first
    WeightParts weight_parts;  // that the kernel before has left
  };

  // Weights of all layers as tensor-core kernels read them, and where each begins.
  struct PackedWeights {
    std::optional<Tensor> memory;
    std::vector<int64_t> begins;

    void* allocate(const std::vector<int64_t>& bytes, const Device& device);
  };

  // Checks and numbers.
  void take_sizes();
  void take_norms();
  void take_path();
  void add_norm(int64_t channels, double* mean, double* var);
  void check_x();
  void check_weights() const;
  void check_weight(const char* list, const Tensors& weights, int64_t layer,
                    const Sizes& sizes) const;
  void check_norm_tensors();
  Sizes given_spatial() const;
  Sizes given_kernel() const;
  Sizes sizes_with(int64_t channels) const;
  Sizes reader_sizes() const;
  TensorMatrix images_matrix(const char* name, const Tensor& tensor, int64_t channels,
                             ScalarType dtype) const;
  TensorMatrix reader_matrix(const char* name, const Tensor& y) const;
  void check_gradients(const BlockGradients& gradients);
  void check_conv_gradients(const BlockGradients& gradients) const;

  // Where things are.
  int64_t channels_before(int64_t layer) const { return channels_in_ + layer * growth_; }
  // C_0 + ... + C_(layers-1)
  int64_t total_inputs(int64_t layers) const {
    return layers * channels_in_ + growth_ * (layers * (layers - 1) / 2);
  }
  TensorMatrix scratch(std::optional<Tensor>* memory, int64_t elements, int64_t channels);
  TensorMatrix z(int64_t layer);
  KernelArgs kernel_args(const TensorMatrix& x, int64_t rows, int64_t channels) const;
  int64_t chunk_elements() const;
  // Of at most so many rows.
  std::vector<RowChunk> row_chunks(int64_t channels, int64_t most) const;
  // Those that the gradient of conv1's weight is summed in.
  std::vector<RowChunk> backward_chunks(int64_t channels) const;
  char* affine(const Tensor& tensor, int row, int64_t begin) const;
  Tensor images(const TensorMatrix& matrix, int64_t channels) const {
    return matrix.as_images(images_, channels, spatial_);
  }
  // Weights as ATen's operators read them: [B, C_l], and [k, B, *kernel] with inner channels.
  const Tensor& conv1(int64_t layer);
  const Tensor& conv2(int64_t layer);
  Tensors all_conv1() const;
  Tensors all_conv2() const;
  // The same of all layers in one memory, `packed`.
  Tensor packed_conv1(const Tensor& packed, int64_t layer) const;
  Tensor packed_conv2(const Tensor& packed, int64_t layer) const;
  Tensor pack(const Tensors& weights, const Sizes& sizes, const Sizes& strides) const;
  Tensor dropout_mask(int64_t layer) const;
  ImageSize image() const { return {spatial_[0], spatial_[1]}; }
  Pooling pooling() const;
  bool on_tensor_cores() const { return path_.conv1 == Conv1x1::kTensorCores; }
  bool has_batch_statistics_reader(int64_t channel) const;

  // Forward.
  void write_input();
  void fold_norm2();
  WeightsToPack conv1_weights(WeightLayout layout) const;
  WeightsToPack conv2_weights(WeightLayout layout) const;
  double* pack_weights(const std::vector<WeightsToPack>& weights, int64_t zeros);
  PackedWeights& packed_weights(WeightLayout layout, bool is_3x3) {
    return packed_weights_[static_cast<int>(layout)][is_3x3];
  }
  const void* packed_weight(WeightLayout layout, bool is_3x3, int64_t layer);
  void take_statistics(const TensorMatrix& x, int64_t channels, double* mean, double* var,
                       const View* copy);
  void normalise(const Norm& norm, const TensorMatrix& x, int64_t rows, const TensorMatrix& y);
  void bottleneck(int64_t layer, const TensorMatrix& z, const Statistics* moments,
                  const MomentsLeft& x_left, MomentsLeft* z_left);
  // `left`: moments of the layer's input; then of its new features, where the next layer adds them
  // up.
  void forward_layer(int64_t layer, MomentsLeft* left);
  void forward_reader(const TensorMatrix& y);

  // Backward.
  void make_norm_numbers();
  Backward start_backward(const BlockGradients& gradients);
  void backward_result(Backward& state, const Tensor& grad_result,
                       const std::optional<TensorMatrix>& grad_y);
  NormGradArgs norm_grad_args(Backward& state, const Norm& norm, const RowChunk& chunk,
                              const View& grad_y, const Pooling* pooling) const;
  void accumulate_norm_grad(Backward& state, const Norm& norm, const RowChunk& chunk,
                            const View& grad_y, const Pooling* pooling);
  TensorMatrix apply_bn_correction(Backward& state, int64_t begin, int64_t channels,
                                   const TensorMatrix& to);
  Gradients gradients_of(Backward& state, const Norm& norm, const TensorMatrix& grad);
  void backward_norm2(Backward& state, const Norm& norm, const TensorMatrix& z,
                      const TensorMatrix& grad);
  Tensor multiply_back(const TensorMatrix& grad_z, const TensorMatrix& a1, int64_t rows,
                       const Tensor& weight, const std::optional<Tensor>& grad_weight);
  void backward_conv1(Backward& state, int64_t layer, const TensorMatrix& grad_z, bool a1_is_ready,
                      const std::optional<Tensor>& grad_weight);
  void backward_conv1_on_tensor_cores(Backward& state, int64_t layer, const TensorMatrix& grad_a2,
                                      const std::optional<Tensor>& grad_weight);
  TensorMatrix backward_conv2(Backward& state, int64_t layer, const TensorMatrix& z,
                              const std::optional<WeightGradient>& grad_weight);
  void backward_conv2_input(Backward& state, int64_t layer, KernelArgs& args,
                            const TensorMatrix& grad_new, NormSumsLeft* sums);
  Tensor backward_aten_conv2(Backward& state, int64_t layer, const TensorMatrix& z,
                             bool needs_weight);
  void backward_layer(Backward& state, int64_t layer, const std::optional<Tensor>& grad_conv1,
                      const std::optional<WeightGradient>& grad_conv2);
  void backward_layers(Backward& state, const BlockGradients& gradients);

  aten::GradModeOff grad_mode_off_;
  const BlockArguments& arguments_;
  Device device_;
  ArgumentChecks checks_;
  Launcher launch_;
  Element element_;
  ScalarType dtype_;
  int64_t element_size_;
  int64_t layers_, growth_, bottleneck_, channels_in_, channels_, rows_, images_;
  Sizes spatial_, kernel_;
  TensorMatrix features_;
  TensorMatrix x_;  // with a projection
  double *mean_, *var_;
  std::vector<Norm> norms_;
  bool uses_batch_statistics_ = false;  // in any norm
  int64_t affine_count_ = 0, frozen_count_ = 0;
  KernelPath path_;
  std::optional<Tensor> a1_, a2_, z_, grad_z_, grad_a2_, grad_new_, coefficients_,
      zeros_;                           // scratch
  Tensors conv1_, conv2_;               // as ATen reads them, once somebody has asked for one
  std::optional<Tensor> norm_numbers_;  // in the backward pass: BatchNorm::numbers
  std::optional<Tensor> folded_;        // norm2 of each layer: scale, bias [2, L, B]
  PackedWeights packed_weights_[2][2];
};

}  // namespace efficient_densenet
