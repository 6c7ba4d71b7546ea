// Adds up what kernels before have left (left_over.h): all blocks of a kernel do so while their
// first copies are under way, sums with their first warps and parts of weights with their last
// ones. No block waits for another, as what is left is that of an earlier kernel of the stream.
//
// Why not the last block that leaves one (last_block.cuh): a tile of a weight is 32 KB and has up
// to 264 parts, and sums are those of up to a thousand channels. A single multiprocessor has too
// few loads under way for that: it took 20 to 50 us per tile on an H100, and 5 to 12 us per norm.
//
// Bytes: what is left, read once, from the L2 cache as far as it fits. Limit: latency.
#pragma once

#include "cuda/elementwise/sums.cuh"
#include "cuda/tensor_core/copies.cuh"
#include "operators/left_over.h"

namespace efficient_densenet::cuda {

constexpr int kPartsAtOnce = 8;  // loads of a lane under way

// The element of the weight's gradient that counts as [output][tap][channel].
template <typename T>
__device__ void store_gradient(const WeightParts& parts, int element, float value) {
  const int row = element / parts.channels, channel = element % parts.channels;
  const int output = row / parts.taps, tap = row % parts.taps;
  const int64_t* const strides = parts.sum.strides;
  const int64_t to =
      output * strides[0] + channel * strides[1] + tap / 3 * strides[2] + tap % 3 * strides[3];
  if (parts.sum.is_float) {
    static_cast<float*>(parts.sum.data)[to] = value;
  } else {
    static_cast<T*>(parts.sum.data)[to] = narrow<T>(value);
  }
}

// By one of so many blocks, whose threads are whole warps. The order of a sum depends on the number
// of parts alone: that of each lane, in double, and a tree of these.
template <typename T, int kLanes>
__device__ void add_parts(const WeightParts& parts, int block, int blocks) {
  constexpr int kQuads = kWarp / kLanes;  // of elements, per warp and round
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp, part_lane = lane / kQuads;
  // Neighbouring warps are in neighbouring blocks, so that no block has more to do than others. The
  // numbers are the same for all lanes of a warp, which exchange their sums.
  const int warp = warps - 1 - threadIdx.x / kWarp;
  for (int first = 4 * kQuads * (warp * blocks + block); first < parts.elements;
       first += 4 * kQuads * warps * blocks) {
    const int element = first + 4 * (lane % kQuads);
    const int count = count_before<4>(parts.elements, element);
    double sums[4] = {};
    const auto add = [&](const auto& load) {
      for (int part = part_lane; part < parts.parts; part += kPartsAtOnce * kLanes) {
        Words<float, 4> more[kPartsAtOnce] = {};
        const float* from = parts.memory + int64_t(part) * parts.elements + element;
#pragma unroll
        for (int i = 0; i < kPartsAtOnce; ++i, from += int64_t(kLanes) * parts.elements) {
          if (part + i * kLanes < parts.parts) more[i] = load(from);
        }
#pragma unroll
        for (int i = 0; i < kPartsAtOnce; ++i) {
#pragma unroll
          for (int k = 0; k < 4; ++k) sums[k] += more[i].get(k);
        }
      }
    };
    if (parts.elements % 4 == 0 && first + 4 * kQuads <= parts.elements) {
      add([](const float* from) { return load_row<4>(from, true, 4); });
    } else {
      add([&](const float* from) { return load_row<4>(from, false, count); });
    }
#pragma unroll
    for (int bit = kWarp / 2; bit >= kQuads; bit /= 2) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[k] += __shfl_xor_sync(~0u, sums[k], bit);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // all lanes of an element have its sum
      if (part_lane == k % kLanes && k < count) {
        store_gradient<T>(parts, element + k, static_cast<float>(sums[k]));
      }
    }
  }
}

// So many lanes share the parts of an element that each has about kPartsAtOnce.
template <typename T>
__device__ void add_left(const WeightParts& parts, int block, int blocks) {
  if (parts.memory == nullptr) return;
  if (parts.parts <= 2 * kPartsAtOnce) {
    add_parts<T, 2>(parts, block, blocks);
  } else {
    add_parts<T, 8>(parts, block, blocks);
  }
}

__device__ inline NormGradients<float> result_of(const NormSumsLeft& left) {
  return {left.bn, left.args, left.channels, left.rows};
}
__device__ inline ReaderGradients<float> result_of(const ReaderSumsLeft& left) {
  return {left.bn, left.args, left.channels};
}

// Likewise; a warp shares the numbers of a channel.
template <typename T, typename Args>
__device__ void add_left(const SumsLeft<Args>& left, int block, int blocks) {
  if (left.dz == nullptr) return;
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t c = threadIdx.x / kWarp * blocks + block; c < left.channels; c += warps * blocks) {
    const auto result = result_of(left);
    const auto channel = result.prepare(c);
    const Pair sums = Sharing{kWarp, lane}.sum(
        {0, 1, left.blocks, 0},
        [&](int i) {
          return Pair{left.dz[i * left.channels + c], left.dz_centred[i * left.channels + c]};
        },
        [](int, const Pair& pair) { return pair; });
    if (lane == 0) result.write({sums.first, sums.second}, channel, c);
  }
}

// Memory for sums of so many blocks, which the kernel writes.
template <typename Args>
SumsLeft<Args> make_sums_left(const KernelArgs& args, const BatchNorm& bn, int blocks,
                              const Args& result) {
  double* const dz = args.workspace(2 * blocks * args.channels);
  return {dz, dz + blocks * args.channels, args.channels, args.rows.count, blocks, bn, result};
}

// Memory for the parts of a gradient.
inline WeightParts make_weight_parts(const KernelArgs& args, int64_t outputs, int taps, int parts,
                                     const WeightGradient& sum) {
  const int64_t elements = outputs * taps * args.channels;
  EFFICIENT_DENSENET_CHECK(elements < (int64_t(1) << 30), "efficient_densenet",
                           "tensor-core kernels: a weight of ", elements, " elements");
  return {static_cast<float*>(args.kept(parts * elements * int64_t(sizeof(float)))),
          parts,
          static_cast<int>(elements),
          static_cast<int>(args.channels),
          taps,
          sum};
}

}  // namespace efficient_densenet::cuda
