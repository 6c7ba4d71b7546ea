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

// How many of k elements lie before `end`.
template <int k>
__device__ int count_before(int end, int first) {
  return min(max(end - first, 0), k);
}

template <int k, typename T>
__device__ __forceinline__ void store_row(T* to, const Pack<T, k>& pack, bool aligned, int count) {
  if (aligned && count == k) {
    *reinterpret_cast<Pack<T, k>*>(to) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < k; ++i) {
    if (i < count) to[i] = pack.values[i];
  }
}

// Four elements of a row, 0 for those that do not count.
template <typename T>
__device__ Pack<T, 4> load_four(const T* from, bool aligned, int count) {
  Pack<T, 4> values{};
  if (count == 4 && aligned) return *reinterpret_cast<const Pack<T, 4>*>(from);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (k < count) values.values[k] = from[k];
  }
  return values;
}

#ifdef EFFICIENT_DENSENET_TENSOR_CORES

// Four elements in one access, which the compiler would break up in places. `to` is aligned.
template <typename T>
__device__ void store_if(bool condition, T* to, const Pack<T, 4>& pack) {
  if constexpr (sizeof(T) == 4) {
    const uint4 bits = *reinterpret_cast<const uint4*>(&pack);
    asm volatile(
        "{.reg .pred p; setp.ne.s32 p, %5, 0; @p st.global.v4.u32 [%0], {%1, %2, %3, %4};}" ::"l"(
            to),
        "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w), "r"(static_cast<int>(condition))
        : "memory");
  } else {
    static_assert(sizeof(T) == 2);
    const uint2 bits = *reinterpret_cast<const uint2*>(&pack);
    asm volatile(
        "{.reg .pred p; setp.ne.s32 p, %3, 0; @p st.global.v2.u32 [%0], {%1, %2};}" ::"l"(to),
        "r"(bits.x), "r"(bits.y), "r"(static_cast<int>(condition))
        : "memory");
  }
}

#endif

}  // namespace efficient_densenet::cuda
