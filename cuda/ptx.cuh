// Every line of inline assembly, one function an instruction (PTX ISA 9.0).
//
// Loads are volatile so that they are issued where they stand in the source. Sunk
// behind the arrival of another, one would cost a memory latency, 0.5 us a call at B
// = 1.
#ifndef JAX_GDN_CUDA_PTX_CUH_
#define JAX_GDN_CUDA_PTX_CUH_

#include <cstdint>

namespace jax_gdn {

// 9.7.9.8, ld.global
__device__ __forceinline__ void Load(const void* from, uint16_t& to) {
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(to) : "l"(from));
}

template <typename T>
__device__ __forceinline__ void Load(const void* from, T& to) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(bits) : "l"(from));
  to = reinterpret_cast<const T&>(bits);
}

__device__ __forceinline__ void Load(const void* from, uint2& to) {
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(to.x), "=r"(to.y) : "l"(from));
}

__device__ __forceinline__ void Load(const void* from, uint4& to) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
               : "l"(from));
}

// The same, leaving the caches early (.cs, "likely accessed once").
__device__ __forceinline__ void LoadStreaming(const void* from, uint4& to) {
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
               : "l"(from));
}

__device__ __forceinline__ void LoadStreaming(const void* from, uint2& to) {
  asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];"
               : "=r"(to.x), "=r"(to.y)
               : "l"(from));
}

// 9.7.13.1, named barriers of kThreads threads: producers arrive, consumers sync.
// Number 0 is that of __syncthreads.
template <int kThreads>
__device__ __forceinline__ void ArriveAtBarrier() {
  asm volatile("bar.arrive 1, %0;" : : "n"(kThreads) : "memory");
}

template <int kNumber, int kThreads>
__device__ __forceinline__ void SyncAtBarrier() {
  asm volatile("bar.sync %0, %1;" : : "n"(kNumber), "n"(kThreads) : "memory");
}

// 9.7.9.25 (asynchronous copy), cp.async.bulk.prefetch: of bytes, a multiple of 16, to
// the L2 cache.
__device__ __forceinline__ void PrefetchBulk(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" : : "l"(from), "r"(bytes));
}

// No instruction: hides a value's origin from the compiler, which then computes what
// follows from it again instead of keeping it in registers.
__device__ __forceinline__ void HideOrigin(int64_t& x) { asm volatile("" : "+l"(x)); }

__device__ __forceinline__ void HideOrigin(uint4& x) {
  asm volatile("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w));
}

__device__ __forceinline__ void HideOrigin(uint2& x) {
  asm volatile("" : "+r"(x.x), "+r"(x.y));
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_PTX_CUH_
