// What becomes of a warp's product: its rows are stored, and their moments taken on the way.
//
// A warp's tile is kRowTiles times 16 rows and kTiles times 8 columns of accumulators. A lane holds
// rows g + 8 r, and four neighbouring columns of each pair of tiles (fragments.cuh). Moments are of
// the values as stored: of a tile's rows in registers, then over the lanes, the warp's tiles and
// the block's warps, in that order, by the formula in moments.cuh, so no sum of squares cancels.
#pragma once

#include "cuda/elementwise/moments.cuh"
#include "cuda/tensor_core/copies.cuh"
#include "cuda/tensor_core/limits.cuh"
#include "operators/left_over.h"

namespace efficient_densenet::cuda {

template <int n>
constexpr int kHalf = n % 2 == 0 ? n / 2 : n;

// What the lanes of a warp hold of the moments of a tile: kColumns per lane at first, and after
// merging over the 8 lanes of a column, each of which then owns a share of them.
template <int kColumns>
struct TileMoments {
  static constexpr int kOwned = kHalf<kHalf<kHalf<kColumns>>>;
  float count = 0, mean[kColumns] = {}, m2[kColumns] = {};
  int first = 0;      // column that the lane's first number is about
  bool owner = true;  // false: another lane has the same columns

  // Merges with the lane whose number differs in `bit`; each keeps half of the columns where their
  // number is even.
  template <int kNow>
  __device__ void merge_lanes(int bit) {
    const bool upper = threadIdx.x & bit;
    const float other_count = __shfl_xor_sync(~0u, count, bit);
    const float total = count + other_count;
    const float fraction = total == 0 ? 0 : other_count / total, weight = count * fraction;
    constexpr int kNext = kHalf<kNow>;
    constexpr bool kSplits = kNext < kNow;
#pragma unroll
    for (int i = 0; i < kNext; ++i) {
      const int j = kSplits ? i + kNext : i;
      const float kept_mean = kSplits && upper ? mean[j] : mean[i];
      const float kept_m2 = kSplits && upper ? m2[j] : m2[i];
      const float other_mean = __shfl_xor_sync(~0u, kSplits && upper ? mean[i] : mean[j], bit);
      const float other_m2 = __shfl_xor_sync(~0u, kSplits && upper ? m2[i] : m2[j], bit);
      const float delta = other_mean - kept_mean;
      mean[i] = fma(delta, fraction, kept_mean);
      m2[i] = fma(delta * delta, weight, kept_m2 + other_m2);
    }
    count = total;
    if (kSplits && upper) first += kNext;
    if (!kSplits && upper) owner = false;
  }

  __device__ void merge_all_lanes() {
    merge_lanes<kColumns>(16);
    merge_lanes<kHalf<kColumns>>(8);
    merge_lanes<kHalf<kHalf<kColumns>>>(4);
  }
};

// Moments of channels of the kernel's input that the kernel before has left.
inline __device__ Partials partials_of(const MomentsLeft& left) {
  return {left.first, left.second, left.channels, left.blocks, left.teams, nullptr};
}

// What a kernel leaves, of all channels of its result; the caller tells where its reader has them.
inline MomentsLeft leave(const Partials& partials, const MomentsOfBlocks& result) {
  return {partials.first,        partials.second, partials.channels, 0,           result.rows,
          result.rows_per_block, partials.blocks, partials.teams,    result.mean, result.var};
}

// The norm's numbers of all channels of the kernel's input, [0, count), 0 from `channels` on; those
// whose moments are left of what these add up to. The caller synchronises.
inline __device__ void load_norm(const SharedNorm& norm, const BatchNorm& bn, int count,
                                 int64_t channels, const MomentsLeft& left) {
  norm.load(bn, 0, count, channels, left.begin, left.begin + left.channels);
  if (left.first == nullptr) return;
  const Partials partials = partials_of(left);
  const MomentsOfBlocks sums{left.rows, left.rows_per_block, left.mean, left.var};
  const bool writes = blockIdx.x == 0 && blockIdx.y == 0;
  for_shared_channels(0, left.channels, [&](int64_t c, const Sharing& sharing) {
    const Pair moments = sums.add(partials, partials.last_step(), sharing, c);
    if (sharing.own != 0) return;
    const int64_t to = left.begin + c;
    norm.put(static_cast<int>(to),
             NormCoefficients<float>::of(bn, to, moments.first, sums.variance(moments)));
    if (writes) sums.finish(moments, c);
  });
}

// The moments of what a warp has stored, over its tiles of rows.
template <int kTiles>
struct WarpMoments {
  using Tile_ = TileMoments<2 * kTiles>;
  Moments<float, Tile_::kOwned> moments;
  int first = 0;
  bool owner = true;

  __device__ void add(const Tile_& tile) {
    moments.merge(
        tile.count, [&](int k) { return tile.mean[k]; }, [&](int k) { return tile.m2[k]; });
    first = tile.first;
    owner = tile.owner;
  }

  // Those of the block's warps, in order: one partial result per column and block. `memory` is
  // shared, kFloats per warp.
  static constexpr int kColumns = kTiles * kTileColumns, kFloats = 2 * kColumns + 1;

