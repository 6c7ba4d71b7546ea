// y[r, c] = relu((x[r, c] - mean[c]) * scale[c] + bias[c]), scale = weight / sqrt(var + eps),
// for the channels c of a list of tensors, without concatenating them.
//
// Tiling: rows.h. Bytes: each element is read once and written once; nothing else grows with the
// rows. Limit: memory bandwidth; for features of few channels, the short inner loops.
#include "cpu/rows.h"

namespace efficient_densenet::cpu {

void concat_bn_relu(const KernelArgs& args, const BatchNorm& bn, const View& y) {
  dispatch(args.element, [&](auto element) {
    using T = decltype(element);
    const TileWalk walk(args);
    const NormCoefficients<T> channels(bn, args.channels, walk.repeat());
    walk.for_each_tile([&](const Tile& tile) {
      loops<T>().normalise(tile.shape, walk.of_feature<const T>(tile.feature.x, tile),
                           walk.of_all<T>(y, tile), channels.at(tile.column));
    });
  });
}

}  // namespace efficient_densenet::cpu
