// Shared by the CPU kernels: how tensors are walked as the matrices of loops.h, threads, sums,
// per-channel numbers.
//
// TileWalk: channels inner (channels-last tensors) makes a feature's channels the columns. Rows
// inner (all others) folds a run of rows of one channel to kLanes columns:
//
//          channels inner                rows inner, one channel
//   row 0  [c0 c1 c2 ...]                [row 0 ... row 15]
//   row 1  [c0 c1 c2 ...]                [row 16 ... row 31]   then what is left, as one row
//
// Threads share the rows; a call's sums are formed in chunks of rows, whose number depends on the
// shape and strides alone, and added in order.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/kernel_args.h"
#include "cpu/loops.h"

namespace efficient_densenet::cpu {

// Element type of per-channel arrays.
template <typename T>
using channel_t = std::conditional_t<(sizeof(T) < 8), float, double>;

template <typename Body>
void dispatch(Element element, const Body& body) {
  switch (element) {
    case Element::kDouble:
      return body(double{});
    case Element::kFloat:
      return body(float{});
    case Element::kHalf:
      return body(c10::Half{});
    case Element::kBFloat16:
      return body(c10::BFloat16{});
  }
}

// Work per thread below which threads cost more than they give, in elements.
constexpr int64_t kGrain = 32768;

// Calls body(begin, end) for shares of `count` items of `elements` elements each, in parallel.
template <typename Body>
void in_parallel(int64_t count, int64_t elements, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, count, grain, body);
}

// Two sums per channel, [2, C], over `count` items of at least one row each: in parallel, with
// calls body(first item, end item, sums [2, C]) for chunks of items.
template <typename Body>
std::vector<double> sums_in_parallel(int64_t channels, int64_t count, int64_t items_per_chunk,
                                     const Body& body) {
  constexpr int64_t kMaxChunks = 64;
  const int64_t chunks = std::min(kMaxChunks, (count + items_per_chunk - 1) / items_per_chunk);
  const int64_t size = 2 * channels;
  std::vector<double> partial(chunks * size, 0.0), sums(size, 0.0);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      body(count * chunk / chunks, count * (chunk + 1) / chunks, &partial[chunk * size]);
    }
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < size; ++i) sums[i] += partial[chunk * size + i];
  }
  return sums;
}

constexpr int64_t kChunkRows = 128;  // a few chunks for each thread, also where rows are few
constexpr int64_t kLanes = 16;

// Part of one feature, as a matrix.
struct Tile {
  const Feature& feature;
  int64_t row, channel;  // the first ones; the channel in the feature
  int64_t column;        // of the first column in per-channel arrays, see TileWalk::repeat
  Shape shape;
};

class TileWalk {
 public:
  explicit TileWalk(const KernelArgs& args)
      : args_(args), channels_inner_(channels_are_inner(args)) {}

  // How often per-channel arrays hold each number: once per column of a channel.
  int64_t repeat() const { return channels_inner_ ? 1 : kLanes; }

  // The tile in a tensor with the channels of the feature, and in one with those of all features.
  template <typename T>
  Matrix<T> of_feature(const View& view, const Tile& tile) const {
    return matrix<T>(view, tile.row, tile.channel);
  }

  template <typename T>
  Matrix<T> of_all(const View& view, const Tile& tile) const {
    return matrix<T>(view, tile.row, tile.feature.first_channel + tile.channel);
  }

  // Covers all elements of all features, in parallel.
  template <typename Body>
  void for_each_tile(const Body& body) const {
    in_parallel(args_.rows.count, args_.channels,
                [&](int64_t begin, int64_t end) { for_each_tile(begin, end, body); });
  }

  // Two sums per channel, [2, C], of what body(tile, sum, other sum) adds for each column.
  template <typename Body>
  std::vector<double> sums(const Body& body) const {
    const int64_t channels = args_.channels;
    const auto chunk = [&](int64_t begin, int64_t end, double* sums) {
      for_each_tile(begin, end, [&](const Tile& tile) {
        double* const sum = sums + tile.feature.first_channel + tile.channel;
        if (channels_inner_) return body(tile, sum, sum + channels);
        double lanes[2][kLanes] = {};
        body(tile, lanes[0], lanes[1]);
        for (const double lane : lanes[0]) sum[0] += lane;
        for (const double lane : lanes[1]) sum[channels] += lane;
      });
    };
    return sums_in_parallel(channels, args_.rows.count, kChunkRows, chunk);
  }

 private:
  static bool channels_are_inner(const KernelArgs& args) {
    const auto all = [&](auto condition) {
      return std::all_of(args.features.begin(), args.features.end(),
                         [&](const Feature& feature) { return condition(feature.x); });
    };
    const int inner = args.rows.dims - 1;
    return all([](const View& x) { return x.channel_stride == 1; }) &&
           !all([&](const View& x) { return x.row_strides[inner] == 1; });
  }

