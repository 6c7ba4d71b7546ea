// Fragments: the operands of a product on tensor cores, in registers of a warp.
//
// A product sums over channels in chunks of 64 bytes of a row: 32 channels of 16 bits or 16 of
// TF32, two mma steps. Which channel is which k of a step is free, as long as both operands agree.
// So a lane takes one piece of 16 bytes that lie next to each other, for both steps at once:
//
//   row of x   | piece of t=0 | piece of t=1 | piece of t=2 | piece of t=3 |     one chunk
//                 \__ 4 registers: step 0 takes the first two, step 1 the last two
//
// lane = 4 g + t: the mma's group g is a row of x (A operand) or a column of the result (B
// operand). Packed weights hold the B operands of 8 columns as 512 bytes in the order of lanes, so
// each is one conflict-free 16-byte access.
//
// Columns of the result are free as well. In each pair of 8-column tiles, column 2 t + e of tile j
// is column 4 t + 2 j + e of the pair, so that a lane's results are four neighbouring columns.
#pragma once

#include <cstdint>

#include "cuda/elementwise/launch.cuh"

// Devices before 8.0 get empty kernels, which why_no_tensor_cores keeps from being launched.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define EFFICIENT_DENSENET_TENSOR_CORES 1
#endif

namespace efficient_densenet::cuda {

constexpr int kPieceBytes = 16;
constexpr int kPieces = 4;       // of a chunk
constexpr int kTileRows = 16;    // of a warp's mma
constexpr int kTileColumns = 8;  // of one mma

template <typename T>
constexpr int kPiece = kPieceBytes / sizeof(T);  // channels
template <typename T>
constexpr int kChannelChunk = kPieces * kPiece<T>;  // channels
template <typename T>
constexpr int kStep = kChannelChunk<T> / 2;  // channels that one mma sums over

// Column, among 16, of place p in a pair of tiles.
__host__ __device__ inline int pair_column(int p) {
  const int tile = p / kTileColumns, place = p % kTileColumns;
  return 4 * (place / 2) + 2 * tile + place % 2;
}

// k elements in the words that registers hold them in. As elements of a Pack, the compiler gives
// each of 16 bits a register of its own, and takes words apart wherever it loads and stores.
template <typename T, int k>
struct alignas(k * sizeof(T)) Words {
  static constexpr int kInWord = sizeof(uint32_t) / sizeof(T);
  uint32_t words[k / kInWord];

  __device__ float get(int i) const {
    const uint32_t word = words[i / kInWord];
    if constexpr (std::is_same_v<T, __half>) {
      const auto both = *reinterpret_cast<const __half2*>(&word);
      return i % 2 == 0 ? __low2float(both) : __high2float(both);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else {
      return __uint_as_float(word);
    }
  }

  // Elements i and i + 1, i even, rounded to T.
  __device__ void put(int i, float first, float second) {
    uint32_t* const to = words + i / kInWord;
    if constexpr (std::is_same_v<T, __half>) {
      *reinterpret_cast<__half2*>(to) = __floats2half2_rn(first, second);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(first, second);
    } else {
      to[0] = __float_as_uint(first);
      to[1] = __float_as_uint(second);
    }
  }
};

template <typename T, int k>
__device__ Words<T, k> as_words(const Pack<T, k>& pack) {
  static_assert(sizeof(pack) == sizeof(Words<T, k>));
  return *reinterpret_cast<const Words<T, k>*>(&pack);
}
template <typename T, int k>
__device__ Pack<T, k> as_pack(const Words<T, k>& words) {
  return *reinterpret_cast<const Pack<T, k>*>(&words);
}

template <typename T>
__device__ uint4 bits(const Words<T, kPiece<T>>& piece) {
  static_assert(sizeof(piece) == sizeof(uint4));
  return *reinterpret_cast<const uint4*>(&piece);
}

// As an operand of the mma. TF32 keeps 10 bits of the fraction, rounded to nearest.
__device__ inline float to_operand(float x) {
#ifdef EFFICIENT_DENSENET_TENSOR_CORES
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return __uint_as_float(rounded);
#else
  return x;
#endif
}
__device__ inline __half to_operand(__half x) { return x; }
__device__ inline __nv_bfloat16 to_operand(__nv_bfloat16 x) { return x; }

template <typename T, int k>
__device__ Words<T, k> to_operands(Words<T, k> values) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < k; i += 2) {
      values.put(i, to_operand(values.get(i)), to_operand(values.get(i + 1)));
    }
  }
  return values;
}

#ifdef EFFICIENT_DENSENET_TENSOR_CORES

