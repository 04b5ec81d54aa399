"""Peers on an NVIDIA GPU, and what FlashInfer's decode gets silently wrong.

Every peer runs from a CUDA graph, over states that together leave the L2 cache, so that
no host is in its time; so does `decode`, from XLA's command buffers.
"""

import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from .loops import CALLS_IN_A_ROW, reference_loop
from .workload import split_state

Arrays = dict[str, np.ndarray]


def _tensors(
    x: Arrays, layout: str, state_dtype: str, repeats: int = 1
) -> dict[str, Any]:
    """Returns CUDA tensors: gates' weights float32, the rest but the state bfloat16."""
    import torch

    result = {}
    for name, array in x.items():
        if name == "state" and layout == "VK":
            array = array.swapaxes(-1, -2)
        tensor = torch.from_numpy(np.ascontiguousarray(array)).cuda()
        if name in ("A_log", "dt_bias"):
            result[name] = tensor.to(torch.float32)
            continue
        dtype = getattr(torch, state_dtype if name == "state" else "bfloat16")
        result[name] = tensor.to(dtype).repeat(repeats, *[1] * (tensor.ndim - 1))
    result["output"] = torch.zeros_like(result["v"])
    return result


class TorchPeer:
    """A peer that works on torch's CUDA tensors; `prepare` gives its call."""

    layout, state_dtype = "KV", "float32"

    def __init__(self, inputs: list[Arrays], repeats: int = 1):
        import torch

        self._call = self.prepare()
        self._torch = torch
        self._sets = [
            _tensors(x, self.layout, self.state_dtype, repeats) for x in inputs
        ]
        self.x = self._sets[0]
        self._graph: Any = None
        self._rounds = -(-CALLS_IN_A_ROW // len(inputs))
        self.calls = self._rounds * len(inputs)

    def prepare(self) -> Callable[[dict[str, Any]], None]:
        raise NotImplementedError

    def once(self):
        """Returns `(out, state)` of one call on the first set, in float32."""
        self._call(self.x)
        self.wait()
        return tuple(self.x[name].float().cpu().numpy() for name in self.results)

    # Where `once` finds them.
    results = ("output", "state")

    def run(self, steps: int) -> None:
        self._graph = self._graph or self._captured()
        for _ in range(steps):
            self._graph.replay()

    def _captured(self) -> Any:
        cuda = self._torch.cuda
        stream = cuda.Stream()
        with cuda.stream(stream):
            for x in self._sets:  # what it compiles or allocates, it does now
                self._call(x)
        stream.synchronize()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=stream):
            for _ in range(self._rounds):
                for x in self._sets:
                    self._call(x)
        return graph

    def wait(self) -> None:
        self._torch.cuda.synchronize()


def _operands(x: dict[str, Any]) -> list[Any]:
    names = ("q", "k", "v", "state", "A_log", "a", "dt_bias", "b")
    return [x[name] for name in names]


def _flashinfer(kernel: str) -> Any:
    """Returns FlashInfer's module; `ImportError` says why a kernel of it is missing."""
    import importlib

    importlib.import_module(f"flashinfer.gdn_kernels.gdn_decode_{kernel}")
    return importlib.import_module("flashinfer.gdn_decode")


class FlashInferKMajor(TorchPeer):
    def prepare(self):
        decode = _flashinfer("nontranspose").gated_delta_rule_decode

        return lambda x: decode(*_operands(x), None, x["output"])


class FlashInferVMajor(TorchPeer):
    layout = "VK"

    def prepare(self):
        decode = _flashinfer("pretranspose").gated_delta_rule_decode_pretranspose

        return lambda x: decode(*_operands(x), None, x["output"])


class FlashInferBfloat16(TorchPeer):
    """Its bfloat16 kernel is the one that takes a pool."""

    layout, state_dtype = "VK", "bfloat16"

    def prepare(self):
        import torch

        decode = _flashinfer("bf16_state").gated_delta_rule_decode_pretranspose

        def call(x):
            if "slots" not in x:
                x["slots"] = torch.arange(len(x["q"]), dtype=torch.int32, device="cuda")
            q, k, v, state, *gates = _operands(x)
            decode(
                *(q, k, v, None, *gates, None, x["output"]),
                initial_state=state,
                initial_state_indices=x["slots"],
            )

        return call


class Fla(TorchPeer):
    """flash-linear-attention: a new state every call, here from the same old one."""

    results = ("output", "new_state")

    def prepare(self):
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule as decode

        def call(x):
            x["output"], x["new_state"] = decode(
                *(x["q"], x["k"], x["v"]),
                g=x["a"],
                beta=x["b"],
                initial_state=x["state"],
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
                use_gate_in_kernel=True,
                A_log=x["A_log"],
                dt_bias=x["dt_bias"],
                use_beta_sigmoid_in_kernel=True,
            )

        return call


