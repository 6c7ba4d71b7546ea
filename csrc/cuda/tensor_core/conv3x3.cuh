// Shared by the kernels of 3x3 convolutions (bn_relu_conv3x3*.cu): rows of images in shared memory,
// with those around them, and which taps of a row lie inside its image.
//
// A block's rows first .. first + R - 1 and their neighbours are one stretch of rows, from
// first - W - 1 on, in chunks of 64 bytes of each row (32 channels of 16 bits, 16 of TF32):
//
//   stretch row s = i + dy W + dx,  dy, dx in 0 .. 2, holds tap (dy, dx) of the block's row i
//
// A row's four pieces of 16 bytes change places from row to row (`place`), so that the same piece
// of 8 rows next to each other, or four words of 4 rows, lie in different banks. A tap outside the
// image reads a row of zeros instead.
#pragma once

#include "cuda/tensor_core/copies.cuh"
#include "cuda/tensor_core/limits.cuh"
#include "operators/bn_relu_conv3x3.h"

namespace efficient_densenet::cuda {

constexpr int kTaps = 9;

struct ImageRows {
  int64_t rows;  // M
  int height, width;

  ImageRows(const KernelArgs& args, const ImageSize& image)
      : rows(args.rows.count),
        height(static_cast<int>(image.height)),
        width(static_cast<int>(image.width)) {}

  // Rows of the stretch around so many.
  __host__ __device__ int stretch(int block_rows) const { return block_rows + 2 * width + 2; }

  // First row of the stretch around rows from `first` on.
  __device__ int64_t stretch_begin(int64_t first) const { return first - width - 1; }

  __device__ int shift(int tap) const { return tap / 3 * width + tap % 3; }

  // One bit per tap of a row: whether it is in the image. None from `end` on.
  __device__ uint32_t taps_inside(int64_t row, int64_t end) const {
    if (row >= end) return 0;
    const auto pixel = static_cast<uint32_t>(row % (static_cast<int64_t>(height) * width));
    const int y = static_cast<int>(pixel / width), x = static_cast<int>(pixel % width);
    const uint32_t line = (x > 0 ? 1u : 0u) | 2u | (x + 1 < width ? 4u : 0u);
    return (y > 0 ? line : 0u) | line << 3 | (y + 1 < height ? line << 6 : 0u);
  }
};

// Where piece p of stretch row s is, in pieces.
__device__ inline int swizzled(int s, int p) {
  return s * kPieces + (p ^ ((s & 2) | (s >> 2 & 1)));
}

// Tiles of 8 columns that there are kernels for; even, for pairs.
constexpr int kMaxConv3x3Tiles = 8;

// The columns of a product in groups of so many tiles: one group of k outputs, or groups of up to
// 64 of the B channels; 32 where a device has too little shared memory for two stages of that.
inline int conv3x3_tiles(bool grad_input, int64_t columns) {
  constexpr int64_t kEnough = 128 << 10;
  if (grad_input && columns > 32 && shared_memory() < kEnough) return 4;
  if (grad_input && columns > 48) return 8;
  return static_cast<int>(2 * ceil_div(std::min<int64_t>(columns, 64), 2 * kTileColumns));
}

// Calls body(tiles) with 2, 4, 6 or 8 as a type.
template <int kTiles = 2, typename Body>
void dispatch_conv3x3_tiles(int tiles, const Body& body) {
  if (tiles <= kTiles || kTiles == kMaxConv3x3Tiles) {
    return body(std::integral_constant<int, kTiles>{});
  }
  if constexpr (kTiles < kMaxConv3x3Tiles) dispatch_conv3x3_tiles<kTiles + 2>(tiles, body);
}

// Shared memory of the smallest blocks of the gradients' kernels.
int64_t conv3x3_grad_input_bytes(Element element, int64_t outputs, int64_t channels, int64_t width);
int64_t conv3x3_grad_weight_bytes(Element element, int64_t outputs, int64_t width);

// Warps of a block, and tiles of 16 rows of each.
struct RowCut {
  int warps, row_tiles;

