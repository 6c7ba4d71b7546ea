// Shared by the CPU kernels: types, addresses of rows, threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "../concat_bn_relu.h"

namespace efficient_densenet::cpu {

// Arithmetic is one step more precise than the elements, so that rounding the result is the only
// error that counts; sums over rows are always double.
template <typename T>
using acc_t = std::conditional_t<(sizeof(T) < 4), float, double>;

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

inline int64_t row_offset(const RowSpace& rows, const View& view, int64_t row) {
  int64_t offset = 0;
  for (int d = rows.dims - 1; d > 0; --d) {
    offset += row % rows.sizes[d] * view.row_strides[d];
    row /= rows.sizes[d];
  }
  return offset + row * view.row_strides[0];
}

template <typename T>
T* address(const RowSpace& rows, const View& view, int64_t row, int64_t channel) {
  return static_cast<T*>(view.data) + row_offset(rows, view, row) + channel * view.channel_stride;
}

// Whether the inner loops run over the channels of a row (channels-last tensors) or over the rows
// of a channel (all others).
inline bool channels_are_inner(const Problem& problem) {
  const auto all = [&](auto condition) {
    return std::all_of(problem.features.begin(), problem.features.end(),
                       [&](const Feature& feature) { return condition(feature.x); });
  };
  const int inner = problem.rows.dims - 1;
  return all([](const View& x) { return x.channel_stride == 1; }) &&
         !all([&](const View& x) { return x.row_strides[inner] == 1; });
}

// Calls body with the strides of two tensors; as constants where both are 1, so that it vectorises.
template <typename Body>
void with_strides(int64_t a, int64_t b, const Body& body) {
  constexpr std::integral_constant<int64_t, 1> one;
  if (a == 1 && b == 1) return body(one, one);
  body(a, b);
}

// Calls body(first row, length) for each stretch of rows [begin, end) with one stride.
template <typename Body>
void for_each_run(const RowSpace& rows, int64_t begin, int64_t end, const Body& body) {
  const int64_t inner = rows.sizes[rows.dims - 1];
  while (begin < end) {
    const int64_t length = std::min(inner - begin % inner, end - begin);
    body(begin, length);
    begin += length;
  }
}

// Stride of the inner loop over a tensor.
template <bool kChannelsInner>
int64_t inner_stride(const RowSpace& rows, const View& view) {
  return kChannelsInner ? view.channel_stride : view.row_strides[rows.dims - 1];
}

// Covers all elements of all features, in parallel, with calls body(feature, row, channel, n): n
// elements from there along the channels of one row, or along rows of one stride in one channel.
template <bool kChannelsInner, typename Body>
void for_each_stretch(const Problem& problem, const Body& body) {
  const RowSpace& rows = problem.rows;
  if (kChannelsInner) {
    const int64_t grain = std::max<int64_t>(1, kGrain / problem.channels);
    torch::stable::parallel_for(0, rows.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (const Feature& feature : problem.features) body(feature, row, 0, feature.channels);
      }
    });
    return;
  }
  for (const Feature& feature : problem.features) {
    const int64_t elements = feature.channels * rows.count;
    torch::stable::parallel_for(0, elements, kGrain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t channel = begin / rows.count, row = begin % rows.count;
        const int64_t stop = std::min(rows.count, row + end - begin);
        for_each_run(rows, row, stop,
                     [&](int64_t first, int64_t length) { body(feature, first, channel, length); });
        begin += stop - row;
      }
    });
  }
}

// The rows of channels-last tensors are reduced in chunks, whose number depends on the shape alone.
inline int64_t row_chunks(const RowSpace& rows) {
  constexpr int64_t kMaxChunks = 64, kMinRows = 512;
  return std::min(kMaxChunks, (rows.count + kMinRows - 1) / kMinRows);
}

// Calls body(chunk, first row, end row) for each chunk, in parallel.
template <typename Body>
void for_each_row_chunk(const RowSpace& rows, const Body& body) {
  const int64_t chunks = row_chunks(rows);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      body(chunk, rows.count * chunk / chunks, rows.count * (chunk + 1) / chunks);
    }
  });
}

// Calls body(feature, channel) for each channel of each feature, in parallel.
template <typename Body>
void for_each_channel(const Problem& problem, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / problem.rows.count);
  for (const Feature& feature : problem.features) {
    torch::stable::parallel_for(0, feature.channels, grain, [&](int64_t first, int64_t last) {
      for (int64_t channel = first; channel < last; ++channel) body(feature, channel);
    });
  }
}

// Per-channel arrays of y = relu((x - mean) * scale + bias), the mean split as in BatchNorm: `rest`
// is what its rounded value lacks, and `bias` makes up for it.
template <typename T>
struct Channels {
  using Acc = acc_t<T>;
  std::vector<Acc> mean, rest, inverse_std, scale, bias;

  Channels(const BatchNorm& bn, int64_t channels)
      : mean(channels), rest(channels), inverse_std(channels), scale(channels), bias(channels) {
    const auto read = [](const void* values, int64_t c, Acc otherwise) {
      return values == nullptr ? otherwise : Acc(static_cast<const channel_t<T>*>(values)[c]);
    };
    for (int64_t c = 0; c < channels; ++c) {
      mean[c] = static_cast<Acc>(bn.mean[c]);
      rest[c] = static_cast<Acc>(bn.mean[c] - mean[c]);
      inverse_std[c] = static_cast<Acc>(1 / std::sqrt(bn.var[c] + bn.eps));
      scale[c] = read(bn.weight, c, 1) * inverse_std[c];
      bias[c] = read(bn.bias, c, 0) - rest[c] * scale[c];
    }
  }
};

// Sum of term(buffer[i]) in double; fixed lanes, so that it vectorises and never depends on the
// machine.
template <typename Acc, typename Term>
double sum(const Acc* buffer, int64_t n, const Term& term) {
  constexpr int kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += term(buffer[i + j]);
  }
  for (int j = 0; i < n; ++i, ++j) lanes[j] += term(buffer[i]);
  double total = 0;
  for (const double lane : lanes) total += lane;
  return total;
}

// The backward pass calls the same function to know where the ReLU was open, so both must round
// alike: this code is compiled without contraction to fused multiply-adds.
template <typename Acc>
Acc normalise(Acc x, Acc mean, Acc scale, Acc bias) {
  return (x - mean) * scale + bias;
}

// NaN passes, as in torch.relu.
template <typename Acc>
Acc relu(Acc value) {
  return value < Acc(0) ? Acc(0) : value;
}

// Where torch's ReLU lets the gradient through: decided on the rounded output.
template <typename T, typename Acc>
bool relu_is_open(Acc value) {
  return !(static_cast<Acc>(static_cast<T>(value)) <= Acc(0));
}

}  // namespace efficient_densenet::cpu
