// The XLA FFI signature of `decode`, written once for both platforms.
#ifndef JAX_GDN_FFI_BINDING_H_
#define JAX_GDN_FFI_BINDING_H_

#include <cstdint>
#include <utility>

#include "ffi/operands.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gdn {

// Calls arrive as (q, k, v, state, A_log, a, dt_bias, b, optional operands) ->
// (out, state), with the state's result aliased to its operand, and likewise out to
// `output` where there is one; XLA may drop an alias. Which optional operands there
// are, in the order below, is said by the bits of the attribute `optional_operands`.
enum OptionalOperand : int32_t {
  kHasOutput = 1,
  kHasStateIndices = 2,
  kHasOutputStateIndices = 4,
};

template <typename Binding>
auto BindDecode(Binding binding) {
  namespace ffi = xla::ffi;
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()  // q
      .template Arg<ffi::AnyBuffer>()  // k
      .template Arg<ffi::AnyBuffer>()  // v
      .template Arg<ffi::AnyBuffer>()  // state
      .template Arg<ffi::AnyBuffer>()  // A_log
      .template Arg<ffi::AnyBuffer>()  // a
      .template Arg<ffi::AnyBuffer>()  // dt_bias
      .template Arg<ffi::AnyBuffer>()  // b
      .RemainingArgs()
      .template Ret<ffi::AnyBuffer>()  // out
      .template Ret<ffi::AnyBuffer>()  // state
      .template Attr<float>("scale")
      .template Attr<bool>("use_qk_l2norm")
      .template Attr<int32_t>("state_layout")
      .template Attr<int32_t>("optional_operands");
}

// What `BindDecode` decodes to, in its order.
struct DecodeCall {
  xla::ffi::AnyBuffer q, k, v, state, A_log, a, dt_bias, b;
  xla::ffi::RemainingArgs optional;
  xla::ffi::Result<xla::ffi::AnyBuffer> out, new_state;
  float scale;
  bool use_qk_l2norm;
  int32_t state_layout;
  int32_t optional_operands;
};

// The kernels' parameters, or InvalidArgument with what is wrong.
xla::ffi::ErrorOr<DecodeParams> ParamsOf(DecodeCall call);

}  // namespace jax_gdn

#endif  // JAX_GDN_FFI_BINDING_H_
