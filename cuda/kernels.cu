// The table of kernels, and their definitions.
//
// Tuned at K = 128 on an H200 and an H100: small tiles for few states, large ones for
// many. Other head sizes have one kernel a layout and dtype, for any number of tokens.
#include "cuda/deferred.cuh"
#include "cuda/kv.cuh"
#include "cuda/vk.cuh"

namespace jax_gdn {
namespace {

using enum Layout;
using enum DType;
using enum Caching;

template <KernelSpec kSpec>
using TileOf = std::conditional_t<
    kSpec.deferred, DeferredTile<kSpec>,
    std::conditional_t<kSpec.layout == kKV, KVTile<kSpec>, VKTile<kSpec>>>;

template <KernelSpec kSpec>
__device__ __forceinline__ void Run(const DecodeParams& p) {
  if constexpr (kSpec.deferred) {
    DecodeDeferred<kSpec>(p);
  } else {
    Decode<TileOf<kSpec>>(p);
  }
}

}  // namespace

// clang-format off
#define JAX_GDN_KERNELS(X)                                                             \
  X(gdn_kv_f32_k128_vt16_c2_token, .layout = kKV, .state = kFloat32, .columns = 2,     \
    .single_token = true, .caching = kStreaming, .max_states = 64)                     \
  X(gdn_kv_f32_k128_vt16_c4_token, .layout = kKV, .state = kFloat32,                   \
    .row_groups = 8, .single_token = true, .caching = kStreaming,                      \
    .max_states = 128)                                                                 \
  X(gdn_kv_f32_k128_vt32_token, .layout = kKV, .state = kFloat32, .VT = 32,            \
    .single_token = true, .prefetch_distance = 6, .prefetch_first = true,              \
    .max_states = 256)                                                                 \
  X(gdn_kv_f32_k128_vt64_token, .layout = kKV, .state = kFloat32, .VT = 64,            \
    .single_token = true, .min_blocks = 2, .prefetch_distance = 1,                     \
    .prefetch_first = true)                                                            \
  X(gdn_kv_bf16_k128_vt32_token, .layout = kKV, .state = kBFloat16, .VT = 32,          \
    .single_token = true, .caching = kStreaming, .max_states = 128)                    \
  X(gdn_kv_bf16_k128_vt64_token, .layout = kKV, .state = kBFloat16, .VT = 64,          \
    .row_groups = 8, .single_token = true, .min_blocks = 4, .prefetch_distance = 4,    \
    .max_states = 4096)                                                                \
  X(gdn_kv_bf16_k128_vt128_token, .layout = kKV, .state = kBFloat16, .VT = 128,        \
    .row_groups = 8, .single_token = true, .min_blocks = 2, .prefetch_distance = 1)    \
  X(gdn_kv_f32_k128_vt16_token_channel, .layout = kKV, .state = kFloat32,              \
    .columns = 2, .single_token = true, .per_channel = true, .caching = kStreaming,    \
    .max_states = 64)                                                                  \
  X(gdn_kv_f32_k128_vt64_token_channel, .layout = kKV, .state = kFloat32, .VT = 64,    \
    .single_token = true, .per_channel = true, .min_blocks = 2,                        \
    .prefetch_distance = 1, .prefetch_first = true)                                    \
  X(gdn_kv_bf16_k128_vt64_token_channel, .layout = kKV, .state = kBFloat16,            \
    .VT = 64, .row_groups = 8, .single_token = true, .per_channel = true,              \
    .min_blocks = 4, .prefetch_distance = 4)                                           \
  X(gdn_kv_f32_k128_vt16_tokens, .layout = kKV, .state = kFloat32, .columns = 2,       \
    .caching = kStreaming, .max_states = 64)                                           \
  X(gdn_kv_f32_k128_vt64_tokens, .layout = kKV, .state = kFloat32, .VT = 64,           \
    .row_groups = 8, .min_blocks = 4)                                                  \
  X(gdn_kv_bf16_k128_vt16_tokens, .layout = kKV, .state = kBFloat16,                   \
    .caching = kStreaming, .max_states = 32)                                           \
  X(gdn_kv_bf16_k128_vt64_tokens, .layout = kKV, .state = kBFloat16, .VT = 64,         \
    .row_groups = 8, .min_blocks = 4)                                                  \
  X(gdn_kv_f16_k128_vt16_tokens, .layout = kKV, .state = kFloat16,                     \
    .caching = kStreaming, .max_states = 32)                                           \
  X(gdn_kv_f16_k128_vt64_tokens, .layout = kKV, .state = kFloat16, .VT = 64,           \
    .row_groups = 8, .min_blocks = 4)                                                  \
  X(gdn_kv_f32_k64_tokens, .layout = kKV, .state = kFloat32, .K = 64)                  \
  X(gdn_kv_bf16_k64_tokens, .layout = kKV, .state = kBFloat16, .K = 64)                \
  X(gdn_kv_f16_k64_tokens, .layout = kKV, .state = kFloat16, .K = 64)                  \
  X(gdn_kv_f32_k192_tokens, .layout = kKV, .state = kFloat32, .K = 192)                \
  X(gdn_kv_bf16_k192_tokens, .layout = kKV, .state = kBFloat16, .K = 192)              \
  X(gdn_kv_f16_k192_tokens, .layout = kKV, .state = kFloat16, .K = 192)                \
  X(gdn_kv_f32_k256_tokens, .layout = kKV, .state = kFloat32, .K = 256)                \
  X(gdn_kv_bf16_k256_tokens, .layout = kKV, .state = kBFloat16, .K = 256)              \
  X(gdn_kv_f16_k256_tokens, .layout = kKV, .state = kFloat16, .K = 256)                \
  X(gdn_vk_f32_k128_vt16_r4_token, .layout = kVK, .state = kFloat32,                   \
    .single_token = true, .caching = kStreaming, .max_states = 128)                    \
  X(gdn_vk_f32_k128_vt16_r2_token, .layout = kVK, .state = kFloat32,                   \
    .warp_rows = 2, .single_token = true, .min_blocks = 7, .prefetch_distance = 7,     \
    .max_states = 1024)                                                                \
  X(gdn_vk_f32_k128_vt32_token, .layout = kVK, .state = kFloat32, .VT = 32,            \
    .warp_rows = 2, .single_token = true, .min_blocks = 3, .prefetch_distance = 4)     \
  X(gdn_vk_bf16_k128_vt16_token, .layout = kVK, .state = kBFloat16,                    \
    .single_token = true, .caching = kStreaming, .max_states = 128)                    \
  X(gdn_vk_bf16_k128_vt32_token, .layout = kVK, .state = kBFloat16, .VT = 32,          \
    .warp_rows = 8, .single_token = true, .min_blocks = 6, .prefetch_distance = 5,     \
    .prefetch_first = true)                                                            \
  X(gdn_vk_f32_k128_vt16_token_channel, .layout = kVK, .state = kFloat32,              \
    .single_token = true, .per_channel = true, .caching = kStreaming,                  \
    .max_states = 128)                                                                 \
  X(gdn_vk_f32_k128_vt32_token_channel, .layout = kVK, .state = kFloat32, .VT = 32,    \
    .warp_rows = 2, .single_token = true, .per_channel = true, .min_blocks = 3,        \
    .prefetch_distance = 4)                                                            \
  X(gdn_vk_bf16_k128_vt32_token_channel, .layout = kVK, .state = kBFloat16,            \
    .VT = 32, .warp_rows = 8, .single_token = true, .per_channel = true,               \
    .min_blocks = 6, .prefetch_distance = 5, .prefetch_first = true)                   \
  X(gdn_vk_f32_k128_vt16_tokens, .layout = kVK, .state = kFloat32, .min_blocks = 4,    \
    .max_states = 64)                                                                  \
  X(gdn_vk_f32_k128_vt64_tokens, .layout = kVK, .state = kFloat32, .VT = 64,           \
    .warp_rows = 16, .min_blocks = 4)                                                  \
  X(gdn_vk_bf16_k128_vt16_tokens, .layout = kVK, .state = kBFloat16,                   \
    .min_blocks = 4, .max_states = 64)                                                 \
  X(gdn_vk_bf16_k128_vt64_tokens, .layout = kVK, .state = kBFloat16, .VT = 64,         \
    .warp_rows = 16, .min_blocks = 4)                                                  \
  X(gdn_vk_f16_k128_vt16_tokens, .layout = kVK, .state = kFloat16, .min_blocks = 4,    \
    .max_states = 64)                                                                  \
  X(gdn_vk_f16_k128_vt64_tokens, .layout = kVK, .state = kFloat16, .VT = 64,           \
    .warp_rows = 16, .min_blocks = 4)                                                  \
  X(gdn_vk_f32_k64_tokens, .layout = kVK, .state = kFloat32, .K = 64,                  \
    .min_blocks = 4)                                                                   \
  X(gdn_vk_bf16_k64_tokens, .layout = kVK, .state = kBFloat16, .K = 64,                \
    .min_blocks = 4)                                                                   \
  X(gdn_vk_f16_k64_tokens, .layout = kVK, .state = kFloat16, .K = 64,                  \
    .min_blocks = 4)                                                                   \
  X(gdn_vk_f32_k192_tokens, .layout = kVK, .state = kFloat32, .K = 192,                \
    .min_blocks = 3)                                                                   \
  X(gdn_vk_bf16_k192_tokens, .layout = kVK, .state = kBFloat16, .K = 192,              \
    .min_blocks = 3)                                                                   \
  X(gdn_vk_f16_k192_tokens, .layout = kVK, .state = kFloat16, .K = 192,                \
    .min_blocks = 3)                                                                   \
  X(gdn_vk_f32_k256_tokens, .layout = kVK, .state = kFloat32, .K = 256,                \
    .min_blocks = 4)                                                                   \
  X(gdn_vk_bf16_k256_tokens, .layout = kVK, .state = kBFloat16, .K = 256,              \
    .min_blocks = 4)                                                                   \
  X(gdn_vk_f16_k256_tokens, .layout = kVK, .state = kFloat16, .K = 256,                \
    .min_blocks = 4) \
  X(gdn_kv_f32_k128_vt64_deferred_token, .layout = kKV,                                \
    .state = kFloat32, .VT = 64, .single_token = true, .deferred = true,               \
    .min_blocks = 4, .prefetch_distance = 2)                                           \
  X(gdn_kv_f32_k128_vt64_deferred_tokens, .layout = kKV,                               \
    .state = kFloat32, .VT = 64, .deferred = true,                                     \
    .min_blocks = 4, .prefetch_distance = 1)                                           \
  X(gdn_kv_bf16_k128_vt64_deferred_token, .layout = kKV,                               \
    .state = kBFloat16, .VT = 64, .single_token = true, .deferred = true,              \
    .min_blocks = 4, .prefetch_distance = 3)                                           \
  X(gdn_kv_bf16_k128_vt64_deferred_tokens, .layout = kKV,                              \
    .state = kBFloat16, .VT = 64, .deferred = true,                                    \
    .min_blocks = 4, .prefetch_distance = 2)                                           \
  X(gdn_kv_f16_k128_vt64_deferred_token, .layout = kKV,                                \
    .state = kFloat16, .VT = 64, .single_token = true, .deferred = true,               \
    .min_blocks = 4, .prefetch_distance = 3)                                           \
  X(gdn_kv_f16_k128_vt64_deferred_tokens, .layout = kKV,                               \
    .state = kFloat16, .VT = 64, .deferred = true,                                     \
    .min_blocks = 4, .prefetch_distance = 2)                                           \
  X(gdn_vk_f32_k128_vt64_deferred_token, .layout = kVK,                                \
    .state = kFloat32, .VT = 64, .single_token = true, .deferred = true,               \
    .min_blocks = 4, .prefetch_distance = 3)                                           \
  X(gdn_vk_f32_k128_vt64_deferred_tokens, .layout = kVK,                               \
    .state = kFloat32, .VT = 64, .deferred = true,                                     \
    .min_blocks = 4, .prefetch_distance = 1)                                           \
  X(gdn_vk_bf16_k128_vt64_deferred_token, .layout = kVK,                               \
    .state = kBFloat16, .VT = 64, .single_token = true, .deferred = true,              \
    .min_blocks = 4, .prefetch_distance = 3)                                           \
  X(gdn_vk_bf16_k128_vt64_deferred_tokens, .layout = kVK,                              \
    .state = kBFloat16, .VT = 64, .deferred = true,                                    \
    .min_blocks = 4, .prefetch_distance = 2)                                           \
  X(gdn_vk_f16_k128_vt64_deferred_token, .layout = kVK,                                \
    .state = kFloat16, .VT = 64, .single_token = true, .deferred = true,               \
    .min_blocks = 4, .prefetch_distance = 3)                                           \
  X(gdn_vk_f16_k128_vt64_deferred_tokens, .layout = kVK,                               \
    .state = kFloat16, .VT = 64, .deferred = true,                                     \
    .min_blocks = 4, .prefetch_distance = 2)
// clang-format on

// A kernel under a name that reads well in a profiler.
#define JAX_GDN_DEFINE(name, ...)                    \
  extern "C" __global__ void __launch_bounds__(      \
      (TileOf<KernelSpec{__VA_ARGS__}>::kThreads),   \
      (KernelSpec{__VA_ARGS__}.min_blocks))          \
      name(const __grid_constant__ DecodeParams p) { \
    Run<KernelSpec{__VA_ARGS__}>(p);                 \
  }
#define JAX_GDN_LIST(name, ...)                 \
  {#name, reinterpret_cast<const void*>(&name), \
   TileOf<KernelSpec{__VA_ARGS__}>::kThreads, KernelSpec{__VA_ARGS__}},

JAX_GDN_KERNELS(JAX_GDN_DEFINE)

std::span<const Kernel> Kernels() {
  static const Kernel kernels[] = {JAX_GDN_KERNELS(JAX_GDN_LIST)};
  return kernels;
}

}  // namespace jax_gdn