class Lalamo:
    """Its Pallas kernel, with gates, norms and repeated heads in the same jit."""

    layout, state_dtype = "VK", "float32"

    def __init__(self, inputs: list[Arrays], repeats: int = 1):
        import importlib.util

        import jax
        import jax.numpy as jnp

        # The kernel alone: the package's own imports are half an inference stack.
        if "lalamo" not in sys.modules:
            spec = importlib.util.find_spec("lalamo")
            if spec is None:
                raise ImportError("lalamo")
            for name in ("lalamo", "lalamo.kernels"):
                module = types.ModuleType(name)
                folders = list(spec.submodule_search_locations or [])
                below = "/kernels" if name.endswith("kernels") else ""
                module.__path__ = [folder + below for folder in folders]
                sys.modules[name] = module
        from lalamo.kernels.deltanet.pallas_recurrent import _make_batched_update

        rows, _, HV, V = inputs[0]["v"].shape
        B = rows * repeats
        update = _make_batched_update(B, HV, V)

        def step(state, x):
            q, k, v, A_log, a, dt_bias, b = (
                x[n] for n in ("q", "k", "v", "A_log", "a", "dt_bias", "b")
            )
            repeats = HV // q.shape[2]
            q, k = (
                jnp.repeat(
                    y / jnp.sqrt((y * y).sum(-1, keepdims=True) + 1e-6), repeats, 2
                )
                for y in (q, k)
            )
            decay = jnp.exp(-jnp.exp(A_log) * jax.nn.softplus(a + dt_bias))
            scaled, beta = q * q.shape[-1] ** -0.5, jax.nn.sigmoid(b)
            operands = (scaled, k, v, decay, beta)
            operands = [y[:, 0].astype(jnp.float32) for y in operands]
            state, out = update(*operands, state, jnp.ones(B, bool))
            return state, out[:, None].astype(x["v"].dtype)

        def array(name: str, x: np.ndarray) -> jax.Array:
            x = x.swapaxes(-1, -2) if name == "state" else x
            repeated = 1 if name in ("A_log", "dt_bias") else repeats
            return jnp.tile(jnp.asarray(x), (repeated, *[1] * (x.ndim - 1)))

        pairs = [split_state({n: array(n, y) for n, y in x.items()}) for x in inputs]
        states, rests = [s for s, _ in pairs], [rest for _, rest in pairs]
        self.once = lambda: jax.jit(step)(states[0], rests[0])[::-1]
        loop = reference_loop(step, states, rests)
        self.run, self.wait, self.calls = loop.run, loop.wait, loop.calls


PEERS = {
    "FlashInfer, K-major": FlashInferKMajor,
    "FlashInfer, V-major": FlashInferVMajor,
    "FlashInfer, bfloat16 state": FlashInferBfloat16,
    "flash-linear-attention": Fla,
    "lalamo (Pallas)": Lalamo,
}


@dataclasses.dataclass(frozen=True)
class Defect:
    what: str
    seen: str


def _inputs(
    B: int = 1, K: int = 128, V: int = 128, H: int = 16, HV: int = 32
) -> Arrays:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    return {
        **{"q": normal(B, 1, H, K), "k": normal(B, 1, H, K), "v": normal(B, 1, HV, V)},
        **{"state": normal(B, HV, K, V), "A_log": np.log(rng.uniform(1, 16, HV))},
        **{"a": normal(B, 1, HV), "dt_bias": normal(HV), "b": normal(B, 1, HV)},
    }


def _error(peer: TorchPeer) -> str:
    """Returns how far a peer is from float64 on the very values that it is given."""
    from tests.oracle import decode64

    given = {n: y.double().cpu().numpy() for n, y in peer.x.items() if n != "output"}
    slots = given.pop("slots", None)
    assert slots is None
    expected = decode64(**given, state_layout=peer.layout)
    errors = [
        np.abs(x.astype(np.float64) - y).max() / np.abs(y).max()
        for x, y in zip(peer.once(), expected, strict=True)
    ]
    return "error of out {:.1e}, of the state {:.1e}".format(*errors)


def _with_float16(peer: TorchPeer) -> TorchPeer:
    for name in ("q", "k", "v"):
        peer.x[name] = peer.x[name].half()
    peer.x["output"] = peer.x["output"].half()
    return peer


def _write_index_minus_one() -> str:
    """Returns whether slot 0 keeps its bytes when a row says not to write."""
    import torch
    from flashinfer.gdn_decode import gated_delta_rule_decode_pretranspose as decode

    x = _tensors(_inputs(B=2), "VK", "float32")
    before = x["state"].clone()
    q, k, v, pool, *gates = _operands(
        {n: y[1:] if n in "qkvab" else y for n, y in x.items()}
    )
    decode(
        *(q, k, v, None, *gates, None, x["output"][1:]),
        initial_state=pool,
        initial_state_indices=torch.tensor([1], dtype=torch.int32, device="cuda"),
        output_state_indices=torch.tensor([-1], dtype=torch.int32, device="cuda"),
    )
    kept = bool(torch.equal(before[0], pool[0]))
    return "slot 0 kept" if kept else "slot 0 overwritten"


def defects() -> list[Defect]:
    """Tries each defect; one that is mended or refused with an error shows as that."""
    large_gate = _inputs()
    large_gate["a"][:], large_gate["dt_bias"][:] = 100, 0
    tries: dict[str, Callable[[], str]] = {
        "K-major, K = 256": lambda: _error(FlashInferKMajor([_inputs(K=256)])),
        "K-major, V = 160": lambda: _error(FlashInferKMajor([_inputs(V=160)])),
        "V-major, float16 q, k, v": lambda: _error(
            _with_float16(FlashInferVMajor([_inputs()]))
        ),
        "bfloat16 state, a + dt_bias = 100": lambda: _error(
            FlashInferBfloat16([large_gate])
        ),
        "V-major, write index -1": _write_index_minus_one,
    }
    results = []
    for what, attempt in tries.items():
        try:
            results.append(Defect(f"FlashInfer, {what}", attempt()))
        except ImportError as missing:
            results.append(Defect(f"FlashInfer, {what}", f"not installed ({missing})"))
        except Exception as refused:  # an error is the right answer to most of these
            results.append(Defect(f"FlashInfer, {what}", f"refused: {refused}"[:200]))
    return results
