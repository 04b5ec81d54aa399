#include "cpu/threads.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>
#include <memory>
#include <string>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

#include "cpu/decode.h"

namespace jax_gdn {
namespace {

// Below this much state a thread's wake-up costs more than it saves.
constexpr int64_t kMinBytesPerThread = 64 << 10;
// Parts a thread: one that starts late leaves its own to the others.
constexpr int64_t kPartsPerThread = 4;
// Threads that one wakes. Two, so that many are awake soon and none wakes for long.
constexpr int kRecruits = 2;

// CPUs that `quota` of every `period` is worth, rounded up; none: `all`.
int64_t CpusOf(double quota, double period, int64_t all) {
  if (!(quota > 0 && period > 0)) return all;
  return std::min(all, static_cast<int64_t>(std::ceil(quota / period)));
}

// The states of one call, in parts that threads take as they come. A thread that gets
// one wakes others, while what is left is worth it: where CPUs are fewer than threads,
// those that run have done the work before the rest is woken.
class Job : public std::enable_shared_from_this<Job> {
 public:
  Job(const DecodeParams& params, int64_t parts, int64_t helpers, int64_t part_bytes,
      const Schedule& schedule)
      : params_(params),
        parts_(parts),
        part_bytes_(part_bytes),
        schedule_(schedule),
        helpers_left_(helpers) {}

  // Takes parts until none is left.
  void Work() {
    int64_t part = taken_.fetch_add(1);
    // Who comes too late finds a call that may have ended: `schedule_` with it.
    if (part >= parts_) return;
    Recruit();
    const int64_t states = params_.B * params_.HV;
    for (; part < parts_; part = taken_.fetch_add(1)) {
      DecodeStates(params_, states * part / parts_, states * (part + 1) / parts_);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  // Returns when the parts that others took are done. Only running threads have taken
  // any, so this ends even where nothing else of the pool ever runs.
  void Wait() const {
    while (done_.load(std::memory_order_acquire) < parts_) std::this_thread::yield();
  }

 private:
  void Recruit() {
    for (int i = 0; i < kRecruits; ++i) {
      const int64_t left = parts_ - taken_.load(std::memory_order_relaxed);
      if (left * part_bytes_ < kMinBytesPerThread) return;
      if (helpers_left_.fetch_sub(1) <= 0) return;
      schedule_([job = shared_from_this()] { job->Work(); });
    }
  }

  const DecodeParams params_;
  const int64_t parts_, part_bytes_;
  const Schedule& schedule_;  // while a part is not done
  std::atomic<int64_t> helpers_left_, taken_ = 0, done_ = 0;
};

}  // namespace

int64_t UsableCpus(const std::string& group) {
  int64_t cpus = std::max<int64_t>(std::thread::hardware_concurrency(), 1);
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) cpus = CPU_COUNT(&set);
#endif
  double quota = 0, period = 0;
  // Version 2 of control groups; "max", where there is no quota, is no number.
  std::ifstream(group + "/cpu.max") >> quota >> period;
  cpus = CpusOf(quota, period, cpus);
  quota = period = 0;
  // Version 1; -1, where there is none.
  std::ifstream(group + "/cpu/cpu.cfs_quota_us") >> quota;
  std::ifstream(group + "/cpu/cpu.cfs_period_us") >> period;
  return CpusOf(quota, period, cpus);
}

void DecodeOnThreads(const DecodeParams& params, int64_t pool_threads,
                     const Schedule& schedule) {
  static const int64_t cpus = UsableCpus();
  const int64_t states = params.B * params.HV;
  const int64_t bytes =
      states * params.K * params.V * (params.state.dtype == DType::kFloat32 ? 4 : 2);
  const int64_t threads =
      std::clamp<int64_t>(std::min(bytes / kMinBytesPerThread, states), 1,
                          std::max<int64_t>(1, std::min(pool_threads, cpus)));
  if (threads == 1) return DecodeStates(params, 0, states);
  const int64_t parts = std::min(states, threads * kPartsPerThread);
  const auto job =
      std::make_shared<Job>(params, parts, threads - 1, bytes / parts, schedule);
  job->Work();
  job->Wait();
}

}  // namespace jax_gdn
