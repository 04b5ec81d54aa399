"""Peers on the CPU; each class is one, with a state that lives from call to call.

Of the inputs they use the first set, once: a CPU's caches are not flushed. Where a
peer takes gates or normalised vectors, they are computed outside the timing.
"""

import ctypes
import os
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
THREADS = len(os.sched_getaffinity(0))


def gates(x: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Returns the log decay and the write strength, [B, T, HV]."""
    g = -np.exp(x["A_log"]) * np.logaddexp(0, x["a"] + x["dt_bias"])
    beta = 1 / (1 + np.exp(-x["b"]))
    return g.astype(np.float32), beta.astype(np.float32)


def normalised(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + np.float32(1e-6))


class Torch:
    """The recurrent loop of Hugging Face's transformers."""

    layout, state_dtype, calls = "KV", "float32", 1

    def __init__(self, inputs: list[Arrays], repeats: int = 1):
        del repeats  # a GPU's, whose batches are made of fewer rows
        x = inputs[0]
        import torch
        from transformers.models.qwen3_next import modeling_qwen3_next as model

        torch.set_num_threads(THREADS)
        g, beta = gates(x)
        repeats = x["v"].shape[2] // x["q"].shape[2]
        # Before 5.17 it does not repeat key heads itself; given all, it never does.
        q, k = (x[name].repeat(repeats, axis=2) for name in ("q", "k"))
        tensors = [torch.from_numpy(y) for y in (q, k, x["v"], g, beta)]
        self._q, self._k, self._v, self._g, self._beta = tensors
        self._state = torch.from_numpy(x["state"].copy())
        self._call = model.torch_recurrent_gated_delta_rule
        self._out, self._no_grad = None, torch.no_grad

    def run(self, steps: int) -> None:
        with self._no_grad():
            for _ in range(steps):
                self._out, self._state = self._call(
                    *(self._q, self._k, self._v),
                    g=self._g,
                    beta=self._beta,
                    initial_state=self._state,
                    output_final_state=True,
                    use_qk_l2norm_in_kernel=True,
                )

    def wait(self) -> None:
        pass

    def once(self):
        self.run(1)
        assert self._out is not None
        return self._out.numpy(), self._state.numpy()


class OnnxRuntime:
    """The operator LinearAttention; q and k normalised and repeated outside."""

    layout, state_dtype, calls = "KV", "float32", 1

    def __init__(self, inputs: list[Arrays], repeats: int = 1):
        del repeats  # a GPU's, whose batches are made of fewer rows
        x = inputs[0]
        import onnxruntime

        B, T, HV, _ = x["v"].shape
        self._out_shape = x["v"].shape
        repeats = HV // x["q"].shape[2]
        q, k = (normalised(x[n]).repeat(repeats, axis=2) for n in ("q", "k"))
        g, beta = gates(x)
        flat = {"q": q, "k": k, "v": x["v"], "g": g, "b": beta}
        self._feed = {
            n: np.ascontiguousarray(y.reshape(B, T, -1)) for n, y in flat.items()
        }
        self._feed["s"] = x["state"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        self._session = onnxruntime.InferenceSession(
            self._model(HV), options, providers=["CPUExecutionProvider"]
        )
        self._out = None

    def _model(self, HV: int) -> bytes:
        from onnx import TensorProto, helper

        def value(name: str, rank: int):
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)

        node = helper.make_node(
            *("LinearAttention", list("qkvsgb"), ["o", "new_s"]),
            q_num_heads=HV,
            kv_num_heads=HV,
            update_rule="gated_delta",
        )
        inputs = [value(name, self._feed[name].ndim) for name in "qkvsgb"]
        graph = helper.make_graph(
            [node], "decode", inputs, [value("o", 3), value("new_s", 4)]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 27)])
        model.ir_version = 13
        return model.SerializeToString()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._out, self._feed["s"] = self._session.run(None, self._feed)

    def wait(self) -> None:
        pass

    def once(self):
        self.run(1)
        assert self._out is not None
        return self._out.reshape(self._out_shape), self._feed["s"]


