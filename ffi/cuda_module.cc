// The `_cuda` module: the FFI handlers, and planning as a plain function.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "cuda/plan.h"
#include "ffi/binding.h"
#include "ffi/module.h"

namespace nb = nanobind;
namespace ffi = xla::ffi;

namespace jax_gdn {
namespace {

constexpr int kMinMajor = 9;  // Hopper

ffi::Error ErrorOf(const CudaStatus& status) {
  if (status.error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_gdn.decode: ") + status.call +
                              " failed: " + cudaGetErrorString(status.error));
}

// Why a GPU cannot run the kernels, or nothing.
std::optional<std::string> WhyUnsupportedDevice(const std::string& name, int major,
                                                int minor) {
  if (major >= kMinMajor) return std::nullopt;
  return "the GPU (" + name + ") has compute capability " + std::to_string(major) +
         "." + std::to_string(minor) +
         "; the CUDA kernel needs 9.0 or newer. Pass implementation=\"xla\".";
}

ffi::Error CheckDevice(int device) {
  cudaDeviceProp found;
  const cudaError_t error = cudaGetDeviceProperties(&found, device);
  if (error != cudaSuccess) return ErrorOf({error, "cudaGetDeviceProperties"});
  const auto reason = WhyUnsupportedDevice(found.name, found.major, found.minor);
  if (!reason) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "jax_gdn.decode: " + *reason);
}

// Runs before every execution, so all but a device's first call must be free.
ffi::Error Initialize(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  static std::atomic<uint64_t> ready_devices = 0;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return ErrorOf({error, "cudaGetDevice"});
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (ready_devices.load(std::memory_order_acquire) & bit) {
    return ffi::Error::Success();
  }
  if (ffi::Error refused = CheckDevice(device); refused.failure()) return refused;
  if (ffi::Error failed = ErrorOf(LoadKernels()); failed.failure()) return failed;
  ready_devices.fetch_or(bit, std::memory_order_release);
  return ffi::Error::Success();
}

// `WhyUnsupported` and the list of kernels disagree.
ffi::Error NoKernel() {
  return ffi::Error(ffi::ErrorCode::kUnimplemented,
                    "jax_gdn.decode: no CUDA kernel takes these operands");
}

ffi::Error Execute(cudaStream_t stream, const DecodeCall& call) {
  const ffi::ErrorOr<Launchable> made = ParamsOf(call);
  if (made.has_error()) return made.error();
  const DecodeParams& params = made->params;
  if (auto reason = WhyUnsupported(params)) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented, "jax_gdn.decode: " + *reason);
  }
  for (const Copy& copy : made->copies) {
    const cudaError_t error = cudaMemcpyAsync(copy.to, copy.from, copy.bytes,
                                              cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return ErrorOf({error, "cudaMemcpyAsync"});
  }
  if (params.B == 0) return ffi::Error::Success();
  const Kernel* kernel = ChooseKernel(params);
  if (kernel == nullptr) return NoKernel();
  return ErrorOf(Launch(*kernel, params, stream));
}

XLA_FFI_DEFINE_HANDLER(kInitialize, Initialize,
                       ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs());

constexpr auto kOnStream = [](cudaStream_t stream, auto... call) {
  return Execute(stream, DecodeCall{call...});
};

