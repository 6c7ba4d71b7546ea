// Adds up what no kernel behind would (left_over.h): the last of a block's backward pass, and where
// a weight needs no gradient.
#include "cuda/tensor_core/left_over.cuh"
#include "cuda/tensor_core/limits.cuh"

namespace efficient_densenet::cuda {
namespace {

constexpr int64_t kMostBlocks = 132;

template <typename T, typename Left>
__global__ void __launch_bounds__(kThreads) left_over_kernel(const __grid_constant__ Left left) {
  add_left<T>(left, blockIdx.x, gridDim.x);
}

// With so many units of work for a warp.
template <typename Left>
void launch(const KernelArgs& args, const Left& left, int64_t units) {
  const auto blocks =
      static_cast<unsigned>(std::min(ceil_div(units, kThreads / kWarp), kMostBlocks));
  dispatch_operand(args.element, [&](auto element) {
    left_over_kernel<decltype(element)>
        <<<blocks, kThreads, 0, static_cast<cudaStream_t>(args.stream)>>>(left);
    check(cudaGetLastError(), "left_over_kernel");
  });
}

}  // namespace

void add_weight_parts(const KernelArgs& args, const WeightParts& left) {
  if (left.memory != nullptr) launch(args, left, ceil_div(left.elements, kWarp));
}
void add_norm_sums(const KernelArgs& args, const NormSumsLeft& left) {
  if (left.dz != nullptr) launch(args, left, left.channels);
}
void add_reader_sums(const KernelArgs& args, const ReaderSumsLeft& left) {
  if (left.dz != nullptr) launch(args, left, left.channels);
}

}  // namespace efficient_densenet::cuda
