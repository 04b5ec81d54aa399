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
  const auto invalid = [](const std::string& what) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("jax_gdn.decode: " + what));
  };
  const auto tensor = [](const ffi::AnyBuffer& x) {
    return Tensor{x.untyped_data(), DTypeOf(x.element_type()),
                  x.element_type() == ffi::DataType::S32, x.dimensions().begin(),
                  x.dimensions().size()};
  };
  size_t next = 0;
  const auto optional = [&](OptionalOperand bit) -> std::optional<Tensor> {
    if (!(call.optional_operands & bit)) return std::nullopt;
    const auto buffer = call.optional.get<ffi::AnyBuffer>(next++);
    return buffer.has_value() ? std::optional(tensor(*buffer)) : std::nullopt;
  };
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
                                   optional(kHasOutput),
                                   optional(kHasStateIndices),
                                   optional(kHasOutputStateIndices),
                                   call.scale,
                                   call.use_qk_l2norm,
                                   call.state_layout};
  constexpr int32_t kKnown = kHasOutput | kHasStateIndices | kHasOutputStateIndices;
  if ((call.optional_operands & ~kKnown) != 0 || next != call.optional.size()) {
    return invalid("optional_operands, " + std::to_string(call.optional_operands) +
                   ", must say which of output (1), state_indices (2) and "
                   "output_state_indices (4) there are; got " +
                   std::to_string(call.optional.size()) + " more operands");
  }
  auto params = MakeParams(operands);
  if (auto* error = std::get_if<std::string>(&params)) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(*error));
  }
  return std::get<DecodeParams>(params);
}

}  // namespace jax_gdn