  int rows() const { return warps * row_tiles * kTileRows; }
};

constexpr int kMaxRowWarps = 8, kMaxRowTiles = 2;

// The cut whose busiest multiprocessor of a large GPU has the fewest rows, those around each tile
// and an allowance for what a tile costs besides counted in. fits(cut): shared memory is enough.
template <typename Fits>
RowCut choose_row_cut(int64_t rows, int64_t width, const Fits& fits) {
  constexpr int64_t kMultiprocessors = 132, kAllowance = 64;
  const auto cost = [&](const RowCut& cut) {
    const int64_t tiles = ceil_div(ceil_div(rows, cut.rows()), kMultiprocessors);
    return tiles * (cut.rows() + 2 * width + 2 + kAllowance);
  };
  RowCut best{4, 1};
  for (const RowCut& cut : {RowCut{8, 1}, RowCut{8, 2}}) {
    if (cost(cut) <= cost(best) && fits(cut)) best = cut;
  }
  return best;
}

// Pieces of the weight of one chunk of channels and one group of columns:
// [tap][step][pair of tiles][lane]. A piece holds the step's operands of both tiles.
template <int kTiles>
constexpr int kConv3x3Stage = kTaps * kTiles * kWarp;

#ifdef EFFICIENT_DENSENET_TENSOR_CORES

// Copies a chunk of the stretch around rows from `tile` on. A thread's piece is the same in all
// rows that it copies, `threads` / kPieces apart: the channels from `channel` on, of which `count`
// exist; all or none where z is `pieces_are_whole`.
template <typename T>
__device__ void copy_stretch(uint4* to, const Rows<const T>& z, const ImageRows& images,
                             int64_t tile, int stretch, int channel, int count,
                             bool pieces_are_whole, int threads) {
  const int64_t first = images.stretch_begin(tile);
  const auto begin = static_cast<int>(max(-first, int64_t(0)));
  const auto end = static_cast<int>(min(images.rows - first, int64_t(stretch)));
  const int own_row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
  const int apart = threads / kPieces;
  const T* from = z.at(first + own_row, channel);
  for (int s = own_row; s < stretch; s += apart) {
    const bool exists = s >= begin && s < end;
    if (pieces_are_whole) {
      copy_async_if<kPieceBytes>(exists && count > 0, to + swizzled(s, piece), from);
    } else {
      copy_row<kPiece<T>>(to + swizzled(s, piece), exists ? from : z.data, z.aligned,
                          exists ? count : 0);
    }
    from += apart * z.stride;
  }
}

// sums += taps of a warp's rows times the weights, over one chunk of channels. `stretch` holds the
// operands; rows begin at stretch row `first`, and `inside` are the taps of the lane's row of each
// tile: row lane % 16.
template <typename T, int kRowTiles, int kTiles>
__device__ void multiply_taps(float (&sums)[kRowTiles][kTiles][4], const uint4* stretch,
                              const uint4* zeros, const uint4* weight, const ImageRows& images,
                              int first, const uint32_t (&inside)[kRowTiles], int steps) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t begin = shared_address(stretch);
  const uint32_t outside = shared_address(zeros) + lane / 16 * kPieceBytes;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    // Tiles are a multiple of 8 rows apart, after which places repeat.
    const uint32_t own =
        begin + swizzled(first + lane % 16 + images.shift(tap), lane / 16) * kPieceBytes;
    uint32_t from[kRowTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      from[m] = inside[m] >> tap & 1 ? own + m * kTileRows * kPieces * kPieceBytes : outside;
    }
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      if (step == steps) break;
      uint4 b[kTiles / 2];
#pragma unroll
      for (int pair = 0; pair < kTiles / 2; ++pair) {
        b[pair] = weight[((tap * 2 + step) * (kTiles / 2) + pair) * kWarp + lane];
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        uint32_t a[4];
        // The second step's pieces are two places on, which `place` makes an exclusive or.
        load_matrices(a, from[m] ^ (step * 2 * kPieceBytes));
#pragma unroll
        for (int pair = 0; pair < kTiles / 2; ++pair) {
          mma<T>(sums[m][2 * pair], a, {b[pair].x, b[pair].y});
          mma<T>(sums[m][2 * pair + 1], a, {b[pair].z, b[pair].w});
        }
      }
    }
  }
}

#endif

}  // namespace efficient_densenet::cuda
