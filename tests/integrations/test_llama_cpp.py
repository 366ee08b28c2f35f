"""The llama.cpp backend, operation by operation: what a real host sends it, against the host's own kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("xllamacpp")

from gguf import GGMLQuantizationType, dequantize, quantize

from sparsek import SparseKConfig, attention
from sparsek.engines import llama_api
from sparsek.integrations import llama_cpp as integration
from sparsek.integrations.llama_cpp import Tensor
from sparsek.kernels import reference
from sparsek.policy import auto_top_k

F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8
PACKED = {n: GGMLQuantizationType(n) for n in (Q4_0, Q8_0)}
KEEP_ALL = SparseKConfig.pure(2**31 - 1)


class Init(ctypes.Structure):
    _fields_ = [("size", c_size_t), ("memory", c_void_p), ("no_alloc", c_bool)]


FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [Init]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor": (POINTER(Tensor), [c_void_p, c_int, c_int, POINTER(c_int64)]),
    "ggml_permute": (POINTER(Tensor), [c_void_p, POINTER(Tensor), c_int, c_int, c_int, c_int]),
    "ggml_set_name": (POINTER(Tensor), [POINTER(Tensor), c_char_p]),
    "ggml_flash_attn_ext": (
        POINTER(Tensor),
        [c_void_p, *[POINTER(Tensor)] * 4, c_float, c_float, c_float],
    ),
    "ggml_flash_attn_ext_add_sinks": (None, [POINTER(Tensor), POINTER(Tensor)]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, POINTER(Tensor)]),
    "ggml_backend_dev_by_name": (c_void_p, [c_char_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_init": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, POINTER(Tensor)]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_free": (None, [c_void_p]),
}


@pytest.fixture(scope="module")
def host() -> ctypes.CDLL:
    library = llama_api.library()
    integration.load_backend(library)
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    integration.configure(KEEP_ALL)
    yield
    integration.configure(None)


@dataclass(frozen=True)
class Shape:
    """An operation as a host sends it. `cache`: type of k and v. `alibi`: the mask has distances, and this is
    the host's `max_bias`. `sinks`: of the model."""

    heads: int = 4
    kv_heads: int = 2
    size: int = 64
    value_size: int = 64
    queries: int = 40
    keys: int = 256
    sequences: int = 1
    cache: int = F16
    mask: str = "shared"
    softcap: float = 0.0
    alibi: float = 0.0
    sinks: bool = False


class Operation:
    """The tensors of one operation, in a context of the host. q, k and v are [B, H, T, D] in NumPy."""

    def __init__(self, host: ctypes.CDLL, shape: Shape) -> None:
        self.host, self.shape, s = host, shape, shape
        self.context = host.ggml_init(Init(256 << 20, None, False))
        rng = np.random.default_rng(0)
        # In memory the tokens come before the heads, as they do in a cache.
        self.q, q = self._rows(rng, F32, s.size, s.queries, s.heads)
        self.k, k = self._rows(rng, s.cache, s.size, s.keys, s.kv_heads)
        self.v, v = self._rows(rng, s.cache, s.value_size, s.keys, s.kv_heads)
        self.mask, mask = self._mask(rng)
        self.op = host.ggml_flash_attn_ext(self.context, q, k, v, mask, s.size**-0.5, s.alibi, s.softcap)
        self.sinks = rng.normal(2, 1, s.heads) if s.sinks else np.full(s.heads, -np.inf)
        if s.sinks:
            host.ggml_flash_attn_ext_add_sinks(self.op, self._new(F32, self.sinks))
        self.graph = host.ggml_new_graph(self.context)
        host.ggml_build_forward_expand(self.graph, self.op)

    def compute(self, device: str) -> np.ndarray[Any, Any]:
        """The output, [B, H, Tq, Dv]."""
        backend = self.host.ggml_backend_dev_init(self.host.ggml_backend_dev_by_name(device.encode()), None)
        out = self.compute_in(backend)
        self.host.ggml_backend_free(backend)
        return out

    def compute_in(self, backend: int) -> np.ndarray[Any, Any]:
        """The same in a context of the host."""
        size = list(self.op.contents.size)
        count = int(np.prod(size))
        out = np.ctypeslib.as_array(ctypes.cast(self.op.contents.data, POINTER(c_float)), shape=(count,))
        out[:] = np.nan
        assert self.host.ggml_backend_graph_compute(backend, self.graph) == 0
        return out.reshape(size[::-1]).transpose(0, 2, 1, 3).copy()

    def is_taken(self) -> bool:
        device = self.host.ggml_backend_dev_by_name(b"SPARSEK")
        return bool(self.host.ggml_backend_dev_supports_op(device, self.op))

    def _rows(self, rng: Any, kind: int, size: int, tokens: int, heads: int) -> Any:
        x = rng.standard_normal((self.shape.sequences, tokens, heads, size)).astype(np.float32)
        x = x.astype(np.float16) if kind == F16 else x
        x = dequantize(quantize(x, PACKED[kind]), PACKED[kind]) if kind in PACKED else x
        tensor = self.host.ggml_permute(self.context, self._new(kind, x), 0, 2, 1, 3)
        return x.astype(np.float32).transpose(0, 2, 1, 3), tensor

    def _mask(self, rng: Any) -> Any:
        s = self.shape
        heads = s.heads if s.mask == "per head" else 1
        shape = (s.sequences, heads, s.queries, s.keys)
        if s.mask == "none":
            return np.zeros(shape), None
        position = np.arange(s.queries)[:, None] + s.keys - s.queries
        allowed = (np.arange(s.keys) <= position) & (rng.random(shape) < 0.9)
        allowed[..., 0] = True
        distances = np.abs(position - np.arange(s.keys)) if s.alibi else 0
        mask = np.where(allowed, -1.0 * distances, -np.inf).astype(np.float16)
        return mask * slopes(s), self._new(F16, mask)

    def _new(self, kind: int, x: np.ndarray[Any, Any]) -> Any:
        size = (c_int64 * 4)(*([*x.shape[::-1], 1, 1, 1, 1][:4]))
        tensor = self.host.ggml_new_tensor(self.context, kind, 4, size)
        x = np.ascontiguousarray(x, np.float16 if kind == F16 else np.float32)
        x = quantize(x, PACKED[kind]) if kind in PACKED else x
        ctypes.memmove(tensor.contents.data, x.ctypes.data, x.nbytes)
        return tensor

    def __del__(self) -> None:
        self.host.ggml_free(self.context)


