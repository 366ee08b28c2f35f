"""attention(): right against the oracle for every kind of call, and unchanged by what must not change it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch.nn.functional import scaled_dot_product_attention

from sparsek import SparseKConfig, attention, select
from sparsek.kernels import dense, reference
from sparsek.problem import make_problem

from . import oracle
from .strategies import Call, Case, cases, examples, tail_cases

SPARSE = SparseKConfig(top_k=5, sinks=2, window=4, dense_layers=(), min_context=0)
KEEP_ALL = SparseKConfig.pure(1000)
BACKENDS = ("auto", "reference")
# Scores far enough apart that rounding chooses the same keys however the work is arranged.
plain_cases = cases(library="torch", dtype="float64", values="normal", softcap=None)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On tensors this small more threads only wait for one another."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def tensors(num_queries: int, num_keys: int, *, seed: int = 0, dtype: Any = torch.float64) -> list[Any]:
    """q, k, v of one sequence: 4 query heads of size 8, 2 key/value heads."""
    rng = torch.Generator().manual_seed(seed)
    shapes = ((1, 4, num_queries, 8), (1, 2, num_keys, 8), (1, 2, num_keys, 6))
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]


def run(call: Call, **changes: Any) -> Any:
    call = replace(call, **changes)
    return attention(call.q, call.k, call.v, **call.options)


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


# --- against the oracle


@examples(400)
@given(cases() | tail_cases)
def test_output_is_that_of_the_definition_over_the_keys_kept(case: Case) -> None:
    call = case.build()
    for backend in BACKENDS:
        kept = np.asarray(select(call.q, call.k, backend=backend, **call.options).to_mask())
        out = attention(call.q, call.k, call.v, backend=backend, **call.options)
        assert out.dtype == call.q.dtype
        oracle.assert_output(call, kept, out)


def test_tail_is_the_mean_value_as_often_as_keys_were_dropped() -> None:
    """70 keys of equal score: 3 are kept, 61 of the first block dropped; the last 6 are no whole block."""
    q, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 70, 8), torch.arange(70.0)[None, None, :, None]
    config = SparseKConfig(top_k=2, sinks=1, window=0, dense_layers=(), min_context=0)
    out = attention(q, k, v, config=config)
    assert out.item() == pytest.approx((0 + 1 + 2 + 61 * 31.5) / (3 + 61))
    assert attention(q, k, v, config=replace(config, tail="none")).item() == 1


# --- what keeps everything is dense attention


@examples(80)
@given(plain_cases)
def test_keeping_every_key_is_dense_attention(case: Case) -> None:
    call = case.build()
    rows = torch.arange(case.num_queries)[:, None] + case.num_keys - case.num_queries
    mask = torch.arange(case.num_keys) <= rows if case.is_causal else torch.ones(1, dtype=torch.bool)
    mask = mask.expand(case.num_queries, case.num_keys)
    if call.attn_mask is not None:
        mask = mask & call.attn_mask if case.mask != "additive" else call.attn_mask.where(mask, -torch.inf)
    expected = scaled_dot_product_attention(
        call.q, call.k, call.v, attn_mask=mask, scale=call.scale, enable_gqa=True
    )
    allowed = mask if mask.dtype == torch.bool else mask > -torch.inf
    expected = expected.masked_fill(~allowed.any(-1, keepdim=True), 0)
    for config in (SparseKConfig.pure(case.num_keys), replace(SPARSE, top_k=case.num_keys), KEEP_ALL):
        for backend in BACKENDS:
            out = attention(call.q, call.k, call.v, backend=backend, **{**call.options, "config": config})
            assert_same(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_of_dense_attention(backend: str) -> None:
    """PyTorch's own attention has none."""
    call = Call(*tensors(20, 100), config=KEEP_ALL, softcap=0.5)
    out = attention(call.q, call.k, call.v, backend=backend, **call.options)
    oracle.assert_output(call, np.ones((1, 4, 20, 100), dtype=bool), out)


