// Gradients of y = relu((x - mean) * scale + bias), per channel c over M rows:
//
//   dz = grad_y where the ReLU was open, else 0     (recomputed from x; y is not kept)
//   grad_bias = sum(dz)      grad_weight = sum(dz * (x - mean)) * inverse_std
//   grad_x = scale * (dz - grad_bias / M - xhat * grad_weight / M)   with batch statistics
//   grad_x = scale * dz                                              with running statistics
//
// Tiling: rows.h; first the sums of all rows, then the gradients, each from the grad_y at its own
// place, so grad_x may take the memory of grad_y.
// Bytes: x and grad_y are read twice, grad_x is written once. Limit: memory bandwidth.
#include "cpu/correction.h"

namespace efficient_densenet::cpu {

void concat_bn_relu_backward(const KernelArgs& args, const BatchNorm& bn,
                             const Gradients& gradients) {
  dispatch(args.element, [&](auto element) {
    using T = decltype(element);
    const TileWalk walk(args);
    const NormCoefficients<T> channels(bn, args.channels, walk.repeat());
    const auto sums = walk.sums([&](const Tile& tile, double* dz, double* dz_centred) {
      loops<T>().accumulate(tile.shape, walk.of_feature<const T>(tile.feature.x, tile),
                            walk.of_all<const T>(gradients.grad_y, tile), {}, Write::kNothing,
                            channels.at(tile.column), &channels.scale[tile.column], dz, dz_centred);
    });
    std::vector<double> s1(args.channels), s2(args.channels);
    const Correction correction{s1.data(), s2.data()};
    finish_sums(channels, sums.data(), gradients.grad_weight, gradients.grad_bias,
                gradients.batch_statistics, true, correction);
    const BatchTerm<T> term(correction, channels.mean_residual, args.rows.count, walk.repeat());
    const bool corrects = gradients.batch_statistics;
    walk.for_each_tile([&](const Tile& tile) {
      if (tile.feature.grad_x.data == nullptr) return;
      loops<T>().gradient(tile.shape, walk.of_feature<const T>(tile.feature.x, tile),
                          walk.of_all<const T>(gradients.grad_y, tile),
                          walk.of_feature<T>(tile.feature.grad_x, tile), channels.at(tile.column),
                          corrects ? &term.offset[tile.column] : nullptr,
                          corrects ? &term.slope[tile.column] : nullptr);
    });
  });
}

}  // namespace efficient_densenet::cpu
