"""Which kernel runs: one table, and one rule for "auto".

Adding a kernel is one row here. A kernel is a module with `why_not(problem) -> str | None` and
`attention(problem)`; one that selects also has `select(problem)`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any, Final

from ..arrays import Array
from ..problem import Problem
from ..selection import Selection
from . import break_even

log = logging.getLogger("sparsek")

# In the order in which "auto" tries them; the reference takes everything and is last.
KERNELS: Final = ("dense", "cpu", "triton_decode", "triton_prefill", "reference")
# What a user can ask for by name. Whether a call is dense is the configuration's business.
BACKENDS: Final = ("auto", "cpu", "triton_decode", "triton_prefill", "reference")


def attention(p: Problem, backend: str = "auto") -> Array:
    p = settled(p, backend)
    return _choose(p, backend, "attention").attention(p)


def attention_into(out: Array, p: Problem, backend: str) -> None:
    """As `attention`, into `out` [B, H, Tq, Dv], which may have any strides but for its last axis: for
    "triton_prefill" and "cpu"."""
    _choose(p, backend, "attention").attention(p, out)


def select(p: Problem, backend: str = "auto") -> Selection:
    p = settled(p, backend)
    selection: Selection = _choose(p, backend, "select").select(p)
    return selection


def settled(p: Problem, backend: str = "auto") -> Problem:
    """The problem with a rule that says for good whether attention is dense, and with a mask where packed
    sequences need one. Parts of it are to be computed as the whole is."""
    if p.rule.or_dense:
        dense = backend == "auto" and break_even.dense_is_better(p)
        p = p.with_rule(p.rule.dense(p.num_keys) if dense else replace(p.rule, or_dense=False))
    if p.starts is not None and _load("triton_prefill").why_not(p) is not None:
        p = p.with_mask()
    return p


def describe() -> dict[str, str]:
    """For each kernel, in the order of "auto", what it takes."""
    return {name: _load(name).TAKES for name in KERNELS}


def check_backend(backend: str) -> None:
    """Raises ValueError when there is no such kernel that can be asked for."""
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}: must be one of {', '.join(map(repr, BACKENDS))}")


def _choose(p: Problem, backend: str, operation: str) -> Any:
    check_backend(backend)
    if backend != "auto":
        kernel = _load(backend)
        reason = kernel.why_not(p)
        if reason is not None:
            raise ValueError(f"backend = {backend!r} cannot do this call: {reason}")
        return kernel
    for name in KERNELS:
        kernel = _load(name)
        if not hasattr(kernel, operation):
            continue
        reason = kernel.why_not(p)
        if reason is None:
            log.debug("%s: kernel %s", operation, name)
            if name == "reference" and p.mask is not None and not _is_bool(p.mask):
                _tell_slow()
            return kernel
        log.debug("%s: not kernel %s: %s", operation, name, reason)
    raise AssertionError("the reference takes every call")


def _is_bool(mask: Array) -> bool:
    return str(mask.dtype).removeprefix("torch.") == "bool"


@cache
def _tell_slow() -> None:
    """Once."""
    log.warning("a mask that adds numbers to the scores is slow: the reference computes it")


@cache
def _load(name: str) -> Any:
    return import_module(f".{name}", __package__)
