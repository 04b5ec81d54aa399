// The XLA FFI signatures of `decode`, written once for both platforms.
#ifndef JAX_GDN_FFI_BINDING_H_
#define JAX_GDN_FFI_BINDING_H_

#include <cstdint>
#include <utility>

#include "ffi/operands.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gdn {

// Calls arrive as the operands of `Operand`, in its order -> (out, state), with the
// state's result aliased to its operand, and likewise out to `output` where there is
// one; XLA may drop an alias. Which optional operands there are is said by the bits of
// the attribute `optional_operands`, from `output` on.
//
// `jax_gdn.decode.v1` is what programs exported before 0.3 call; it stays as it is.
template <typename Binding>
auto BindDecodeV1(Binding&& binding) {
  return std::move(binding)
      .RemainingArgs()
      .RemainingRets()
      .template Attr<float>("scale")
      .template Attr<bool>("use_qk_l2norm")
      .template Attr<int32_t>("state_layout")
      .template Attr<int32_t>("optional_operands");
}

// `jax_gdn.decode.v2`. The other targets have what it has, and more.
template <typename Binding>
auto BindDecode(Binding&& binding) {
  return BindDecodeV1(std::move(binding))
      .template Attr<int32_t>("gates")
      .template Attr<float>("lower_bound")
      .template Attr<float>("beta_scale")
      .template Attr<int32_t>("layer");
}

// `jax_gdn.decode_deferred.v1` -> (out, state, pending k, u and decay), all of them
// aliased to their operands.
template <typename Binding>
auto BindDecodeDeferred(Binding&& binding) {
  return BindDecode(std::move(binding)).template Attr<int32_t>("window");
}

// What all decode to, in their order.
struct DecodeCall {
  xla::ffi::RemainingArgs operands;
  xla::ffi::RemainingRets results;
  float scale;
  bool use_qk_l2norm;
  int32_t state_layout;
  int32_t optional_operands;
  int32_t gates = 0;
  float lower_bound = 0, beta_scale = 1;
  int32_t layer = -1;
  int32_t window = 0;
};

// What to launch, or InvalidArgument with what is wrong.
xla::ffi::ErrorOr<Launchable> ParamsOf(DecodeCall call);

}  // namespace jax_gdn

#endif  // JAX_GDN_FFI_BINDING_H_
