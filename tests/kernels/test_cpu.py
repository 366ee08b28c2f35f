"""The compiled kernel, on every instruction set: the oracle's kept sets and outputs, whatever comes in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsek import KeyIndex, SparseKConfig, attention, select
from sparsek.kernels import cpu, dense, dispatch, reference
from sparsek.problem import make_problem
from sparsek.verify import verify

from .. import oracle
from ..strategies import Case, cases, examples, tail_cases
from ..waiting import HANGS

PURE = SparseKConfig.pure(24)
DEFAULT = SparseKConfig(top_k=24, min_context=0)
SHARES = SparseKConfig(min_share=0.00517, min_context=0)
KEEP_ALL = SparseKConfig.pure(2**31 - 1)
every_isa = pytest.mark.usefixtures("isa")
# What the kernel takes: see cpu.why_not.
FITTING: dict[str, Any] = {
    "library": "torch",
    "dtype": st.sampled_from(("float16", "bfloat16", "float32")),
    "mask": st.sampled_from(("none", "padding", "packed", "sliding window", "random")),
}


def tensors(
    tokens: int,
    *,
    queries: int | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 64,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = ((1, heads, queries or tokens, size), (1, kv_heads, tokens, size), (1, kv_heads, tokens, size))
    q, k, v = (torch.randn(shape, generator=rng) for shape in shapes)
    return q, k, v


def run(q: Any, k: Any, v: Any, config: SparseKConfig = DEFAULT, **options: Any) -> Any:
    return attention(q, k, v, config=config, is_causal=True, backend="cpu", **options)


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    prelude = "import os, torch, sparsek\nfrom sparsek import SparseKConfig, attention\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=HANGS, **options
    )


# --- against the oracle


@every_isa
@settings(examples(120), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(case=cases(**FITTING) | cases(**{**FITTING, "num_keys": st.integers(100, 400)}))
def test_kept_set_and_output_are_those_of_the_definition(case: Case) -> None:
    call = case.build()
    kept = np.asarray(select(call.q, call.k, backend="cpu", **call.options).to_mask())
    oracle.assert_kept(call, kept)
    oracle.assert_output(call, kept, attention(call.q, call.k, call.v, backend="cpu", **call.options))


@every_isa
@settings(examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(case=tail_cases)
def test_tail_is_that_of_the_definition(case: Case) -> None:
    call = case.build()
    problem = make_problem(call.q, call.k, call.v, **call.options)
    if cpu.why_not(problem) is not None:
        return
    kept = np.asarray(select(call.q, call.k, backend="cpu", **call.options).to_mask())
    oracle.assert_output(call, kept, attention(call.q, call.k, call.v, backend="cpu", **call.options))


@every_isa
@settings(examples(150), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    case=cases(**{**FITTING, "num_keys": st.integers(1, 70) | st.integers(100, 400)}),
    share=st.sampled_from((1e-4, 0.0123, 0.05, 0.3, 1.0)),
    most=st.sampled_from(("auto", "auto", 0, 1, 5, 40)),
)
def test_keys_with_a_share_of_the_estimated_sum(case: Case, share: float, most: Any) -> None:
    call = case.build()
    config = replace(call.config, top_k=most, min_share=share, sinks=max(call.config.sinks, int(most == 0)))
    call = replace(call, config=config)
    kept = np.asarray(select(call.q, call.k, backend="cpu", **call.options).to_mask())
    oracle.assert_estimated_shares(call, kept)
    oracle.assert_output(call, kept, attention(call.q, call.k, call.v, backend="cpu", **call.options))


@every_isa
@pytest.mark.parametrize("queries", [3, 300])
def test_no_key_with_the_share_is_dropped(queries: int) -> None:
    """The estimate is never above the true sum, and close to it where the scores are."""
    q, k, v = tensors(1100, queries=queries)
    for spread, most in ((0.3, 1.2), (1.0, 3.0)):
        problem = make_problem(q * spread, k, v, config=SHARES, is_causal=True)
        kept, expected = cpu.select(problem).to_mask(), reference.select(problem).to_mask()
        assert not (expected & ~kept).any()
        lower = make_problem(
            q * spread, k, v, config=replace(SHARES, min_share=SHARES.min_share / most), is_causal=True
        )
        assert not (kept & ~reference.select(lower).to_mask()).any()


@every_isa
@pytest.mark.parametrize(
    "config", [PURE, DEFAULT, SHARES, SparseKConfig(top_k=7, stride=50, min_context=0)], ids=str
)
@pytest.mark.parametrize("size", [64, 128, 40])
def test_thousands_of_random_rows_keep_exactly_the_best(config: SparseKConfig, size: int) -> None:
    q, k, v = tensors(1100, heads=2, kv_heads=1, size=size)
    problem = make_problem(q, k, v, config=config, is_causal=True)
    checked = verify(problem, cpu.attention(problem), backend="cpu", rows=1100)
    assert 2 * checked.rows >= 2000
    assert checked.max_abs_err < 1e-5


@every_isa
@pytest.mark.model
@pytest.mark.parametrize("config", [PURE, DEFAULT, SHARES], ids=str)
def test_thousands_of_real_rows_keep_exactly_the_best(config: SparseKConfig, real: Any) -> None:
    problem = make_problem(real.q, real.k, real.v, config=config, is_causal=True)
    checked = verify(problem, cpu.attention(problem), backend="cpu", rows=256)
    assert real.q.shape[1] * checked.rows >= 2000
    assert checked.max_abs_err < 1e-5


@pytest.fixture(scope="module")
def real() -> Any:
    from sparsek.bench.capture import model_inputs

    return model_inputs(None, tokens=1500, queries=256)


@every_isa
def test_keeping_everything_is_pytorchs_attention() -> None:
    q, k, v = tensors(333)
    for mask in (None, torch.rand(333, 333, generator=torch.Generator().manual_seed(0)) < 0.5):
        problem = make_problem(q, k, v, config=KEEP_ALL, attn_mask=mask, is_causal=True)
        torch.testing.assert_close(cpu.attention(problem), dense.attention(problem), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [2, 100])
def test_lists_of_shares_are_as_wide_as_the_longest(queries: int) -> None:
    q, k, _ = tensors(900, queries=queries)
    selection = select(q, k, config=SHARES, is_causal=True, backend="cpu")
    assert selection.indices.shape[3] == int(selection.counts.max()) < 400


# --- hostile inputs


def _everything_ties(q: Any, k: Any) -> None:
    q.fill_(1)
    k.fill_(1)


def _both_signs_alone(q: Any, k: Any) -> None:
    q.sign_()
    k.sign_()


# What becomes of ordinary q and k.
HOSTILE: dict[str, Callable[[Any, Any], Any]] = {
    "everything ties": _everything_ties,
    "signs alone": _both_signs_alone,
    "zero keys": lambda _, k: k.zero_(),
    "zero queries": lambda q, _: q.zero_(),
    "an enormous key": lambda _, k: k[:, :, 77].fill_(1e9),
    "an enormous channel": lambda _, k: k[..., 3].mul_(1e12),
    "an enormous number": lambda _, k: k[0, 0, 9, 2].fill_(1e18),
    "most keys tiny": lambda _, k: k[:, :, :200].mul_(1e-20),
    "denormal keys": lambda _, k: k.mul_(1e-41),
    "denormal queries": lambda q, _: q.mul_(1e-41),
    "a common offset": lambda _, k: k.add_(1000),
}


@every_isa
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("config", [PURE, DEFAULT], ids=str)
def test_hostile_inputs_are_still_exact(name: str, config: SparseKConfig) -> None:
    q, k, v = tensors(300, size=24)
    HOSTILE[name](q, k)
    problem = make_problem(q, k, v, config=config, is_causal=True)
    selection = cpu.select(problem)
    kept, expected = selection.to_mask(), reference.select(problem).to_mask()
    assert torch.equal(kept.sum(-1), expected.sum(-1))
    out = cpu.attention(problem)
    assert torch.isfinite(out).all()
    products = (q.double().abs() @ k.double().abs().repeat_interleave(2, 1).mT).amax().item()
    if products < 1e4:  # beyond that the order in which float32 adds them decides
        assert torch.equal(kept, expected)
        torch.testing.assert_close(out, reference.attention(problem, selection), rtol=1e-5, atol=1e-5)


@every_isa
@pytest.mark.parametrize("name", HOSTILE)
def test_shares_of_hostile_inputs(name: str) -> None:
    q, k, v = tensors(300, size=24)
    HOSTILE[name](q, k)
    problem = make_problem(q, k, v, config=SHARES, is_causal=True)
    selection = cpu.select(problem)
    out = cpu.attention(problem)
    assert torch.isfinite(out).all()
    products = (q.double().abs() @ k.double().abs().repeat_interleave(2, 1).mT).amax().item()
    if products < 1e4:
        assert not (reference.select(problem).to_mask() & ~selection.to_mask()).any()
        torch.testing.assert_close(out, reference.attention(problem, selection), rtol=1e-5, atol=1e-5)


@every_isa
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("config", [PURE, DEFAULT, SHARES, KEEP_ALL], ids=str)
def test_rows_that_do_not_see_a_bad_number_are_unharmed(
    bad: float, place: str, config: SparseKConfig
) -> None:
    clean = dict(zip("qkv", tensors(300, size=24), strict=True))
    spoiled = {name: x.clone() for name, x in clean.items()}
    spoiled[place][:, :, 200, 5] = bad
    # Dense attention multiplies whole blocks of values with weights of 0, as PyTorch's does.
    rows = 192 if config is KEEP_ALL else 200
    before = run(**clean, config=config)[:, :, :rows]
    after = run(**spoiled, config=config)[:, :, :rows]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@every_isa
def test_everything_may_be_bad() -> None:
    q, k, v = (torch.full_like(x, float("nan")) for x in tensors(300))
    for config in (PURE, DEFAULT, SHARES, KEEP_ALL):
        assert run(q, k, v, config).shape == q.shape
        counts = select(q, k, config=config, is_causal=True, backend="cpu").counts
        assert int(counts.max()) <= 300


@every_isa
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("queries", [1, 2, 13])
def test_few_keys_and_queries(tokens: int, queries: int) -> None:
    q, k, v = tensors(tokens, queries=queries, size=8)
    problem = make_problem(q, k, v, config=SparseKConfig.pure(1), is_causal=True)
    expected = reference.attention(problem)
    torch.testing.assert_close(cpu.attention(problem), expected, rtol=1e-5, atol=1e-5)


@every_isa
def test_memory_that_is_not_aligned() -> None:
    q, k, v = (x.numpy() for x in tensors(100, size=8))

    def shifted(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        memory = np.zeros(x.nbytes + 1, np.uint8)
        moved = memory[1:].view(np.float32).reshape(x.shape)
        moved[...] = x
        assert not moved.flags.aligned
        return moved

    assert np.array_equal(run(shifted(q), shifted(k), shifted(v)), run(q, k, v))


# --- few queries and the index


@every_isa
@pytest.mark.parametrize("queries", [1, 2, 5, 16])
@pytest.mark.parametrize("config", [PURE, DEFAULT, SHARES], ids=str)
def test_few_queries_are_the_last_rows_of_many(queries: int, config: SparseKConfig) -> None:
    """Rows that are scored exactly, scanned in pieces, and scanned in tiles: all give the same bits, but for
    the mean scores of the tail, which few rows add up in another order."""
    q, k, v = tensors(20_000, queries=60, heads=3, kv_heads=1, size=64)
    many = run(q, k, v, config)[:, :, -queries:]
    last = q[:, :, -queries:]
    few = run(last, k, v, config)
    assert torch.equal(few, many) if config.tail == "none" else torch.allclose(few, many, rtol=0, atol=1e-7)
    assert torch.equal(run(last, k, v, config, index=KeyIndex()), many)


# --- threads, processes, signals


@every_isa
@pytest.mark.parametrize("config", [DEFAULT, SHARES], ids=str)
@pytest.mark.parametrize("queries", [2, 20, 700])
def test_the_number_of_threads_changes_nothing(config: SparseKConfig, queries: int) -> None:
    q, k, v = (x.numpy() for x in tensors(700, queries=queries))
    problem = make_problem(q, k, v, config=config, is_causal=True)
    results = []
    for threads in ("1", "2", "5"):
        os.environ["SPARSEK_NUM_THREADS"] = threads
        try:
            results.append(cpu.attention(problem))
        finally:
            del os.environ["SPARSEK_NUM_THREADS"]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_two_python_threads_call_at_once() -> None:
    q, k, v = tensors(500)
    expected, index, wrong = run(q, k, v), KeyIndex(), []

    def work(given: KeyIndex | None) -> None:
        for _ in range(5):
            if not torch.equal(run(q, k, v, index=given), expected):
                wrong.append(given)

    threads = [threading.Thread(target=work, args=(given,)) for given in (None, None, index, index)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_control_c_ends_a_long_call_within_a_second() -> None:
    """Counted in seconds of two processors, for on a busy machine those of a clock say nothing. The whole
    call takes a hundred."""
    code = """