  __device__ void write(float* memory, int first_output, int outputs,
                        const Partials& partials) const {
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    float *const m2s = memory + warps * kColumns, *const counts = m2s + warps * kColumns;
    if (lane == 0) counts[warp] = moments.count;
    if (owner) {
#pragma unroll
      for (int k = 0; k < Tile_::kOwned; ++k) {
        const int place = first + k;
        const int column = place / 4 * 2 * kTileColumns + 4 * (lane % kPieces) + place % 4;
        memory[warp * kColumns + column] = moments.mean[k];
        m2s[warp * kColumns + column] = moments.m2[k];
      }
    }
    __syncthreads();
    for (int n = threadIdx.x; n < kColumns; n += blockDim.x) {
      if (first_output + n >= outputs) break;
      Moments<float, 1> all;
      for (int w = 0; w < warps; ++w) {
        all.merge(
            counts[w], [&](int) { return memory[w * kColumns + n]; },
            [&](int) { return m2s[w * kColumns + n]; });
      }
      const int64_t i = partials.at(blockIdx.x, first_output + n);
      partials.first[i] = all.mean[0];
      partials.second[i] = all.m2[0];
    }
  }
};

// sums = relu(norm(sums)), as an operand of the next product.
template <typename T, int kRowTiles, int kTiles>
__device__ void fold(float (&sums)[kRowTiles][kTiles][4], const FoldedNorm& norm, int first_output,
                     int outputs) {
  const int own = first_output + 4 * (threadIdx.x % kPieces);
#pragma unroll
  for (int pair = 0; pair < kTiles / 2; ++pair) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int n = own + pair * 2 * kTileColumns + k;
      if (n >= outputs) continue;
      const float scale = norm.scale[n], bias = norm.bias[n];
#pragma unroll
      for (int r = 0; r < 2 * kRowTiles; ++r) {
        float& sum = sums[r / 2][2 * pair + k / 2][r % 2 * 2 + k % 2];
        sum = relu(fma(sum, scale, bias));
        if constexpr (std::is_same_v<T, float>) sum = to_operand(sum);
      }
    }
  }
}

// Stores the tile whose row of this lane is `row`, the rows from `end` on excepted, and sets the
// sums to 0. With a norm, relu(norm(sums)). Moments are null where nobody asks for them; between
// tiles they stay in memory, as the product needs the registers.
//
// A block comes here once or twice, so what takes its time is loading the instructions. What only
// odd shapes need is out of the way of the others: kWhole, all rows and pieces of columns exist.
template <typename T, int kRowTiles, int kTiles>
__device__ void store_tile(float (&sums)[kRowTiles][kTiles][4], const Rows<T>& to, int64_t row,
                           int64_t end, int first_output, int outputs, const FoldedNorm& norm,
                           WarpMoments<kTiles>* moments) {
  constexpr int kOwnRows = 2 * kRowTiles;
  if (norm.scale != nullptr) fold<T>(sums, norm, first_output, outputs);
  typename WarpMoments<kTiles>::Tile_ tile;
#pragma unroll
  for (int r = 0; r < kOwnRows; ++r) tile.count += row + r * 8 < end;
  const bool full = __all_sync(~0u, tile.count == kOwnRows);
  const int own = first_output + 4 * (threadIdx.x % kPieces);
  T* const first = to.at(row, own);
  const int64_t apart = 8 * to.stride;
  const auto store_pairs = [&](auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    const float share = kWhole ? 1.0f / kOwnRows : 1 / fmaxf(tile.count, 1);
#pragma unroll
    for (int pair = 0; pair < kTiles / 2; ++pair) {
      const int place = pair * 2 * kTileColumns;
      Words<T, 4> values[kOwnRows];
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) {
        const float* const left = sums[r / 2][2 * pair] + r % 2 * 2;
        const float* const right = sums[r / 2][2 * pair + 1] + r % 2 * 2;
        values[r].put(0, left[0], left[1]);
        values[r].put(2, right[0], right[1]);
        T* const at = first + r * apart + place;
        if constexpr (kWhole) {
          if (own + place < outputs) *reinterpret_cast<Words<T, 4>*>(at) = values[r];
        } else if (row + r * 8 < end) {
          store_row(at, values[r], to.aligned, count_before<4>(outputs, own + place));
        } else {
          values[r] = r == 0 ? Words<T, 4>{} : values[0];  // which adds nothing below
        }
      }
      if (moments == nullptr) continue;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        // Relative to the first of so few rows, the squares' sum loses no digits.
        const float shift = values[0].get(k);
        float sum = 0, squares = 0;
#pragma unroll
        for (int r = 1; r < kOwnRows; ++r) {
          const float delta = values[r].get(k) - shift;
          sum += delta;
          squares = fma(delta, delta, squares);
        }
        const float mean = sum * share;
        tile.mean[4 * pair + k] = shift + mean;
        tile.m2[4 * pair + k] = fma(-mean, sum, squares);
      }
    }
  };
  if (full && to.aligned && outputs % 4 == 0) {
    store_pairs(std::true_type{});
  } else {
    store_pairs(std::false_type{});
  }
  if (moments != nullptr) {
    tile.merge_all_lanes();
    moments->add(tile);
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[m][j][k] = 0;
    }
  }
}

}  // namespace efficient_densenet::cuda
