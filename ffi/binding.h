// The XLA FFI signature of `decode`, written once for both platforms.
#ifndef JAX_GDN_FFI_BINDING_H_
#define JAX_GDN_FFI_BINDING_H_

#include <optional>
#include <string>
#include <utility>

#include "ffi/operands.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gdn {

// Calls arrive as (q, k, v, state, A_log, a, dt_bias, b[, output]) ->
// (out, state), with the state's result aliased to its operand, and likewise out
// to output where there is one.
template <typename Binding>
auto BindDecode(Binding binding) {
  namespace ffi = xla::ffi;
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()          // q
      .template Arg<ffi::AnyBuffer>()          // k
      .template Arg<ffi::AnyBuffer>()          // v
      .template Arg<ffi::AnyBuffer>()          // state
      .template Arg<ffi::AnyBuffer>()          // A_log
      .template Arg<ffi::AnyBuffer>()          // a
      .template Arg<ffi::AnyBuffer>()          // dt_bias
      .template Arg<ffi::AnyBuffer>()          // b
      .template OptionalArg<ffi::AnyBuffer>()  // output
      .template Ret<ffi::AnyBuffer>()          // out
      .template Ret<ffi::AnyBuffer>()          // state
      .template Attr<float>("scale")
      .template Attr<bool>("use_qk_l2norm");
}

// What `BindDecode` decodes to, in its order.
struct DecodeCall {
  xla::ffi::AnyBuffer q, k, v, state, A_log, a, dt_bias, b;
  std::optional<xla::ffi::AnyBuffer> output;
  xla::ffi::Result<xla::ffi::AnyBuffer> out, new_state;
  float scale;
  bool use_qk_l2norm;
};

// The kernels' parameters, or InvalidArgument with what is wrong.
xla::ffi::ErrorOr<DecodeParams> ParamsOf(DecodeCall call);

}  // namespace jax_gdn

#endif  // JAX_GDN_FFI_BINDING_H_
