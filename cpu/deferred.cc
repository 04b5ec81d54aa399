// Gated-delta-rule decode on the host that leaves the states as they are.
//
// A token finds a state S_0 and entries k_i, u_i: the pending ones and, after them, the
// call's own. With w_i the product of the decays after entry i, that of the token with
// them, and w that of all,
//
//     p = k^T S = w k^T S_0 + sum_i w_i (k.k_i) u_i         likewise r = q^T S
//     u = beta (v - p);   out = r + (q.k) u;   the next entry: k, u, decay
//
// All products are queries of a kernel. The entries' keys are a [V, K] state that the
// tokens ask for k.k_i and q.k_i, once a key head; their u are a [K, V] state that is
// asked, with these weighted, for the sums: the pending ones by all tokens at once, as
// S_0, which is read once; the call's own ones as they come to be. A row that folds
// does so in the pass that reads S_0.
#include "cpu/deferred.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/inputs.h"
#include "cpu/lanes.h"
#include "cpu/state_kernel.h"

namespace jax_gdn {
namespace {

// What a row does. Not valid: padding.
struct RowPlan {
  int64_t read, write;
  int32_t first, count;  // of the pending entries
  bool valid, folds;
};

RowPlan PlanRow(const DecodeParams& p, int64_t n) {
  const Pending& ring = p.pending;
  const int64_t read = ReadSlot(p, n);
  if (read == kNoSlot) return {};
  const int64_t write = WriteSlot(p, n, 0, read);
  const int32_t first = ring.cursors[2 * read], count = ring.cursors[2 * read + 1];
  const bool valid = 0 <= first && first < ring.R && 0 <= count && count <= ring.window;
  const bool full = count + p.T > ring.window;
  const bool told = ring.fold != nullptr && ring.fold[n] != 0;
  const bool folds = write != read || (count > 0 && (full || told));
  return {read, write, first, count, valid, write != kNoSlot && folds};
}

void BringNear(const void* data, int64_t bytes) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < bytes; i += kLine) {
    __builtin_prefetch(static_cast<const char*>(data) + i, 1, 2);
  }
}

// Adds to sums over a call's own entries those over the others.
void Join(float since, float decay, const float* __restrict state,
          const float* __restrict pending, int32_t V, float* __restrict sums) {
  for (int32_t j = 0; j < V; ++j) sums[j] += since * (decay * state[j] + pending[j]);
}

// From p and r, which `out` has, a token's u, with k's factor, and `out`.
void Solve(float beta, float k_factor, float qk, const float* __restrict v,
           const float* __restrict p, int32_t V, float* __restrict u,
           float* __restrict out) {
  for (int32_t j = 0; j < V; ++j) {
    const float u_j = beta * (v[j] - p[j]);
    out[j] += qk * u_j;
    u[j] = k_factor * u_j;
  }
}

// Decodes states one after the other.
class DeferredDecoder {
 public:
  explicit DeferredDecoder(const DecodeParams& params)
      : DeferredDecoder(
            params, Scratch::OfThread(ScratchSize(params), Keys::kPieces + kPieces)) {}

  // All tokens of state `index` of [B, HV]. The next one is brought near meanwhile.
  void DecodeState(int64_t index, bool has_next) {
    const int64_t n = index / p_.HV;
    const int32_t hv = static_cast<int32_t>(index % p_.HV), h = hv / p_.group;
    const RowPlan row = PlanRow(p_, n);
    if (!row.valid) {
      std::fill_n(out_, p_.V, 0.0f);
      for (int64_t t = 0; t < p_.T; ++t) StoreOut(HeadOf(n, t, hv));
      return;
    }
    if (keys_.Load(n, h)) LoadEntryKeys(row, n, h);
    LoadPending(row, hv);
    kernels_.query({{p_.layout, p_.state.dtype, p_.K, p_.V, StateOf(p_, row.read, hv),
                     tile_, has_next ? StateAhead(p_, index + 1) : nullptr},
                    of_state_.data(),
                    p_.T,
                    FoldOf(row, hv)});
    if (has_next) BringPendingNear(index + 1);
    since_ = 1.0f;
    for (int64_t t = 0; t < p_.T; ++t) {
      DecodeToken(row, t, HeadOf(n, t, hv), hv);
      if (row.write != kNoSlot) Append(row, n, t, hv);
    }
  }

