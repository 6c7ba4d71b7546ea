// The bodies of the loops of loops.h, included by one source file per instruction set. All is in
// an unnamed namespace and nothing of std:: is called, see loops.h.
//
// Vectors are those of the compiler (GCC's vector extensions, which clang shares), as wide as the
// instruction set has them, and narrower for the last columns. A panel of some rows is walked strip
// by strip: a strip's numbers and sums stay in registers for its rows, and the panel in the L1
// cache for its strips.
//
// Multiply and add are never fused (-ffp-contract=off): forward and backward pass, and all
// instruction sets, round alike.
#include "cpu/loops.h"

namespace efficient_densenet::cpu {
namespace {

#define EFFICIENT_DENSENET_INLINE inline __attribute__((always_inline))

#ifndef EFFICIENT_DENSENET_VECTOR_BYTES
#define EFFICIENT_DENSENET_VECTOR_BYTES 16
#endif
constexpr int kVectorBytes = EFFICIENT_DENSENET_VECTOR_BYTES;
constexpr int64_t kPanelRows = 16;

template <typename Real, int W>
struct VectorOf {
  typedef Real type __attribute__((vector_size(sizeof(Real) * W)));
};
template <typename Real, int W>
using Vector = typename VectorOf<Real, W>::type;

// Lanes of loops whose arithmetic is all in acc_t, and of those that also sum in double.
template <typename T>
constexpr int kWide = kVectorBytes / sizeof(acc_t<T>);
constexpr int kSumming = kVectorBytes / sizeof(double);

template <typename V, typename T>
EFFICIENT_DENSENET_INLINE V read(const T* from) {
  V vector;
  __builtin_memcpy(&vector, from, sizeof(V));
  return vector;
}

template <int W>
EFFICIENT_DENSENET_INLINE Vector<double, W> load(const double* from) {
  return read<Vector<double, W>>(from);
}

template <int W>
EFFICIENT_DENSENET_INLINE Vector<float, W> load(const float* from) {
  return read<Vector<float, W>>(from);
}

template <int W>
EFFICIENT_DENSENET_INLINE Vector<uint32_t, W> load_bits(const void* from) {
  return __builtin_convertvector(read<Vector<uint16_t, W>>(from), Vector<uint32_t, W>);
}

template <int W>
EFFICIENT_DENSENET_INLINE Vector<float, W> load(const c10::BFloat16* from) {
  return (Vector<float, W>)(load_bits<W>(from) << 16);
}

template <int W>
EFFICIENT_DENSENET_INLINE Vector<float, W> load(const c10::Half* from) {
  using Bits = Vector<uint32_t, W>;
  const Bits bits = load_bits<W>(from);
  const Bits magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  // Multiplying moves the exponent, and normalises the numbers that half has as denormal.
  const Bits finite = (Bits)((Vector<float, W>)magnitude * 0x1p112f);
  const Bits infinite = magnitude | 0x7f800000;
  return (Vector<float, W>)(sign | ((bits & 0x7c00) == 0x7c00 ? infinite : finite));
}

template <int W>
EFFICIENT_DENSENET_INLINE Vector<double, W> to_double(const Vector<double, W>& values) {
  return values;
}

template <int W>
EFFICIENT_DENSENET_INLINE Vector<double, W> to_double(const Vector<float, W>& values) {
  // What the instruction set converts at once, GCC 12 would take apart and convert in halves.
#if EFFICIENT_DENSENET_VECTOR_BYTES >= 32
  if constexpr (W == 4) return (Vector<double, W>)_mm256_cvtps_pd((__m128)values);
#endif
#if EFFICIENT_DENSENET_VECTOR_BYTES >= 64
  if constexpr (W == 8) return (Vector<double, W>)_mm512_maskz_cvtps_pd(0xff, (__m256)values);
#endif
  return __builtin_convertvector(values, Vector<double, W>);
}

template <typename V, typename T>
EFFICIENT_DENSENET_INLINE void write(T* to, const V& vector) {
  __builtin_memcpy(to, &vector, sizeof(V));
}

template <int W>
EFFICIENT_DENSENET_INLINE void store(double* to, const Vector<double, W>& values) {
  write(to, values);
}

template <int W>
EFFICIENT_DENSENET_INLINE void store(float* to, const Vector<float, W>& values) {
  write(to, values);
}

// Both round to nearest even, as torch does.
template <int W>
EFFICIENT_DENSENET_INLINE void store(c10::BFloat16* to, const Vector<float, W>& values) {
  using Bits = Vector<uint32_t, W>;
  const Bits bits = (Bits)values, nan = Bits{} + 0x7fc0;
  const Bits rounded = (bits + (0x7fff + ((bits >> 16) & 1))) >> 16;
  write(to, __builtin_convertvector(values != values ? nan : rounded, Vector<uint16_t, W>));
}

template <int W>
EFFICIENT_DENSENET_INLINE void store(c10::Half* to, const Vector<float, W>& values) {
  using Bits = Vector<uint32_t, W>;
  using Floats = Vector<float, W>;
  const Bits bits = (Bits)values, nan = Bits{} + 0x7e00, smallest = Bits{} + 0x38800000;
  const Bits sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Adding a power of two some digits above the value leaves the digits of half at the end of the
  // sum, rounded; the first product makes infinity of what half cannot hold.
  const Bits exponent = magnitude & 0x7f800000;
  const Floats above = (Floats)((exponent < smallest ? smallest : exponent) + 0x07800000);
  const Bits sum = (Bits)(above + (Floats)magnitude * 0x1p112f * 0x1p-110f);
  const Bits rounded = ((sum >> 13) & 0x7c00) + (sum & 0xfff);
  write(to, __builtin_convertvector(sign | (Bits)(values != values ? nan : rounded),
                                    Vector<uint16_t, W>));
}

template <typename T>
EFFICIENT_DENSENET_INLINE T* at(const Matrix<T>& matrix, int64_t row, int64_t column) {
  return matrix.data + row * matrix.row_stride + column * matrix.column_stride;
}

template <typename V, typename NormPointers>
EFFICIENT_DENSENET_INLINE V normalise(const V& x, const NormPointers& numbers) {
  return (x - numbers.mean) * numbers.scale + numbers.bias;
}

// The numbers of a strip.
template <typename T, int W>
struct Strip {
  Vector<acc_t<T>, W> mean, scale, bias;
};

template <int W, typename T>
EFFICIENT_DENSENET_INLINE Strip<T, W> load_strip(const NormPointers<T>& numbers, int64_t column) {
  return {load<W>(numbers.mean + column), load<W>(numbers.scale + column),
          load<W>(numbers.bias + column)};
}

// NaN passes, as in torch.relu.
template <typename V>
EFFICIENT_DENSENET_INLINE V relu(const V& value) {
  return value < V{} ? V{} : value;
}

// The gradient where torch's ReLU lets it through: decided on the output, so a value that a 16-bit
// type rounds to 0 (half its smallest number, at most) does not count as positive. NaN passes.
template <typename T, typename V>
EFFICIENT_DENSENET_INLINE V masked(const V& value, const V& grad_y) {
  constexpr acc_t<T> kRoundsToZero = std::is_same_v<T, c10::Half>       ? 0x1p-25f
                                     : std::is_same_v<T, c10::BFloat16> ? 0x1p-134f
                                                                        : 0;
  return value <= kRoundsToZero ? V{} : grad_y;
}

template <int W, typename Body>
EFFICIENT_DENSENET_INLINE void for_each_strip(int64_t column, int64_t columns, const Body& body) {
  for (; column + W <= columns; column += W) body(std::integral_constant<int, W>{}, column);
  if constexpr (W > 1) for_each_strip<W / 2>(column, columns, body);
}

template <typename... Matrices>
EFFICIENT_DENSENET_INLINE bool columns_are_neighbours(const Matrices&... matrices) {
  return ((matrices.column_stride == 1) && ...);
}

// Calls body(width of the strip, first column, first row, end row).
template <int kWidest, typename Body>
EFFICIENT_DENSENET_INLINE void for_each_panel(const Shape& shape, bool neighbours,
                                              const Body& body) {
  for (int64_t row = 0; row < shape.rows; row += kPanelRows) {
    const int64_t end = shape.rows - row < kPanelRows ? shape.rows : row + kPanelRows;
    const auto strip = [&](auto width, int64_t column) { body(width, column, row, end); };
    if (neighbours) {
      for_each_strip<kWidest>(0, shape.columns, strip);
    } else {
      for_each_strip<1>(0, shape.columns, strip);
    }
  }
}

template <typename T>
void moments(Shape shape, Matrix<const T> x, Matrix<T> copy, const double* pivot, double* sum,
             double* sum_of_squares) {
  const bool copied = copy.data != nullptr;
  const bool neighbours = columns_are_neighbours(x) && (!copied || columns_are_neighbours(copy));
  for_each_panel<kSumming>(shape, neighbours, [&](auto width, int64_t c, int64_t row, int64_t end) {
    constexpr int W = decltype(width)::value;
    const auto about = load<W>(pivot + c);
    auto total = load<W>(sum + c), squares = load<W>(sum_of_squares + c);
    for (int64_t r = row; r < end; ++r) {
      const auto value = load<W>(at(x, r, c));
      if (copied) store<W>(at(copy, r, c), value);
      const auto centred = to_double<W>(value) - about;
      total += centred;
      squares += centred * centred;
    }
    store<W>(sum + c, total);
    store<W>(sum_of_squares + c, squares);
  });
}

template <typename T>
void normalise(Shape shape, Matrix<const T> x, Matrix<T> y, NormPointers<T> numbers) {
  const bool neighbours = columns_are_neighbours(x, y);
  for_each_panel<kWide<T>>(shape, neighbours, [&](auto width, int64_t c, int64_t row, int64_t end) {
    constexpr int W = decltype(width)::value;
    const auto strip = load_strip<W>(numbers, c);
    for (int64_t r = row; r < end; ++r) {
      store<W>(at(y, r, c), relu(normalise(load<W>(at(x, r, c)), strip)));
    }
  });
}

template <typename T>
void accumulate(Shape shape, Matrix<const T> x, Matrix<const T> grad_y, Matrix<acc_t<T>> g,
                Write mode, NormPointers<T> numbers, const acc_t<T>* factor, double* dz_sum,
                double* dz_centred_sum) {
  const bool neighbours =
      columns_are_neighbours(x, grad_y) && (mode == Write::kNothing || columns_are_neighbours(g));
  for_each_panel<kSumming>(shape, neighbours, [&](auto width, int64_t c, int64_t row, int64_t end) {
    constexpr int W = decltype(width)::value;
    using Doubles = Vector<double, W>;
    const auto strip = load_strip<W>(numbers, c);
    const auto weight = load<W>(factor + c);
    Doubles sum = load<W>(dz_sum + c), centred_sum = load<W>(dz_centred_sum + c);
    for (int64_t r = row; r < end; ++r) {
      const auto value = load<W>(at(x, r, c));
      const auto dz = masked<T>(normalise(value, strip), load<W>(at(grad_y, r, c)));
      if (mode == Write::kAssign) {
        store<W>(at(g, r, c), weight * dz);
      } else if (mode == Write::kAdd) {
        store<W>(at(g, r, c), load<W>(at(g, r, c)) + weight * dz);
      }
      const Doubles wide = to_double<W>(dz);
      sum += wide;
      centred_sum += wide * to_double<W>(value - strip.mean);
    }
    store<W>(dz_sum + c, sum);
    store<W>(dz_centred_sum + c, centred_sum);
  });
}

template <typename T>
void gradient(Shape shape, Matrix<const T> x, Matrix<const T> grad_y, Matrix<T> grad_x,
              NormPointers<T> numbers, const acc_t<T>* offset, const acc_t<T>* slope) {
  const bool neighbours = columns_are_neighbours(x, grad_y, grad_x);
  for_each_panel<kWide<T>>(shape, neighbours, [&](auto width, int64_t c, int64_t row, int64_t end) {
    constexpr int W = decltype(width)::value;
    const auto strip = load_strip<W>(numbers, c);
    if (slope == nullptr) {
      for (int64_t r = row; r < end; ++r) {
        const auto z = normalise(load<W>(at(x, r, c)), strip);
        store<W>(at(grad_x, r, c), strip.scale * masked<T>(z, load<W>(at(grad_y, r, c))));
      }
      return;
    }
    const auto shift = load<W>(offset + c), steepness = load<W>(slope + c);
    for (int64_t r = row; r < end; ++r) {
      const auto value = load<W>(at(x, r, c));
      const auto dz = masked<T>(normalise(value, strip), load<W>(at(grad_y, r, c)));
      const auto correction = (value - strip.mean) * steepness;
      store<W>(at(grad_x, r, c), strip.scale * dz - shift - correction);
    }
  });
}

template <typename T>
void apply_bn_correction(Shape shape, Matrix<const T> x, Matrix<const acc_t<T>> g, Matrix<T> grad_x,
                         const acc_t<T>* mean, const acc_t<T>* offset,
                         const acc_t<T>* offset_residual, const acc_t<T>* slope) {
  const bool neighbours = columns_are_neighbours(x, g, grad_x);
  for_each_panel<kWide<T>>(shape, neighbours, [&](auto width, int64_t c, int64_t row, int64_t end) {
    constexpr int W = decltype(width)::value;
    const auto about = load<W>(mean + c), tail = load<W>(offset_residual + c);
    const auto shift = load<W>(offset + c), steepness = load<W>(slope + c);
    for (int64_t r = row; r < end; ++r) {
      const auto correction = shift + ((load<W>(at(x, r, c)) - about) * steepness + tail);
      store<W>(at(grad_x, r, c), load<W>(at(g, r, c)) - correction);
    }
  });
}

template <typename T>
void activations(Shape shape, Matrix<const T> x, NormPointers<T> numbers, double* sum) {
  const bool neighbours = columns_are_neighbours(x);
  for_each_panel<kSumming>(shape, neighbours, [&](auto width, int64_t c, int64_t row, int64_t end) {
    constexpr int W = decltype(width)::value;
    const auto strip = load_strip<W>(numbers, c);
    auto total = load<W>(sum + c);
    for (int64_t r = row; r < end; ++r) {
      total += to_double<W>(relu(normalise(load<W>(at(x, r, c)), strip)));
    }
    store<W>(sum + c, total);
  });
}

template <typename T>
void pool(Shape shape, Matrix<const T> x, const PoolingWindow& window, Matrix<T> y,
          NormPointers<T> numbers) {
  const bool neighbours = columns_are_neighbours(x, y);
  const acc_t<T> share = acc_t<T>(1) / window.size;
  for_each_panel<kWide<T>>(shape, neighbours, [&](auto width, int64_t c, int64_t row, int64_t end) {
    constexpr int W = decltype(width)::value;
    const auto strip = load_strip<W>(numbers, c);
    for (int64_t r = row; r < end; ++r) {
      const T* const first = at(x, r, c);
      Vector<acc_t<T>, W> sum = {};
      for (int i = 0; i < window.size; ++i) {
        sum += relu(normalise(load<W>(first + window.offsets[i]), strip));
      }
      store<W>(at(y, r, c), sum * share);
    }
  });
}

// As integers of the width of acc_t<T>, which comparisons of acc_t<T> give.
template <typename T, int W>
using Places = decltype(Vector<acc_t<T>, W>{} < Vector<acc_t<T>, W>{});

// The values as T stores them.
template <typename T, int W>
EFFICIENT_DENSENET_INLINE Vector<acc_t<T>, W> rounded(const Vector<acc_t<T>, W>& values) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) return values;
  T memory[W];
  store<W>(memory, values);
  return load<W>(memory);
}

