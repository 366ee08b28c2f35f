"""q, k, v of a real model on real text: they are distributed very differently from random numbers."""

from __future__ import annotations

from typing import Any

import torch

from ..config import KEEP_ALL
from ..engines.base import open_engine
from ..problem import Problem
from .inputs import DTYPES, Inputs
from .text import read_text, take_tokens


class _Captured(Exception):  # noqa: N818 - not an error: it ends the model's run early
    """The layer was reached."""


def model_inputs(
    model: str | None,
    *,
    tokens: int,
    queries: int,
    layer: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    text: str | None = None,
) -> Inputs:
    """Capture one layer's inputs while the model reads `tokens` tokens of a text.

    Beyond the model's own context positions are simply continued: good enough for timing.

    Raises:
        ValueError: the model has no such layer.
    """
    engine = open_engine("transformers", model)
    layer = engine.num_layers // 2 if layer is None else layer
    if layer >= engine.num_layers:
        raise ValueError(f"layer = {layer}: the model has layers 0 to {engine.num_layers - 1}")
    _, words = read_text(text)
    captured: list[Problem] = []

    def capture(at: int, problem: Problem, _out: Any) -> None:
        if at == layer:
            captured.append(problem)
            raise _Captured

    try:
        with engine.observed(capture):
            list(engine.prompt(take_tokens(engine, words, tokens), KEEP_ALL))
    except _Captured:
        pass

    def given(x: Any, count: int) -> torch.Tensor:
        last: torch.Tensor = x[:, :, -count:].to(device=device, dtype=DTYPES[dtype])
        return last.clone()

    p = captured[0]
    source = f"{engine.model} layer {layer}"
    return Inputs(given(p.q, queries), given(p.k, tokens), given(p.v, tokens), source)
