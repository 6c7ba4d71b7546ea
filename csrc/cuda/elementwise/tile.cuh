// Shared by the CUDA kernels: which elements a thread owns, how it reads and writes them, and the
// launch geometry that follows.
//
// A thread owns V neighbouring elements in one direction and walks over rows:
//
//   channels inner (channels-last tensors)        rows inner (all others)
//
//          c ->   tx=0      tx=1   ...                   row ->  ty=0      ty=1   ...
//   row  ty=0   [V chan.] [V chan.]               channel bx   [V rows]  [V rows]  then next step
//    |   ty=1   [V chan.] [V chan.]               (one channel per block column)
//    v   ...    then row += blockDim.y
//
// blockIdx.x: channels; blockIdx.y: chunks of rows. V elements are one access of up to 16 bytes.
// Features whose strides fit neither direction go rows inner with V = 1.
//
// Every tensor of a call is addressed through its View, so no thread needs to know about layouts.
// The features travel as a kernel parameter: a FeatureList (at most kMaxFeatures a launch), or one
// Matrix, whose rows form one dimension; then an address is one multiplication.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "common/kernel_args.h"

namespace efficient_densenet::cuda {

constexpr int kThreads = 256;
constexpr int kMaxWidth = 32;     // threads of a block side by side, along the channels
constexpr int kMaxFeatures = 64;  // 7 KB of kernel parameters
constexpr int kUnroll = 4;        // independent accesses in flight per thread and tensor

// As many steps at once as leave registers for two blocks per multiprocessor, in kernels that read
// several tensors.
template <int V>
constexpr int kUnrollOfSeveral = V == 8 ? 2 : kUnroll;

// Arithmetic type of one element; sums over rows end in double.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

// Explicit, since torch compiles extensions without the implicit conversions of 16-bit types.
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T narrow(acc_t<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T values[V];
};

struct FeatureList {
  static constexpr int kRowDims = kMaxRowDims;
  int count;
  Feature items[kMaxFeatures];

  __host__ __device__ int64_t first_channel() const { return items[0].first_channel; }
  __host__ __device__ int64_t end_channel() const {
    return items[count - 1].first_channel + items[count - 1].channels;
  }

  // The feature that holds a channel: the last one that does not begin behind it.
  __device__ const Feature& find(int64_t channel) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (items[middle].first_channel <= channel) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return items[low];
  }
};

// One feature, its channels next to each other and its rows of one stride.
struct Matrix {
  static constexpr int kRowDims = 1;
  Feature feature;

  __host__ __device__ int64_t first_channel() const { return 0; }
  __host__ __device__ int64_t end_channel() const { return feature.channels; }
  __device__ const Feature& find(int64_t) const { return feature; }
};

// Rows are reduced or written in `chunks` stretches of `rows_per_chunk` rows, one per block.
struct RowChunking {
  int64_t rows_per_chunk;
  int chunks;
};

// ---------------------------------------------------------------------------------------------
// Device side