@pytest.mark.parametrize(
    ("config", "layer", "is_dense"),
    [
        (replace(SPARSE, min_context=101), None, True),
        (replace(SPARSE, min_context=100), None, False),
        (replace(SPARSE, dense_layers=(0, 3)), 3, True),
        (replace(SPARSE, dense_layers=(0, 3)), 2, False),
        (replace(SPARSE, dense_layers=(0, 3)), None, False),
        (replace(SPARSE, top_k=(5, 100)), 1, True),
        (replace(SPARSE, top_k=(5, 100)), 0, False),
    ],
)
def test_where_a_config_is_dense(config: SparseKConfig, layer: int | None, is_dense: bool) -> None:
    q, k, v = tensors(20, 100)
    expected = attention(q, k, v, config=KEEP_ALL if is_dense else SPARSE)
    assert_same(attention(q, k, v, config=config, layer=layer), expected)
    counts = select(q, k, config=config, layer=layer).counts
    assert (counts == 100).all() if is_dense else (counts <= 5 + 2 + 4).all()


# --- what must change nothing


@examples(40)
@given(plain_cases)
def test_grouped_heads_are_repeated_heads(case: Case) -> None:
    call = case.build()
    k, v = (x.repeat_interleave(case.group, 1) for x in (call.k, call.v))
    assert_same(run(call, k=k, v=v), run(call))


@examples(40)
@given(plain_cases)
def test_order_of_heads_and_sequences_changes_nothing(case: Case) -> None:
    call = case.build()
    out = run(call)
    # Whole groups change places: query heads [Hkv, G] with their key/value head.
    mask = call.attn_mask
    if mask is not None and mask.ndim == 4:
        mask = _flip(mask, case.kv_heads).flip(0)
    flipped = run(call, q=_flip(call.q, case.kv_heads).flip(0), k=call.k.flip(0, 1), v=call.v.flip(0, 1),
                  attn_mask=mask)  # fmt: skip
    assert_same(_flip(flipped, case.kv_heads).flip(0), out)


