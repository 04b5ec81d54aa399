// The `_cpu` module: the FFI handler of the host kernel.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <thread>

#include "cpu/decode.h"
#include "cpu/step.h"
#include "ffi/binding.h"
#include "ffi/module.h"

namespace nb = nanobind;
namespace ffi = xla::ffi;

namespace jax_gdn {
namespace {

// Below this much state a thread's wake-up costs more than it saves.
constexpr int64_t kMinBytesPerThread = 64 << 10;
// Parts a thread: one that starts late leaves its own to the others.
constexpr int64_t kPartsPerThread = 4;

// The states of one call, in parts that threads take as they come.
class Shared {
 public:
  Shared(const DecodeParams& params, int64_t parts) : params_(params), parts_(parts) {}

  // Takes parts until none is left.
  void Work() {
    const int64_t states = params_.B * params_.HV;
    for (int64_t part; (part = taken_.fetch_add(1)) < parts_;) {
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
  const DecodeParams params_;
  const int64_t parts_;
  std::atomic<int64_t> taken_ = 0, done_ = 0;
};

// Spreads the states over XLA's pool and works on them itself. It returns when all is
// done: XLA would hand a call that ends later from thread to thread.
ffi::Error Execute(ffi::ThreadPool pool, const DecodeCall& call) {
  ffi::ErrorOr<DecodeParams> params = ParamsOf(call);
  if (params.has_error()) return params.error();

  const int64_t states = params->B * params->HV;
  const int64_t bytes =
      states * params->K * params->V * (params->state.dtype == DType::kFloat32 ? 4 : 2);
  const int64_t threads = std::clamp<int64_t>(
      std::min(bytes / kMinBytesPerThread, states), 1, pool.num_threads());
  if (threads == 1) {
    DecodeStates(*params, 0, states);
    return ffi::Error::Success();
  }
  const auto shared =
      std::make_shared<Shared>(*params, std::min(states, threads * kPartsPerThread));
  for (int64_t other = 1; other < threads; ++other) {
    pool.Schedule([shared] { shared->Work(); });
  }
  shared->Work();
  shared->Wait();
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(
    kExecute,
    [](ffi::ThreadPool pool, auto... call) {
      return Execute(pool, DecodeCall{call...});
    },
    BindDecode(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace

NB_MODULE(_cpu, m) {
  DefineFfiVersion(m);
  m.def("instruction_sets", [] {
    nb::list names;
    for (const Kernels* kernels : UsableKernels()) names.append(kernels->name);
    return names;
  });
  m.def("instruction_set", [] { return ChosenKernels().name; });
  m.def("use_instruction_set", [](const char* name) {
    if (!ChooseKernels(name)) {
      const std::string message =
          std::string(
              "use_instruction_set: `name` must be one of instruction_sets(), "
              "got ") +
          name;
      throw nb::value_error(message.c_str());
    }
  });
  m.def("handlers", [] {
    nb::dict stages, handlers;
    stages["execute"] = Capsule(kExecute);
    handlers["decode"] = stages;
    return handlers;
  });
}

}  // namespace jax_gdn