def slopes(shape: Shape) -> Any:
    """ALiBi's, [H, 1, 1]: a geometric series, and between its terms for heads beyond a power of two."""
    if not shape.alibi:
        return 1.0
    even = 2 ** int(np.log2(shape.heads))
    steps = [*range(1, even + 1), *np.arange(shape.heads - even) + 0.5]
    return 2 ** (-shape.alibi / even * np.array(steps))[:, None, None]


def relative_error(got: Any, expected: Any) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


PREFILL = [
    Shape(),
    Shape(heads=9, kv_heads=3, queries=512, keys=768),
    Shape(heads=8, kv_heads=1, size=128, value_size=128),
    Shape(heads=4, kv_heads=4, size=96, value_size=80),
    Shape(size=40, value_size=40, queries=33, keys=97),
    Shape(size=256, value_size=256, queries=65, keys=513),
    Shape(sequences=3),
    Shape(mask="per head"),
    Shape(mask="none"),
    Shape(softcap=2.0),
    Shape(cache=F32),
    Shape(cache=F32, sequences=2, mask="per head", softcap=10.0, queries=100, keys=301),
    Shape(cache=Q8_0),
    Shape(cache=Q8_0, sequences=2, mask="per head", softcap=10.0, queries=33, keys=301, value_size=32),
]
ADDED = [
    Shape(alibi=8.0),
    Shape(alibi=8.0, heads=9, kv_heads=3, queries=100, keys=701, sequences=2),
    Shape(alibi=16.0, heads=12, kv_heads=12, mask="per head", queries=65, keys=513, sinks=True),
    Shape(alibi=8.0, heads=40, kv_heads=1, queries=9, cache=F32),
    Shape(alibi=8.0, cache=Q8_0, queries=33, keys=301),
    Shape(alibi=8.0, queries=1, keys=2048),
    Shape(alibi=4.0, queries=2, keys=777, sinks=True),
    Shape(sinks=True),
    Shape(sinks=True, queries=1, sequences=3),
    Shape(sinks=True, cache=Q8_0, heads=8, queries=80),
    Shape(sinks=True, softcap=3.0, mask="none"),
]
DECODE = [
    Shape(queries=1),
    Shape(queries=1, heads=9, kv_heads=3, keys=2048),
    Shape(queries=2, keys=777),
    Shape(queries=1, sequences=4, keys=512),
    Shape(queries=1, cache=F32, softcap=5.0),
]


