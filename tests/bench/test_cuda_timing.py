from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sparsek.bench import cuda_timing

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MIB = 1 << 20


@pytest.mark.parametrize("graphs", [("a", "b"), ("a", None)])
def test_all_are_replayed_or_none(graphs: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device: a call of 10 ms, of which a graph would hold two."""
    ran: list[str] = []
    captured = iter(graphs)

    def capture(_: cuda_timing.Call) -> tuple[cuda_timing.Call, int] | None:
        name = next(captured)
        return None if name is None else (lambda: ran.append(f"graph {name}"), 2)

    def seconds(run: cuda_timing.Call, times: int) -> float:
        del ran[:]
        for _ in range(times):
            run()
        return 0.01

    monkeypatch.setattr(cuda_timing, "_captured", capture)
    monkeypatch.setattr(cuda_timing, "_seconds", seconds)
    timed, timing = cuda_timing.samplers([lambda: ran.append("call a"), lambda: ran.append("call b")])
    replayed = None not in graphs
    assert timing == ("graph" if replayed else "calls")
    assert [sample() for sample in timed] == [0.005 if replayed else 0.01] * 2
    assert ran == ["graph b" if replayed else "call b"] * 5  # 50 ms


@needs_cuda
def test_a_replay_does_what_the_call_does() -> None:
    count = torch.zeros((), dtype=torch.int64, device="cuda")
    (sample,), timing = cuda_timing.samplers([lambda: count.add_(1)])
    assert timing == "graph"
    before = int(count)
    seconds = sample()
    calls = int(count) - before
    assert calls > 1000
    assert 0.01 < seconds * calls < 0.5


@needs_cuda
def test_time_is_that_of_the_work() -> None:
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def twice() -> None:
        _ = x @ x
        _ = x @ x

    timed, timing = cuda_timing.samplers([lambda: x @ x, twice])
    assert timing == "graph"
    once, both = (min(sample() for _ in range(3)) for sample in timed)
    assert both / once == pytest.approx(2, rel=0.3)
    assert 2 * 4096**3 / once < 3e15  # no card is that fast


@needs_cuda
def test_what_waits_for_the_device_is_timed_as_calls() -> None:
    x = torch.ones(64, device="cuda")
    stream = torch.cuda.current_stream()
    timed, timing = cuda_timing.samplers([lambda: x + 1, lambda: float(x.sum())])
    assert timing == "calls"
    assert all(sample() > 0 for sample in timed)
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.get_sync_debug_mode() == 0
    assert cuda_timing.samplers([lambda: x + 1])[1] == "graph"  # the next can still be captured


CAPTURE_THAT_FAILS = """
import torch
from sparsek.bench import cuda_timing

x = torch.ones(64, device="cuda")
stream = torch.cuda.current_stream()

def waits():
    torch.cuda.synchronize()  # which PyTorch does not warn of
    return x + 1

timed, timing = cuda_timing.samplers([waits])
assert timing == "calls", timing
assert timed[0]() > 0
assert torch.cuda.current_stream() == stream
assert waits().tolist() == [2.0] * 64
"""


@needs_cuda
def test_after_a_capture_that_fails_calls_are_timed() -> None:
    """In a process of its own, which it leaves without graphs."""
    subprocess.run([sys.executable, "-c", CAPTURE_THAT_FAILS], check=True)


@needs_cuda
def test_host_time_is_not_the_device_s() -> None:
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    _ = x @ x
    (sample,), _ = cuda_timing.samplers([lambda: x @ x])
    assert 0 < cuda_timing.host_us(lambda: x @ x) < sample() * 1e6


@needs_cuda
def test_peak_memory_counts_inputs_and_what_is_kept_but_not_what_others_hold() -> None:
    others = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    inputs = torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")
    kept: list[torch.Tensor] = []
    peak = cuda_timing.PeakMemory(inputs)

    def call() -> torch.Tensor:
        if not kept:
            kept.append(torch.empty(8 * MIB, dtype=torch.uint8, device="cuda"))
        return torch.empty(16 * MIB, dtype=torch.uint8, device="cuda")

    assert peak.mib(call) == pytest.approx(32 + 8 + 16, abs=0.1)
    assert cuda_timing.PeakMemory(inputs).mib(lambda: None) == pytest.approx(32, abs=0.1)
    assert others.is_cuda