  template <typename T>
  Matrix<T> matrix(const View& view, int64_t row, int64_t channel) const {
    const RowSpace& rows = args_.rows;
    const int64_t row_stride = view.row_strides[rows.dims - 1];
    int64_t offset = channel * view.channel_stride;
    for (int d = rows.dims - 1; d > 0; --d) {
      offset += row % rows.sizes[d] * view.row_strides[d];
      row /= rows.sizes[d];
    }
    T* const data = static_cast<T*>(view.data) + offset + row * view.row_strides[0];
    return channels_inner_ ? Matrix<T>{data, row_stride, view.channel_stride}
                           : Matrix<T>{data, kLanes * row_stride, row_stride};
  }

  // Rows [begin, end), in stretches with one stride, short enough that what the features of a
  // channels-last list write next to each other stays in the L1 cache.
  template <typename Body>
  void for_each_tile(int64_t begin, int64_t end, const Body& body) const {
    constexpr int64_t kStretch = 64;
    const int64_t inner = args_.rows.sizes[args_.rows.dims - 1];
    while (begin < end) {
      int64_t length = std::min(inner - begin % inner, end - begin);
      if (channels_inner_) length = std::min(length, kStretch);
      for (const Feature& feature : args_.features) {
        if (!channels_inner_) {
          for_each_fold(feature, begin, length, body);
        } else if (feature.channels > 0) {
          body(Tile{feature, begin, 0, feature.first_channel, {length, feature.channels}});
        }
      }
      begin += length;
    }
  }

  template <typename Body>
  static void for_each_fold(const Feature& feature, int64_t row, int64_t length, const Body& body) {
    const int64_t full = length / kLanes, left = length % kLanes;
    for (int64_t c = 0; c < feature.channels; ++c) {
      const int64_t column = (feature.first_channel + c) * kLanes;
      if (full > 0) body(Tile{feature, row, c, column, {full, kLanes}});
      if (left > 0) body(Tile{feature, row + full * kLanes, c, column, {1, left}});
    }
  }

  const KernelArgs& args_;
  const bool channels_inner_;
};

// Per-channel arrays of y = relu((x - mean) * scale + bias), the mean split as in BatchNorm:
// `mean_residual` is what its rounded value lacks, and `bias` makes up for it.
template <typename T>
class NormCoefficients {
  using Acc = acc_t<T>;

 public:
  // Repeated (TileWalk::repeat), for the loops.
  std::vector<Acc> mean, scale, bias;
  // One number per channel, for the sums.
  std::vector<double> mean_residual, inverse_std;
  const int64_t repeat;

  NormCoefficients(const BatchNorm& bn, int64_t channels, int64_t repeat)
      : mean(channels * repeat),
        scale(channels * repeat),
        bias(channels * repeat),
        mean_residual(channels),
        inverse_std(channels),
        repeat(repeat) {
    const auto read = [](const void* values, int64_t c, double otherwise) {
      return values == nullptr ? otherwise : static_cast<const channel_t<T>*>(values)[c];
    };
    for (int64_t c = 0; c < channels; ++c) {
      inverse_std[c] = 1 / std::sqrt(bn.var[c] + bn.eps);
      const double exact_scale = read(bn.weight, c, 1) * inverse_std[c];
      const Acc rounded = round_mean(bn.mean[c], inverse_std[c]);
      // Nothing can be taken off an infinite mean, and infinity minus infinity would be NaN.
      mean_residual[c] = std::isinf(rounded) ? 0 : bn.mean[c] - rounded;
      std::fill_n(&mean[c * repeat], repeat, rounded);
      std::fill_n(&scale[c * repeat], repeat, static_cast<Acc>(exact_scale));
      std::fill_n(&bias[c * repeat], repeat,
                  static_cast<Acc>(read(bn.bias, c, 0) - mean_residual[c] * exact_scale));
    }
  }

  NormPointers<T> at(int64_t column) const {
    return {&mean[column], &scale[column], &bias[column]};
  }

 private:
  // A multiple of the power of two next to the standard deviation: 0 where the mean is small, and
  // of so few digits elsewhere that x - mean is exact for almost every x.
  static Acc round_mean(double mean, double inverse_std) {
    const double unit = std::exp2(-std::logb(inverse_std));
    const Acc rounded = static_cast<Acc>(unit * std::rint(mean / unit));
    return std::isfinite(rounded) ? rounded : static_cast<Acc>(mean);
  }
};

}  // namespace efficient_densenet::cpu
