// What one decode call is, for every kernel: plain pointers and sizes.
//
// Axis letters: B sequences, H query/key heads, HV value heads, K and V head
// sizes. Value head j reads key head j / (HV / H).
#ifndef JAX_GDN_FFI_DECODE_PARAMS_H_
#define JAX_GDN_FFI_DECODE_PARAMS_H_

#include <cstdint>

namespace jax_gdn {

// Storage types. All arithmetic is float32, whatever is stored.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A dense row-major array whose storage type is known at run time.
struct Input {
  const void* data;
  DType dtype;
};

struct Output {
  void* data;
  DType dtype;
};

struct DecodeParams {
  Input q;             // [B, 1, H, K]
  Input k;             // [B, 1, H, K]
  Input v;             // [B, 1, HV, V]
  Input a;             // [B, 1, HV]
  Input dt_bias;       // [HV]
  Input b;             // [B, 1, HV]
  const float* A_log;  // [HV]
  float* state;        // [B, HV, K, V], read and written in place
  Output out;          // [B, 1, HV, V]
  int64_t B;
  int32_t H, HV, K, V;
  int32_t group;           // HV / H, value heads that share a key head
  uint32_t group_inverse;  // ceil(2^32 / group) mod 2^32, for division by multiplying
  float scale;             // on q, after its normalisation
  bool use_qk_l2norm;      // q and k become x / sqrt(sum x^2 + kNormEpsilon)
};

inline constexpr float kNormEpsilon = 1e-6f;

}  // namespace jax_gdn

#endif  // JAX_GDN_FFI_DECODE_PARAMS_H_
