// The seam between the operators, which see tensors, and the kernels, which see plain structs.
//
// Notation, in every kernel: a row is one pixel of one image, M rows in all; c is a channel of
// the concatenation of all features, C channels in all.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace efficient_densenet {

enum class Element { kDouble, kFloat, kHalf, kBFloat16 };

// Parameters and running statistics are double for double features and float for all others.
inline bool is_double(Element element) { return element == Element::kDouble; }

constexpr int kMaxRowDims = 4;  // batch and up to three spatial dimensions

// How the M rows are laid out: the batch and spatial dimensions, outermost first, merged as far
// as the strides of all tensors of a call allow. Always at least one dimension.
struct RowSpace {
  int dims;
  int64_t sizes[kMaxRowDims];
  int64_t count;
};

// Memory of one [N, C_i, *spatial] tensor; strides in elements.
struct View {
  void* data;
  int64_t channel_stride;
  int64_t row_strides[kMaxRowDims];
};

// One tensor of the list and its place in the concatenation.
struct Feature {
  View x;
  View grad_x;  // data is null where no gradient is needed
  int64_t first_channel;
  int64_t channels;
};

// What all kernels of a call share.
struct KernelArgs {
  Element element;
  RowSpace rows;
  std::vector<Feature> features;
  int64_t channels;
  void* stream = nullptr;                     // CUDA only
  std::function<double*(int64_t)> workspace;  // CUDA only: scratch of so many doubles
  // CUDA only: so many bytes, which stay until the second call after this one that asks.
  std::function<void*(int64_t)> kept;
  std::function<uint32_t*(int64_t)> tickets;  // CUDA only: so many of last_block.cuh, which are 0
};

// Per-channel arrays [C]. Weight and bias are float or double (is_double) and may be null: 1 and 0.
//
// Statistics are always double: they are few. Kernels subtract a rounded mean m from x and fold
// what it lacks into the bias: (x - m) * scale + (bias - (mean - m) * scale). So where the mean is
// a thousand standard deviations, y keeps the digits that a float mean would lose.
struct BatchNorm {
  const double* mean;
  const double* var;
  const void* weight;
  const void* bias;
  double eps;
  // On CUDA, where they were made beforehand (operators/norm_numbers.h): m, scale and the bias that
  // makes up for it, [3, .] with so many floats from one to the next. Null: each kernel makes them.
  const float* numbers = nullptr;
  int64_t numbers_stride = 0;
};

// scale z + bias of a norm whose statistics are known beforehand, [C]; null: no norm.
struct FoldedNorm {
  const float *scale, *bias;
};

struct Statistics {
  double* mean;      // [C], out
  double* var;       // [C], out: biased variance
  const View* copy;  // null, or where all channels are copied to as they are read
};

struct Gradients {
  View grad_y;            // may be the memory of the gradient of the features
  void* grad_weight;      // [C], out
  void* grad_bias;        // [C], out
  bool batch_statistics;  // mean and var depend on the features
  // Of float or 16-bit features, on CUDA: [5, C], out, what else makes the gradient of a feature of
  // that of y (NormGradCoefficients in cuda/elementwise/sums.cuh); null: not asked for.
  float* coefficients = nullptr;
};

namespace cpu {
void concat_bn_stats(const KernelArgs& args, const Statistics& statistics);
void concat_bn_relu(const KernelArgs& args, const BatchNorm& bn, const View& y);
void concat_bn_relu_backward(const KernelArgs& args, const BatchNorm& bn,
                             const Gradients& gradients);
}  // namespace cpu

namespace cuda {
void* current_stream(int device_index);
void concat_bn_stats(const KernelArgs& args, const Statistics& statistics);
void concat_bn_relu(const KernelArgs& args, const BatchNorm& bn, const View& y);
void concat_bn_relu_backward(const KernelArgs& args, const BatchNorm& bn,
                             const Gradients& gradients);
// Its halves: the sums over the rows, and the gradients of the features, from those and from
// grad_y, whose elements behind a closed ReLU may be 0 already.
void concat_bn_relu_backward_sums(const KernelArgs& args, const BatchNorm& bn,
                                  const Gradients& gradients);
void concat_bn_relu_backward_features(const KernelArgs& args, const BatchNorm& bn,
                                      const Gradients& gradients);
}  // namespace cuda

}  // namespace efficient_densenet
