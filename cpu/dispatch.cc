#include <atomic>
#include <cstring>

#include "cpu/state_kernel.h"

namespace jax_gdn {

#define JAX_GDN_DECLARE(isa)                                                      \
  namespace isa {                                                                 \
  void Decode(const DecodeJob& job);                                              \
  void RunQueries(const QueryJob& job);                                           \
  void Widen(const Input& x, int64_t first, int64_t count, float* values);        \
  void Round(const float* values, int64_t first, int64_t count, const Output& x); \
  float Dot(const float* x, const float* y, int32_t size);                        \
  constexpr Kernels kKernels = {#isa, Decode, RunQueries, Widen, Round, Dot};     \
  }
JAX_GDN_DECLARE(plain)
#ifdef JAX_GDN_X86
JAX_GDN_DECLARE(avx2)
JAX_GDN_DECLARE(avx512)
JAX_GDN_DECLARE(avx512bf16)
#endif

std::vector<const Kernels*> UsableKernels() {
  std::vector<const Kernels*> usable;
#ifdef JAX_GDN_X86
  const bool avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    usable.push_back(&avx512bf16::kKernels);
  }
  if (avx512) usable.push_back(&avx512::kKernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    usable.push_back(&avx2::kKernels);
  }
#endif
  usable.push_back(&plain::kKernels);
  return usable;
}

namespace {
std::atomic<const Kernels*>& Chosen() {
  static std::atomic<const Kernels*> chosen = UsableKernels().front();
  return chosen;
}
}  // namespace

const Kernels& ChosenKernels() { return *Chosen(); }

bool ChooseKernels(const char* name) {
  for (const Kernels* kernels : UsableKernels()) {
    if (std::strcmp(kernels->name, name) == 0) {
      Chosen() = kernels;
      return true;
    }
  }
  return false;
}

}  // namespace jax_gdn
