// What one decode call is, for every kernel: plain pointers and sizes.
//
// Axis letters: B sequences, T tokens, H query/key heads, HV value heads, K and V
// head sizes, N slots of a state pool. Value head j reads key head j / (HV / H).
#ifndef JAX_GDN_COMMON_DECODE_PARAMS_H_
#define JAX_GDN_COMMON_DECODE_PARAMS_H_

#include <cstdint>

namespace jax_gdn {

// Storage types. All arithmetic is float32, whatever is stored.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Whether a state is [K, V] or [V, K].
enum class Layout : int32_t { kKV = 0, kVK = 1 };

// What a, dt_bias, A_log and b mean: the log decay g and the write strength beta.
enum class GateForm : int32_t {
  kSoftplus = 0,  // g = -exp(A_log) softplus(a + dt_bias), beta = beta_scale sigmoid(b)
  kSigmoid = 1,   // g = lower_bound sigmoid(exp(A_log) (a + dt_bias)), the same beta
  kGiven = 2      // g = a, beta = b
};

// A dense row-major array whose storage type is known at run time.
struct Input {
  const void* data;
  DType dtype;
};

struct Output {
  void* data;
  DType dtype;
};

// The tokens that `decode_deferred` has not written into the states yet: of each slot a
// ring of R entries, of which those from `first` on, `count` of them, are pending.
//
//     S  =  (product of all decays) S_0  +  sum over the entries of
//           (product of the decays after it) k u^T
struct Pending {
  void* k;       // [N, H, R, K], as it came, of k's dtype; null: none in this call
  float* u;      // [N, HV, R, V], with the factor that normalises k
  float* decay;  // [N, HV, R], exp(g)
  const int32_t* cursors;  // [N, 2]: first, count
  const int32_t* fold;     // [B], not 0: write all that is pending; null: none
  int32_t R;
  int32_t window;  // more than these are never pending before a call
};

// What a kernel needs first comes first: on a GPU every 64 bytes of it are brought on
// their own.
struct DecodeParams {
  Input state;                 // [N, HV, K, V] or [N, HV, V, K], read
  const int32_t* read_slots;   // [B]; null: row n reads slot n
  const int32_t* write_slots;  // [B], or [B, T] if snapshots; null: where it read
  int64_t N;
  int32_t H, HV;
  Input q;             // [B, T, H, K]
  Input k;             // [B, T, H, K]
  Input v;             // [B, T, HV, V]
  Input a;             // [B, T, HV], or [B, T, HV, K] if per_channel
  Input dt_bias;       // [HV], or [HV, K] if per_channel
  Input b;             // [B, T, HV]
  const float* A_log;  // [HV]; may hold anything if the gates are given, like dt_bias
  Output out;          // [B, T, HV, V]
  void* new_state;     // as the state, written; for a pool, the state's own buffer
  int64_t B, T;
  int32_t K, V;
  int32_t group;           // HV / H, value heads that share a key head
  uint32_t group_inverse;  // ceil(2^32 / group) mod 2^32, for division by multiplying
  float scale;             // on q, after its normalisation
  Layout layout;
  bool use_qk_l2norm;  // q and k become x / sqrt(sum x^2 + kNormEpsilon)
  bool per_channel;    // one decay per key channel, not one per head
  bool snapshots;      // the state is written after every token
  GateForm gates;
  float lower_bound, beta_scale;
  Pending pending;
};

inline constexpr float kNormEpsilon = 1e-6f;

}  // namespace jax_gdn

#endif  // JAX_GDN_COMMON_DECODE_PARAMS_H_
