// The inner loops of the CPU kernels, compiled once per instruction set (loops_impl.h), and the
// choice between them at run time. They see matrices: each column has numbers of its own (those of
// a channel), and whatever is summed is summed down the columns, row after row, so results do not
// depend on the width of a vector. Everything around them (threads, layouts) is compiled once.
//
// Only plain structs cross this border: a function template or an inline function that both sides
// instantiate would be one symbol for the linker, which might keep the copy with AVX-512 in it.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

// Elsewhere the compiler's own target (NEON on aarch64, -march) is all there is.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EFFICIENT_DENSENET_X86_LEVELS 1
#endif

namespace efficient_densenet::cpu {

// Arithmetic on single elements; sums over rows are always double.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Shape {
  int64_t rows, columns;
};

template <typename T>
struct Matrix {
  T* data;
  int64_t row_stride, column_stride;
};

// Of y = relu((x - mean) * scale + bias), for each column.
template <typename T>
struct NormPointers {
  const acc_t<T>*mean, *scale, *bias;
};

enum class Write { kNothing, kAssign, kAdd };

// Pixels of a pooling window, or windows of a pixel, as offsets of elements from one of them. For
// max pooling, the place of the pixel in the window.
struct PoolingWindow {
  int64_t offsets[27];
  uint8_t places[27];
  int size;

  void add(int64_t offset, int place) {
    offsets[size] = offset;
    places[size++] = static_cast<uint8_t>(place);
  }
};

template <typename T>
struct Loops {
  // Adds x - pivot and its square to the sums; copies x where copy has data.
  void (*moments)(Shape, Matrix<const T> x, Matrix<T> copy, const double* pivot, double* sum,
                  double* sum_of_squares);
  void (*normalise)(Shape, Matrix<const T> x, Matrix<T> y, NormPointers<T>);
  // With dz = grad_y where the ReLU was open: writes factor * dz to g, adds dz and dz * (x - mean)
  // to the sums.
  void (*accumulate)(Shape, Matrix<const T> x, Matrix<const T> grad_y, Matrix<acc_t<T>> g, Write,
                     NormPointers<T>, const acc_t<T>* factor, double* dz, double* dz_centred);
  // grad_x = scale * dz - offset - (x - mean) * slope; grad_y may be the memory of grad_x. Without
  // a slope, scale * dz: x may be infinite where the ReLU is closed.
  void (*gradient)(Shape, Matrix<const T> x, Matrix<const T> grad_y, Matrix<T> grad_x,
                   NormPointers<T>, const acc_t<T>* offset, const acc_t<T>* slope);
  // grad_x = g - (offset + ((x - mean) * slope + offset_residual)): g meets a number that differs
  // in every row
  void (*apply_bn_correction)(Shape, Matrix<const T> x, Matrix<const acc_t<T>> g, Matrix<T> grad_x,
                              const acc_t<T>* mean, const acc_t<T>* offset,
                              const acc_t<T>* offset_residual, const acc_t<T>* slope);
  // Adds relu(normalise(x)) to the sums.
  void (*activations)(Shape, Matrix<const T> x, NormPointers<T>, double* sum);
  // y = mean of relu(normalise(x)) over a window
  void (*pool)(Shape, Matrix<const T> x, const PoolingWindow&, Matrix<T> y, NormPointers<T>);
  // y = maximum of relu(normalise(x)) over a window, and the place of the first pixel that has it
  void (*max_pool)(Shape, Matrix<const T> x, const PoolingWindow&, Matrix<T> y,
                   Matrix<uint8_t> winners, NormPointers<T>);
  // grad_x = sum of grad_y over the windows of a pixel that it won
  void (*unpool)(Shape, Matrix<const T> grad_y, Matrix<const uint8_t> winners, const PoolingWindow&,
                 Matrix<T> grad_x);
};

struct AllLoops {
  Loops<double> of_double;
  Loops<float> of_float;
  Loops<c10::Half> of_half;
  Loops<c10::BFloat16> of_bfloat16;
};

extern const AllLoops kBaselineLoops, kAvx2Loops, kAvx512Loops;

// Those of the best instruction set that this machine has and ATEN_CPU_CAPABILITY, torch's own
// setting (default, avx2, avx512), allows.
const AllLoops& all_loops();

template <typename T>
const Loops<T>& loops() {
  const AllLoops& all = all_loops();
  if constexpr (std::is_same_v<T, double>) {
    return all.of_double;
  } else if constexpr (std::is_same_v<T, float>) {
    return all.of_float;
  } else if constexpr (std::is_same_v<T, c10::Half>) {
    return all.of_half;
  } else {
    return all.of_bfloat16;
  }
}

}  // namespace efficient_densenet::cpu