@pytest.mark.parametrize("shape", [*PREFILL, *ADDED], ids=str)
def test_prefill_is_the_hosts(host: ctypes.CDLL, shape: Shape) -> None:
    operation = Operation(host, shape)
    assert operation.is_taken()
    expected = operation.compute("CPU")
    # The host's tiles work in half precision in part: its own error is the larger one.
    exact = dense(operation)
    ours = operation.compute("SPARSEK")
    assert relative_error(ours, exact) < 1e-5
    assert relative_error(ours, expected) < 1e-5 + 2 * relative_error(expected, exact)


@pytest.mark.parametrize("shape", DECODE, ids=str)
def test_decode_is_the_hosts(host: ctypes.CDLL, shape: Shape) -> None:
    operation = Operation(host, shape)
    assert operation.is_taken()
    assert relative_error(operation.compute("SPARSEK"), operation.compute("CPU")) < 1e-2
    assert relative_error(operation.compute("SPARSEK"), dense(operation)) < 1e-5


@pytest.mark.parametrize("shape", [*PREFILL, *ADDED, *DECODE], ids=str)
@pytest.mark.parametrize("tail", ["none", "centroid"])
def test_sparse_is_the_reference(host: ctypes.CDLL, shape: Shape, tail: Any) -> None:
    config = SparseKConfig(top_k=9, sinks=3, window=20, tail=tail, dense_layers=(), min_context=0)
    integration.configure(config)
    before = integration.counts()
    operation = Operation(host, shape)
    got = operation.compute("SPARSEK")
    assert integration.counts().sparse == before.sparse + 1
    assert relative_error(got, sparse(operation, config)) < 1e-4
    assert integration.counts().by_host == before.by_host


@pytest.mark.parametrize("shape", [*PREFILL, *DECODE], ids=str)
def test_shares_are_those_of_the_kernel(host: ctypes.CDLL, shape: Shape) -> None:
    config = SparseKConfig(min_share=0.0123, sinks=3, window=20, dense_layers=(), min_context=0)
    integration.configure(config)
    before = integration.counts()
    operation = Operation(host, shape)
    rules = []
    with integration.observed(lambda _layer, problem, _out: rules.append(problem.rule)):
        got = operation.compute("SPARSEK")
    assert integration.counts().sparse == before.sparse + 1
    assert [rule.min_share for rule in rules[-1:]] == [pytest.approx(0.0123)]
    assert relative_error(got, sparse(operation, config, "cpu")) < 1e-4


def test_auto_is_the_count_that_it_is_elsewhere(host: ctypes.CDLL) -> None:
    integration.configure(SparseKConfig(dense_layers=(), min_context=0))
    problems: list[Any] = []
    with integration.observed(lambda _layer, problem, _out: problems.append(problem)):
        Operation(host, PREFILL[0]).compute("SPARSEK")
    (problem,) = problems
    assert (problem.rule.top_k, problem.rule.min_share) == (auto_top_k(problem.num_keys), 0)


@pytest.mark.parametrize("shape", [s for s in [*PREFILL, *ADDED, *DECODE] if not s.sinks], ids=str)
def test_an_observer_sees_the_problem(host: ctypes.CDLL, shape: Shape) -> None:
    integration.configure(SparseKConfig(top_k=9, tail="none", dense_layers=(), min_context=0))
    seen = []
    with integration.observed(lambda _layer, problem, out: seen.append((problem, out))):
        Operation(host, shape).compute("SPARSEK")
    ((problem, out),) = seen
    assert relative_error(out, reference.attention(problem)) < 1e-4


def test_sinks_of_an_unknown_form_stay_with_the_host(host: ctypes.CDLL) -> None:
    operation = Operation(host, Shape(sinks=True))
    operation.op.contents.src[4].contents.size[0] += 1
    assert not operation.is_taken()


@pytest.mark.parametrize("place", range(5, 10))
def test_inputs_of_a_newer_ggml_stay_with_the_host(host: ctypes.CDLL, place: int) -> None:
    operation = Operation(host, Shape())
    operation.op.contents.src[place] = operation.op.contents.src[0]
    assert not operation.is_taken()


def test_a_step_of_generation_over_a_quantised_cache_stays_with_the_host(host: ctypes.CDLL) -> None:
    assert Operation(host, Shape(cache=Q8_0, queries=9)).is_taken()
    assert not Operation(host, Shape(cache=Q8_0, queries=1, keys=4096)).is_taken()
    assert not Operation(host, Shape(cache=Q4_0)).is_taken()


