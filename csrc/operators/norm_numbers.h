// Numbers of norms whose statistics are known, made once for all kernels that read them: a square
// root and a division in double per channel would else be made by every block of every kernel.
#pragma once

#include <vector>

#include "common/kernel_args.h"

namespace efficient_densenet {

struct KnownNorm {
  BatchNorm bn;
  int64_t channels;
  int64_t begin;  // of its first channel in the results
};

namespace cuda {

// What BatchNorm::numbers points to, [3, stride].
void norm_numbers(const std::vector<KnownNorm>& norms, float* numbers, int64_t stride,
                  void* stream);
// The scale and bias of FoldedNorm.
void fold_norms(const std::vector<KnownNorm>& norms, float* scale, float* bias, void* stream);

}  // namespace cuda
}  // namespace efficient_densenet
