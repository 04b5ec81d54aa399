// What every pass over a part of a state needs. Compiled once an instruction set.
#ifndef JAX_GDN_CPU_PREFETCH_H_
#define JAX_GDN_CPU_PREFETCH_H_

#include <cstdint>

#include "cpu/lanes.h"

namespace jax_gdn {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

constexpr DType kFloat = DType::kFloat32;

// Prefetches memory while there is arithmetic to do, evenly over all of it.
class Prefetcher {
 public:
  // `visits`: entries of a state that are passed over in the meantime. Null `data`:
  // there is nothing to prefetch.
  Prefetcher(const void* data, int64_t bytes, int64_t visits)
      : at_(static_cast<const char*>(data)),
        end_(at_ == nullptr ? at_ : at_ + bytes),
        visits_per_line_(at_ == nullptr ? 1 : kLine * visits / bytes) {}

  // To be called with every entry that is passed over.
  void Fetch(int64_t visits) {
    for (visits_ += visits; visits_ >= visits_per_line_ && at_ < end_;
         visits_ -= visits_per_line_) {
      __builtin_prefetch(at_, 1, 2);
      at_ += kLine;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* at_;
  const char* end_;
  int64_t visits_per_line_;
  int64_t visits_ = 0;
};

// Where a pass has the entries of a part from.
enum class Source {
  kState,        // which is in memory
  kStateToTile,  // likewise; they go into the tile as well
  kTile,         // which an earlier pass has filled
};

// An entry after a token. Written once: what several tokens of a call leave must be,
// bit by bit, what as many calls leave.
template <typename F>
inline F Updated(F s, F k, F u, F decay) {
  return k * u + decay * s;
}

}  // namespace
}  // namespace jax_gdn

#endif  // JAX_GDN_CPU_PREFETCH_H_
