// A launch, decided without touching a device: which kernel, on what grid.
//
// Planning is a pure function of the parameters, so it is tested, and run by the
// tests' PTX machine, where there is no GPU.
#ifndef JAX_GDN_CUDA_PLAN_H_
#define JAX_GDN_CUDA_PLAN_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "ffi/decode_params.h"

namespace jax_gdn {

// One compiled kernel. All take one argument, `const DecodeParams`, by value.
struct Kernel {
  const char* symbol;  // its name in the PTX
  const void* function;
  Layout layout;
  DType state;  // storage type
  int K, VT;    // key channels, value channels a block owns
  int threads;  // of a block
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

// Value channels a block should own; divides V.
int ChooseTile(const DecodeParams& params);

// The launch with blocks of VT value channels; nothing if there is no such kernel or
// VT does not divide V. With `ChooseTile` and parameters that `WhyUnsupported` has
// nothing against, there always is one.
std::optional<LaunchPlan> PlanDecode(const DecodeParams& params, int VT);

// Enqueues; neither allocates nor synchronises.
CudaStatus Launch(const LaunchPlan& plan, const DecodeParams& params,
                  cudaStream_t stream);

// Loads every kernel onto the current device, so that no launch does first-use
// work (which CUDA forbids while a graph is captured).
CudaStatus LoadKernels();

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_PLAN_H_
