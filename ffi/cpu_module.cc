// The `_cpu` module: the FFI handler of the host kernel.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <string>

#include "cpu/decode.h"
#include "cpu/step.h"
#include "ffi/binding.h"
#include "ffi/module.h"

namespace nb = nanobind;
namespace ffi = xla::ffi;

namespace jax_gdn {
namespace {

// Below this much state a thread's wake-up costs more than it saves.
constexpr int64_t kMinBytesPerTask = 64 << 10;

ffi::Future Failed(const ffi::Error& error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(error);
  return future;
}

// Spreads the states over XLA's pool. The handler itself runs on that pool: it
// takes one share and returns without waiting for the others.
ffi::Future Execute(ffi::ThreadPool pool, const DecodeCall& call) {
  ffi::ErrorOr<DecodeParams> decoded = ParamsOf(call);
  if (decoded.has_error()) return Failed(decoded.error());
  const DecodeParams params = *decoded;

  const int64_t states = params.B * params.HV;
  const int64_t bytes =
      states * params.K * params.V * (params.state.dtype == DType::kFloat32 ? 4 : 2);
  const int64_t tasks = std::clamp<int64_t>(std::min(bytes / kMinBytesPerTask, states),
                                            1, pool.num_threads());
  const auto share = [params, states, tasks](int64_t task) {
    DecodeStates(params, states * task / tasks, states * (task + 1) / tasks);
  };

  ffi::CountDownPromise done(tasks);
  ffi::Future future(done);
  for (int64_t task = 1; task < tasks; ++task) {
    pool.Schedule([share, done, task]() mutable {
      share(task);
      done.CountDown();
    });
  }
  share(0);
  done.CountDown();
  return future;
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
