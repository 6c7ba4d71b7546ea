// y = max_pool(relu(bn(x))) and its gradients; windows and winners: ../bn_relu_max_pool.h.
//
// Tiling: the windows of a line (the last dimension) that have the same places inside the image, or
// the pixels of a line that lie in windows alike, are the rows of a matrix: the first one, the last
// one, and all between. NormCoefficients are its columns; where they are not next to each other,
// lines are copied to scratch in which they are, and back. Threads share the lines. Backward: each
// pixel gathers, from the at most 2^dims windows that it lies in, what it won. That fills grad_x,
// from which concat_bn_relu_backward goes on in place. Bytes: forward reads x once and writes y and
// the winners, 1 + 1 / s bytes per 2^dims elements of x of s bytes each. Backward reads grad_y and
// the winners, writes grad_x, and then moves as much as concat_bn_relu_backward: to gather twice
// instead would save a write and a read of the size of x where that is larger than the cache, and
// cost sums and gradients of its own. Limit: forward, the arithmetic of the 3^dims places;
// backward, memory bandwidth.
#include "operators/bn_relu_max_pool.h"

#include "cpu/rows.h"

namespace efficient_densenet::cpu {
namespace {

// A pixel or window: image, and index in each spatial dimension.
struct Position {
  int64_t image, index[kMaxRowDims - 1];
};

Position line_at(int64_t line, const RowSpace& rows) {
  const int64_t h = line % rows.sizes[2], plane = line / rows.sizes[2];
  return {plane / rows.sizes[1], {plane % rows.sizes[1], h, 0}};
}

// From that position on, every step-th of the line.
template <typename T>
Matrix<T> along_line(const View& view, const Position& position, int64_t step) {
  int64_t offset = position.image * view.row_strides[0];
  for (int d = 1; d < kMaxRowDims; ++d) offset += position.index[d - 1] * view.row_strides[d];
  return {static_cast<T*>(view.data) + offset, step * view.row_strides[kMaxRowDims - 1],
          view.channel_stride};
}

template <typename From, typename To>
void copy(const Shape& shape, const Matrix<From>& from, const Matrix<To>& to) {
  for (int64_t c = 0; c < shape.columns; ++c) {
    for (int64_t r = 0; r < shape.rows; ++r) {
      to.data[r * to.row_stride + c * to.column_stride] =
          from.data[r * from.row_stride + c * from.column_stride];
    }
  }
}

// side x side neighbouring lines of a tensor, with channels next to each other: where they are, or
// copied to scratch.
template <typename T>
class Patch {
 public:
  Patch(const View& view, const RowSpace& rows, int64_t channels, int side)
      : view_(view), rows_(rows), shape_{rows.sizes[kMaxRowDims - 1], channels}, side_(side) {
    if (view.channel_stride != 1) scratch_.resize(side * side * shape_.rows * channels);
  }

  // From line (d, h) on, which may be outside of the image; so are some of its neighbours.
  View from_line(int64_t image, int64_t d, int64_t h) {
    if (scratch_.empty()) {
      View patch = view_;
      patch.data = along_line<T>(view_, {image, {d, h, 0}}, 1).data;
      return patch;
    }
    const int64_t line = shape_.rows * shape_.columns;
    const View patch{scratch_.data(), 1, {0, side_ * line, line, shape_.columns}};
    for (int64_t i = 0; i < side_ * side_; ++i) {
      const Position at{image, {d + i / side_, h + i % side_, 0}};
      if (!is_inside(at.index[0], 1) || !is_inside(at.index[1], 2)) continue;
      copy(shape_, along_line<T>(view_, at, 1),
           along_line<T>(patch, {0, {i / side_, i % side_, 0}}, 1));
    }
    return patch;
  }

 private:
  bool is_inside(int64_t index, int dim) const { return index >= 0 && index < rows_.sizes[dim]; }

  const View& view_;
  const RowSpace& rows_;
  Shape shape_;
  int64_t side_;
  std::vector<T> scratch_;
};

// A line to write to, with channels next to each other: itself, or scratch that `finish` copies. Of
// a tensor without memory, scratch.
template <typename T>
class Line {
 public:
  Line(const View& view, const Position& position, const Shape& shape, std::vector<T>* scratch)
      : to_(view.data == nullptr ? Matrix<T>{} : along_line<T>(view, position, 1)),
        shape_(shape),
        inner_(to_) {
    if (to_.data != nullptr && view.channel_stride == 1) return;
    scratch->resize(shape.rows * shape.columns);
    inner_ = {scratch->data(), shape.columns, 1};
  }

  // Rows first, first + step, ...
  Matrix<T> from(int64_t first, int64_t step) const {
    return {inner_.data + first * inner_.row_stride, step * inner_.row_stride, 1};
  }

  void finish() const {
    if (to_.data != nullptr && inner_.data != to_.data) copy(shape_, inner_, to_);
  }

