// What the tensor-core kernels are compiled for, and what a device allows.
#pragma once

#include <atomic>
#include <iterator>

#include "cuda/tensor_core/fragments.cuh"

namespace efficient_densenet::cuda {

// Numbers of tiles of 8 columns that kernels exist for; even, for pairs.
constexpr int kTileCounts[] = {4, 6, 8, 12, 16, 24, 32};

// The fewest that hold so many outputs.
inline int tiles_for(int64_t outputs) {
  for (const int tiles : kTileCounts) {
    if (tiles * kTileColumns >= outputs) return tiles;
  }
  fail("efficient_densenet", "tensor-core kernels: too many outputs: ", outputs);
}

// Calls body(tiles) with one of kTileCounts as a type.
template <int kIndex = 0, typename Body>
void dispatch_tiles(int tiles, const Body& body) {
  if constexpr (kIndex < std::size(kTileCounts)) {
    constexpr int kTiles = kTileCounts[kIndex];
    if (tiles == kTiles) return body(std::integral_constant<int, kTiles>{});
    dispatch_tiles<kIndex + 1>(tiles, body);
  }
}

// Groups of columns of a 1x1 convolution's outputs, which blocks share: see conv1x1_forward.cu.
struct OutputGroups {
  int groups, tiles;  // tiles of 8 columns in a group

  OutputGroups(int64_t rows, int64_t outputs) : groups(1) {
    while (rows * groups < 16384 && groups < 4 && outputs > 32 * groups) groups *= 2;
    tiles = tiles_for(ceil_div(outputs, groups));
  }
};

template <typename Body>
void dispatch_operand(Element element, const Body& body) {
  EFFICIENT_DENSENET_CHECK(!is_double(element), "efficient_densenet",
                           "tensor-core kernels: no float64");
  dispatch_element(element, [&](auto tag) {
    if constexpr (!std::is_same_v<decltype(tag), double>) body(tag);
  });
}

// Makes a device the current one for as long as it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(index), "cudaSetDevice");
  }
  ~CurrentDevice() { cudaSetDevice(before_); }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
};

// Bytes of shared memory that a block is to have on the current device. In conv1x1_forward.cu.
int64_t shared_memory();

constexpr int kKnownDevices = 64;  // those beyond are asked every time

// Lets a kernel have all that the device allows; asked once per kernel and device.
template <auto kKernel>
void allow_shared() {
  static std::atomic<uint64_t> allowed{0};  // one bit per device
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const uint64_t bit = device < kKnownDevices ? uint64_t(1) << device : 0;
  if (allowed.load() & bit) return;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
        "cudaFuncSetAttribute");
  allowed |= bit;
}

}  // namespace efficient_densenet::cuda
