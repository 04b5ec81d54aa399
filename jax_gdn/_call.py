"""The call itself: the native one or the reference, as the platform has it."""

import functools as ft
import math
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_gdn import _registration
from jax_gdn._chunked import chunked_prefill, tokens_there
from jax_gdn._operands import (
    GATE_FORMS,
    OPTIONAL,
    PENDING,
    SLOTS,
    UPDATED,
    Call,
    Operands,
    Results,
    Settings,
)
from jax_gdn._reference import (
    as_gates,
    only,
    reference_decode,
    reference_decode_deferred,
    slots_of_layer,
)

# An identity on one operand whose lowering rule warns or raises: only when a program is
# lowered is its platform known, and so whether there is a native kernel for it.
_without_native_p = Primitive("jax_gdn_without_native")
_without_native_p.def_impl(lambda x, **_: x)
_without_native_p.def_abstract_eval(lambda x, **_: x)
batching.defvectorized(_without_native_p)


def _lower_without_native(ctx, x, *, name: str, reason: str | None, required: bool):
    if reason is None:
        names = set(ctx.module_context.platforms or ()) - {"cpu", "cuda"}
        where = ", ".join(sorted(names)) or "this platform"
        reason = f"there is no native kernel for {where}"
    if required:
        raise NotImplementedError(
            f'jax_gdn.{name}: implementation="native" cannot run: {reason}. Pass '
            'implementation="xla" for the reference, which runs anywhere.'
        )
    text = f"jax_gdn.{name} falls back to the reference: {reason}."
    warnings.warn(text, stacklevel=2)
    return [x]


mlir.register_lowering(_without_native_p, _lower_without_native)


def _why_not_cuda(settings: Settings, operands: Operands) -> str | None:
    """Returns why the CUDA kernel cannot take these operands, or None."""
    q, v = operands.q, operands.v
    if _registration.cuda is None:
        return "this build of jax_gdn has no CUDA kernels"
    B = math.prod(v.shape[: settings.num_batch_dims + 1])
    HV, V = v.shape[-2:]
    # The handler itself checks a symbolic B or T, when it has a value.
    why = _registration.cuda.why_unsupported(
        B if isinstance(B, int) else 1, HV, q.shape[-1], V
    )
    if why or settings.window is None:
        return why
    T = v.shape[-3]
    return _registration.cuda.why_unsupported_deferred(
        T if isinstance(T, int) else 1,
        q.shape[-1],
        V,
        settings.window,
        len(settings.axes.a) == 4,
        all(x.dtype == jnp.bfloat16 for x in (q, operands.k, v)),
    )


def _why_not_cpu(settings: Settings) -> str | None:
    """Returns why the host kernel cannot take such a call, or None."""
    if settings.window is None or len(settings.axes.a) != 4:
        return None
    return (
        "the host kernel of decode_deferred takes one decay a head; got one a key "
        "channel"
    )


def by_platform(native: Call, reference: Call) -> Call:
    """Returns a call that is either, decided when it is lowered for a platform.

    A native call that cannot run is a warning, but for `prefill`, whose reference is
    what runs wherever the native call takes longer.
    """

    def by_platform(settings: Settings, operands: Operands) -> Results:
        if settings.implementation == "xla":
            return reference(settings, operands)
        _registration.require_handlers()

        def without_native(reason: str | None, operands: Operands) -> Results:
            required = settings.implementation == "native"
            q = _without_native_p.bind(
                operands.q, name=settings.name, reason=reason, required=required
            )
            return reference(settings, operands._replace(q=q))

        # One object for both platforms, which are then one branch.
        run, in_chunks = ft.partial(native, settings), ft.partial(reference, settings)
        whys = {
            "cpu": _why_not_cpu(settings),
            "cuda": _why_not_cuda(settings, operands),
        }
        free = settings.precision is not None and settings.implementation is None

        def choose(platform: str) -> Callable[[Operands], Results]:
            why_not = whys[platform]
            if free and (why_not or _chunks_pay(platform, operands)):
                return in_chunks
            return ft.partial(without_native, why_not) if why_not else run

        return jax.lax.platform_dependent(
            operands,
            cpu=choose("cpu"),
            cuda=choose("cuda"),
            default=in_chunks if free else ft.partial(without_native, None),
        )

    return by_platform


def reference(settings: Settings, operands: Operands) -> Results:
    """The reference, for operands with any number of batch dimensions."""

    def call(operands: Operands) -> Results:
        given = dict(operands.items())
        if settings.gate_form == "given":
            given |= {"g": given.pop("a"), "beta": given.pop("b")}
        if settings.layer is not None:
            given["layer"] = settings.layer
        pending = ()
        if settings.precision is not None:
            given["precision"] = settings.precision
            out, state = chunked_prefill(**given, **options)
        elif settings.window is None:
            out, state = reference_decode(**given, **options)
        else:
            given["pending"] = [given.pop(name) for name in PENDING]
            given["window"] = settings.window
            out, state, pending = reference_decode_deferred(**given, **options)
        output = operands.output
        # Written whole into `output`, so that a donated buffer finds its use.
        out = out if output is None else output.at[...].set(out)
        return Results(out, state, *pending)

    names = ("scale", "use_qk_l2norm", "state_layout")
    names += ("lower_bound", "allow_neg_eigval")
    options = {name: getattr(settings, name) for name in names}
    in_axes = Operands(*(0 if batch else None for batch in settings.has_batch_dims))
    for _ in range(settings.num_batch_dims):
        call = jax.vmap(call, (in_axes,))
    return call(operands)


