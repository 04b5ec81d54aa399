// The `_bench_cuda` module: the in-place passes as an FFI handler and as a function.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>

#include "benchmarks/roofline.h"
#include "ffi/module.h"
#include "xla/ffi/api/ffi.h"

namespace nb = nanobind;
namespace ffi = xla::ffi;

namespace jax_gdn {
namespace {

// What is wrong with a call, or nothing.
std::string Run(int pass, void* data, int64_t bytes, int64_t entry_bytes,
                cudaStream_t stream) {
  if (pass < 0 || pass >= static_cast<int>(PassNames().size()) ||
      bytes % kPassBytes != 0 || (entry_bytes != 2 && entry_bytes != 4)) {
    return "an in-place pass needs a known number, and a multiple of 8 KB of 2- or "
           "4-byte entries";
  }
  const cudaError_t error =
      LaunchPass(pass, data, bytes, static_cast<int>(entry_bytes), stream);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// Extra operands are ignored: they are data dependencies only.
ffi::Error Execute(cudaStream_t stream, ffi::AnyBuffer data, ffi::RemainingArgs,
                   ffi::Result<ffi::AnyBuffer> result, int32_t number) {
  if (data.untyped_data() != result->untyped_data()) {
    return ffi::Error::InvalidArgument("an in-place pass needs a donated buffer");
  }
  const std::string wrong = Run(number, result->untyped_data(), data.size_bytes(),
                                ffi::ByteWidth(data.element_type()), stream);
  return wrong.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(wrong);
}

XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Arg<ffi::AnyBuffer>()
                           .RemainingArgs()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<int32_t>("number"),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

NB_MODULE(_bench_cuda, m) {
  m.attr("PASSES") = nb::cast(PassNames());
  m.def("handler", [] { return Capsule(kExecute); });
  // For CUDA graphs that no XLA is in.
  m.def("launch", [](int pass, uintptr_t data, int64_t bytes, int64_t entry_bytes,
                     uintptr_t stream) {
    const std::string wrong = Run(pass, reinterpret_cast<void*>(data), bytes,
                                  entry_bytes, reinterpret_cast<cudaStream_t>(stream));
    if (!wrong.empty()) throw nb::value_error(wrong.c_str());
  });
}

}  // namespace jax_gdn
