// The kernels of a dense block: formulas in dense_block/kernels.h.
//
// Tiling: rows.h, channels inner. With pooling, the pixels of a line (the last dimension) that have
// the same place in their windows form a matrix: every second row of the line. Its parents, one
// each, are a line of the pooled tensor. Of averages of whole images, threads share the images and
// columns forward, and the rows backward, where all rows of an image have one parent.
// Bytes, per element of x:
//   accumulate  x and grad_y read once, G read (but by the first reader) and written once
//   apply_bn_correction    x and G read once, grad_x written once
//   pool        x read once, y written once
// Limit: memory bandwidth. Where a chunk of rows fits the L2 cache, grad_y comes from there.
#include "cpu/correction.h"
#include "dense_block/kernels.h"

namespace efficient_densenet::cpu {
namespace {

// Lines of pixels: image after image, all but the last dimension counted through. These take a line
// of the pixels to the line of the pooled tensor that it is pooled into, or to -1, ...
int64_t parent_line(const Pooling& pooling, int64_t line) {
  int64_t parent = 0, step = 1;
  for (int d = pooling.dims - 2; d >= 0; --d) {
    const int64_t size = pooling.sizes[d], pooled = size / 2, i = line % size;
    if (i / 2 >= pooled) return -1;
    parent += i / 2 * step;
    step *= pooled;
    line /= size;
  }
  return parent + line * step;
}

// ... and back to the first such line.
int64_t first_child_line(const Pooling& pooling, int64_t parent) {
  int64_t line = 0, step = 1;
  for (int d = pooling.dims - 2; d >= 0; --d) {
    const int64_t size = pooling.sizes[d], pooled = size / 2;
    line += 2 * (parent % pooled) * step;
    step *= size;
    parent /= pooled;
  }
  return line + parent * step;
}

int64_t line_width(const Pooling& pooling) { return pooling.sizes[pooling.dims - 1]; }

// Rows first, first + step, ... of a view of a dense block.
template <typename T>
Matrix<T> matrix(const View& view, int64_t first, int64_t step = 1) {
  const int64_t stride = view.row_strides[0];
  return {static_cast<T*>(view.data) + first * stride, step * stride, view.channel_stride};
}

template <typename T>
void fill_with_zeros(const Matrix<T>& matrix, const Shape& shape) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    std::fill_n(matrix.data + r * matrix.row_stride, shape.columns, T(0));
  }
}

template <typename T>
std::vector<double> accumulate(const KernelArgs& args, const NormCoefficients<T>& channels,
                               const NormGradArgs& norm_grad) {
  const TileWalk walk(args);
  const Write mode = norm_grad.first_reader ? Write::kAssign : Write::kAdd;
  return walk.sums([&](const Tile& tile, double* dz, double* dz_centred) {
    loops<T>().accumulate(tile.shape, walk.of_feature<const T>(tile.feature.x, tile),
                          walk.of_all<const T>(norm_grad.grad_y, tile),
                          walk.of_all<acc_t<T>>(norm_grad.grad_features, tile), mode,
                          channels.at(tile.column), &channels.scale[tile.column], dz, dz_centred);
  });
}

// The mean over a window hands each of its pixels an equal share of the gradient. Shares are powers
// of two, so they may be taken from the scale and from the sums.
template <typename T>
std::vector<double> accumulate_pooled(const KernelArgs& args, const NormCoefficients<T>& channels,
                                      const NormGradArgs& norm_grad) {
  const Pooling& pooling = *norm_grad.pooling;
  const Write mode = norm_grad.first_reader ? Write::kAssign : Write::kAdd;
  const int64_t width = line_width(pooling), pooled_width = width / 2;
  const double share = std::ldexp(1.0, -pooling.dims);
  std::vector<acc_t<T>> factor(channels.scale);
  for (acc_t<T>& value : factor) value *= static_cast<acc_t<T>>(share);

  const auto line_sums = [&](int64_t line, double* sums) {
    const int64_t parent = parent_line(pooling, line);
    const int64_t covered = parent < 0 ? 0 : 2 * pooled_width;
    for (int64_t place = 0; place < 2 && covered > 0; ++place) {
      const int64_t first = line * width + place;
      loops<T>().accumulate({pooled_width, args.channels},
                            matrix<const T>(args.features[0].x, first, 2),
                            matrix<const T>(norm_grad.grad_y, parent * pooled_width),
                            matrix<acc_t<T>>(norm_grad.grad_features, first, 2), mode,
                            channels.at(0), factor.data(), sums, sums + args.channels);
    }
    if (norm_grad.first_reader) {
      fill_with_zeros(matrix<acc_t<T>>(norm_grad.grad_features, line * width + covered),
                      {width - covered, args.channels});
    }
  };
  std::vector<double> sums = sums_in_parallel(args.channels, args.rows.count / width,
                                              std::max<int64_t>(1, kChunkRows / width),
                                              [&](int64_t begin, int64_t end, double* sums) {
                                                for (int64_t line = begin; line < end; ++line)
                                                  line_sums(line, sums);
                                              });
  for (double& sum : sums) sum *= share;
  return sums;
}

