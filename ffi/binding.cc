#include "ffi/binding.h"

#include <optional>
#include <string>
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
    known_dtypes &= dtype.has_value() || x.element_type() == ffi::DataType::S32;
    return Tensor{x.untyped_data(), dtype, x.dimensions().begin(),
                  x.dimensions().size()};
  };
  size_t next = 0;
  bool all_there = true;
  const auto optional = [&](OptionalOperand bit) -> std::optional<Tensor> {
    if (!(call.optional_operands & bit)) return std::nullopt;
    const auto buffer = call.optional.get<ffi::AnyBuffer>(next++);
    all_there &= buffer.has_value();
    return buffer.has_value() ? std::optional(tensor(*buffer)) : std::nullopt;
  };
  const std::optional<Tensor> output = optional(kHasOutput);
  const std::optional<Tensor> state_indices = optional(kHasStateIndices);
  const std::optional<Tensor> output_state_indices = optional(kHasOutputStateIndices);
  const DecodeOperands operands = {tensor(call.q),
                                   tensor(call.k),
                                   tensor(call.v),
                                   tensor(call.state),
                                   tensor(call.A_log),
                                   tensor(call.a),
                                   tensor(call.dt_bias),
                                   tensor(call.b),
                                   tensor(*call.out),
                                   tensor(*call.new_state),
                                   state_indices,
                                   output_state_indices,
                                   call.scale,
                                   call.use_qk_l2norm,
                                   static_cast<Layout>(call.state_layout)};
  const auto invalid = [](const std::string& what) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(what));
  };
  if (!all_there || next != call.optional.size()) {
    return invalid("jax_gdn.decode: optional_operands does not match the operands");
  }
  if (!known_dtypes) {
    return invalid(
        "jax_gdn.decode: operands must be float32, bfloat16, float16, int32");
  }
  if (output && output->data != call.out->untyped_data()) {
    return invalid("jax_gdn.decode: the result must share the buffer of output");
  }
  auto params = MakeParams(operands);
  if (auto* error = std::get_if<std::string>(&params)) return invalid(*error);
  return std::get<DecodeParams>(params);
}

}  // namespace jax_gdn
