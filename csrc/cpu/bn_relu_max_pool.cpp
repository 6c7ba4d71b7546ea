// y = max_pool(relu(bn(x))) and its gradients; windows and winners: ../bn_relu_max_pool.h.
//
// Tiling: the windows of a line (the last dimension) that have the same places inside the image, or
// the pixels of a line that lie in windows alike, are the rows of a matrix: the first one, the last
// one, and all between. Threads share the lines.
// Backward: each pixel gathers, from the at most 2^dims windows that it lies in, what it won. That
// fills grad_x, from which concat_bn_relu_backward goes on in place.
// Bytes: forward reads x once and writes y and the winners, 1 + 1 / s bytes per 2^dims elements of
// x of s bytes each. Backward reads grad_y and the winners, writes grad_x, and then moves as much
// as concat_bn_relu_backward: to gather twice instead would save a write and a read of the size of
// x where that is larger than the cache, and cost sums and gradients of its own. Limit: forward,
// the arithmetic of the 3^dims places; backward, memory bandwidth.
#include "../bn_relu_max_pool.h"

#include "rows.h"

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

// The places of a window that are inside the image, from pixel 2 o.
Window places_of(const Position& window, const RowSpace& rows, const View& x) {
  Window found{};
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
Window windows_of(const Position& pixel, const RowSpace& pooled, const View& y) {
  Window found{};
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

template <typename Body>
void for_each_line(const RowSpace& rows, int64_t channels, const Body& body) {
  const int64_t width = rows.sizes[kMaxRowDims - 1];
  in_parallel(rows.count / width, width * channels, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) body(line_at(line, rows));
  });
}

// What the windows send to each pixel: the gradient of the normalised rows.
template <typename T>
void unpool(const Problem& problem, const Pooled& pooled, const View& grad_x) {
  const RowSpace pooled_space = pooled_rows(problem.rows);
  const int64_t width = problem.rows.sizes[kMaxRowDims - 1];
  for_each_line(problem.rows, problem.channels, [&](Position pixel) {
    for (int64_t parity = 0; parity < 2; ++parity) {
      for_each_stretch((width + 1 - parity) / 2, [&](int64_t begin, int64_t end) {
        pixel.index[2] = 2 * begin + parity;
        const Position window{pixel.image,
                              {pixel.index[0] / 2, pixel.index[1] / 2, pixel.index[2] / 2}};
        loops<T>().unpool({end - begin, problem.channels}, along_line<const T>(pooled.y, window, 1),
                          along_line<const uint8_t>(pooled.winners, window, 1),
                          windows_of(pixel, pooled_space, pooled.y),
                          along_line<T>(grad_x, pixel, 2));
      });
    }
  });
}

}  // namespace

void bn_relu_max_pool(const Problem& problem, const BatchNorm& bn, const Pooled& pooled) {
  dispatch(problem.element, [&](auto element) {
    using T = decltype(element);
    const Channels<T> channels(bn, problem.channels, 1);
    const View& x = problem.features[0].x;
    const RowSpace windows = pooled_rows(problem.rows);
    for_each_line(windows, problem.channels, [&](Position window) {
      for_each_stretch(windows.sizes[kMaxRowDims - 1], [&](int64_t begin, int64_t end) {
        window.index[2] = begin;
        const Position pixel{window.image,
                             {2 * window.index[0], 2 * window.index[1], 2 * window.index[2]}};
        Matrix<uint8_t> winners{};
        if (pooled.winners.data != nullptr) {
          winners = along_line<uint8_t>(pooled.winners, window, 1);
        }
        loops<T>().max_pool({end - begin, problem.channels}, along_line<const T>(x, pixel, 2),
                            places_of(window, problem.rows, x), along_line<T>(pooled.y, window, 1),
                            winners, channels.at(0));
      });
    });
  });
}

void bn_relu_max_pool_backward(const Problem& problem, const BatchNorm& bn, const Pooled& pooled,
                               const Gradients& gradients) {
  const View& grad_x = problem.features[0].grad_x;
  dispatch(problem.element,
           [&](auto element) { unpool<decltype(element)>(problem, pooled, grad_x); });
  Gradients of_pixels = gradients;
  of_pixels.grad_y = grad_x;
  concat_bn_relu_backward(problem, bn, of_pixels);
}

}  // namespace efficient_densenet::cpu
