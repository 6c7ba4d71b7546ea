// Packs weights: [group of columns][chunk of k] of the pieces of a stage, where k is what a product
// sums over.
//
//                   columns                  k
//   forward         outputs                  channels
//   grad input      channels                 outputs; taps in reverse order
//
// A stage of a 1x1 convolution is [column][k of the chunk]; that of a 3x3 one is in conv3x3.cuh.
// Columns of each pair of tiles are in the order of fragments.cuh.
#include "cuda/tensor_core/conv3x3.cuh"
#include "cuda/tensor_core/limits.cuh"
#include "operators/packed_weights.h"

namespace efficient_densenet::cuda {
namespace {

constexpr int kGradInputColumns = 32;  // of a group of 1x1 convolutions

// What all weights of one job have in common.
struct Shape {
  bool is_3x3, forward, is_float;
  int columns, channel_chunk;  // columns of a group; k of a chunk
  uint32_t outputs;
  int64_t own_groups, own_chunks;  // where they do not depend on the channels; else 0

  Shape() = default;
  Shape(Element element, int64_t rows, const WeightsToPack& weights)
      : is_3x3(weights.is_3x3),
        forward(weights.layout == WeightLayout::kForward),
        is_float(weights.views.is_float),
        channel_chunk(kPieces * kPieceBytes / element_size(element)),
        outputs(static_cast<uint32_t>(weights.outputs)),
        own_groups(0),
        own_chunks(0) {
    if (is_3x3) {
      columns = conv3x3_tiles(!forward, forward ? outputs : weights.channels) * kTileColumns;
      own_groups = forward ? ceil_div(outputs, columns) : 0;
      own_chunks = forward ? 0 : ceil_div(outputs, channel_chunk);
    } else if (forward) {
      const OutputGroups groups(rows, outputs);
      columns = groups.tiles * kTileColumns;
      own_groups = groups.groups;
    } else {
      columns = kGradInputColumns;
      own_chunks = ceil_div(tiles_for(outputs) * kTileColumns, channel_chunk);
    }
  }

