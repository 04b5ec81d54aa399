#include "cpu/step.h"

namespace jax_gdn {

#define JAX_GDN_DECLARE(isa)                                                       \
  namespace isa {                                                                  \
  void DecodeStep(Layout layout, StateView from, StateView to, const Token& token, \
                  int32_t K, int32_t V);                                           \
  }
JAX_GDN_DECLARE(plain)
#ifdef JAX_GDN_X86
JAX_GDN_DECLARE(avx2)
JAX_GDN_DECLARE(avx512)
#endif

Step BestStep() {
#ifdef JAX_GDN_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return avx512::DecodeStep;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::DecodeStep;
  }
#endif
  return plain::DecodeStep;
}

}  // namespace jax_gdn
