// A launch, decided without touching a device: which kernel, on what grid.
//
// Planning is a pure function of the parameters, so it is tested, and run by the
// tests' PTX machine, where there is no GPU.
#ifndef JAX_GDN_CUDA_PLAN_H_
#define JAX_GDN_CUDA_PLAN_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "ffi/decode_params.h"

namespace jax_gdn {

constexpr int64_t kMany = INT64_MAX;

// One compiled kernel. All take one argument, `const DecodeParams`, by value.
struct Kernel {
  const char* symbol;  // its name in the PTX
  const void* function;
  Layout layout;
  DType state;  // storage type
  int K, VT;    // key channels, value channels a block owns
  int threads;  // of a block
  bool step;    // only for one token, V = K, bfloat16 inputs and out, a decay a head
  int64_t max_states;  // B HV up to which it is the one to take
};

struct LaunchPlan {
  const Kernel* kernel;
  unsigned grid_x, grid_y, grid_z;
  size_t shared_bytes;  // dynamic; static shared memory belongs to the kernel
};

// Every compiled kernel for a layout.
const std::vector<Kernel>& DecodeKernels(Layout layout);

// A CUDA call that failed, or success.
struct CudaStatus {
  cudaError_t error = cudaSuccess;
  const char* call = "";
};

// Why no kernel takes these sizes, or nothing when one does.
std::optional<std::string> WhyUnsupported(int64_t B, int64_t HV, int64_t K, int64_t V);

// Whether the kernel computes what these parameters ask for.
bool Fits(const Kernel& kernel, const DecodeParams& params);

// The kernel to take, of those that fit. There always is one for parameters that
// `WhyUnsupported` has nothing against.
const Kernel* ChooseKernel(const DecodeParams& params);

LaunchPlan PlanDecode(const DecodeParams& params, const Kernel& kernel);

// Enqueues; neither allocates nor synchronises.
CudaStatus Launch(const LaunchPlan& plan, const DecodeParams& params,
                  cudaStream_t stream);

// Loads every kernel onto the current device, so that no launch does first-use
// work (which CUDA forbids while a graph is captured).
CudaStatus LoadKernels();

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_PLAN_H_