  __host__ __device__ int64_t groups(int64_t channels) const {
    return own_groups > 0 ? own_groups : (channels + columns - 1) / columns;
  }
  __host__ __device__ int64_t chunks(int64_t channels) const {
    return own_chunks > 0 ? own_chunks : (channels + channel_chunk - 1) / channel_chunk;
  }
  __host__ __device__ int64_t elements(int64_t channels) const {
    return groups(channels) * chunks(channels) * columns * channel_chunk * (is_3x3 ? kTaps : 1);
  }
};

struct Item {
  WeightView from;
  void* to;
  uint32_t channels, shape;
};

constexpr int kMaxJobs = 3;

// A launch's kernel parameters: 4 KB on any driver, and 32 on those that CUDA 13 needs.
constexpr int kSmallList = 56;
constexpr int kLargeList = CUDART_VERSION >= 13000 ? 512 : kSmallList;

template <int size>
struct PackList {
  Shape shapes[kMaxJobs];
  ZeroMemory zeros;
  Item items[size];
};
static_assert(sizeof(PackList<kSmallList>) <= 4096 && sizeof(PackList<kLargeList>) <= 32764);

// Where an element of the packed weight comes from. All of this is in 32 bits, whose divisions are
// much faster: shared memory limits the channels to thousands.
struct Place {
  uint32_t k, column, tap;
};

__device__ Place place_of_1x1(const Shape& shape, uint32_t chunks, uint32_t i) {
  const uint32_t channel_chunk = shape.channel_chunk, columns = shape.columns;
  const uint32_t in_stage = i / channel_chunk, stage = in_stage / columns;
  const uint32_t p = in_stage % columns, pair = p / (2 * kTileColumns);
  return {stage % chunks * channel_chunk + i % channel_chunk,
          stage / chunks * columns + pair * 2 * kTileColumns + pair_column(p % (2 * kTileColumns)),
          0};
}

template <typename T>
__device__ Place place_of_3x3(const Shape& shape, uint32_t chunks, uint32_t i) {
  constexpr uint32_t kWord = 4 / sizeof(T);  // elements
  const uint32_t element = i % kPiece<T>, word = element / kWord;
  const uint32_t lane = i / kPiece<T> % kWarp, g = lane / 4, t = lane % 4;
  const uint32_t columns = shape.columns, pairs = columns / (2 * kTileColumns);
  uint32_t rest = i / kPiece<T> / kWarp;
  const uint32_t pair = rest % pairs;
  rest /= pairs;
  const uint32_t step = rest % 2;
  rest /= 2;
  const uint32_t tap = rest % kTaps;
  rest /= kTaps;
  return {
      rest % chunks * shape.channel_chunk + step * kStep<T> + word % 2 * (kStep<T> / 2) +
          t * kWord + element % kWord,
      rest / chunks * columns + pair * 2 * kTileColumns + pair_column(word / 2 * kTileColumns + g),
      shape.forward ? tap : kTaps - 1 - tap};
}

template <typename T>
__device__ float read(const Item& item, const Shape& shape, const Place& place) {
  const uint32_t n = shape.forward ? place.column : place.k;
  const uint32_t c = shape.forward ? place.k : place.column;
  if (n >= shape.outputs || c >= item.channels) return 0;
  const int64_t* const strides = item.from.strides;
  int64_t at = n * strides[0] + c * strides[1];
  if (shape.is_3x3) at += place.tap / 3 * strides[2] + place.tap % 3 * strides[3];
  return shape.is_float ? static_cast<const float*>(item.from.data)[at]
                        : widen(static_cast<const T*>(item.from.data)[at]);
}

// A row of blocks per item, and one for the zeros.
template <typename T, int size>
__global__ void __launch_bounds__(kThreads)
    pack_weights_kernel(const __grid_constant__ PackList<size> list) {
  const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  if (blockIdx.y == 0) {
    auto* const pieces = static_cast<uint4*>(list.zeros.data);
    for (uint32_t i = first; i < list.zeros.bytes / kPieceBytes; i += step) pieces[i] = {};
    return;
  }
  const Item& item = list.items[blockIdx.y - 1];
  const Shape& shape = list.shapes[item.shape];
  const auto chunks = static_cast<uint32_t>(shape.chunks(item.channels));
  const auto elements = static_cast<uint32_t>(shape.elements(item.channels));
  for (uint32_t i = first; i < elements; i += step) {
    const Place place =
        shape.is_3x3 ? place_of_3x3<T>(shape, chunks, i) : place_of_1x1(shape, chunks, i);
    static_cast<T*>(item.to)[i] = to_operand(narrow<T>(read<T>(item, shape, place)));
  }
}

template <int size>
void launch(Element element, const std::vector<Shape>& shapes, const ZeroMemory& zeros,
            const Item* items, int64_t count, void* stream) {
  PackList<size> list{};
  std::copy(shapes.begin(), shapes.end(), list.shapes);
  list.zeros = zeros;
  std::copy_n(items, count, list.items);
  int64_t most = 1;
  for (int64_t i = 0; i < count; ++i) {
    most = std::max(most, shapes[items[i].shape].elements(items[i].channels));
  }
  const dim3 grid(std::min<int64_t>(ceil_div(most, kThreads), 64), 1 + count);
  dispatch_operand(element, [&](auto tag) {
    pack_weights_kernel<decltype(tag), size>
        <<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(list);
    check(cudaGetLastError(), "pack_weights_kernel");
  });
}

}  // namespace

int64_t packed_bytes(Element element, int64_t rows, const WeightsToPack& weights, int64_t layer) {
  const Shape shape(element, rows, weights);
  return shape.elements(weights.channels + layer * weights.growth) * element_size(element);
}

void pack_weights(Element element, int64_t rows, const std::vector<PackJob>& jobs,
                  const ZeroMemory& zeros, void* stream) {
  std::vector<Shape> shapes;
  std::vector<Item> items;
  for (const auto& [weights, packed] : jobs) {
    const Shape shape(element, rows, weights);
    char* to = static_cast<char*>(packed);
    int64_t channels = weights.channels;
    for (const WeightView& view : weights.views.layers) {
      items.push_back(
          {view, to, static_cast<uint32_t>(channels), static_cast<uint32_t>(shapes.size())});
      to += shape.elements(channels) * element_size(element);
      channels += weights.growth;
    }
    shapes.push_back(shape);
  }
  const auto all = static_cast<int64_t>(items.size());
  for (int64_t first = 0; first < all; first += kLargeList) {
    const int64_t count = std::min<int64_t>(all - first, kLargeList);
    const auto launch = count <= kSmallList ? cuda::launch<kSmallList> : cuda::launch<kLargeList>;
    launch(element, shapes, first == 0 ? zeros : ZeroMemory{}, &items[first], count, stream);
  }
}

}  // namespace efficient_densenet::cuda