 private:
  Matrix<T> to_;
  Shape shape_;
  Matrix<T> inner_;
};

// The places of a window that are inside the image, from pixel 2 o.
PoolingWindow places_of(const Position& window, const RowSpace& rows, const View& x) {
  PoolingWindow found{};
  for (int i = 0; i < kPlaces * kPlaces * kPlaces; ++i) {
    const int places[] = {i / (kPlaces * kPlaces), i / kPlaces % kPlaces, i % kPlaces};
    int64_t offset = 0;
    bool inside = true;
    for (int d = 0; d < kMaxRowDims - 1; ++d) {
      const int64_t pixel = pixel_at(window.index[d], places[d]);
      inside = inside && pixel >= 0 && pixel < rows.sizes[d + 1];
      offset += (places[d] - 1) * x.row_strides[d + 1];
    }
    if (inside) found.add(offset, joint_place(places[0], places[1], places[2]));
  }
  return found;
}

// The windows that a pixel lies in, from window o, and the place that it has in each.
PoolingWindow windows_of(const Position& pixel, const RowSpace& pooled, const View& y) {
  PoolingWindow found{};
  for (int i = 0; i < 1 << (kMaxRowDims - 1); ++i) {
    const int nexts[] = {i >> 2, i >> 1 & 1, i & 1};
    int places[kMaxRowDims - 1];
    int64_t offset = 0;
    bool inside = true;
    for (int d = 0; d < kMaxRowDims - 1; ++d) {
      const int parity = static_cast<int>(pixel.index[d] % 2);
      places[d] = place_in(parity, nexts[d]);
      inside = inside && nexts[d] <= parity && pixel.index[d] / 2 + nexts[d] < pooled.sizes[d + 1];
      offset += nexts[d] * y.row_strides[d + 1];
    }
    if (inside) found.add(offset, joint_place(places[0], places[1], places[2]));
  }
  return found;
}

// Calls body(begin, end) for stretches within which all but the first and the last are alike.
template <typename Body>
void for_each_stretch(int64_t count, const Body& body) {
  if (count > 0) body(0, 1);
  if (count > 2) body(1, count - 1);
  if (count > 1) body(count - 1, count);
}

// Calls body(begin, end) for shares of the lines, in parallel.
template <typename Body>
void in_parallel_lines(const RowSpace& rows, int64_t channels, const Body& body) {
  const int64_t width = rows.sizes[kMaxRowDims - 1];
  in_parallel(rows.count / width, width * channels, body);
}

template <typename T>
void pool_lines(const KernelArgs& args, const NormCoefficients<T>& channels, const Pooled& pooled,
                int64_t begin, int64_t end) {
  const RowSpace windows = pooled_rows(args.rows);
  const Shape shape{windows.sizes[kMaxRowDims - 1], args.channels};
  Patch<T> x(args.features[0].x, args.rows, args.channels, kPlaces);
  std::vector<T> y_scratch;
  std::vector<uint8_t> winners_scratch;
  for (int64_t line = begin; line < end; ++line) {
    Position window = line_at(line, windows);
    const int64_t d = 2 * window.index[0], h = 2 * window.index[1];
    const View patch = x.from_line(window.image, d - 1, h - 1);
    const Line<T> y(pooled.y, window, shape, &y_scratch);
    const Line<uint8_t> winners(pooled.winners, window, shape, &winners_scratch);
    for_each_stretch(shape.rows, [&](int64_t first, int64_t last) {
      window.index[2] = first;
      loops<T>().max_pool({last - first, shape.columns},
                          along_line<const T>(patch, {0, {1, 1, 2 * first}}, 2),
                          places_of(window, args.rows, patch), y.from(first, 1),
                          winners.from(first, 1), channels.at(0));
    });
    y.finish();
    winners.finish();
  }
}

// What the windows send to each pixel: the gradient of the normalised rows.
template <typename T>
void unpool_lines(const KernelArgs& args, const Pooled& pooled, const View& grad_x, int64_t begin,
                  int64_t end) {
  const RowSpace windows = pooled_rows(args.rows);
  const Shape shape{args.rows.sizes[kMaxRowDims - 1], args.channels};
  Patch<T> grad_y(pooled.y, windows, args.channels, 2);
  Patch<uint8_t> winners(pooled.winners, windows, args.channels, 2);
  std::vector<T> scratch;
  for (int64_t line = begin; line < end; ++line) {
    Position pixel = line_at(line, args.rows);
    const int64_t d = pixel.index[0] / 2, h = pixel.index[1] / 2;
    const View grad_patch = grad_y.from_line(pixel.image, d, h);
    const View winners_patch = winners.from_line(pixel.image, d, h);
    const Line<T> to(grad_x, pixel, shape, &scratch);
    for (int64_t parity = 0; parity < 2; ++parity) {
      for_each_stretch((shape.rows + 1 - parity) / 2, [&](int64_t first, int64_t last) {
        pixel.index[2] = 2 * first + parity;
        loops<T>().unpool({last - first, shape.columns},
                          along_line<const T>(grad_patch, {0, {0, 0, first}}, 1),
                          along_line<const uint8_t>(winners_patch, {0, {0, 0, first}}, 1),
                          windows_of(pixel, windows, grad_patch), to.from(pixel.index[2], 2));
      });
    }
    to.finish();
  }
}

}  // namespace

void bn_relu_max_pool(const KernelArgs& args, const BatchNorm& bn, const Pooled& pooled) {
  dispatch(args.element, [&](auto element) {
    using T = decltype(element);
    const NormCoefficients<T> channels(bn, args.channels, 1);
    in_parallel_lines(pooled_rows(args.rows), args.channels, [&](int64_t begin, int64_t end) {
      pool_lines(args, channels, pooled, begin, end);
    });
  });
}

void bn_relu_max_pool_backward(const KernelArgs& args, const BatchNorm& bn, const Pooled& pooled,
                               const Gradients& gradients) {
  const View& grad_x = args.features[0].grad_x;
  dispatch(args.element, [&](auto element) {
    using T = decltype(element);
    in_parallel_lines(args.rows, args.channels, [&](int64_t begin, int64_t end) {
      unpool_lines<T>(args, pooled, grad_x, begin, end);
    });
  });
  Gradients of_pixels = gradients;
  of_pixels.grad_y = grad_x;
  concat_bn_relu_backward(args, bn, of_pixels);
}

}  // namespace efficient_densenet::cpu