// The same for the mean over an image: a line of grad_y that all of its rows read.
template <typename T>
std::vector<double> accumulate_averaged(const KernelArgs& args, const NormCoefficients<T>& channels,
                                        const NormGradArgs& norm_grad) {
  const int64_t pixels = norm_grad.pooling->window;
  const Write mode = norm_grad.first_reader ? Write::kAssign : Write::kAdd;
  const double share = 1 / static_cast<double>(pixels);
  std::vector<acc_t<T>> factor(channels.scale);
  for (acc_t<T>& value : factor) value *= static_cast<acc_t<T>>(share);

  const auto chunk = [&](int64_t begin, int64_t end, double* sums) {
    while (begin < end) {
      const int64_t image = begin / pixels, stop = std::min(end, (image + 1) * pixels);
      loops<T>().accumulate({stop - begin, args.channels},
                            matrix<const T>(args.features[0].x, begin),
                            matrix<const T>(norm_grad.grad_y, image, 0),
                            matrix<acc_t<T>>(norm_grad.grad_features, begin), mode, channels.at(0),
                            factor.data(), sums, sums + args.channels);
      begin = stop;
    }
  };
  std::vector<double> sums = sums_in_parallel(args.channels, args.rows.count, kChunkRows, chunk);
  for (double& sum : sums) sum *= share;
  return sums;
}

template <typename T>
std::vector<double> accumulate_any(const KernelArgs& args, const NormCoefficients<T>& channels,
                                   const NormGradArgs& norm_grad) {
  if (norm_grad.pooling == nullptr) return accumulate(args, channels, norm_grad);
  if (norm_grad.pooling->of_images()) return accumulate_averaged(args, channels, norm_grad);
  return accumulate_pooled(args, channels, norm_grad);
}

// y = mean of relu(bn(x)) over each image
template <typename T>
void average_images(const KernelArgs& args, const NormCoefficients<T>& channels,
                    const Pooling& pooling, const View& y) {
  constexpr int64_t kColumns = 64;  // of an item of work
  const int64_t pixels = pooling.window, columns = args.channels;
  const int64_t parts = (columns + kColumns - 1) / kColumns;
  in_parallel(pooling.images * parts, pixels * kColumns, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / parts, column = item % parts * kColumns;
      const int64_t count = std::min(kColumns, columns - column);
      double sums[kColumns] = {};
      Matrix<const T> x = matrix<const T>(args.features[0].x, image * pixels);
      x.data += column;
      loops<T>().activations({pixels, count}, x, channels.at(column), sums);
      T* const to = matrix<T>(y, image).data + column;
      for (int64_t c = 0; c < count; ++c) {
        to[c] = static_cast<T>(static_cast<acc_t<T>>(sums[c] / static_cast<double>(pixels)));
      }
    }
  });
}

}  // namespace

void accumulate_norm_grad(const KernelArgs& args, const BatchNorm& bn,
                          const NormGradArgs& norm_grad) {
  dispatch(args.element, [&](auto element) {
    using T = decltype(element);
    const NormCoefficients<T> channels(bn, args.channels, TileWalk(args).repeat());
    const std::vector<double> sums = accumulate_any(args, channels, norm_grad);
    for (size_t i = 0; i < sums.size(); ++i) {
      norm_grad.sums[i] = (norm_grad.first_chunk ? 0 : norm_grad.sums[i]) + sums[i];
    }
    if (!norm_grad.last_chunk) return;
    finish_sums(channels, norm_grad.sums, norm_grad.grad_weight, norm_grad.grad_bias,
                norm_grad.batch_statistics, norm_grad.first_reader, norm_grad.correction);
  });
}

void apply_bn_correction(const KernelArgs& args, const View& grad_features, const double* mean,
                         const Correction& correction) {
  dispatch(args.element, [&](auto element) {
    using T = decltype(element);
    using Acc = acc_t<T>;
    const TileWalk walk(args);
    std::vector<Acc> rounded(args.channels * walk.repeat());
    std::vector<double> mean_residual(args.channels);
    for (int64_t c = 0; c < args.channels; ++c) {
      mean_residual[c] = mean[c] - static_cast<Acc>(mean[c]);
      std::fill_n(&rounded[c * walk.repeat()], walk.repeat(), static_cast<Acc>(mean[c]));
    }
    const BatchTerm<T> term(correction, mean_residual, args.rows.count, walk.repeat());
    walk.for_each_tile([&](const Tile& tile) {
      loops<T>().apply_bn_correction(tile.shape, walk.of_feature<const T>(tile.feature.x, tile),
                                     walk.of_all<const Acc>(grad_features, tile),
                                     walk.of_feature<T>(tile.feature.grad_x, tile),
                                     &rounded[tile.column], &term.offset[tile.column],
                                     &term.offset_residual[tile.column], &term.slope[tile.column]);
    });
  });
}

void average_pool(const KernelArgs& args, const BatchNorm& bn, const Pooling& pooling,
                  const View& y) {
  dispatch(args.element, [&](auto element) {
    using T = decltype(element);
    const NormCoefficients<T> channels(bn, args.channels, 1);
    if (pooling.of_images()) return average_images(args, channels, pooling, y);
    const View& x = args.features[0].x;
    const int64_t width = line_width(pooling), pooled_width = width / 2;

    // Corner `i` of a window is one pixel further in the dimensions whose bits are set in `i`.
    PoolingWindow window{};
    window.size = 1 << pooling.dims;
    int64_t pooled_lines = pooling.images, stride = x.row_strides[0];
    for (int d = pooling.dims - 1, bit = 1; d >= 0; --d, bit *= 2) {
      for (int i = 0; i < bit; ++i) window.offsets[bit + i] = window.offsets[i] + stride;
      stride *= pooling.sizes[d];
      if (d < pooling.dims - 1) pooled_lines *= pooling.sizes[d] / 2;
    }
    in_parallel(pooled_lines, width * args.channels, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) {
        loops<T>().pool({pooled_width, args.channels},
                        matrix<const T>(x, first_child_line(pooling, line) * width, 2), window,
                        matrix<T>(y, line * pooled_width), channels.at(0));
      }
    });
  });
}

}  // namespace efficient_densenet::cpu
