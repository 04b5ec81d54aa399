#include "cuda/plan.h"

namespace jax_gdn {
namespace {

// The y and z axes of a grid (HV and B) are 16-bit.
constexpr int64_t kMaxGridYZ = 65535;

bool IsBFloat16(const DecodeParams& params) {
  return params.q.dtype == DType::kBFloat16 && params.k.dtype == DType::kBFloat16 &&
         params.v.dtype == DType::kBFloat16;
}

// Whether single-token kernels take these operands.
bool IsSingleToken(const DecodeParams& params) {
  return params.T == 1 && params.V == params.K && IsBFloat16(params);
}

}  // namespace

std::optional<std::string> WhyUnsupported(int64_t B, int64_t HV, int64_t K, int64_t V) {
  if (K != 64 && K != 128 && K != 192 && K != 256) {
    return "the CUDA kernel takes K of 64, 128, 192 or 256; got K = " +
           std::to_string(K);
  }
  if (V % 16 != 0) {
    return "the CUDA kernel takes V in multiples of 16; got V = " + std::to_string(V);
  }
  if (B > kMaxGridYZ || HV > kMaxGridYZ) {
    return "the CUDA kernel takes B and HV up to 65535; got B = " + std::to_string(B) +
           ", HV = " + std::to_string(HV);
  }
  return std::nullopt;
}

std::optional<std::string> WhyUnsupportedDeferred(int64_t T, int64_t K, int64_t V,
                                                  int64_t window, bool per_channel,
                                                  bool bfloat16) {
  const auto takes = [](const std::string& what) {
    return "the CUDA kernel of decode_deferred takes " + what;
  };
  if (K != 128 || V != 128) {
    return takes("K = V = 128; got K = " + std::to_string(K) +
                 ", V = " + std::to_string(V));
  }
  if (T > kMaxTokens) {
    return takes("T up to " + std::to_string(kMaxTokens) +
                 "; got T = " + std::to_string(T));
  }
  if (window > kMaxPending) {
    return takes("a window of up to " + std::to_string(kMaxPending) + "; got " +
                 std::to_string(window));
  }
  if (per_channel) return takes("one decay a head; got one a key channel");
  if (!bfloat16) return takes("bfloat16 q, k and v; got another dtype");
  return std::nullopt;
}

std::optional<std::string> WhyUnsupported(const DecodeParams& p) {
  auto why = WhyUnsupported(p.B, p.HV, p.K, p.V);
  if (why || p.pending.k == nullptr) return why;
  return WhyUnsupportedDeferred(p.T, p.K, p.V, p.pending.window, p.per_channel,
                                IsBFloat16(p));
}

bool Fits(const KernelSpec& spec, const DecodeParams& params) {
  return spec.deferred == (params.pending.k != nullptr) &&
         spec.layout == params.layout && spec.state == params.state.dtype &&
         spec.K == params.K && params.V % spec.VT == 0 &&
         (!spec.single_token ||
          (IsSingleToken(params) && spec.per_channel == params.per_channel));
}

// By the number of states alone: small tiles give a small batch enough blocks to fill
// the chip. Of kernels tuned for as many states, the one for the fewest; else the one
// for the most.
const Kernel* ChooseKernel(const DecodeParams& params) {
  const int64_t states = params.B * params.HV;
  const auto is_better = [&](const KernelSpec& a, const KernelSpec& b) {
    if (a.single_token != b.single_token) return a.single_token;
    const bool enough = a.max_states >= states;
    if (enough != (b.max_states >= states)) return enough;
    return enough ? a.max_states < b.max_states : a.max_states > b.max_states;
  };
  const Kernel* chosen = nullptr;
  for (const Kernel& kernel : Kernels()) {
    if (!Fits(kernel.spec, params)) continue;
    if (chosen == nullptr || is_better(kernel.spec, chosen->spec)) chosen = &kernel;
  }
  return chosen;
}

dim3 GridOf(const KernelSpec& spec, const DecodeParams& params) {
  return dim3(params.V / spec.VT, params.HV, static_cast<unsigned>(params.B));
}

CudaStatus Launch(const Kernel& kernel, const DecodeParams& params,
                  cudaStream_t stream) {
  void* arguments[] = {const_cast<DecodeParams*>(&params)};
  return {cudaLaunchKernel(kernel.function, GridOf(kernel.spec, params),
                           dim3(kernel.threads), arguments, /*sharedMem=*/0, stream),
          "cudaLaunchKernel"};
}

CudaStatus LoadKernels() {
  for (const Kernel& kernel : Kernels()) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function);
    if (error != cudaSuccess) return {error, "cudaFuncGetAttributes"};
  }
  return {};
}

}  // namespace jax_gdn
