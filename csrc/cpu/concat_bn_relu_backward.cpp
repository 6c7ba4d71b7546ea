// Gradients of y = relu((x - mean) * scale + bias), per channel c over M rows:
//
//   dz = grad_y where the ReLU was open, else 0     (recomputed from x; y is not kept)
//   grad_bias = sum(dz)      grad_weight = sum(dz * (x - mean)) * inverse_std
//   grad_x = scale * (dz - grad_bias / M - xhat * grad_weight / M)   with batch statistics
//   grad_x = scale * dz                                              with running statistics
//
// Tiling: as in concat_bn_relu.cpp; the sums by chunks of rows (channels-last) or by channel, in
// double and in an order that depends on the shape alone.
// Bytes: x and grad_y are read twice, grad_x is written once. Limit: memory bandwidth, and the
// double sums.
#include "rows.h"

namespace efficient_densenet::cpu {
namespace {

struct Sums {
  std::vector<double> dz, dz_centred;  // dz, dz * (x - rounded mean)

  explicit Sums(int64_t size) : dz(size, 0.0), dz_centred(size, 0.0) {}

  // sum(dz * (x - mean))
  template <typename T>
  double about_mean(const Channels<T>& bn, int64_t c) const {
    return dz_centred[c] - bn.rest[c] * dz[c];
  }
};

template <typename T>
acc_t<T> masked(acc_t<T> x, T grad_y, acc_t<T> mean, acc_t<T> scale, acc_t<T> bias) {
  const bool open = relu_is_open<T>(normalise(x, mean, scale, bias));
  return open ? static_cast<acc_t<T>>(grad_y) : acc_t<T>(0);
}

// Adds one row of one channels-last feature to the sums, which start at its first channel.
template <typename T>
void add_row(int64_t n, const T* x, const T* grad_y, int64_t grad_stride, const Channels<T>& bn,
             int64_t first_channel, double* __restrict__ dz_sum,
             double* __restrict__ dz_centred_sum) {
  const acc_t<T>*mean = &bn.mean[first_channel], *scale = &bn.scale[first_channel],
        *bias = &bn.bias[first_channel];
  with_strides(1, grad_stride, [&](auto, auto stride) {
    for (int64_t c = 0; c < n; ++c) {
      const auto value = static_cast<acc_t<T>>(x[c]);
      const acc_t<T> dz = masked<T>(value, grad_y[c * stride], mean[c], scale[c], bias[c]);
      dz_sum[c] += dz;
      dz_centred_sum[c] += static_cast<double>(dz) * (value - mean[c]);
    }
  });
}

template <typename T>
Sums sums_by_row(const Problem& problem, const Channels<T>& bn, const View& grad_y) {
  const RowSpace& rows = problem.rows;
  Sums partial(row_chunks(rows) * problem.channels);
  for_each_row_chunk(rows, [&](int64_t chunk, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (const Feature& feature : problem.features) {
        const int64_t c = feature.first_channel, i = chunk * problem.channels + c;
        add_row<T>(feature.channels, address<T>(rows, feature.x, row, 0),
                   address<T>(rows, grad_y, row, c), grad_y.channel_stride, bn, c, &partial.dz[i],
                   &partial.dz_centred[i]);
      }
    }
  });
  Sums sums(problem.channels);
  for (size_t i = 0; i < partial.dz.size(); ++i) {
    sums.dz[i % problem.channels] += partial.dz[i];
    sums.dz_centred[i % problem.channels] += partial.dz_centred[i];
  }
  return sums;
}

// Adds a run of rows of one channel to its sums.
template <typename T>
void add_run(int64_t n, const T* x, int64_t xs, const T* grad_y, int64_t gs, acc_t<T> mean,
             acc_t<T> scale, acc_t<T> bias, double* dz_sum, double* dz_centred_sum) {
  constexpr int64_t kBlock = 256;  // buffers in the L1 cache
  acc_t<T> dz[kBlock], dz_centred[kBlock];
  const auto identity = [](acc_t<T> value) { return static_cast<double>(value); };
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t block = std::min(kBlock, n - begin);
    with_strides(xs, gs, [&](auto x_stride, auto g_stride) {
      const T *const x_block = x + begin * x_stride, *const g_block = grad_y + begin * g_stride;
      for (int64_t i = 0; i < block; ++i) {
        const auto value = static_cast<acc_t<T>>(x_block[i * x_stride]);
        dz[i] = masked<T>(value, g_block[i * g_stride], mean, scale, bias);
        dz_centred[i] = dz[i] * (value - mean);
      }
    });
    *dz_sum += sum(dz, block, identity);
    *dz_centred_sum += sum(dz_centred, block, identity);
  }
}