// The maximum begins at the 0 of the ReLU, so only what is larger replaces it; and NaN, as in
// torch.
template <typename T>
void max_pool(Shape shape, Matrix<const T> x, const PoolingWindow& window, Matrix<T> y,
              Matrix<uint8_t> winners, NormPointers<T> numbers) {
  const bool neighbours = columns_are_neighbours(x, y, winners);
  for_each_panel<kWide<T>>(shape, neighbours, [&](auto width, int64_t c, int64_t row, int64_t end) {
    constexpr int W = decltype(width)::value;
    const auto strip = load_strip<W>(numbers, c);
    for (int64_t r = row; r < end; ++r) {
      const T* const first = at(x, r, c);
      Vector<acc_t<T>, W> maximum = {};
      Places<T, W> winner = {};
      for (int i = 0; i < window.size; ++i) {
        const auto value = rounded<T, W>(normalise(load<W>(first + window.offsets[i]), strip));
        const auto wins = (value > maximum) | (value != value);
        maximum = wins ? value : maximum;
        winner = wins ? Places<T, W>{} + window.places[i] : winner;
      }
      store<W>(at(y, r, c), maximum);
      write(at(winners, r, c), __builtin_convertvector(winner, Vector<uint8_t, W>));
    }
  });
}

template <typename T>
void unpool(Shape shape, Matrix<const T> grad_y, Matrix<const uint8_t> winners,
            const PoolingWindow& windows, Matrix<T> grad_x) {
  const bool neighbours = columns_are_neighbours(grad_y, winners, grad_x);
  for_each_panel<kWide<T>>(shape, neighbours, [&](auto width, int64_t c, int64_t row, int64_t end) {
    constexpr int W = decltype(width)::value;
    for (int64_t r = row; r < end; ++r) {
      Vector<acc_t<T>, W> sum = {};
      for (int i = 0; i < windows.size; ++i) {
        const auto winner = read<Vector<uint8_t, W>>(at(winners, r, c) + windows.offsets[i]);
        const auto won =
            __builtin_convertvector(winner, Places<T, W>) == Places<T, W>{} + windows.places[i];
        sum += won ? load<W>(at(grad_y, r, c) + windows.offsets[i]) : Vector<acc_t<T>, W>{};
      }
      store<W>(at(grad_x, r, c), sum);
    }
  });
}

template <typename T>
constexpr Loops<T> kLoops = {
    moments<T>,     normalise<T>, accumulate<T>, gradient<T>, apply_bn_correction<T>,
    activations<T>, pool<T>,      max_pool<T>,   unpool<T>};

constexpr AllLoops kAll = {kLoops<double>, kLoops<float>, kLoops<c10::Half>, kLoops<c10::BFloat16>};

}  // namespace
}  // namespace efficient_densenet::cpu
