// What a build without CUDA answers to CUDA tensors.
#ifndef EFFICIENT_DENSENET_CUDA

#include "common/checks.h"
#include "operators/bn_relu_conv1x1.h"
#include "operators/bn_relu_conv3x3.h"
#include "operators/bn_relu_max_pool.h"
#include "operators/norm_numbers.h"
#include "operators/running_statistics.h"

namespace efficient_densenet::cuda {
namespace {

[[noreturn]] void fail_without_cuda() {
  fail("efficient_densenet",
       "got CUDA tensors, but this build is CPU only. Rebuild where torch is a CUDA build and the "
       "CUDA toolkit (nvcc and cuda_runtime.h) is installed: EFFICIENT_DENSENET_CUDA=1 pip "
       "install --force-reinstall --no-deps --no-build-isolation .");
}

}  // namespace

void* current_stream(int) { fail_without_cuda(); }
void concat_bn_stats(const KernelArgs&, const Statistics&) { fail_without_cuda(); }
void concat_bn_relu(const KernelArgs&, const BatchNorm&, const View&) { fail_without_cuda(); }
void concat_bn_relu_backward(const KernelArgs&, const BatchNorm&, const Gradients&) {
  fail_without_cuda();
}
void concat_bn_relu_backward_sums(const KernelArgs&, const BatchNorm&, const Gradients&) {
  fail_without_cuda();
}
void concat_bn_relu_backward_features(const KernelArgs&, const BatchNorm&, const Gradients&) {
  fail_without_cuda();
}
void bn_relu_max_pool(const KernelArgs&, const BatchNorm&, const Pooled&) { fail_without_cuda(); }
void bn_relu_max_pool_backward(const KernelArgs&, const BatchNorm&, const Pooled&,
                               const Gradients&) {
  fail_without_cuda();
}
void accumulate_norm_grad(const KernelArgs&, const BatchNorm&, const NormGradArgs&) {
  fail_without_cuda();
}
void apply_bn_correction(const KernelArgs&, const View&, const double*, const Correction&) {
  fail_without_cuda();
}
void average_pool(const KernelArgs&, const BatchNorm&, const Pooling&, const View&) {
  fail_without_cuda();
}
void update_running_statistics(const std::vector<RunningStatistics>&, void*) {
  fail_without_cuda();
}
std::string why_no_tensor_cores(int, Element, int64_t, int64_t) { return "this build is CPU only"; }
void limit_shared_memory(int64_t) { fail_without_cuda(); }
int64_t packed_bytes(Element, int64_t, const WeightsToPack&, int64_t) { fail_without_cuda(); }
void pack_weights(Element, int64_t, const std::vector<PackJob>&, const ZeroMemory&, void*) {
  fail_without_cuda();
}
void bn_relu_conv1x1(const KernelArgs&, const BatchNorm&, const void*, int64_t, const FoldedNorm&,
                     const View&, const Statistics*, const MomentsLeft&, MomentsLeft*) {
  fail_without_cuda();
}
void norm_numbers(const std::vector<KnownNorm>&, float*, int64_t, void*) { fail_without_cuda(); }
void fold_norms(const std::vector<KnownNorm>&, float*, float*, void*) { fail_without_cuda(); }
void bn_relu_conv1x1_grad_input(const KernelArgs&, const BatchNorm&, const void*, int64_t,
                                const NormGradient&, const NormGradArgs&, ReaderSumsLeft*) {
  fail_without_cuda();
}
bool conv1x1_grad_input_shares_rows(Element, int64_t, int64_t, int64_t) { fail_without_cuda(); }
void bn_relu_conv1x1_grad_weight(const KernelArgs&, const BatchNorm&, int64_t, const View&,
                                 const WeightGradient&, WeightParts*, const ReaderSumsLeft&) {
  fail_without_cuda();
}
std::string why_no_conv3x3(int, Element, int64_t, int64_t, int64_t) {
  return "this build is CPU only";
}
void bn_relu_conv3x3(const KernelArgs&, const BatchNorm&, bool, const ImageSize&, const void*,
                     int64_t, const View&, const Statistics*, const MomentsLeft&, MomentsLeft*) {
  fail_without_cuda();
}
int64_t conv3x3_grad_pitch(Element, int64_t) { fail_without_cuda(); }
void bn_relu_conv3x3_grad_input(const KernelArgs&, const BatchNorm&, const ImageSize&, const void*,
                                int64_t, const Gathered&, const View&, const Gradients&,
                                NormSumsLeft*) {
  fail_without_cuda();
}
void bn_relu_conv3x3_grad_weight(const KernelArgs&, const BatchNorm&, const ImageSize&, int64_t,
                                 const View&, const WeightGradient&, WeightParts*,
                                 const NormSumsLeft&) {
  fail_without_cuda();
}
void add_weight_parts(const KernelArgs&, const WeightParts&) { fail_without_cuda(); }
void add_norm_sums(const KernelArgs&, const NormSumsLeft&) { fail_without_cuda(); }
void add_reader_sums(const KernelArgs&, const ReaderSumsLeft&) { fail_without_cuda(); }

}  // namespace efficient_densenet::cuda

#endif