 private:
  static constexpr int64_t kPieces = 16;  // of scratch, beside the keys
  static int64_t ScratchSize(const DecodeParams& p) {
    const int64_t E = p.pending.window + p.T;
    return Keys::ScratchSize(p) + E * (p.K + p.V + 2 * p.T) + 3 * p.T +
           (4 * p.T + 3) * p.V + TileSize(p);
  }
  // For parts of a state, and of the pending u.
  static int64_t TileSize(const DecodeParams& p) {
    return int64_t{kTileWidth} * std::max(p.K, p.pending.window);
  }

  DeferredDecoder(const DecodeParams& params, Scratch& scratch)
      : p_(params), kernels_(ChosenKernels()), keys_(p_, kernels_, scratch) {
    const int64_t E = p_.pending.window + p_.T;
    entry_k_ = scratch.Take(E * p_.K);
    pending_u_ = scratch.Take(p_.pending.window * p_.V);
    own_u_ = scratch.Take(p_.T * p_.V);
    for (float** x : {&own_weights_, &k_weights_, &q_weights_}) {
      *x = scratch.Take(p_.T);
    }
    for (float** x : {&v_, &own_p_, &out_}) *x = scratch.Take(p_.V);
    tile_ = scratch.Take(TileSize(p_));
    const auto take = [&](int64_t size) { return scratch.Take(p_.T * size); };
    float *const k_dots = take(E), *const q_dots = take(E);
    float *const pending_p = take(p_.V), *const pending_r = take(p_.V);
    float *const state_p = take(p_.V), *const state_r = take(p_.V);
    for (int64_t t = 0; t < p_.T; ++t) {
      const float *const k = keys_.k(t), *const q = keys_.q(t);
      const int64_t first = t * p_.V;
      dots_.push_back({k, q, k_dots + t * E, q_dots + t * E});
      of_pending_.push_back(
          {dots_[t].p, dots_[t].r, pending_p + first, pending_r + first});
      of_state_.push_back({k, q, state_p + first, state_r + first});
    }
  }

  int64_t HeadOf(int64_t n, int64_t t, int32_t hv) const {
    return (n * p_.T + t) * p_.HV + hv;
  }
  // Of a slot's ring, the entry that comes i after the first pending one: its number
  // among all of u and decay, and among all of k.
  int64_t EntryOf(const RowPlan& row, int64_t slot, int32_t hv, int64_t i) const {
    return (slot * p_.HV + hv) * p_.pending.R + (row.first + i) % p_.pending.R;
  }
  int64_t KeyEntryOf(const RowPlan& row, int64_t slot, int32_t h, int64_t i) const {
    return (slot * p_.H + h) * p_.pending.R + (row.first + i) % p_.pending.R;
  }

  // The keys of all entries but the last, which no token of the call asks for, and
  // what the tokens ask.
  void LoadEntryKeys(const RowPlan& row, int64_t n, int32_t h) {
    const Input ring = {p_.pending.k, p_.k.dtype};
    float* to = entry_k_;
    for (int32_t i = 0; i < row.count; ++i, to += p_.K) {
      kernels_.widen(ring, KeyEntryOf(row, row.read, h, i) * p_.K, p_.K, to);
    }
    for (int64_t t = 0; t + 1 < p_.T; ++t, to += p_.K) {
      kernels_.widen(p_.k, ((n * p_.T + t) * p_.H + h) * p_.K, p_.K, to);
    }
    Ask(entry_k_, Layout::kVK, p_.K, row.count + p_.T - 1, dots_.data(), p_.T);
  }

  // Prefetches what state `index` has pending, and where the call's tokens go behind
  // it.
  void BringPendingNear(int64_t index) const {
    const int64_t n = index / p_.HV;
    const int32_t hv = static_cast<int32_t>(index % p_.HV), h = hv / p_.group;
    const RowPlan row = PlanRow(p_, n);
    if (!row.valid) return;
    const int64_t key_bytes = p_.K * SizeOf(p_.k.dtype);
    for (int64_t i = 0; i < row.count + p_.T; ++i) {
      BringNear(&p_.pending.u[EntryOf(row, row.read, hv, i) * p_.V],
                p_.V * sizeof(float));
      if (hv % p_.group != 0) continue;
      BringNear(static_cast<const char*>(p_.pending.k) +
                    KeyEntryOf(row, row.read, h, i) * key_bytes,
                key_bytes);
    }
  }