def _flip(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    return x if x.shape[1] == 1 else x.unflatten(1, (kv_heads, -1)).flip(1).flatten(1, 2)


@examples(25)
@given(plain_cases)
def test_size_of_chunks_changes_nothing(case: Case) -> None:
    call = case.build()
    out, indices = run(call), select(call.q, call.k, **call.options).indices
    dense_out = run(call, config=KEEP_ALL)
    with pytest.MonkeyPatch.context() as patch:
        scores_of_a_row = case.batch * case.kv_heads * case.group * case.num_keys
        patch.setattr(reference, "_CHUNK_ELEMENTS", 3 * scores_of_a_row)
        patch.setattr(dense, "_MASK_ELEMENTS", 3 * case.num_keys)
        assert_same(run(call), out)
        assert torch.equal(select(call.q, call.k, **call.options).indices, indices)
        assert_same(run(call, config=KEEP_ALL), dense_out)


@examples(40)
@given(plain_cases)
def test_rows_alone_are_the_rows_of_the_whole(case: Case) -> None:
    call = case.build()
    problem = make_problem(call.q, call.k, call.v, **call.options)
    rows = slice(case.num_queries // 3, case.num_queries // 3 + 2)
    assert_same(reference.attention(problem.rows(rows)), reference.attention(problem)[:, :, rows])


def test_the_future_changes_nothing() -> None:
    """No centroid and no window may reach past the query, whatever lies there."""
    q, k, v = tensors(200, 200)
    out = attention(q, k, v, config=SPARSE, is_causal=True)
    for first in (1, 64, 70, 127, 128, 199):
        k_other, v_other = k.clone(), v.clone()
        k_other[:, :, first:], v_other[:, :, first:] = 9, 1e6
        changed = attention(q, k_other, v_other, config=SPARSE, is_causal=True)
        assert_same(changed[:, :, :first], out[:, :, :first])
        assert not torch.allclose(changed[:, :, first:], out[:, :, first:])


def test_number_of_threads_changes_nothing() -> None:
    q, k, v = tensors(200, 200, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            indices = select(q, k, config=SPARSE).indices
            results.append((indices, attention(q, k, v, config=SPARSE)))
    finally:
        torch.set_num_threads(before)
    for indices, out in results[1:]:
        assert torch.equal(indices, results[0][0])
        assert torch.equal(out, results[0][1])


# --- at the edges


@pytest.mark.parametrize("config", [SPARSE, KEEP_ALL], ids=["sparse", "dense"])
@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize(
    ("batch", "num_queries", "num_keys"), [(0, 5, 70), (2, 0, 70), (2, 5, 0), (0, 0, 0), (2, 9, 3)]
)
def test_empty_inputs_and_more_queries_than_keys(
    batch: int, num_queries: int, num_keys: int, library: str, config: SparseKConfig
) -> None:
    """Equal values average to themselves; rows that see no key are zero."""
    q, k, v = (
        np.ones((batch, *shape)) for shape in ((4, num_queries, 8), (2, num_keys, 8), (2, num_keys, 6))
    )
    mask = np.ones((batch, 1, num_queries, num_keys), dtype=bool)
    if library == "torch":
        q, k, v, mask = map(torch.from_numpy, (q, k, v, mask))
    for is_causal, attn_mask, backend in product((False, True), (None, mask), BACKENDS):
        options = {"is_causal": is_causal, "attn_mask": attn_mask, "backend": backend}
        out = attention(q, k, v, config=config, **options)
        assert tuple(out.shape) == (batch, 4, num_queries, 6)
        blind = num_queries if num_keys == 0 else max(0, num_queries - num_keys) if is_causal else 0
        assert (out[:, :, :blind] == 0).all()
        assert (abs(out[:, :, blind:] - 1) < 1e-12).all()


@pytest.mark.parametrize("config", [SPARSE, KEEP_ALL], ids=["sparse", "dense"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_stay_where_they_are(bad: float, config: SparseKConfig) -> None:
    q, k, v = tensors(100, 100)
    clean = attention(q, k, v, config=config, is_causal=True)
    bad_q, bad_k = q.clone(), k.clone()
    bad_q[0, 1, 50, 2] = bad_k[0, 0, 70, 3] = bad
    untouched = torch.ones(4, 100, dtype=torch.bool)
    untouched[1, 50] = False  # the query itself
    untouched[:2, 70:] = False  # whoever sees the key
    # PyTorch's own kernel, which "auto" takes for dense rules, lets NaN reach rows that do not see the key.
    out = attention(bad_q, bad_k, v, config=config, is_causal=True, backend="reference")
    assert_same(out[0, untouched], clean[0, untouched])
    assert attention(bad_q, bad_k, v, config=config, is_causal=True).shape == clean.shape
    indices = select(bad_q, bad_k, config=config, is_causal=True).indices
    assert ((indices >= -1) & (indices < 100)).all()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("config", [SparseKConfig.pure(3), SPARSE, KEEP_ALL], ids=["pure", "tail", "dense"])
def test_gradient(config: SparseKConfig, options: dict[str, Any]) -> None:
    q, k, v = (x[:, :2].requires_grad_() for x in tensors(2, 70))

    def output(*inputs: torch.Tensor) -> torch.Tensor:
        return attention(*inputs, config=config, backend="reference", **options)

    assert torch.autograd.gradcheck(output, (q, k, v), fast_mode=True)


MEMORY = """
import torch
from pathlib import Path
from sparsek import SparseKConfig, attention

def peak_mib():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

q, k, v = torch.randn(1, 9, 512, 64), torch.randn(1, 3, 8192, 64), torch.randn(1, 3, 8192, 64)
before = peak_mib()
for config in (SparseKConfig.pure(64), SparseKConfig()):
    attention(q, k, v, config=config, is_causal=True)
print(peak_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_queries_times_keys() -> None:
    """8192 tokens fit in 1 GiB above the inputs. The last 512 queries of them, which take seconds and not a
    minute, must fit in a quarter of that: their scores alone, held all at once, are 144 MiB a copy."""
    # A process of its own, and its own peak: getrusage() would count what the parent held before exec.
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 256
