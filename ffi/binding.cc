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

ffi::ErrorOr<Launchable> ParamsOf(DecodeCall call) {
  const auto invalid = [](const std::string& what) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(what));
  };
  const auto tensor = [](const ffi::AnyBuffer& x) {
    return Tensor{x.untyped_data(), DTypeOf(x.element_type()),
                  x.element_type() == ffi::DataType::S32, x.dimensions().begin(),
                  x.dimensions().size()};
  };
  const bool deferred = call.window > 0;
  const auto is_required = [&](int i) { return IsRequired(i, call.gates, deferred); };
  const auto is_there = [&](int i) {
    return is_required(i) || (kFirstOptional <= i && i < kOut &&
                              (call.optional_operands & (1 << (i - kFirstOptional))));
  };
  size_t wanted = 0, required = 0, results = 0;
  for (int i = 0; i < kOut; ++i) {
    wanted += is_there(i);
    required += is_required(i);
  }
  for (int i = kOut; i < kNumOperands; ++i) results += is_required(i);
  const int num_optional = (deferred ? kOut : kFold) - kFirstOptional;
  if ((call.optional_operands & -(1 << num_optional)) != 0 ||
      wanted != call.operands.size() || results != call.results.size()) {
    return invalid("jax_gdn.decode: optional_operands, " +
                   std::to_string(call.optional_operands) +
                   ", must say which of output (1), state_indices (2)" +
                   (deferred ? ", output_state_indices (4) and fold (8)"
                             : " and output_state_indices (4)") +
                   " there are beside " + std::to_string(required) + " operands and " +
                   std::to_string(results) + " results; got " +
                   std::to_string(call.operands.size()) + " and " +
                   std::to_string(call.results.size()));
  }
  DecodeOperands operands = {
      {},         call.scale,       call.use_qk_l2norm, call.state_layout,
      call.gates, call.lower_bound, call.beta_scale,    call.layer,
      call.window};
  size_t next = 0;
  for (int i = 0; i < kOut; ++i) {
    if (!is_there(i)) continue;
    const auto buffer = call.operands.get<ffi::AnyBuffer>(next++);
    if (buffer.has_error()) return ffi::Unexpected(buffer.error());
    operands.tensors[i] = tensor(*buffer);
  }
  for (size_t i = 0; i < results; ++i) {
    auto buffer = call.results.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return ffi::Unexpected(buffer.error());
    operands.tensors[kOut + i] = tensor(**buffer);
  }
  auto made = MakeParams(operands);
  if (auto* error = std::get_if<std::string>(&made)) return invalid(*error);
  return std::get<Launchable>(std::move(made));
}

}  // namespace jax_gdn