import time, torch
from sparsek import SparseKConfig, attention
q = torch.randn(1, 16, 40_000, 64)
begin = time.process_time()
print("go", flush=True)
try:
    attention(q, q, q, config=SparseKConfig.pure(64), is_causal=True, backend="cpu")
except KeyboardInterrupt:
    print(time.process_time() - begin)
    raise
"""
    environment = {**os.environ, "SPARSEK_NUM_THREADS": "2"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANGS)
    assert "KeyboardInterrupt" in err
    assert float(out) < 2 * (0.5 + 1)


def test_a_forked_process_can_call() -> None:
    code = """
q, k, v = (torch.randn(1, 4, 600, 64) for _ in range(3))
def run():
    return attention(q, k, v, config=SparseKConfig.pure(20), is_causal=True, backend="cpu")
before = run()
pid = os.fork()
if pid == 0:
    os._exit(0 if torch.equal(run(), before) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert torch.equal(run(), before)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rule", ["top_k=64", "min_share=0.002", "min_share=1e-9"])
def test_memory_is_under_three_bytes_per_key_element(rule: str) -> None:
    code = f"config = SparseKConfig({rule}, min_context=0)"
    code += """
def kib(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
torch.set_num_threads(2)
q, k, v = (torch.zeros(1, h, n, 64).normal_() for h, n in ((6, 64), (2, 120_000), (2, 120_000)))
attention(q[:, :, :1], k[:, :, :99], v[:, :, :99], config=config, backend="cpu")
before = kib("VmRSS")
attention(q, k, v, config=config, backend="cpu")
print((kib("VmHWM") - before) * 1024 / k.numel())
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert 1 < float(done.stdout) < 3


# --- what it does not take


def test_other_calls_go_to_the_reference_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = tensors(50)
    bias = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    with caplog.at_level("DEBUG", "sparsek"):
        out = attention(q, k, v, config=PURE, attn_mask=bias)
    assert "not kernel cpu: the mask adds numbers to the scores" in caplog.text
    assert "kernel reference" in caplog.text
    expected = attention(q, k, v, config=PURE, attn_mask=bias, backend="reference")
    assert torch.equal(out, expected)
    with pytest.raises(ValueError, match="backend = 'cpu' cannot do this call: the mask adds numbers"):
        attention(q, k, v, config=PURE, attn_mask=bias, backend="cpu")


def test_an_additive_mask_that_only_forbids_is_taken() -> None:
    q, k, v = tensors(80)
    allowed = torch.rand(80, 80, generator=torch.Generator().manual_seed(0)) < 0.7
    additive = torch.zeros(80, 80).masked_fill(~allowed, -torch.inf)
    assert torch.equal(run(q, k, v, attn_mask=additive), run(q, k, v, attn_mask=allowed))


def test_auto_takes_this_kernel() -> None:
    for config in (PURE, KEEP_ALL):
        problem = make_problem(*tensors(100), config=config, is_causal=True)
        assert dispatch._choose(problem, "auto", "attention") is cpu
