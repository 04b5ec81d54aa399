// A launch, decided without touching a device: which kernel, on what grid.
//
// Planning is a pure function of the parameters, so it is tested, and run by the
// tests' PTX machine, where there is no GPU.
#ifndef JAX_GDN_CUDA_PLAN_H_
#define JAX_GDN_CUDA_PLAN_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "common/decode_params.h"

namespace jax_gdn {

constexpr int64_t kMany = INT64_MAX;

// Of a call that leaves tokens pending: its tokens, and those from before.
constexpr int kMaxTokens = 8, kMaxPending = 16;

// How accesses to the state treat the caches. Streaming ones leave them early: they win
// while few blocks run, and lose where many do.
enum class Caching { kPlain, kStreaming };

// What distinguishes a compiled kernel.
struct KernelSpec {
  Layout layout;
  DType state;          // storage type
  int K = 128;          // key channels
  int VT = 16;          // value channels of a block
  int columns = 4;      // "KV": of a thread
  int row_groups = 16;  // "KV": of a block
  int warp_rows = 4;    // "VK": rows of V of a warp
  // T = 1, V = K and bfloat16 q, k, v; the decay as `per_channel` says. Other kernels
  // take any number of tokens and either decay.
  bool single_token = false, per_channel = false;
  // Leaves tokens pending. V = K and bfloat16 q, k, v; one decay a head.
  bool deferred = false;
  Caching caching = Caching::kPlain;
  int min_blocks = 1;  // on a multiprocessor, for the compiler
  // A gate warp prefetches the states of the block that runs this many blocks later on
  // its multiprocessor; 0: none. It does so before or after it computes the gates.
  int prefetch_distance = 0;
  bool prefetch_first = false;
  int64_t max_states = kMany;  // B HV up to which it is the kernel to take
};

// One compiled kernel. All take one argument, `const DecodeParams`, by value.
struct Kernel {
  const char* symbol;  // its name in the PTX
  const void* function;
  int threads;  // of a block
  KernelSpec spec;
};

// A CUDA call that failed, or success.
struct CudaStatus {
  cudaError_t error = cudaSuccess;
  const char* call = "";
};

std::span<const Kernel> Kernels();

// Why no kernel takes these sizes, or nothing when one does.
std::optional<std::string> WhyUnsupported(int64_t B, int64_t HV, int64_t K, int64_t V);

// The same of what a call that leaves tokens pending has beyond these.
std::optional<std::string> WhyUnsupportedDeferred(int64_t T, int64_t K, int64_t V,
                                                  int64_t window, bool per_channel,
                                                  bool bfloat16);

// The same of a whole call.
std::optional<std::string> WhyUnsupported(const DecodeParams& params);

// Whether the kernel computes what these parameters ask for.
bool Fits(const KernelSpec& spec, const DecodeParams& params);

// The kernel to take; there is one unless `WhyUnsupported` says why not.
const Kernel* ChooseKernel(const DecodeParams& params);

dim3 GridOf(const KernelSpec& spec, const DecodeParams& params);

// Enqueues; neither allocates nor synchronises.
CudaStatus Launch(const Kernel& kernel, const DecodeParams& params,
                  cudaStream_t stream);

// Loads every kernel onto the current device: CUDA forbids that while it captures.
CudaStatus LoadKernels();

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_PLAN_H_
