// The kernels of a dense block beyond those in common/kernel_args.h.
//
// Inside a block every tensor is a matrix: M rows, channels next to each other. `KernelArgs` then
// has one feature, x, a window of columns of the block's feature buffer (or a chunk of its rows).
//
// The gradient of a channel is gathered from all norms that read it (docs/design.md, "Backward"):
//
//   grad_x = G - (S1 + (x - mean) * S2) / M
//   G  = sum over readers of scale * dz, elementwise      scale = weight * inverse_std
//   S1 = sum over readers of scale * sum(dz)               dz = grad_y where the ReLU was open
//   S2 = sum over readers of scale * inverse_std^2 * sum(dz * (x - mean))
//
// The sums S1, S2 run over the readers that normalise by the statistics of the batch.
//
// G is float or double (is_double): the correction is smaller than a 16-bit G would resolve, so
// that taking it off would be lost to rounding in every row alike, and sums over the rows would be
// wrong.
#pragma once

#include "common/kernel_args.h"

namespace efficient_densenet {

// Average pooling with this window and stride in each of `dims` dimensions; what does not fill a
// window at the end of a dimension is dropped. Rows are pixels of `images` images of these sizes.
struct Pooling {
  int dims;
  int64_t sizes[kMaxRowDims - 1];
  int64_t images;
  int64_t window;  // 2; or all pixels of an image, which then is one line of a single dimension

  bool of_images() const { return dims == 1 && window == sizes[0]; }
};

// S1 and S2 of each channel of the block, [C_total].
struct Correction {
  double* s1;
  double* s2;
};

// What one norm sends back, gathered over chunks of rows: the caller goes through the rows in
// order, and all numbers per channel are those of the norm's C channels.
struct NormGradArgs {
  View grad_y;             // of the chunk's rows; with pooling, of all pooled rows
  const Pooling* pooling;  // null: none. With pooling there is one chunk: all rows
  View grad_features;      // G of the chunk's rows, in and out; float or double
  double* sums;            // [2, C]: of dz and of dz * (x - rounded mean) over the chunks so far
  void* grad_weight;       // [C], out, with the last chunk; float or double (is_double)
  void* grad_bias;         // [C], likewise
  Correction correction;   // in and out, with the last chunk
  bool first_chunk, last_chunk;
  bool first_reader;  // G and correction hold nothing yet: they are written, not added to
  bool batch_statistics;
};

// The gradient of z behind a = relu(norm2(z)), where that of a is there and its sums over the rows:
// the kernel that reads it makes the gradient of z of it on the way, and writes that for others.
struct NormGradient {
  View grad_a, z;
  const float* coefficients;  // Gradients::coefficients
  bool batch_statistics;
  View grad_z;  // out
};

namespace cpu {
// Adds scale * dz to G, and its sums over the rows to `sums`.
void accumulate_norm_grad(const KernelArgs& args, const BatchNorm& bn,
                          const NormGradArgs& norm_grad);
// args.features[0].grad_x = the formula above; arrays are those of the C channels.
void apply_bn_correction(const KernelArgs& args, const View& grad_features, const double* mean,
                         const Correction& correction);
// y = pooled relu(bn(x)); y has the pooled rows.
void average_pool(const KernelArgs& args, const BatchNorm& bn, const Pooling& pooling,
                  const View& y);
}  // namespace cpu

namespace cuda {
void accumulate_norm_grad(const KernelArgs& args, const BatchNorm& bn,
                          const NormGradArgs& norm_grad);
void apply_bn_correction(const KernelArgs& args, const View& grad_features, const double* mean,
                         const Correction& correction);
void average_pool(const KernelArgs& args, const BatchNorm& bn, const Pooling& pooling,
                  const View& y);
}  // namespace cuda

}  // namespace efficient_densenet