// c += a b, 16 x 8, over kStep channels.
template <typename T>
__device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Both steps of a chunk: pieces of rows g and g + 8, and of column g.
template <typename T>
__device__ void mma_chunk_step(float (&c)[4], const uint4& low, const uint4& high, const uint4& b,
                               int step) {
  if (step == 0) {
    mma<T>(c, {low.x, high.x, low.y, high.y}, {b.x, b.y});
  } else {
    mma<T>(c, {low.z, high.z, low.w, high.w}, {b.z, b.w});
  }
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 16-bit numbers, each lane giving the shared address of one of their rows;
// then the same, each transposed.
__device__ inline void load_matrices(uint32_t (&registers)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

__device__ inline void load_transposed(uint32_t (&registers)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

#endif

// The mean, scale and bias of a channel, from where they were made beforehand if they were.
__device__ inline NormCoefficients<float> load_numbers(const BatchNorm& bn, int64_t c) {
  if (bn.numbers == nullptr) return NormCoefficients<float>::load(bn, c);
  NormCoefficients<float> channel{};
  channel.mean = bn.numbers[c];
  channel.scale = bn.numbers[bn.numbers_stride + c];
  channel.bias = bn.numbers[2 * bn.numbers_stride + c];
  return channel;
}

// The numbers of batch norm of neighbouring channels, in shared memory: one array per number.
struct SharedNorm {
  float *mean, *scale, *bias;

  __device__ SharedNorm(float* memory, int count)
      : mean(memory), scale(memory + count), bias(memory + 2 * count) {}

  static constexpr int kNumbers = 3;

  __device__ void put(int at, const NormCoefficients<float>& channel) const {
    mean[at] = channel.mean;
    scale[at] = channel.scale;
    bias[at] = channel.bias;
  }

  // Of the channels [first, first + count), 0 from `channels` on, but for those of [left,
  // left_end). The caller synchronises.
  __device__ void load(const BatchNorm& bn, int64_t first, int count, int64_t channels,
                       int64_t left = 0, int64_t left_end = 0) const {
    constexpr int kAtOnce = 4;  // loads under way per thread
    for (int i = threadIdx.x; i < count; i += kAtOnce * blockDim.x) {
      NormCoefficients<float> loaded[kAtOnce] = {};
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int64_t c = first + i + k * static_cast<int64_t>(blockDim.x);
        if (c < channels && (c < left || c >= left_end)) {
          loaded[k] = load_numbers(bn, c);
        }
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int at = i + k * blockDim.x;
        if (at >= count) break;
        if (first + at < left || first + at >= left_end) put(at, loaded[k]);
      }
    }
  }

  template <int k>
  __device__ void get(NormCoefficients<float> (&numbers)[k], int first) const {
    using Floats = Pack<float, 4>;
#pragma unroll
    for (int i = 0; i < k; i += 4) {
      const auto means = *reinterpret_cast<const Floats*>(mean + first + i);
      const auto scales = *reinterpret_cast<const Floats*>(scale + first + i);
      const auto biases = *reinterpret_cast<const Floats*>(bias + first + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        numbers[i + j].mean = means.values[j];
        numbers[i + j].scale = scales.values[j];
        numbers[i + j].bias = biases.values[j];
      }
    }
  }
};

// relu of two numbers, rounded to the operands' type, side by side. NaN passes.
template <typename T>
__device__ uint32_t relu_operands(float first, float second) {
  uint32_t both = 0;
#ifdef EFFICIENT_DENSENET_TENSOR_CORES
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  }
#endif
  return both;
}

// relu(bn(x)) of a piece, as an operand.
template <typename T>
__device__ uint4 normalised(const uint4& x_bits,
                            const NormCoefficients<float> (&channels)[kPiece<T>]) {
  const auto x = *reinterpret_cast<const Words<T, kPiece<T>>*>(&x_bits);
  float y[kPiece<T>];
#pragma unroll
  for (int i = 0; i < kPiece<T>; ++i) y[i] = channels[i].normalise(x.get(i));
  if constexpr (sizeof(T) == 2) {
    return {relu_operands<T>(y[0], y[1]), relu_operands<T>(y[2], y[3]),
            relu_operands<T>(y[4], y[5]), relu_operands<T>(y[6], y[7])};
  } else {
    const auto operand = [](float value) { return __float_as_uint(to_operand(relu(value))); };
    return {operand(y[0]), operand(y[1]), operand(y[2]), operand(y[3])};
  }
}

}  // namespace efficient_densenet::cuda