def test_without_a_k_everything_stays_with_the_host(host: ctypes.CDLL) -> None:
    operation = Operation(host, Shape())
    integration.configure(None)
    assert not operation.is_taken()


@pytest.mark.parametrize("alibi", [0.0, 8.0])
def test_a_mask_that_adds_numbers_to_capped_scores_is_computed_by_the_host(
    host: ctypes.CDLL, alibi: float
) -> None:
    integration.configure(SparseKConfig(top_k=9, dense_layers=(), min_context=0))
    operation = Operation(host, Shape(softcap=5.0, alibi=alibi, sinks=True))
    data = ctypes.cast(operation.op.contents.src[3].contents.data, POINTER(ctypes.c_uint16))
    data[0] = 0x3800  # 0.5
    before = integration.counts()
    got = operation.compute("SPARSEK")
    assert integration.counts().by_host == before.by_host + 1
    assert np.array_equal(got, operation.compute("CPU"))


@pytest.mark.parametrize("says", [False, True], ids=["numbers begin anew", "the host says it"])
def test_a_mask_has_new_content_in_the_next_pass(host: ctypes.CDLL, says: bool) -> None:
    """At the same place. Within a pass it is read once, for all layers."""
    device = host.ggml_backend_dev_by_name(b"SPARSEK")
    registry = host.ggml_backend_dev_backend_reg(device)
    address = host.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
    begin = ctypes.CFUNCTYPE(None, c_void_p, c_int)(address)
    backend = host.ggml_backend_dev_init(device, None)
    operation = Operation(host, Shape())
    mask = operation.op.contents.src[3].contents
    count = int(np.prod(list(mask.size)))
    halves = np.ctypeslib.as_array(ctypes.cast(mask.data, POINTER(ctypes.c_uint16)), shape=(count,))
    rng = np.random.default_rng(1)

    def computed(layer: int) -> Any:
        host.ggml_set_name(operation.op.contents.src[1], b"cache_k_l%d (view)" % layer)
        return operation.compute_in(backend)

    for first in (0, 3, 6):
        if says:
            begin(backend, 1)
        number = first if says else 0
        for layer in range(number, number + 3):
            assert relative_error(computed(layer), dense(operation)) < 2e-4
        kept = rng.random(operation.mask.shape) < 0.5
        kept[..., 0] = True
        operation.mask = np.where(kept, operation.mask, -np.inf)
        halves[:] = np.where(operation.mask == 0, 0, 0xFC00).reshape(-1)
    host.ggml_backend_free(backend)


def test_numbers_of_a_mask_without_alibi_are_added(host: ctypes.CDLL) -> None:
    operation = Operation(host, Shape())
    data = ctypes.cast(operation.op.contents.src[3].contents.data, POINTER(ctypes.c_uint16))
    before, plain = integration.counts(), operation.compute("SPARSEK")
    data[0] = 0x4900  # 10, for the first key of the first query
    got = operation.compute("SPARSEK")
    operation.mask[0, 0, 0, 0] = 10
    assert integration.counts().by_host == before.by_host
    assert relative_error(got, dense(operation)) < 1e-5
    assert relative_error(got[:, :, 0], plain[:, :, 0]) > 0.1


def dense(operation: Operation) -> Any:
    return sparse(operation, KEEP_ALL)


def sparse(operation: Operation, config: SparseKConfig, backend: str = "reference") -> Any:
    """The reference in float64, or another kernel in float32, row by row: each stands at the end of the
    cache, as the backend has it, and what it may see is in the mask alone. An attention sink is one more
    key, the last, with a score of its own and the value zero."""
    dtype = np.float64 if backend == "reference" else np.float32
    q, k, v = (x.astype(dtype) for x in (operation.q, operation.k, operation.v))
    mask = operation.mask
    if operation.shape.sinks:
        k, v = (np.pad(x, [(0, 0), (0, 0), (0, 1), (0, 0)]) for x in (k, v))
        scores = operation.sinks[:, None, None]
        mask = np.broadcast_to(mask, (mask.shape[0], len(scores), *mask.shape[2:]))
        mask = np.concatenate([mask, np.broadcast_to(scores, (*mask.shape[:3], 1))], 3)
        config = replace(config, window=config.window + 1)
    rows = [
        attention(
            q[:, :, i : i + 1],
            k,
            v,
            config=config,
            attn_mask=mask[:, :, i : i + 1],
            softcap=operation.shape.softcap or None,
            backend=backend,
        )
        for i in range(q.shape[2])
    ]
    return np.concatenate(rows, 2)