template <typename T>
Sums sums_by_channel(const Problem& problem, const Channels<T>& bn, const View& grad_y) {
  const RowSpace& rows = problem.rows;
  Sums sums(problem.channels);
  for_each_channel(problem, [&](const Feature& feature, int64_t channel) {
    const int64_t c = feature.first_channel + channel;
    for_each_run(rows, 0, rows.count, [&](int64_t row, int64_t length) {
      add_run<T>(length, address<T>(rows, feature.x, row, channel),
                 inner_stride<false>(rows, feature.x), address<T>(rows, grad_y, row, c),
                 inner_stride<false>(rows, grad_y), bn.mean[c], bn.scale[c], bn.bias[c],
                 &sums.dz[c], &sums.dz_centred[c]);
    });
  });
  return sums;
}

// grad_x = scale * dz - offset - (x - rounded mean) * slope; the last two are what the batch
// statistics send back, 0 for running statistics.
template <typename T>
struct Correction {
  std::vector<acc_t<T>> offset, slope;

  Correction(const Problem& problem, const Channels<T>& bn, const Sums& sums, bool batch_statistics)
      : offset(problem.channels, 0), slope(problem.channels, 0) {
    if (!batch_statistics) return;
    const double m = static_cast<double>(problem.rows.count);
    for (int64_t c = 0; c < problem.channels; ++c) {
      const double scale = bn.scale[c], inverse_std = bn.inverse_std[c];
      const double exact = scale * inverse_std * inverse_std * sums.about_mean(bn, c) / m;
      slope[c] = static_cast<acc_t<T>>(exact);
      offset[c] = static_cast<acc_t<T>>(scale * sums.dz[c] / m - bn.rest[c] * exact);
    }
  }
};

template <typename T, bool kChannelsInner>
void grad_features(const Problem& problem, const Channels<T>& bn, const Correction<T>& correction,
                   const View& grad_y) {
  const RowSpace& rows = problem.rows;
  for_each_stretch<kChannelsInner>(
      problem, [&](const Feature& feature, int64_t row, int64_t channel, int64_t n) {
        if (feature.grad_x.data == nullptr) return;
        const T* const x = address<T>(rows, feature.x, row, channel);
        const T* const dy = address<T>(rows, grad_y, row, feature.first_channel + channel);
        T* const __restrict__ dx = address<T>(rows, feature.grad_x, row, channel);
        const int64_t xs = inner_stride<kChannelsInner>(rows, feature.x);
        const int64_t dxs = inner_stride<kChannelsInner>(rows, feature.grad_x);
        const int64_t dys = inner_stride<kChannelsInner>(rows, grad_y);
        // Per-channel numbers advance with the loop only where it runs over channels.
        const int64_t c0 = feature.first_channel + channel;
        const acc_t<T>*mean = &bn.mean[c0], *scale = &bn.scale[c0], *bias = &bn.bias[c0];
        const acc_t<T>*offset = &correction.offset[c0], *slope = &correction.slope[c0];
        const auto loop = [&](auto x_stride, auto dx_stride, auto dy_stride) {
          for (int64_t i = 0; i < n; ++i) {
            const int64_t c = kChannelsInner ? i : 0;
            const auto value = static_cast<acc_t<T>>(x[i * x_stride]);
            const acc_t<T> dz = masked<T>(value, dy[i * dy_stride], mean[c], scale[c], bias[c]);
            const acc_t<T> centred = value - mean[c];
            dx[i * dx_stride] = static_cast<T>(scale[c] * dz - offset[c] - centred * slope[c]);
          }
        };
        constexpr std::integral_constant<int64_t, 1> one;
        if (xs == 1 && dxs == 1 && dys == 1) {
          loop(one, one, one);
        } else {
          loop(xs, dxs, dys);
        }
      });
}

template <typename T, bool kChannelsInner>
void backward(const Problem& problem, const BatchNorm& bn, const Gradients& gradients) {
  using Real = channel_t<T>;
  const Channels<T> channels(bn, problem.channels);
  const Sums sums = kChannelsInner ? sums_by_row<T>(problem, channels, gradients.grad_y)
                                   : sums_by_channel<T>(problem, channels, gradients.grad_y);
  for (int64_t c = 0; c < problem.channels; ++c) {
    static_cast<Real*>(gradients.grad_bias)[c] = static_cast<Real>(sums.dz[c]);
    static_cast<Real*>(gradients.grad_weight)[c] =
        static_cast<Real>(sums.about_mean(channels, c) * channels.inverse_std[c]);
  }
  const Correction<T> correction(problem, channels, sums, gradients.batch_statistics);
  grad_features<T, kChannelsInner>(problem, channels, correction, gradients.grad_y);
}

}  // namespace

void concat_bn_relu_backward(const Problem& problem, const BatchNorm& bn,
                             const Gradients& gradients) {
  dispatch(problem.element, [&](auto element) {
    using T = decltype(element);
    if (channels_are_inner(problem)) {
      backward<T, true>(problem, bn, gradients);
    } else {
      backward<T, false>(problem, bn, gradients);
    }
  });
}

}  // namespace efficient_densenet::cpu
