// What both nanobind modules offer to Python.
#ifndef JAX_GDN_FFI_MODULE_H_
#define JAX_GDN_FFI_MODULE_H_

#include <nanobind/nanobind.h>

#include "xla/ffi/api/c_api.h"

namespace jax_gdn {

inline nanobind::capsule Capsule(XLA_FFI_Handler* handler) {
  return nanobind::capsule(reinterpret_cast<void*>(handler));
}

// The FFI version the handlers were built with. A jaxlib that speaks an older one
// must never see them.
inline void DefineFfiVersion(nanobind::module_& m) {
  m.attr("FFI_API_VERSION") =
      nanobind::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}

}  // namespace jax_gdn

#endif  // JAX_GDN_FFI_MODULE_H_
