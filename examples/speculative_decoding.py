"""Speculative decoding: verify T drafted tokens in one call, take back the wrong ones.

Two ways. Snapshots: every token leaves the state in a slot of its own, and the next
call reads the slot after the last right one. Deferred writes: the call's tokens are
pending beside the state, and the cursors say how many of them count. Neither copies or
computes anything again. Snapshots give the bits of decoding token by token; deferred
writes, which sum in another order, give its outputs to rounding, and its tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_gdn

B, T, H, HV, K, V, LENGTH, WORDS = 3, 4, 2, 4, 128, 128, 24, 50
A_log, dt_bias = jnp.zeros(HV, jnp.float32), jnp.zeros(HV, jnp.float32)


def sequence(key, length: int) -> dict[str, Any]:
    keys = jax.random.split(key, 5)
    shapes = {"q": (H, K), "k": (H, K), "v": (HV, V), "a": (HV,), "b": (HV,)}
    return {
        name: jax.random.normal(key, (B, length, *shape), jnp.bfloat16)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


class Snapshots:
    """Row n owns slots n (T + 1) to n (T + 1) + T: one to read, T to write."""

    def __init__(self):
        self.slots = np.arange(B * (T + 1), dtype=np.int32).reshape(B, T + 1)
        self.pool = jnp.zeros((self.slots.size, HV, K, V), jnp.float32)
        self.read = self.slots[:, 0].copy()

    def verify(self, inputs, finished):
        others = [x[x != r] for x, r in zip(self.slots, self.read, strict=True)]
        self.write = np.stack(others)
        read = np.where(finished, -1, self.read)
        out, self.pool = self.call(self.pool, inputs, read, self.write)
        return out

    def accept(self, good):
        last = self.write[np.arange(B), good - 1]
        self.read = np.where(good > 0, last, self.read)

    @staticmethod
    @jax.jit(donate_argnums=0)
    def call(pool, inputs, read, write):
        slots = {"state_indices": read, "output_state_indices": write}
        given = inputs | {"A_log": A_log, "dt_bias": dt_bias} | slots
        return jax_gdn.decode(**given, state=pool)


class DeferredWrites:
    """Row n owns slot n. The cursors are all that is taken back."""

    def __init__(self):
        self.state = jnp.zeros((B, HV, K, V), jnp.float32)
        self.pending = jax_gdn.new_pending(self.state, H, max_tokens=T)
        self.cursors = jax_gdn.new_cursors(B)

    def verify(self, inputs, finished):
        self.rows = np.where(finished, -1, np.arange(B, dtype=np.int32))
        given = inputs | {"state_indices": self.rows}
        out, self.state, self.pending = self.call(
            self.state, self.pending, self.cursors, given
        )
        return out

    def accept(self, good):
        self.cursors = jax_gdn.advance_cursors(
            self.cursors, self.pending, T, state_indices=self.rows, accepted=good
        )

    @staticmethod
    @jax.jit(donate_argnums=(0, 1))
    def call(state, pending, cursors, inputs):
        given = inputs | {"A_log": A_log, "dt_bias": dt_bias, "cursors": cursors}
        return jax_gdn.decode_deferred(**given, state=state, pending=pending)


def decode_drafts(way, true, wrong) -> tuple[list, int]:
    """Returns each row's outputs, and how many calls they took."""
    outputs, position = [[] for _ in range(B)], np.zeros(B, int)
    rng, calls = np.random.default_rng(0), 0
    while (position < LENGTH).any():
        # A draft is right up to a point that only verifying tells.
        good = np.minimum(rng.integers(1, T + 1, B), LENGTH - position)
        at = np.minimum(position[:, None] + np.arange(T), LENGTH - 1)
        right = np.arange(T) < good[:, None]
        inputs = {}
        for name, x in true.items():
            mask = right.reshape(B, T, *[1] * (x.ndim - 2))
            inputs[name] = jnp.where(
                mask, x[np.arange(B)[:, None], at], wrong[name][:, :T]
            )
        out = way.verify(inputs, position >= LENGTH)
        way.accept(good.astype(np.int32))
        for n in range(B):
            outputs[n] += list(np.asarray(out[n, : good[n]]))
        position, calls = position + good, calls + 1
    return outputs, calls


def main():
    true = sequence(jax.random.key(0), LENGTH)
    wrong = sequence(jax.random.key(1), LENGTH)
    state = jnp.zeros((B, HV, K, V), jnp.float32)
    plain = []
    for t in range(LENGTH):
        token = {name: x[:, t : t + 1] for name, x in true.items()}
        out, state = jax_gdn.decode(**token, state=state, A_log=A_log, dt_bias=dt_bias)
        plain.append(np.asarray(out[:, 0]))
    plain = np.stack(plain, 1)

    # As a model would: the likeliest word.
    head = np.asarray(jax.random.normal(jax.random.key(2), (HV * V, WORDS)))

    def words(outputs):
        return np.argmax(outputs.astype(np.float32).reshape(B, LENGTH, -1) @ head, -1)

    for way in (Snapshots(), DeferredWrites()):
        outputs, calls = decode_drafts(way, true, wrong)
        outputs = np.array(outputs)
        bitwise = np.array_equal(outputs, plain)
        same = np.array_equal(words(outputs), words(plain))
        print(
            f"{type(way).__name__}: {B * LENGTH} tokens in {calls} calls of {T}; "
            f"the tokens of one by one: {same}; bitwise: {bitwise}"
        )


if __name__ == "__main__":
    main()