// Captured into CUDA graphs: the launch depends on shapes and attributes alone.
XLA_FFI_DEFINE_HANDLER(
    kExecuteV1, kOnStream,
    BindDecodeV1(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()),
    {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(
    kExecute, kOnStream,
    BindDecode(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()),
    {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(
    kExecuteDeferred, kOnStream,
    BindDecodeDeferred(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()),
    {ffi::Traits::kCmdBufferCompatible});

// An operand as Python describes it: address, dtype name, shape.
using PythonTensor = std::tuple<uintptr_t, std::string, std::vector<int64_t>>;

Tensor TensorOf(const PythonTensor& x) {
  static const std::map<std::string, DType> kTypes = {{"float32", DType::kFloat32},
                                                      {"bfloat16", DType::kBFloat16},
                                                      {"float16", DType::kFloat16}};
  const auto& [address, dtype, shape] = x;
  const auto type = kTypes.find(dtype);
  return {reinterpret_cast<void*>(address),
          type == kTypes.end() ? std::nullopt : std::optional(type->second),
          dtype == "int32", shape.data(), shape.size()};
}

// The launch that these operands would get, without a device: for tests that run the
// kernels' PTX. The new state is `new_state`, or else the state, and what is pending is
// updated in place. `kernel`, a symbol, overrides the planner's.
nb::dict Plan(const std::map<std::string, PythonTensor>& operands, float scale,
              bool use_qk_l2norm, int32_t state_layout,
              const std::optional<std::string>& kernel, int32_t gates,
              float lower_bound, float beta_scale, int32_t layer, int32_t window) {
  DecodeOperands x = {{},          scale,      use_qk_l2norm, state_layout, gates,
                      lower_bound, beta_scale, layer,         window};
  for (int i = 0; i < kNumOperands; ++i) {
    const auto operand =
        operands.find(i == kNewState ? "new_state" : kArguments[i].name);
    if (operand != operands.end()) x.tensors[i] = TensorOf(operand->second);
  }
  if (!x.tensors[kNewState]) x.tensors[kNewState] = x.tensors[kState];
  for (int i = 0; i < 3; ++i) x.tensors[kNewPendingK + i] = x.tensors[kPendingK + i];
  for (int i = 0; i < kNumOperands; ++i) {
    if (x.tensors[i] || !IsRequired(i, gates, window > 0)) continue;
    throw nb::value_error((std::string(kArguments[i].name) + " is missing").c_str());
  }
  auto checked = MakeParams(x);
  if (const auto* error = std::get_if<std::string>(&checked)) {
    throw nb::value_error(error->c_str());
  }
  const DecodeParams params = std::get<Launchable>(checked).params;
  if (auto why = WhyUnsupported(params)) {
    throw nb::value_error(why->c_str());
  }
  const Kernel* chosen = ChooseKernel(params);
  if (kernel) {
    chosen = nullptr;
    for (const Kernel& other : Kernels()) {
      if (other.symbol == *kernel && Fits(other.spec, params)) chosen = &other;
    }
  }
  if (chosen == nullptr) throw nb::value_error("no such kernel, or it does not fit");
  const dim3 grid = GridOf(chosen->spec, params);
  nb::dict result;
  result["symbol"] = chosen->symbol;
  result["grid"] = nb::make_tuple(grid.x, grid.y, grid.z);
  result["block"] = nb::make_tuple(chosen->threads, 1, 1);
  result["arguments"] =
      nb::bytes(reinterpret_cast<const char*>(&params), sizeof params);
  return result;
}

// Every compiled kernel, its spec's fields by their names.
std::vector<nb::dict> KernelTable() {
  const std::map<DType, const char*> types = {{DType::kFloat32, "float32"},
                                              {DType::kBFloat16, "bfloat16"},
                                              {DType::kFloat16, "float16"}};
  std::vector<nb::dict> table;
  for (const Kernel& kernel : Kernels()) {
    const KernelSpec& spec = kernel.spec;
    nb::dict row;
    row["symbol"] = kernel.symbol;
    row["threads"] = kernel.threads;
    row["layout"] = spec.layout == Layout::kKV ? "KV" : "VK";
    row["state"] = types.at(spec.state);
    row["K"] = spec.K;
    row["VT"] = spec.VT;
    row["columns"] = spec.columns;
    row["row_groups"] = spec.row_groups;
    row["warp_rows"] = spec.warp_rows;
    row["single_token"] = spec.single_token;
    row["per_channel"] = spec.per_channel;
    row["deferred"] = spec.deferred;
    row["streaming"] = spec.caching == Caching::kStreaming;
    row["min_blocks"] = spec.min_blocks;
    row["prefetch_distance"] = spec.prefetch_distance;
    row["prefetch_first"] = spec.prefetch_first;
    row["max_states"] = spec.max_states;
    table.push_back(row);
  }
  return table;
}

}  // namespace

NB_MODULE(_cuda, m) {
  DefineFfiVersion(m);
  m.attr("CUDA_VERSION") =
      nb::make_tuple(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  m.attr("ARCHITECTURES") = JAX_GDN_ARCHITECTURES;
  m.def("handlers", [] {
    nb::dict handlers;
    const auto add = [&](const char* target, XLA_FFI_Handler* execute) {
      nb::dict stages;
      stages["initialize"] = Capsule(kInitialize);
      stages["execute"] = Capsule(execute);
      handlers[target] = stages;
    };
    add("jax_gdn.decode.v1", kExecuteV1);
    add("jax_gdn.decode.v2", kExecute);
    add("jax_gdn.decode_deferred.v1", kExecuteDeferred);
    return handlers;
  });
  m.def("why_unsupported_device", &WhyUnsupportedDevice, nb::arg("name"),
        nb::arg("major"), nb::arg("minor"));
  m.def("why_unsupported",
        nb::overload_cast<int64_t, int64_t, int64_t, int64_t>(&WhyUnsupported),
        nb::arg("B"), nb::arg("HV"), nb::arg("K"), nb::arg("V"));
  m.def("why_unsupported_deferred", &WhyUnsupportedDeferred, nb::arg("T"), nb::arg("K"),
        nb::arg("V"), nb::arg("window"), nb::arg("per_channel"), nb::arg("bfloat16"));
  m.def("plan", &Plan, nb::arg("operands"), nb::arg("scale"), nb::arg("use_qk_l2norm"),
        nb::arg("state_layout") = 0, nb::arg("kernel") = nb::none(),
        nb::arg("gates") = 0, nb::arg("lower_bound") = 0.0f,
        nb::arg("beta_scale") = 1.0f, nb::arg("layer") = -1, nb::arg("window") = 0);
  m.def("kernels", &KernelTable);
}

}  // namespace jax_gdn
