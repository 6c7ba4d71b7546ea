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
// The list of features travels as a kernel parameter (at most kMaxFeatures a launch).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "../checks.h"
#include "../concat_bn_relu.h"

namespace efficient_densenet::cuda {

constexpr int kThreads = 256;
constexpr int kMaxWidth = 32;     // threads of a block side by side, along the channels
constexpr int kMaxFeatures = 64;  // 7 KB of kernel parameters
constexpr int kUnroll = 4;        // independent accesses in flight per thread and tensor

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
  int count;
  Feature items[kMaxFeatures];
};

// Rows are reduced or written in `chunks` stretches of `rows_per_chunk` rows, one per block.
struct Chunking {
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

  __device__ Tile(const FeatureList& list, const RowSpace& rows, const Chunking& chunking) {
    channel = list.items[0].first_channel +
              (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kChannels;
    const int64_t begin = blockIdx.y * chunking.rows_per_chunk;
    row = begin + static_cast<int64_t>(threadIdx.y) * kRows;
    row_end = min(begin + chunking.rows_per_chunk, rows.count);
    row_step = static_cast<int64_t>(blockDim.y) * kRows;
  }

  // Which of the thread's channels the i-th of its V elements belongs to.
  __device__ static constexpr int channel_of(int i) { return kChannelsInner ? i : 0; }

  __device__ static bool in_list(const FeatureList& list, int64_t channel) {
    const Feature& last = list.items[list.count - 1];
    return channel < last.first_channel + last.channels;
  }

  // Calls body(row of each of kUnroll steps) and then, for the rest, body(row of one step).
  template <typename Body>
  __device__ void for_each_group(const Body& body) const {
    int64_t r = row;
    for (; r + (kUnroll - 1) * row_step < row_end; r += kUnroll * row_step) {
      body(r, std::integral_constant<int, kUnroll>{});
    }
    for (; r < row_end; r += row_step) body(r, std::integral_constant<int, 1>{});
  }
};

// The feature that holds a channel: the last one that does not begin behind it.
__device__ inline const Feature& find_feature(const FeatureList& list, int64_t channel) {
  int low = 0, high = list.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (list.items[middle].first_channel <= channel) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return list.items[low];
}

// One thread's window into one tensor. The strides are copied to registers: neighbouring threads
// may look at different features, and constant memory serves one address at a time.
template <typename T, int V>
struct Window {
  T* base;
  const RowSpace& rows;
  int64_t strides[kMaxRowDims];

  __device__ Window(const View& view, const RowSpace& rows, int64_t channel)
      : base(static_cast<T*>(view.data) + channel * view.channel_stride), rows(rows) {
#pragma unroll
    for (int d = 0; d < kMaxRowDims; ++d) strides[d] = view.row_strides[d];
  }

  __device__ Pack<T, V>* at(int64_t row) const {
    int64_t offset = 0;
#pragma unroll
    for (int d = kMaxRowDims - 1; d > 0; --d) {
      if (d >= rows.dims) continue;
      const int64_t outer = divide(row, rows.sizes[d]);
      offset += (row - outer * rows.sizes[d]) * strides[d];
      row = outer;
    }
    return reinterpret_cast<Pack<T, V>*>(base + offset + row * strides[0]);
  }
};

// Per-channel numbers of y = relu((x - mean) * scale + bias), the mean split as in BatchNorm:
// `rest` is what its rounded value lacks, and `bias` makes up for it.
template <typename Acc>
struct Channel {
  Acc mean, rest, inverse_std, scale, bias;

  __device__ static Channel load(const BatchNorm& bn, int64_t c) {
    const double inverse_std = inverse_sqrt(bn.var[c] + bn.eps);
    const Acc weight = bn.weight == nullptr ? Acc(1) : static_cast<const Acc*>(bn.weight)[c];
    const Acc bias = bn.bias == nullptr ? Acc(0) : static_cast<const Acc*>(bn.bias)[c];
    const double scale = weight * inverse_std;
    Channel channel;
    channel.inverse_std = static_cast<Acc>(inverse_std);
    channel.scale = static_cast<Acc>(scale);
    channel.mean = round_mean(bn.mean[c], channel.inverse_std);
    const double rest = bn.mean[c] - channel.mean;
    channel.rest = static_cast<Acc>(rest);
    channel.bias = static_cast<Acc>(bias - rest * scale);
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
    const double unit = scalbn(1.0, -ilogb(inverse_std));
    const Acc rounded = static_cast<Acc>(unit * rint(mean * scalbn(1.0, ilogb(inverse_std))));
    return isfinite(rounded) ? rounded : static_cast<Acc>(mean);
  }

