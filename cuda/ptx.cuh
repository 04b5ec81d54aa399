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

__device__ __forceinline__ void Load(const void* from, float2& to) {
  asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(to.x), "=f"(to.y) : "l"(from));
}

__device__ __forceinline__ void Load(const void* from, float4& to) {
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(to.x), "=f"(to.y), "=f"(to.z), "=f"(to.w)
               : "l"(from));
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

// 9.7.14, mma.m16n8k16: sums += a b, of bfloat16 pairs. Products are exact, sums are
// float32, their roundings the tensor core's own. With g = lane / 4 and t = lane % 4 a
// lane has of a (16 x 16) rows g and g + 8, of b (16 x 8) column g: pairs 2 t and
// 2 t + 8; and of the sums (16 x 8) columns 2 t and 2 t + 1 of rows g and g + 8.
__device__ __forceinline__ void MultiplyAdd(float (&sums)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// No instruction: hides a value's origin from the compiler, which then computes what
// follows from it again instead of keeping it in registers.
__device__ __forceinline__ void HideOrigin(int64_t& x) { asm volatile("" : "+l"(x)); }

__device__ __forceinline__ void HideOrigin(float& x) { asm volatile("" : "+f"(x)); }

__device__ __forceinline__ void HideOrigin(uint4& x) {
  asm volatile("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w));
}

__device__ __forceinline__ void HideOrigin(uint2& x) {
  asm volatile("" : "+r"(x.x), "+r"(x.y));
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_PTX_CUH_
