// mean[c] and biased var[c] over the rows of each channel of a list of tensors; on the way, where
// needed, a copy of all channels.
//
// Method: sums in double of x - pivot and of its square, where the pivot of a channel is its value
// in the first row. A value is never more than sqrt(M - 1) standard deviations from the mean of the
// M values that it is one of. So the variance loses at most a factor M of the digits of double,
// and next to none where the pivot is a typical value, however many standard deviations the mean
// is. Tiling: rows.h. Bytes: each element is read once, and written once where copied. Limit:
// memory bandwidth.
#include "cpu/rows.h"

namespace efficient_densenet::cpu {
namespace {

template <typename T>
std::vector<double> pivots(const KernelArgs& args, int64_t repeat) {
  std::vector<double> pivot(args.channels * repeat);
  for (const Feature& feature : args.features) {
    const T* const first_row = static_cast<const T*>(feature.x.data);
    for (int64_t c = 0; c < feature.channels; ++c) {
      std::fill_n(&pivot[(feature.first_channel + c) * repeat], repeat,
                  static_cast<double>(first_row[c * feature.x.channel_stride]));
    }
  }
  return pivot;
}

}  // namespace

void concat_bn_stats(const KernelArgs& args, const Statistics& statistics) {
  dispatch(args.element, [&](auto element) {
    using T = decltype(element);
    const TileWalk walk(args);
    const std::vector<double> pivot = pivots<T>(args, walk.repeat());
    const auto sums = walk.sums([&](const Tile& tile, double* sum, double* sum_of_squares) {
      const Matrix<T> copy =
          statistics.copy == nullptr ? Matrix<T>{} : walk.of_all<T>(*statistics.copy, tile);
      loops<T>().moments(tile.shape, walk.of_feature<const T>(tile.feature.x, tile), copy,
                         &pivot[tile.column], sum, sum_of_squares);
    });
    const double m = static_cast<double>(args.rows.count);
    for (int64_t c = 0; c < args.channels; ++c) {
      const double from_pivot = sums[c] / m;
      const double var = sums[args.channels + c] / m - from_pivot * from_pivot;
      statistics.mean[c] = pivot[c * walk.repeat()] + from_pivot;
      statistics.var[c] = var < 0 ? 0 : var;  // NaN passes
    }
  });
}

}  // namespace efficient_densenet::cpu
