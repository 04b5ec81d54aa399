// The `_cpu` module: the FFI handler of the host kernel.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <functional>
#include <string>
#include <utility>

#include "cpu/state_kernel.h"
#include "cpu/threads.h"
#include "ffi/binding.h"
#include "ffi/module.h"

namespace nb = nanobind;
namespace ffi = xla::ffi;

namespace jax_gdn {
namespace {

// XLA's pool and this thread do the work. It returns when all is done: XLA would hand a
// call that ends later from thread to thread.
ffi::Error Execute(ffi::ThreadPool pool, const DecodeCall& call) {
  const ffi::ErrorOr<Launchable> made = ParamsOf(call);
  if (made.has_error()) return made.error();
  if (made->params.pending.k != nullptr && made->params.per_channel) {
    return ffi::Error(
        ffi::ErrorCode::kUnimplemented,
        "jax_gdn.decode_deferred: the host kernel takes one decay a head");
  }
  for (const Copy& copy : made->copies) std::memcpy(copy.to, copy.from, copy.bytes);
  DecodeOnThreads(
      made->params, pool.num_threads(),
      [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

constexpr auto kOnPool = [](ffi::ThreadPool pool, auto... call) {
  return Execute(pool, DecodeCall{call...});
};

XLA_FFI_DEFINE_HANDLER(kExecuteV1, kOnPool,
                       BindDecodeV1(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(kExecute, kOnPool,
                       BindDecode(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(kExecuteDeferred, kOnPool,
                       BindDecodeDeferred(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

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
  // `group`: where the control group's files are.
  m.def("usable_cpus", &UsableCpus, nb::arg("group") = "/sys/fs/cgroup");
  m.def("handlers", [] {
    nb::dict handlers;
    const auto add = [&](const char* target, XLA_FFI_Handler* execute) {
      nb::dict stages;
      stages["execute"] = Capsule(execute);
      handlers[target] = stages;
    };
    add("jax_gdn.decode.v1", kExecuteV1);
    add("jax_gdn.decode.v2", kExecute);
    add("jax_gdn.decode_deferred.v1", kExecuteDeferred);
    return handlers;
  });
}

}  // namespace jax_gdn
