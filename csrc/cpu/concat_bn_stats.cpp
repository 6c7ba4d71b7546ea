// mean[c] and biased var[c] over the rows of each channel of a list of tensors, and the update of
// the running statistics.
//
// Method: rows are taken in small groups; the mean of a group and the squares about that mean are
// formed first and then merged into the channel's moments in double (Chan, Golub and LeVeque 1983),
// so a mean of many standard deviations costs no accuracy.
// Tiling: channels-last tensors by chunks of rows (threads share chunks, whose number depends on
// the shape alone), all others by channel. Bytes: each element is read once. Limit: arithmetic in
// double for short groups.
#include "rows.h"

namespace efficient_densenet::cpu {
namespace {

constexpr int64_t kGroup = 16;   // rows whose moments are formed at once, channels inner
constexpr int64_t kBlock = 256;  // the same, rows inner: one buffer in the L1 cache

struct Moments {
  double count = 0, mean = 0, m2 = 0;  // m2: sum of squares about the mean

  void merge(double other_count, double other_mean, double other_m2) {
    if (other_count == 0) return;
    const double total = count + other_count;
    const double delta = other_mean - mean;
    mean += delta * (other_count / total);
    m2 += other_m2 + delta * delta * (count * other_count / total);
    count = total;
  }
};

template <typename Acc>
void merge_buffer(const Acc* buffer, int64_t n, Moments* moments) {
  const double mean = sum(buffer, n, [](Acc x) { return static_cast<double>(x); }) / n;
  const double m2 = sum(buffer, n, [mean](Acc x) {
    const double centred = x - mean;
    return centred * centred;
  });
  moments->merge(n, mean, m2);
}

template <typename T>
Moments channel_moments(const RowSpace& rows, const View& x, int64_t channel) {
  Moments moments;
  const int64_t stride = x.row_strides[rows.dims - 1];
  acc_t<T> buffer[kBlock];
  for_each_run(rows, 0, rows.count, [&](int64_t first, int64_t length) {
    const T* const run = address<T>(rows, x, first, channel);
    for (int64_t begin = 0; begin < length; begin += kBlock) {
      const int64_t n = std::min(kBlock, length - begin);
      with_strides(stride, 1, [&](auto x_stride, auto) {
        for (int64_t i = 0; i < n; ++i) {
          buffer[i] = static_cast<acc_t<T>>(run[(begin + i) * x_stride]);
        }
      });
      merge_buffer(buffer, n, &moments);
    }
  });
  return moments;
}

// Merges rows [begin, end) of all channels of one channels-last feature into moments[channel].
template <typename T>
void merge_rows(const RowSpace& rows, const Feature& feature, int64_t begin, int64_t end,
                Moments* moments) {
  std::vector<double> mean(feature.channels), m2(feature.channels);
  const T* group[kGroup];
  for (int64_t row = begin; row < end; row += kGroup) {
    const int64_t n = std::min(kGroup, end - row);
    for (int64_t r = 0; r < n; ++r) group[r] = address<T>(rows, feature.x, row + r, 0);
    std::fill(mean.begin(), mean.end(), 0.0);
    std::fill(m2.begin(), m2.end(), 0.0);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < feature.channels; ++c) mean[c] += static_cast<acc_t<T>>(group[r][c]);
    }
    for (int64_t c = 0; c < feature.channels; ++c) mean[c] /= n;
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < feature.channels; ++c) {
        const double centred = static_cast<acc_t<T>>(group[r][c]) - mean[c];
        m2[c] += centred * centred;
      }
    }
    for (int64_t c = 0; c < feature.channels; ++c) moments[c].merge(n, mean[c], m2[c]);
  }
}

template <typename T>
std::vector<Moments> by_row(const Problem& problem) {
  std::vector<Moments> partial(row_chunks(problem.rows) * problem.channels);
  for_each_row_chunk(problem.rows, [&](int64_t chunk, int64_t begin, int64_t end) {
    for (const Feature& feature : problem.features) {
      merge_rows<T>(problem.rows, feature, begin, end,
                    &partial[chunk * problem.channels + feature.first_channel]);
    }
  });
  std::vector<Moments> moments(problem.channels);
  for (size_t i = 0; i < partial.size(); ++i) {
    moments[i % problem.channels].merge(partial[i].count, partial[i].mean, partial[i].m2);
  }
  return moments;
}

template <typename T>
std::vector<Moments> by_channel(const Problem& problem) {
  std::vector<Moments> moments(problem.channels);
  for_each_channel(problem, [&](const Feature& feature, int64_t channel) {
    moments[feature.first_channel + channel] = channel_moments<T>(problem.rows, feature.x, channel);
  });
  return moments;
}

template <typename Real>
void update_running(void* running, int64_t channel, double momentum, double value) {
  if (running == nullptr) return;
  Real& average = static_cast<Real*>(running)[channel];
  average = static_cast<Real>((1 - momentum) * average + momentum * value);
}

}  // namespace

void concat_bn_stats(const Problem& problem, const Statistics& statistics) {
  dispatch(problem.element, [&](auto element) {
    using T = decltype(element);
    using Real = channel_t<T>;
    const std::vector<Moments> moments =
        channels_are_inner(problem) ? by_row<T>(problem) : by_channel<T>(problem);
    for (int64_t c = 0; c < problem.channels; ++c) {
      const auto& [count, mean, m2] = moments[c];
      statistics.mean[c] = mean;
      statistics.var[c] = m2 / count;
      update_running<Real>(statistics.running_mean, c, statistics.momentum, mean);
      update_running<Real>(statistics.running_var, c, statistics.momentum, m2 / (count - 1));
    }
  });
}

}  // namespace efficient_densenet::cpu