__device__ inline int64_t divide(int64_t a, int64_t b) {
  // 64-bit division is a long routine; rows rarely need it.
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// What one thread owns.
template <int V, bool kChannelsInner>
struct Tile {
  static constexpr int kChannels = kChannelsInner ? V : 1;                   // per thread
  static constexpr int kRows = kChannelsInner ? 1 : V;                       // per step
  static constexpr int kBlockChannels = kChannelsInner ? kMaxWidth * V : 1;  // at most

  int64_t channel;  // first one, in the concatenation
  int64_t row, row_end, row_step;

  template <typename Inputs>
  __device__ Tile(const Inputs& inputs, const RowSpace& rows, const RowChunking& chunking) {
    channel = inputs.first_channel() +
              (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kChannels;
    const int64_t begin = blockIdx.y * chunking.rows_per_chunk;
    row = begin + static_cast<int64_t>(threadIdx.y) * kRows;
    row_end = min(begin + chunking.rows_per_chunk, rows.count);
    row_step = static_cast<int64_t>(blockDim.y) * kRows;
  }

  // The channels of a block, which all blocks of a group share.
  template <typename Inputs>
  __device__ static int64_t first_of_block(const Inputs& inputs) {
    return inputs.first_channel() + static_cast<int64_t>(blockIdx.x) * blockDim.x * kChannels;
  }

  template <typename Inputs>
  __device__ static int64_t end_of_block(const Inputs& inputs) {
    return min(first_of_block(inputs) + blockDim.x * kChannels, inputs.end_channel());
  }

  // Which of the thread's channels the i-th of its V elements belongs to.
  __device__ static constexpr int channel_of(int i) { return kChannelsInner ? i : 0; }

  // Calls body(row, kSteps) for groups of so many steps and then, for the rest, body(row, 1).
  template <int kSteps, typename Body>
  __device__ void for_each_group(const Body& body) const {
    int64_t r = row;
    for (; r + (kSteps - 1) * row_step < row_end; r += kSteps * row_step) {
      body(r, std::integral_constant<int, kSteps>{});
    }
    for (; r < row_end; r += row_step) body(r, std::integral_constant<int, 1>{});
  }
};

// One thread's window into one tensor. The strides are copied to registers: neighbouring threads
// may look at different features, and constant memory serves one address at a time.
template <typename T, int V, int kRowDims>
struct ThreadView {
  T* base;
  const RowSpace& rows;
  int64_t strides[kRowDims];

  __device__ ThreadView(const View& view, const RowSpace& rows, int64_t channel)
      : base(static_cast<T*>(view.data) + channel * view.channel_stride), rows(rows) {
#pragma unroll
    for (int d = 0; d < kRowDims; ++d) strides[d] = view.row_strides[d];
  }

  __device__ Pack<T, V>* at(int64_t row) const {
    int64_t offset = 0;
#pragma unroll
    for (int d = kRowDims - 1; d > 0; --d) {
      if (d >= rows.dims) continue;
      const int64_t outer = divide(row, rows.sizes[d]);
      offset += (row - outer * rows.sizes[d]) * strides[d];
      row = outer;
    }
    return reinterpret_cast<Pack<T, V>*>(base + offset + row * strides[0]);
  }
};

// Per-channel numbers of y = relu((x - mean) * scale + bias), the mean split as in BatchNorm:
// `mean_residual` is what its rounded value lacks, and `bias` makes up for it.
template <typename Acc>
struct NormCoefficients {
  Acc mean, mean_residual, inverse_std, scale, bias;

  __device__ static NormCoefficients load(const BatchNorm& bn, int64_t c) {
    return of(bn, c, bn.mean[c], bn.var[c]);
  }

  // With statistics that are not in memory yet.
  __device__ static NormCoefficients of(const BatchNorm& bn, int64_t c, double mean, double var) {
    const double inverse_std = inverse_sqrt(var + bn.eps);
    const Acc weight = bn.weight == nullptr ? Acc(1) : static_cast<const Acc*>(bn.weight)[c];
    const Acc bias = bn.bias == nullptr ? Acc(0) : static_cast<const Acc*>(bn.bias)[c];
    const double scale = weight * inverse_std;
    NormCoefficients channel;
    channel.inverse_std = static_cast<Acc>(inverse_std);
    channel.scale = static_cast<Acc>(scale);
    channel.mean = round_mean(mean, channel.inverse_std);
    // Nothing can be taken off an infinite mean, and infinity minus infinity would be NaN.
    const double mean_residual = isinf(channel.mean) ? 0 : mean - channel.mean;
    channel.mean_residual = static_cast<Acc>(mean_residual);
    channel.bias = static_cast<Acc>(bias - mean_residual * scale);
    return channel;
  }

  // For float: one Newton step in double from the hardware's float. A double square root and
  // division cost far more where double arithmetic is slow.
  __device__ static double inverse_sqrt(double x) {
    if constexpr (std::is_same_v<Acc, double>) return 1 / sqrt(x);
    const double r = rsqrtf(static_cast<float>(x));
    return r * (1.5 - 0.5 * x * r * r);
  }

  // A multiple of the power of two next to the standard deviation: 0 where the mean is small, and
  // of so few digits elsewhere that x - mean is exact for almost every x.
  __device__ static Acc round_mean(double mean, Acc inverse_std) {
    double unit, inverse_unit;
    if constexpr (std::is_same_v<Acc, float>) {
      // Of a float's bits: every block of every kernel does this, and scalbn takes 50 instructions.
      const int exponent = (__float_as_int(inverse_std) >> 23 & 255) - 127;
      unit = __hiloint2double((1023 - exponent) << 20, 0);
      inverse_unit = __hiloint2double((1023 + exponent) << 20, 0);
    } else {
      unit = scalbn(1.0, -ilogb(inverse_std));
      inverse_unit = scalbn(1.0, ilogb(inverse_std));
    }
    const Acc rounded = static_cast<Acc>(unit * rint(mean * inverse_unit));
    return isfinite(rounded) ? rounded : static_cast<Acc>(mean);
  }

  // Forward and backward both call this, and fma leaves the compiler no choice of rounding, so
  // the backward pass finds the ReLU open exactly where the forward did.
  __device__ Acc normalise(Acc x) const { return fma(x - mean, scale, bias); }
};

// The numbers of a block's channels, formed once per block and handed to the threads that own them.
template <typename Number, typename T_, typename Inputs, typename Load>
__device__ void load_per_channel(const Inputs& inputs, Number (&numbers)[T_::kChannels],
                                 const Load& load) {
  __shared__ Number shared[T_::kBlockChannels];
  const int count = blockDim.x * T_::kChannels, threads = blockDim.x * blockDim.y;
  const int64_t first = inputs.first_channel() + static_cast<int64_t>(blockIdx.x) * count;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < count; i += threads) {
    if (first + i < inputs.end_channel()) shared[i] = load(first + i);
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < T_::kChannels; ++k) numbers[k] = shared[threadIdx.x * T_::kChannels + k];
}

// NaN passes, as in torch.relu.
template <typename Acc>
__device__ Acc relu(Acc value) {
  return value < Acc(0) ? Acc(0) : value;
}

// Where torch's ReLU lets the gradient through: decided on the output, so a value that a 16-bit
// type rounds to 0 (half its smallest number, at most) does not count as positive. NaN passes.
template <typename T>
__device__ bool relu_is_open(acc_t<T> value) {
  constexpr acc_t<T> kRoundsToZero = std::is_same_v<T, __half>          ? 0x1p-25
                                     : std::is_same_v<T, __nv_bfloat16> ? 0x1p-134
                                                                        : 0;
  return !(value <= kRoundsToZero);
}

// Merges what the threads of each channel hold, a tree over threadIdx.y: put(i) shares a thread's
// own at place i, take(i) adds what is there. The result is with threadIdx.y = 0.
template <typename Put, typename Take>
__device__ void reduce_threads(const Put& put, const Take& take) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int count = blockDim.y; count > 1;) {
    const int half = (count + 1) / 2;
    if (threadIdx.y >= half && threadIdx.y < count) put(thread);
    __syncthreads();
    if (threadIdx.y + half < count) take(thread + half * blockDim.x);
    __syncthreads();
    count = half;
  }
}

constexpr int kWarp = 32;

}  // namespace efficient_densenet::cuda
