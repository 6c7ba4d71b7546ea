// y[r, c] = relu((x[r, c] - mean[c]) * scale[c] + bias[c]), scale = weight / sqrt(var + eps),
// for the channels c of a list of tensors, without concatenating them.
//
// Tiling: channels-last tensors are walked row by row, the inner loop over the channels of one
// feature; all others channel by channel, the inner loop over rows of one stride. Threads share
// rows or channels.
// Bytes: each element is read once and written once; nothing else grows with the rows.
// Limit: memory bandwidth; for features of few channels, the short inner loops.
#include "rows.h"

namespace efficient_densenet::cpu {
namespace {

template <typename T, bool kChannelsInner>
void normalise_all(const Problem& problem, const Channels<T>& bn, const View& y) {
  const RowSpace& rows = problem.rows;
  for_each_stretch<kChannelsInner>(
      problem, [&](const Feature& feature, int64_t row, int64_t channel, int64_t n) {
        const T* const from = address<T>(rows, feature.x, row, channel);
        T* const __restrict__ to = address<T>(rows, y, row, feature.first_channel + channel);
        const int64_t from_stride = inner_stride<kChannelsInner>(rows, feature.x);
        const int64_t to_stride = inner_stride<kChannelsInner>(rows, y);
        // Per-channel numbers advance with the loop only where it runs over channels.
        const int64_t c0 = feature.first_channel + channel;
        const acc_t<T>*mean = &bn.mean[c0], *scale = &bn.scale[c0], *bias = &bn.bias[c0];
        with_strides(from_stride, to_stride, [&](auto xs, auto ys) {
          for (int64_t i = 0; i < n; ++i) {
            const int64_t c = kChannelsInner ? i : 0;
            const auto x = static_cast<acc_t<T>>(from[i * xs]);
            to[i * ys] = static_cast<T>(relu(normalise(x, mean[c], scale[c], bias[c])));
          }
        });
      });
}

}  // namespace

void concat_bn_relu(const Problem& problem, const BatchNorm& bn, const View& y) {
  dispatch(problem.element, [&](auto element) {
    using T = decltype(element);
    const Channels<T> channels(bn, problem.channels);
    if (channels_are_inner(problem)) {
      normalise_all<T, true>(problem, channels, y);
    } else {
      normalise_all<T, false>(problem, channels, y);
    }
  });
}

}  // namespace efficient_densenet::cpu
