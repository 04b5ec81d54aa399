"""The public function `prefill`."""

from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_gdn._decode import run


def prefill(
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
    lengths: ArrayLike | None = None,
    precision: str = "bf16x6",
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Advances states by the tokens of a prompt: `decode` of many tokens at once.

    Computes what `decode` computes, to rounding, in chunks of 64 tokens: products of
    matrices, and a walk of T / 64 steps. So its time grows with the work and not with
    the length of a sequence of dependent steps. Where `decode` with all T takes less
    time (few tokens, or many rows), that is what runs.

    A donated state is updated in place. All transformations of `decode` apply; reverse
    mode keeps the states after each 2^16 / (B HV) tokens, and the operands.

    Args:
        q: See `decode`, as for all that is not said here.
        k: See `decode`.
        v: See `decode`.
        state: See `decode`; 0 where a sequence begins.
        A_log: See `decode`.
        a: See `decode`.
        dt_bias: See `decode`.
        b: See `decode`.
        scale: See `decode`.
        output: See `decode`.
        use_qk_l2norm: See `decode`.
        g: See `decode`.
        beta: See `decode`.
        lower_bound: See `decode`.
        allow_neg_eigval: See `decode`.
        state_layout: See `decode`.
        layer: See `decode`.
        state_dtype: See `decode`.
        state_indices: See `decode`.
        output_state_indices: The slot that each row writes, [B]; see `decode`.
        lengths: How many tokens of each row count, [B], int32: the first ones. What
            the others hold is not read, their output is 0, and the state is that after
            the last that counts. Below 0 is 0; above T is T. Default: all.
        precision: Of the chunks' products, by how many of bfloat16 pieces a GPU makes
            them: "bf16x6", as exact as float32; "bf16x3", whose operands are rounded to
            2^-16; or "bf16", to 2^-9. A CPU has float32 in place of the former two.
        implementation: "native" is `decode` with all T on a platform that has a kernel
            for it, "xla" the chunked form on any. None takes the faster one.

    Returns:
        `(out, state)`, see `decode`.

    Raises:
        ValueError, TypeError, ImportError, NotImplementedError: As `decode`; and where
            `precision` is unknown or T is symbolic.

    Sources: Yang et al., arXiv:2406.06484, for the chunked form; arXiv:2412.06464.
    """
    # None, which is no choice, would make it a call of `decode`.
    results = run(locals(), precision=str(precision))
    return results.out, results.state
