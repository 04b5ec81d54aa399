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
    return ffi::Unexpected(ffi::Error::InvalidArgument(what));
  };
  const auto tensor = [](const ffi::AnyBuffer& x) {
    return Tensor{x.untyped_data(), DTypeOf(x.element_type()),
                  x.element_type() == ffi::DataType::S32, x.dimensions().begin(),
                  x.dimensions().size()};
  };
  const auto is_there = [&](int operand) {
    return IsRequired(operand, call.gates) ||
           (kOutput <= operand && operand < kOut &&
            (call.optional_operands & (1 << (operand - kNumRequired))));
  };
  size_t wanted = 0, required = 0;
  for (int i = 0; i < kOut; ++i) {
    wanted += is_there(i);
    required += IsRequired(i, call.gates);
  }
  if ((call.optional_operands & -(1 << kNumOptional)) != 0 ||
      wanted != call.operands.size() || call.results.size() != 2) {
    return invalid("jax_gdn.decode: optional_operands, " +
                   std::to_string(call.optional_operands) +
                   ", must say which of output (1), state_indices (2) and "
                   "output_state_indices (4) there are beside " +
                   std::to_string(required) + " operands and 2 results; got " +
                   std::to_string(call.operands.size()) + " and " +
                   std::to_string(call.results.size()));
  }
  DecodeOperands operands = {
      {},         call.scale,       call.use_qk_l2norm, call.state_layout,
      call.gates, call.lower_bound, call.beta_scale,    call.layer};
  size_t next = 0;
  for (int i = 0; i < kOut; ++i) {
    if (!is_there(i)) continue;
    const auto buffer = call.operands.get<ffi::AnyBuffer>(next++);
    if (buffer.has_error()) return ffi::Unexpected(buffer.error());
    operands.tensors[i] = tensor(*buffer);
  }
  for (int i = kOut; i < kNumOperands; ++i) {
    auto buffer = call.results.get<ffi::AnyBuffer>(i - kOut);
    if (buffer.has_error()) return ffi::Unexpected(buffer.error());
    operands.tensors[i] = tensor(**buffer);
  }
  auto params = MakeParams(operands);
  if (auto* error = std::get_if<std::string>(&params)) return invalid(*error);
  return std::get<DecodeParams>(params);
}

}  // namespace jax_gdn
