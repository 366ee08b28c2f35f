"""Time and memory of calls on a CUDA device.

Calls are captured in CUDA graphs and replayed, which is how serving engines run them, so that no time of the
host is in it. The same inputs are read again and again: what fits into the L2 cache may be read from there.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch

_BATCH_SECONDS: Final = 50e-3  # of one sample
_GRAPH_SECONDS: Final = 1e-3  # launching a graph costs microseconds: a graph of short calls holds several
_MOST_IN_GRAPH: Final = 16
_WARM_UP: Final = 3
_HOST_CALLS: Final = 5

log = logging.getLogger("sparsek")

Call = Callable[[], Any]


def samplers(calls: Sequence[Call]) -> tuple[list[Callable[[], float]], str]:
    """For each call a function that measures a batch of it and returns the seconds of one call; and what is
    measured: "graph", replays, or "calls", plain calls, for all when one of them cannot be captured."""
    graphs = []
    for call in calls:
        graph = _captured(call)
        if graph is None:
            return [_sampler(call) for call in calls], "calls"
        graphs.append(graph)
    return [_sampler(replay, held) for replay, held in graphs], "graph"


def host_us(call: Call) -> float:
    """Microseconds until one call returns, median, with the device idle before."""
    samples = []
    for _ in range(_HOST_CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(samples) * 1e6


class PeakMemory:
    """The most memory that the calls of one side need. Made before that side allocates anything: beside
    `inputs`, what is there by then belongs to others and does not count."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        gc.collect()
        self._others = torch.cuda.memory_allocated() - sum(x.nbytes for x in inputs)

    def mib(self, call: Call) -> float:
        """Of one call, MiB, with the inputs and what earlier calls have left for it, like an index."""
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - self._others) / 2**20


def _captured(call: Call) -> tuple[Call, int] | None:
    """What replays a graph of `call`, and how many calls are in it; None when it cannot be captured. The
    graph and its memory live as long as what replays it."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):  # also back to the old stream after a capture that failed
            for _ in range(_WARM_UP):
                call()
            with _no_synchronising():  # a capture that fails leaves PyTorch's allocator in disorder
                call()
            held = max(1, min(_MOST_IN_GRAPH, round(_GRAPH_SECONDS / _seconds(call, _WARM_UP))))
            with torch.cuda.graph(graph, stream=side):
                for _ in range(held):
                    call()
    except RuntimeError as error:
        log.debug("not captured in a CUDA graph: %s", error)
        return None
    finally:
        torch.cuda.current_stream().wait_stream(side)
    return graph.replay, held


@contextlib.contextmanager
def _no_synchronising() -> Iterator[None]:
    """PyTorch raises RuntimeError where an operation waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _sampler(run: Call, held: int = 1) -> Callable[[], float]:
    """Measures a batch of `run`, which makes `held` calls."""
    times = 1
    for _ in range(2):  # in the first estimate the launch counts
        times = max(1, round(_BATCH_SECONDS / _seconds(run, times)))
    return lambda: _seconds(run, times) / held


def _seconds(run: Call, times: int) -> float:
    """Of one `run`, from `times` of them on the current stream."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(times):
        run()
    stop.record()
    stop.synchronize()
    milliseconds: float = start.elapsed_time(stop)
    return max(milliseconds, 1e-6) * 1e-3 / times