class _Plan(ctypes.Structure):
    """ggml_cplan; room behind it for what newer versions add."""

    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("later", ctypes.c_char * 256),
    )


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class Ggml:
    """`ggml_gated_delta_net`, through the libraries of llama-cpp-python.

    It maps value head j to key head j % H, keeps states as [V, K] and returns a new
    one. That is not copied back, in its favour: every call starts from the same state.
    Gates and norms are outside.
    """

    layout, state_dtype, calls = "VK", "float32", 1

    def __init__(self, inputs: list[Arrays], repeats: int = 1):
        del repeats  # a GPU's, whose batches are made of fewer rows
        x = inputs[0]
        base, cpu = _ggml_libraries()
        B, T, HV, V = x["v"].shape
        H, K = x["q"].shape[2:]
        self._shapes = (B, T, HV, V), (B, HV, V, K)
        # The value head that stands at place j there has key head j % H here.
        self._order = np.arange(HV).reshape(H, HV // H).T.reshape(-1)
        g, beta = (y[:, :, self._order, None] for y in gates(x))
        state = x["state"].swapaxes(-1, -2)[:, self._order]
        q, k = normalised(x["q"]), normalised(x["k"])
        arrays = [q, k, x["v"][:, :, self._order], g, beta, state]
        # The inputs, as much again for the result, and what ggml notes beside.
        room = 2 * sum(y.nbytes for y in arrays) + (64 << 20)
        self._context = base.ggml_init(_InitParams(room, None, False))
        tensors = []
        for array in arrays:
            data = np.ascontiguousarray(array, np.float32)
            # ggml counts axes from the last; type 0 is float32.
            tensor = base.ggml_new_tensor_4d(self._context, 0, *data.shape[::-1])
            ctypes.memmove(base.ggml_get_data(tensor), data.ctypes.data, data.nbytes)
            tensors.append(tensor)
        self._result = base.ggml_gated_delta_net(self._context, *tensors, 1)
        self._graph = base.ggml_new_graph(self._context)
        base.ggml_build_forward_expand(self._graph, self._result)
        self._base, self._cpu = base, cpu
        # Planned once, as a model does: the short cut takes new memory every call.
        self._plan = cpu.ggml_graph_plan(self._graph, THREADS, None)
        self._work = ctypes.create_string_buffer(max(1, self._plan.work_size))
        self._plan.work_data = ctypes.addressof(self._work)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._cpu.ggml_graph_compute(self._graph, ctypes.byref(self._plan))

    def wait(self) -> None:
        pass

    def once(self):
        self.run(1)
        out_shape, state_shape = self._shapes
        sizes = int(np.prod(out_shape)), int(np.prod(state_shape))
        data = self._base.ggml_get_data(self._result)
        floats = (ctypes.c_float * sum(sizes)).from_address(data)
        packed = np.ctypeslib.as_array(floats)
        out, state = np.empty(out_shape), np.empty(state_shape)
        out[:, :, self._order] = packed[: sizes[0]].reshape(out_shape)
        state[:, self._order] = packed[sizes[0] :].reshape(state_shape)
        return out, state


def _ggml_libraries():
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    signatures = {
        "ggml_init": [_InitParams],
        "ggml_new_tensor_4d": [pointer, int32, *[int64] * 4],
        "ggml_gated_delta_net": [*[pointer] * 7, int64],
        "ggml_get_data": [pointer],
        "ggml_new_graph": [pointer],
        "ggml_build_forward_expand": [pointer, pointer],
    }
    for name, types in signatures.items():
        function = getattr(base, name)
        function.argtypes, function.restype = types, pointer
    cpu.ggml_graph_plan.argtypes = [pointer, int32, pointer]
    cpu.ggml_graph_plan.restype = _Plan
    cpu.ggml_graph_compute.argtypes = [pointer, pointer]
    return base, cpu


PEERS = {
    "transformers (torch)": Torch,
    "onnxruntime": OnnxRuntime,
    "ggml (llama-cpp-python)": Ggml,
}