  // Forward and backward both call this, and fma leaves the compiler no choice of rounding, so
  // the backward pass finds the ReLU open exactly where the forward did.
  __device__ Acc normalise(Acc x) const { return fma(x - mean, scale, bias); }
};

// The numbers of a block's channels, formed once per block and handed to the threads that own them.
template <typename Number, typename T_, typename Load>
__device__ void load_per_channel(const FeatureList& list, Number (&numbers)[T_::kChannels],
                                 const Load& load) {
  __shared__ Number shared[T_::kBlockChannels];
  const int count = blockDim.x * T_::kChannels;
  const int64_t first = list.items[0].first_channel + static_cast<int64_t>(blockIdx.x) * count;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < count; i += kThreads) {
    if (T_::in_list(list, first + i)) shared[i] = load(first + i);
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

// Sums over rows leave a block as one partial result per channel and chunk, [C, chunks], and are
// merged by one warp per channel in a second kernel. Partial results are double: they are few, and
// the merge then adds no error of its own.
__device__ inline int64_t partial_index(const Chunking& chunking, int64_t channel) {
  return channel * chunking.chunks + blockIdx.y;
}

constexpr int kWarp = 32;
constexpr int kMergeWarps = 4;  // channels per block of the second kernel

// ---------------------------------------------------------------------------------------------
// Host side

inline void check(cudaError_t error, const char* what) {
  EFFICIENT_DENSENET_CHECK(error == cudaSuccess, "efficient_densenet", what, ": ",
                           cudaGetErrorString(error));
}

template <typename Body>
void dispatch_element(Element element, const Body& body) {
  switch (element) {
    case Element::kDouble:
      return body(double{});
    case Element::kFloat:
      return body(float{});
    case Element::kHalf:
      return body(__half{});
    case Element::kBFloat16:
      return body(__nv_bfloat16{});
  }
}

inline int element_size(Element element) {
  return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
}

// Calls body(view) for every tensor of a call until one answers false.
template <typename Body>
bool all_views(const Problem& problem, const View* other, const Body& body) {
  for (const Feature& feature : problem.features) {
    if (!body(feature.x)) return false;
    if (feature.grad_x.data != nullptr && !body(feature.grad_x)) return false;
  }
  return other == nullptr || body(*other);
}

// How a call is walked: direction, elements per access.
struct Walk {
  bool channels_inner;
  int vector;
};

inline bool channels_fit(const Problem& problem, const View* other, int vector) {
  for (const Feature& feature : problem.features) {
    if (feature.first_channel % vector != 0 || feature.channels % vector != 0) return false;
  }
  return all_views(problem, other, [&](const View& view) {
    for (int d = 0; d < problem.rows.dims; ++d) {
      if (view.row_strides[d] % vector != 0) return false;
    }
    return view.channel_stride == 1;
  });
}

inline bool rows_fit(const Problem& problem, const View* other, int vector) {
  const int inner = problem.rows.dims - 1;
  if (problem.rows.sizes[inner] % vector != 0) return false;
  return all_views(problem, other, [&](const View& view) {
    for (int d = 0; d < inner; ++d) {
      if (view.row_strides[d] % vector != 0) return false;
    }
    return view.row_strides[inner] == 1 && view.channel_stride % vector == 0;
  });
}

// Accesses of at most `widest` elements and 16 bytes.
inline Walk choose_walk(const Problem& problem, const View* other, int widest) {
  const int size = element_size(problem.element);
  const auto aligned = [&](int vector) {
    return all_views(problem, other, [&](const View& view) {
      return reinterpret_cast<uintptr_t>(view.data) % (vector * size) == 0;
    });
  };
  for (int vector = std::min(16 / size, widest); vector > 1; vector = vector == 8 ? 4 : 1) {
    if (!aligned(vector)) continue;
    if (channels_fit(problem, other, vector)) return {true, vector};
    if (rows_fit(problem, other, vector)) return {false, vector};
  }
  return {channels_fit(problem, other, 1), 1};
}

// Blocks of kThreads threads: as many channels wide as the call has, up to a warp of accesses.
inline dim3 block_shape(const Problem& problem, const Walk& walk) {
  unsigned width = 1;
  if (walk.channels_inner) {
    while (width < kMaxWidth && width * walk.vector < problem.channels) width *= 2;
  }
  return dim3(width, kThreads / width);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t channel_blocks(int64_t channels, const Walk& walk, const dim3& block) {
  return ceil_div(channels,
                  static_cast<int64_t>(block.x) * (walk.channels_inner ? walk.vector : 1));
}

// Chunks such that a call has about `blocks` blocks and no chunk is shorter than a few steps. The
// numbers depend on the shape alone, never on the device, so that sums are the same everywhere.
inline Chunking choose_chunks(const Problem& problem, const Walk& walk, const dim3& block,
                              int64_t blocks) {
  const int64_t step = static_cast<int64_t>(block.y) * (walk.channels_inner ? 1 : walk.vector);
  const int64_t shortest = 2 * kUnroll * step;
  const int64_t wanted = ceil_div(blocks, channel_blocks(problem.channels, walk, block));
  const int64_t rows =
      std::max(shortest, ceil_div(ceil_div(problem.rows.count, wanted), step) * step);
  const int64_t fitting =
      std::max(rows, ceil_div(ceil_div(problem.rows.count, 65535), step) * step);
  return {fitting, static_cast<int>(ceil_div(problem.rows.count, fitting))};
}

// The geometry of a call.
struct Plan {
  Walk walk;
  dim3 block;
  Chunking chunking;

  // Blocks in all: enough to fill a large GPU several times over, but few enough that the partial
  // results of a reduction stay small.
  static constexpr int64_t kElementwiseBlocks = 4096;
  static constexpr int64_t kReductionBlocks = 528;

  Plan(const Problem& problem, const View* other, int64_t blocks, int widest)
      : walk(choose_walk(problem, other, widest)),
        block(block_shape(problem, walk)),
        chunking(choose_chunks(problem, walk, block, blocks)) {}

  // Two arrays of partial results.
  double* workspace(const Problem& problem) const {
    return problem.workspace(2 * problem.channels * chunking.chunks);
  }

  dim3 grid(const FeatureList& list) const {
    const Feature& last = list.items[list.count - 1];
    const int64_t channels = last.first_channel + last.channels - list.items[0].first_channel;
    return dim3(channel_blocks(channels, walk, block), chunking.chunks);
  }
};

inline dim3 merge_grid(const Problem& problem) {
  return dim3(ceil_div(problem.channels, kMergeWarps));
}

inline dim3 merge_block() { return dim3(kWarp, kMergeWarps); }

// Calls body(list) for each kMaxFeatures features; empty features have no channels to own.
template <typename Body>
void for_each_list(const Problem& problem, const Body& body) {
  FeatureList list{};
  for (const Feature& feature : problem.features) {
    if (feature.channels == 0) continue;
    list.items[list.count++] = feature;
    if (list.count == kMaxFeatures) {
      body(list);
      list.count = 0;
    }
  }
  if (list.count > 0) body(list);
}

template <int V, bool kChannelsInner>
struct WalkTag {
  static constexpr int vector = V;
  static constexpr bool channels_inner = kChannelsInner;
};

// Calls body with T, V and the direction as types: the few combinations that kernels exist for.
template <int kWidest, typename Body>
void dispatch(const Problem& problem, const Walk& walk, const Body& body) {
  dispatch_element(problem.element, [&](auto element) {
    constexpr int kFits = std::min<int>(16 / sizeof(element), kWidest);
    const auto with_vector = [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      if (walk.channels_inner) {
        body(element, WalkTag<V, true>{});
      } else {
        body(element, WalkTag<V, false>{});
      }
    };
    if constexpr (kFits == 8) {
      if (walk.vector == 4) return with_vector(std::integral_constant<int, 4>{});
    }
    if (walk.vector == kFits) return with_vector(std::integral_constant<int, kFits>{});
    with_vector(std::integral_constant<int, 1>{});
  });
}

}  // namespace efficient_densenet::cuda
