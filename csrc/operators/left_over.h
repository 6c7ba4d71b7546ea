// What kernels of a layer's backward pass leave to be added up. The next kernel that makes a
// weight's gradient does it besides its own work, so that there is no launch for it and nobody
// waits:
//
//   conv3x3_grad_input      leaves sums of norm2      conv3x3_grad_weight   adds them
//   conv3x3_grad_weight     leaves parts of conv2     conv1x1_grad_weight   adds them
//   conv1x1_grad_input      leaves sums of norm1      conv1x1_grad_weight   adds them
//   conv1x1_grad_weight     leaves parts of conv1     conv3x3_grad_weight   adds them, of the layer
//                                                                           before
//
// What no kernel behind would add has launches of its own, below.
#pragma once

#include "common/weights.h"
#include "dense_block/kernels.h"

namespace efficient_densenet {

// Partial results of the gradient of a weight [outputs, channels, taps], one per part of the rows:
// [parts, outputs, taps, channels], float.
struct WeightParts {
  float* memory;        // null: nothing is left
  int parts, elements;  // elements of the weight
  int channels, taps;
  WeightGradient sum;  // out
};

// Sums over rows of dz and of dz * (x - rounded mean), [blocks, channels] each, in the scratch
// memory of the kernel that left them, and what becomes of the sums: Gradients of a norm, or
// NormGradArgs of a reader.
template <typename Args>
struct SumsLeft {
  double *dz, *dz_centred;  // null: nothing is left
  int64_t channels, rows;
  int blocks;
  BatchNorm bn;
  Args args;
};
using NormSumsLeft = SumsLeft<Gradients>;
using ReaderSumsLeft = SumsLeft<NormGradArgs>;

// In the forward pass: moments of a kernel's result, of which a number of blocks, or of teams of
// them, have left a mean and the squares about it each, [blocks + teams, channels]. The kernel that
// normalises the result adds them up, each block for itself: they are the channels of its input
// from `begin` on. It also writes them.
struct MomentsLeft {
  double *first, *second;  // null: nothing is left
  int64_t channels, begin, rows, rows_per_block;
  int blocks, teams;
  double *mean, *var;  // out
};

namespace cuda {

void add_weight_parts(const KernelArgs& args, const WeightParts& left);
void add_norm_sums(const KernelArgs& args, const NormSumsLeft& left);
void add_reader_sums(const KernelArgs& args, const ReaderSumsLeft& left);

}  // namespace cuda
}  // namespace efficient_densenet
