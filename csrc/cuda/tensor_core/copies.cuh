// Copies of the tensor-core kernels: rows of global memory to shared memory ahead of their use, and
// results back.
#pragma once

#include "cuda/tensor_core/fragments.cuh"

namespace efficient_densenet::cuda {

#ifdef EFFICIENT_DENSENET_TENSOR_CORES

// 16 or 8 bytes from global to shared memory, of which `count` are read and the others are 0.
template <int kBytes = kPieceBytes>
__device__ void copy_async(void* to, const void* from, int count = kBytes) {
  if constexpr (kBytes == kPieceBytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(count)
                 : "memory");
  } else {
    static_assert(kBytes == 8);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(count)
                 : "memory");
  }
}
// The same where the condition holds; else all bytes are 0.
template <int kBytes>
__device__ void copy_async_if(bool condition, void* to, const void* from) {
  if constexpr (kBytes == kPieceBytes) {
    asm volatile(
        "{.reg .pred none; setp.eq.s32 none, %2, 0; "
        "cp.async.cg.shared.global [%0], [%1], 16, none;}" ::"r"(shared_address(to)),
        "l"(from), "r"(static_cast<int>(condition))
        : "memory");
  } else {
    static_assert(kBytes == 8);
    asm volatile(
        "{.reg .pred none; setp.eq.s32 none, %2, 0; "
        "cp.async.ca.shared.global [%0], [%1], 8, none;}" ::"r"(shared_address(to)),
        "l"(from), "r"(static_cast<int>(condition))
        : "memory");
  }
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the `kPending` youngest groups of this thread have arrived.
template <int kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ inline void wait_for_all_but(int pending) {
  if (pending >= 2) return wait_for_copies<2>();
  if (pending == 1) return wait_for_copies<1>();
  wait_for_copies<0>();
}

#endif

// Whether rows can be read in aligned pieces; else their elements are read one by one.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  bool aligned;

  __host__ explicit Rows(const View& view, int access = kPieceBytes / sizeof(T))
      : data(static_cast<T*>(view.data)),
        stride(view.row_strides[0]),
        aligned(reinterpret_cast<uintptr_t>(view.data) % (access * sizeof(T)) == 0 &&
                stride % access == 0) {}

  __device__ T* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

#ifdef EFFICIENT_DENSENET_TENSOR_CORES

// k elements of a row into shared memory; those from `count` on are 0 and not read.
template <int k, typename T>
__device__ __forceinline__ void copy_row(void* to, const T* from, bool aligned, int count) {
  if (aligned) return copy_async<k * sizeof(T)>(to, from, count * static_cast<int>(sizeof(T)));
  Pack<T, k> pack{};
#pragma unroll
  for (int i = 0; i < k; ++i) {
    if (i < count) pack.values[i] = from[i];
  }
  *static_cast<Pack<T, k>*>(to) = pack;
}

#endif

#ifdef EFFICIENT_DENSENET_TENSOR_CORES

// Brings columns [column, column + columns) of `count` rows, those from `end` on excepted, into the
// L2 cache: a line of it per lane of the warp.
template <typename T>
__device__ void prefetch_rows(const Rows<const T>& rows, int64_t row, int count, int64_t end,
                              int64_t column, int columns) {
  constexpr int kLine = 128 / sizeof(T);
  const int lines = (columns + kLine - 1) / kLine;
  for (int i = threadIdx.x % kWarp; i < count * lines; i += kWarp) {
    if (row + i / lines >= end) continue;
    asm volatile(
        "prefetch.global.L2 [%0];" ::"l"(rows.at(row + i / lines, column + i % lines * kLine)));
  }
}

#endif

// How many of k elements lie before `end`.
template <int k>
__device__ int count_before(int end, int first) {
  return min(max(end - first, 0), k);
}

// k elements to and from a row; those from `count` on are not touched, and 0 where they are read.
template <int k, typename T>
__device__ __forceinline__ void store_row(T* to, const Words<T, k>& values, bool aligned,
                                          int count) {
  if (aligned && count == k) {
    *reinterpret_cast<Words<T, k>*>(to) = values;
    return;
  }
  const Pack<T, k> elements = as_pack(values);
#pragma unroll
  for (int i = 0; i < k; ++i) {
    if (i < count) to[i] = elements.values[i];
  }
}

template <int k, typename T>
__device__ __forceinline__ Words<T, k> load_row(const T* from, bool aligned, int count) {
  if (aligned && count == k) return *reinterpret_cast<const Words<T, k>*>(from);
  Pack<T, k> elements{};
#pragma unroll
  for (int i = 0; i < k; ++i) {
    if (i < count) elements.values[i] = from[i];
  }
  return as_words(elements);
}

}  // namespace efficient_densenet::cuda
