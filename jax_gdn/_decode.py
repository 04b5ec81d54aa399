"""The public function `decode`, and how it and `decode_deferred` begin."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_gdn._call import by_platform, native, reference, token_by_token
from jax_gdn._checks import (
    as_array,
    as_layer,
    check_operands,
    check_settings,
    check_state_dtype,
    gate_form,
)
from jax_gdn._operands import GIVEN_GATES, Operands, Results, Settings
from jax_gdn._sharding import shard_auto, shard_explicit
from jax_gdn._transformations import batched, differentiable

# The layers of a call, the outermost first: derivatives, a mesh whose types say what is
# split, vmap, the platform, a mesh that XLA splits, the native call. Functions, and no
# JAX primitive: its rules would come from `jax.interpreters`, which change more often.
_CALL = differentiable(
    shard_explicit(batched(by_platform(shard_auto(native), reference))),
    shard_explicit(reference),
)
# Of `prefill`: what is on a device decides which way is faster there.
_PREFILL = differentiable(
    shard_explicit(batched(shard_auto(by_platform(token_by_token, reference)))),
    shard_explicit(reference),
)
# Arguments of the public functions that are settings as they are.
_STATIC = (
    *("scale", "use_qk_l2norm", "state_layout", "implementation"),
    *("lower_bound", "allow_neg_eigval"),
)


def decode(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    state: ArrayLike,
    A_log: ArrayLike | None = None,
    a: ArrayLike | None = None,
    dt_bias: ArrayLike | None = None,
    b: ArrayLike | None = None,
    scale: float | None = None,
    output: ArrayLike | None = None,
    use_qk_l2norm: bool = True,
    *,
    g: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    state_layout: str = "KV",
    layer: int | ArrayLike | None = None,
    state_dtype: DTypeLike | None = None,
    state_indices: ArrayLike | None = None,
    output_state_indices: ArrayLike | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Advances gated-delta-rule states by T tokens and reads them after each.

    For every sequence, token and value head::

        g    = -exp(A_log) * softplus(a + dt_bias)                 log decay, <= 0
        g    = lower_bound * sigmoid(exp(A_log) * (a + dt_bias))   if lower_bound
        beta = sigmoid(b), or 2 sigmoid(b) if allow_neg_eigval     write strength
        q, k = q / sqrt(sum q^2 + 1e-6), k / sqrt(sum k^2 + 1e-6)  if use_qk_l2norm
        S    = exp(g) S                                            S is [K, V]
        u    = beta (v - k^T S)
        S    = S + k u^T
        out  = scale q^T S

    Value head j reads key head j // (HV // H). Axis letters: B sequences, T tokens, H
    query/key heads, HV value heads, K and V head sizes, N slots of a pool. Storage
    types may be mixed; all arithmetic is float32, between tokens too, and `out` and the
    state are each rounded once, when stored.

    The state is updated in place when it is donated to the surrounding `jax.jit`
    (`jax.jit(step, donate_argnums=...)`): same buffer, no copy. The op itself donates
    nothing: in eager code, and where the state is not donated, the caller's array is
    left as it was, at the price of one copy.

    Under `jax.vmap` it stays one call, for any arguments but one shared pool. On a mesh
    the split of B and HV is that of the state, and nothing is communicated; a split of
    K, V, N or L is gathered. Derivatives, of either mode, are those of the reference:
    reverse mode keeps the operands, so one state for each call (of a stack, all of
    it), and about 3 T + 4 states more while it differentiates one.

    Args:
        q: Queries, [B, T, H, K], float16, bfloat16 or float32.
        k: Keys, [B, T, H, K], float16, bfloat16 or float32.
        v: Values, [B, T, HV, V], float16, bfloat16 or float32.
        state: States, [B, HV, K, V], or a pool of them, [N, HV, K, V], with
            `state_indices`, or with `layer` a stack of either, [L, B, HV, K, V] or
            [L, N, HV, K, V]; float32, bfloat16 or float16.
        A_log: Logarithm of the decay rate, [HV], float32; of 16 bits, it is cast.
        a: Decay input, [B, T, HV]; or [B, T, HV, K], one decay a key channel (Kimi
            Delta Attention). float16, bfloat16 or float32.
        dt_bias: Bias on `a`, [HV], or [HV, K] with the latter; float16, bfloat16 or
            float32.
        b: Write-strength logit, [B, T, HV], float16, bfloat16 or float32.
        scale: Factor on q, a Python number. Default K ** -0.5.
        output: Optional [B, T, HV, V]. Gives the result its dtype and, when donated,
            its buffer; what it holds is not read.
        use_qk_l2norm: Whether q and k are normalised.
        g: Log decay as it is, <= 0, [B, T, HV] or [B, T, HV, K], in place of `A_log`,
            `a` and `dt_bias`; float16, bfloat16 or float32.
        beta: Write strength as it is, [B, T, HV], in place of `b`; comes with `g`.
        lower_bound: Of g, a Python number below 0, for models with a bounded decay.
        allow_neg_eigval: Whether the write strength reaches 2.
        state_layout: "KV" or "VK", whether a state is [K, V] or [V, K].
        layer: Which layer of a stack of states the call updates: a Python int, or an
            integer scalar that the program computes (in a loop over layers). The stack
            is updated in place; the other layers are neither read nor written. A
            computed layer outside [0, L) makes every row padding.
        state_dtype: What dtype the state must have. Where a framework may cast it on
            its way here, that is an error then, and not a mismatch in a loop's carry.
        state_indices: The slot of the pool that each row reads, [B], int32. A row
            whose index is outside [0, N), by convention -1, is padding: its output is
            0 and nothing is written.
        output_state_indices: The slot that each row writes, [B], int32; or the slot
            after each of its tokens, [B, T]: snapshots, so that speculative decoding
            rolls back by choosing a slot. An index outside [0, N) is not written.
            Default: `state_indices`. What two rows leave in a slot that both write,
            or that one writes and another reads, is undefined; `jax_gdn.check_slots`
            finds them. Slots in NumPy arrays may have any integer dtype.
        implementation: None, "native" or "xla". "native" is the CUDA kernel (compute
            capability 9.0 and newer; K of 64, 128, 192 or 256, V a multiple of 16) or
            the host kernel (any K and V). "xla" is the reference, on any platform.
            None takes the native kernel where there is one for the platform and the
            shapes, else the reference, with a warning that names the reason.

    Returns:
        `(out, state)`: out [B, T, HV, V] in the dtype of `output`, or q's without
        one; state with the shape and dtype it came with.

    Raises:
        ValueError: Shapes disagree, HV is no multiple of H, `state_layout` or
            `implementation` is unknown, `output_state_indices` comes alone, `g` and
            `beta` are mixed with what they replace, a Python int `layer` is outside the
            stack, a slot of a NumPy array does not fit into int32, or mapped calls
            share a pool or a stack.
        TypeError: A dtype or a static argument has the wrong type.
        ImportError: The native modules were built for a newer jaxlib than this one.
        NotImplementedError: `implementation="native"` where there is no such kernel;
            or inside a `jax.shard_map` that leaves axes of the mesh to XLA.

    Source: Yang, Kautz, Hatamizadeh, Gated Delta Networks, arXiv:2412.06464; with one
    decay a key channel, Kimi Delta Attention, arXiv:2510.26692.
    """
    results = run(locals())
    return results.out, results.state