  // u of the pending entries, weighted, and the sums of these for all tokens.
  void LoadPending(const RowPlan& row, int32_t hv) {
    pending_decay_ = 1.0f;
    for (int32_t i = row.count - 1; i >= 0; --i) {
      const int64_t entry = EntryOf(row, row.read, hv, i);
      const float* const from = &p_.pending.u[entry * p_.V];
      float* const to = &pending_u_[int64_t{i} * p_.V];
      for (int32_t j = 0; j < p_.V; ++j) to[j] = pending_decay_ * from[j];
      pending_decay_ *= p_.pending.decay[entry];
    }
    Ask(pending_u_, Layout::kKV, row.count, p_.V, of_pending_.data(), p_.T);
  }

  // Queries entries: what they have is [K, V] or [V, K].
  void Ask(const float* entries, Layout layout, int64_t K, int64_t V,
           const Query* queries, int64_t count) {
    kernels_.query({{layout, DType::kFloat32, static_cast<int32_t>(K),
                     static_cast<int32_t>(V), entries, tile_, nullptr},
                    queries,
                    count,
                    {}});
  }

  Fold FoldOf(const RowPlan& row, int32_t hv) const {
    if (!row.folds) return {};
    return {NewStateOf(p_, row.write, hv), entry_k_, pending_u_, row.count,
            pending_decay_};
  }

  // Token t: `out`, and what is to be kept. `decay_` and `since_` are of the token
  // before it.
  void DecodeToken(const RowPlan& row, int64_t t, int64_t head, int32_t hv) {
    decay_ = DecayOfHead(p_, head, hv);
    since_ *= decay_;
    for (int64_t s = 0; s < t; ++s) {
      own_weights_[s] *= decay_;
      k_weights_[s] = own_weights_[s] * dots_[t].p[row.count + s];
      q_weights_[s] = own_weights_[s] * dots_[t].r[row.count + s];
    }
    own_weights_[t] = 1.0f;
    const Query own = {k_weights_, q_weights_, own_p_, out_};
    Ask(own_u_, Layout::kKV, t, p_.V, &own, 1);
    kernels_.widen(p_.v, head * p_.V, p_.V, v_);
    const Query &pending = of_pending_[t], &state = of_state_[t];
    Join(since_, pending_decay_, state.p, pending.p, p_.V, own_p_);
    Join(since_, pending_decay_, state.r, pending.r, p_.V, out_);
    Solve(BetaOf(p_, head), keys_.k_factor(t), keys_.qk(t), v_, own_p_, p_.V,
          &own_u_[t * p_.V], out_);
    StoreOut(head);
  }

  void StoreOut(int64_t head) { kernels_.round(out_, head * p_.V, p_.V, p_.out); }

  // Keeps token t, which was decoded last; its key once a key head.
  void Append(const RowPlan& row, int64_t n, int64_t t, int32_t hv) {
    const Pending& ring = p_.pending;
    const int64_t entry = EntryOf(row, row.write, hv, row.count + t);
    ring.decay[entry] = decay_;
    std::memcpy(&ring.u[entry * p_.V], &own_u_[t * p_.V], p_.V * sizeof(float));
    if (hv % p_.group != 0) return;
    const int32_t h = hv / p_.group;
    const int64_t bytes = p_.K * SizeOf(p_.k.dtype);
    std::memcpy(
        static_cast<char*>(ring.k) +
            KeyEntryOf(row, row.write, h, row.count + t) * bytes,
        static_cast<const char*>(p_.k.data) + ((n * p_.T + t) * p_.H + h) * bytes,
        bytes);
  }

  const DecodeParams& p_;
  const Kernels& kernels_;
  Keys keys_;
  float* entry_k_;      // [window + T, K], of the row and the key head at hand
  float* pending_u_;    // [window, V], weighted
  float* own_u_;        // [T, V], of the tokens before the one at hand
  float* own_weights_;  // [T], theirs
  float *k_weights_, *q_weights_;  // [T], times k.k_i and q.k_i
  float pending_decay_;            // of all that is pending
  float decay_, since_;            // of the token at hand, and since what was pending
  float *v_, *own_p_, *out_;       // [V]
  float* tile_;                    // [kTileWidth, K], or window for K
  std::vector<Query> dots_;        // [T], k.k_i and q.k_i of all entries
  std::vector<Query> of_pending_, of_state_;  // [T]
};

}  // namespace

void DecodeDeferredStates(const DecodeParams& params, int64_t begin, int64_t end) {
  DeferredDecoder decoder(params);
  for (int64_t i = begin; i < end; ++i) decoder.DecodeState(i, i + 1 < end);
}

}  // namespace jax_gdn
