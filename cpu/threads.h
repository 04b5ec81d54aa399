// Spreads the states of one call over the threads of a pool.
#ifndef JAX_GDN_CPU_THREADS_H_
#define JAX_GDN_CPU_THREADS_H_

#include <cstdint>
#include <functional>
#include <string>

#include "common/decode_params.h"

namespace jax_gdn {

// CPUs that this process may use: those it may run on, or fewer where the quota of its
// control group, as a container sees it under `group`, says so. At least 1.
int64_t UsableCpus(const std::string& group = "/sys/fs/cgroup");

// Hands a task to a pool.
using Schedule = std::function<void(std::function<void()>)>;

// Decodes all states of a call, on this thread and on others of a pool of so many.
// Returns when all is done, however late the others start, if they ever do.
void DecodeOnThreads(const DecodeParams& params, int64_t pool_threads,
                     const Schedule& schedule);

}  // namespace jax_gdn

#endif  // JAX_GDN_CPU_THREADS_H_