def run(arguments: dict[str, Any], **only: Any) -> Results:
    """One call, of a public function's arguments by their names.

    `only` are settings that this function alone has.
    """
    static = {name: arguments[name] for name in _STATIC}
    gates = ("A_log", "a", "dt_bias", "b", "g", "beta")
    form = gate_form(
        {name: arguments[name] for name in gates},
        arguments["lower_bound"],
        arguments["allow_neg_eigval"],
    )
    known_layer, layer = as_layer(arguments["layer"])
    settings = Settings(**static, gate_form=form, layer=known_layer, **only)
    check_settings(settings)
    # Before jit, which would take slots that wrap around and, where it is disabled,
    # converts nothing.
    left_out = GIVEN_GATES.values() if form != "given" else gates[:4]
    places = {gate: place for place, gate in GIVEN_GATES.items()}
    operands = {
        places.get(name, name): as_array(name, x)
        for name, x in arguments.items()
        if name not in (*_STATIC, *only, "layer", "state_dtype", *left_out)
    }
    check_state_dtype(operands["state"], arguments["state_dtype"])
    return _decode(settings, Operands(**operands, layer=layer))


@ft.partial(jax.jit, static_argnums=0)
def _decode(settings: Settings, operands: Operands) -> Results:
    # Everything but the call itself happens while tracing: an eager call costs what
    # a jitted one does.
    axes = check_operands(operands, settings)
    if operands.A_log is not None:
        operands = operands._replace(A_log=operands.A_log.astype(jnp.float32))
    scale = operands.q.shape[-1] ** -0.5 if settings.scale is None else settings.scale
    settings = settings._replace(axes=axes, scale=float(scale))
    with jax.named_scope(f"jax_gdn.{settings.name}"):
        call = _CALL if settings.precision is None else _PREFILL
        return call(settings, operands)
