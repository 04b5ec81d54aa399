#include "cuda/plan.h"

#include "cuda/decode_kv.h"
#include "cuda/decode_vk.h"

namespace jax_gdn {
namespace {

// The y and z axes of a grid (HV and B) are 16-bit.
constexpr int64_t kMaxGridYZ = 65535;

// What "step" kernels are compiled for.
bool IsStep(const DecodeParams& params) {
  for (const Input& input : {params.q, params.k, params.v, params.a, params.b}) {
    if (input.dtype != DType::kBFloat16) return false;
  }
  return params.T == 1 && params.V == params.K && !params.per_channel &&
         params.out.dtype == DType::kBFloat16;
}

}  // namespace

const std::vector<Kernel>& DecodeKernels(Layout layout) {
  return layout == Layout::kKV ? DecodeKVKernels() : DecodeVKKernels();
}

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

bool Fits(const Kernel& kernel, const DecodeParams& params) {
  return kernel.layout == params.layout && kernel.state == params.state.dtype &&
         kernel.K == params.K && params.V % kernel.VT == 0 &&
         (!kernel.step || IsStep(params));
}

// By the number of states alone: small tiles give a small batch enough blocks to fill
// the chip; large ones read longer rows ("KV") or more of them ("VK"). Of kernels that
// were tuned for as many states, the one for the fewest; else the one for the most.
const Kernel* ChooseKernel(const DecodeParams& params) {
  const int64_t states = params.B * params.HV;
  const auto is_better = [&](const Kernel& a, const Kernel& b) {
    if (a.step != b.step) return a.step;
    const bool enough = a.max_states >= states;
    if (enough != (b.max_states >= states)) return enough;
    return enough ? a.max_states < b.max_states : a.max_states > b.max_states;
  };
  const Kernel* chosen = nullptr;
  for (const Kernel& kernel : DecodeKernels(params.layout)) {
    if (!Fits(kernel, params)) continue;
    if (chosen == nullptr || is_better(kernel, *chosen)) chosen = &kernel;
  }
  return chosen;
}

LaunchPlan PlanDecode(const DecodeParams& params, const Kernel& kernel) {
  return {&kernel, static_cast<unsigned>(params.V / kernel.VT),
          static_cast<unsigned>(params.HV), static_cast<unsigned>(params.B),
          /*shared_bytes=*/0};
}

CudaStatus Launch(const LaunchPlan& plan, const DecodeParams& params,
                  cudaStream_t stream) {
  void* arguments[] = {const_cast<DecodeParams*>(&params)};
  return {cudaLaunchKernel(
              plan.kernel->function, dim3(plan.grid_x, plan.grid_y, plan.grid_z),
              dim3(plan.kernel->threads), arguments, plan.shared_bytes, stream),
          "cudaLaunchKernel"};
}

CudaStatus LoadKernels() {
  for (Layout layout : {Layout::kKV, Layout::kVK}) {
    for (const Kernel& kernel : DecodeKernels(layout)) {
      cudaFuncAttributes attributes;
      cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function);
      if (error != cudaSuccess) return {error, "cudaFuncGetAttributes"};
    }
  }
  return {};
}

}  // namespace jax_gdn
