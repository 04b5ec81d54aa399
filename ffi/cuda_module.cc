// The `_cuda` module: the FFI handlers, and planning as a plain function.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/decode_kv.h"
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

// Refuses a GPU that cannot run the kernels.
ffi::Error CheckDevice(int device) {
  int major = 0, minor = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  if (error != cudaSuccess) return ErrorOf({error, "cudaDeviceGetAttribute"});
  if (major >= kMinMajor) return ffi::Error::Success();
  cudaDeviceProp properties;
  error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) return ErrorOf({error, "cudaGetDeviceProperties"});
  return ffi::Error(
      ffi::ErrorCode::kUnimplemented,
      "jax_gdn.decode: device " + std::to_string(device) + " (" + properties.name +
          ") has compute capability " + std::to_string(major) + "." +
          std::to_string(minor) +
          "; the CUDA kernel needs 9.0 or newer. Pass implementation=\"xla\".");
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

ffi::Error Execute(cudaStream_t stream, const DecodeCall& call) {
  ffi::ErrorOr<DecodeParams> params = ParamsOf(call);
  if (params.has_error()) return params.error();
  if (auto reason = WhyUnsupported(params->B, params->HV, params->K, params->V)) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented, "jax_gdn.decode: " + *reason);
  }
  if (params->B * params->HV * params->V == 0) return ffi::Error::Success();
  return ErrorOf(Launch(PlanDecode(*params), *params, stream));
}

XLA_FFI_DEFINE_HANDLER(kInitialize, Initialize,
                       ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs());

// Captured into CUDA graphs: the launch depends on shapes and attributes alone.
XLA_FFI_DEFINE_HANDLER(
    kExecute,
    [](cudaStream_t stream, auto... call) {
      return Execute(stream, DecodeCall{call...});
    },
    BindDecode(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()),
    {ffi::Traits::kCmdBufferCompatible});

}  // namespace

NB_MODULE(_cuda, m) {
  DefineFfiVersion(m);
  m.attr("CUDA_VERSION") = CUDART_VERSION;
  m.def("handlers", [] {
    nb::dict stages, handlers;
    stages["initialize"] = Capsule(kInitialize);
    stages["execute"] = Capsule(kExecute);
    handlers["decode"] = stages;
    return handlers;
  });
  m.def("why_unsupported", &WhyUnsupported, nb::arg("B"), nb::arg("HV"), nb::arg("K"),
        nb::arg("V"));
  m.def("kernel_symbols", [] {
    std::vector<std::string> symbols;
    for (const Kernel& kernel : DecodeKVKernels()) symbols.push_back(kernel.symbol);
    return symbols;
  });
}

}  // namespace jax_gdn