def native(settings: Settings, operands: Operands) -> Results:
    """The native call, for operands with any number of batch dimensions."""
    # Types from the reference carry shardings and varying axes too.
    results = jax.eval_shape(ft.partial(reference, settings), operands)
    # A known layer is an offset, which costs nothing; another, and one under vmap, is
    # a part of the slots.
    offset = -1 if settings.layer is None or settings.num_batch_dims else settings.layer
    if offset < 0:
        operands = _merge_batch_dims(settings, operands)
    given = dict(operands.items())
    if operands.fold is not None:
        given["fold"] = operands.fold.astype(jnp.int32)
    names = list(given)
    there = {name: x for name, x in results._asdict().items() if x is not None}
    donors = {"out": "output"}
    aliases = {
        names.index(donor): i
        for i, name in enumerate(there)
        if (donor := donors.get(name, name)) in given
    }
    bits = sum(1 << i for i, name in enumerate(OPTIONAL) if name in given)
    target, attributes = _registration.DECODE_TARGET, {}
    if settings.window is not None:
        target = _registration.DEFERRED_TARGET
        attributes["window"] = np.int32(settings.window)
    call = jax.ffi.ffi_call(target, list(there.values()), input_output_aliases=aliases)
    results = call(
        *given.values(),
        scale=np.float32(settings.scale),
        use_qk_l2norm=settings.use_qk_l2norm,
        state_layout=np.int32(settings.state_layout == "VK"),
        optional_operands=np.int32(bits),
        gates=np.int32(GATE_FORMS.index(settings.gate_form)),
        lower_bound=np.float32(settings.lower_bound or 0),
        beta_scale=np.float32(2 if settings.allow_neg_eigval else 1),
        layer=np.int32(offset),
        **attributes,
    )
    return Results(*results)


def token_by_token(settings: Settings, operands: Operands) -> Results:
    """The native call of `decode` with all tokens of `prefill`."""
    lengths, operands = operands.lengths, operands._replace(lengths=None)
    axes = settings.axes._replace(lengths=None)
    settings = settings._replace(precision=None, axes=axes)
    if lengths is None:
        return native(settings, operands)
    # Padding has no decay and no strength, which logits cannot say.
    there = tokens_there(operands.q.shape[-3], lengths, None)
    logits = (x.astype(jnp.float32) for x in (operands.a, operands.b))
    bounds = settings.lower_bound, settings.allow_neg_eigval
    a, b = as_gates(operands.A_log, operands.dt_bias, *bounds, *logits)
    tokens = operands._asdict() | {"a": a, "b": b}
    tokens = {name: only(tokens[name], there) for name in ("q", "k", "v", "a", "b")}
    given = settings._replace(
        gate_form="given",
        lower_bound=None,
        allow_neg_eigval=False,
        axes=axes._replace(A_log=None, dt_bias=None),
    )
    operands = operands._replace(A_log=None, dt_bias=None, **tokens)
    results = native(given, operands)
    return results._replace(out=only(results.out, there))


def _chunks_pay(platform: str, operands: Operands) -> bool:
    """Whether `prefill` takes less time in chunks than by `decode` with all T.

    On a CPU never, by `benchmarks/results/host/prefill.json`. On a GPU tokens wait for
    one another, and few states leave it idle: chunks should pay from some tokens on, up
    to some states. These two bounds are estimates.
    """
    *rows, T, HV, _ = operands.v.shape
    known = [size for size in rows if not export.is_symbolic_dim(size)]
    return platform == "cuda" and T >= 256 and math.prod(known) * HV <= 96


def _merge_batch_dims(settings: Settings, operands: Operands) -> Operands:
    """Makes one axis of the batch dimensions, L and B, or N; slots are then of all."""
    dims, has_stack = settings.num_batch_dims, settings.has_stack
    if dims == 0 and not has_stack:
        return operands

    def merged(name: str, x: Array) -> Array:
        # Handlers merge those of both that are donated: XLA's host code would copy what
        # is reshaped.
        in_place = name in (*UPDATED, "output")
        if in_place or not getattr(settings.has_batch_dims, name):
            return x
        if name == "cursors" and has_stack:  # one for all layers
            L = operands.state.shape[dims]
            x = jnp.expand_dims(x, dims)
            x = jnp.broadcast_to(x, (*x.shape[:dims], L, *x.shape[dims + 1 :]))
            return x.reshape(math.prod(x.shape[:-1]), 2)
        return x.reshape(math.prod(x.shape[: dims + 1]), *x.shape[dims + 1 :])

    layer = settings.layer if operands.layer is None else operands.layer
    result = {name: merged(name, x) for name, x in operands.items() if name != "layer"}
    if settings.has_pool or has_stack:
        *pools, N = operands.state.shape[: dims + 1 + has_stack]
        L = pools.pop() if has_stack else 1
        E = math.prod(pools)  # each with its own layer
        of_layer = jnp.broadcast_to(
            jnp.asarray(0 if layer is None else layer, jnp.int32), pools
        )
        of_layer = of_layer.reshape(E, 1)
        first = L * N * jnp.arange(E, dtype=jnp.int32)[:, None]
        if not settings.has_pool:
            rows = jnp.arange(N, dtype=jnp.int32)
            result["state_indices"] = jnp.broadcast_to(rows, (E, N)).reshape(E * N)
        for name in SLOTS:
            if name in result:
                slots = result[name].reshape(E, -1)
                # Outside its own pool must not become inside the next one.
                slots = slots_of_layer(of_layer, L, N, slots)
                slots = jnp.where(slots >= 0, slots + first, -1)
                result[name] = slots.reshape(result[name].shape)
    return Operands(**result)
