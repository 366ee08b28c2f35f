"""Who wants to see the attention that Sparse-K computes: for measuring, verifying and capturing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ..problem import Problem

# observer(layer, problem, output): `problem` holds q, k, v and the rule; `output` is [B, H, Tq, Dv].
Observer = Callable[[int, Problem, Any], None]


class Observers:
    """Those of one host. True where there is one."""

    def __init__(self) -> None:
        self._all: list[Observer] = []

    def __bool__(self) -> bool:
        return bool(self._all)

    @contextlib.contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Call `observer` after every attention within the block."""
        self._all.append(observer)
        try:
            yield
        finally:
            self._all.remove(observer)

    def tell(self, layer: int | None, problem: Problem, out: Any) -> None:
        """Of a layer without a number they are told -1."""
        for observer in tuple(self._all):
            observer(-1 if layer is None else layer, problem, out)
