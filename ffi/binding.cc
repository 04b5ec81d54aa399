#include "ffi/binding.h"

#include <variant>

namespace jax_gdn {
namespace {

namespace ffi = xla::ffi;

std::optional<DType> DTypeOf(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32:
      return DType::kFloat32;
    case ffi::DataType::BF16:
      return DType::kBFloat16;
    case ffi::DataType::F16:
      return DType::kFloat16;
    default:
      return std::nullopt;
  }
}

}  // namespace

ffi::ErrorOr<DecodeParams> ParamsOf(DecodeCall call) {
  bool known_dtypes = true;
  const auto tensor = [&](const ffi::AnyBuffer& x) {
    const std::optional<DType> dtype = DTypeOf(x.element_type());
    known_dtypes = known_dtypes && dtype.has_value();
    return Tensor{x.untyped_data(), dtype.value_or(DType::kFloat32),
                  x.dimensions().begin(), x.dimensions().size()};
  };
  const DecodeOperands operands = {
      tensor(call.q),          tensor(call.k),     tensor(call.v),
      tensor(call.state),      tensor(call.A_log), tensor(call.a),
      tensor(call.dt_bias),    tensor(call.b),     tensor(*call.out),
      tensor(*call.new_state), call.scale,         call.use_qk_l2norm};
  if (!known_dtypes) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        "jax_gdn.decode: operands must be float32, bfloat16 or float16"));
  }
  if (call.output && call.output->untyped_data() != call.out->untyped_data()) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        "jax_gdn.decode: the result must share the buffer of output"));
  }
  auto params = MakeParams(operands);
  if (auto* error = std::get_if<std::string>(&params)) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(*error));
  }
  return std::get<DecodeParams>(params);
}

}  // namespace jax_gdn
