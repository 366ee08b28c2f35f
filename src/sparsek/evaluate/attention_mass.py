"""Retained mass: how much of the dense softmax falls on the kept keys, by layer and head."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from ..kernels import dispatch, reference
from ..problem import Problem
from ..verify import blocks

_ONE_IN: Final = 64  # rows of each head that are looked at, but 8 of each call at least


@dataclass
class LayerMass:
    """Sums over the rows looked at: of each head the retained mass, of all heads the kept keys."""

    mass: list[float]
    kept: float = 0.0
    rows: int = 0  # of one head

    def add(self, mass: list[float], kept: float, rows: int) -> None:
        self.mass = [a + b for a, b in zip(self.mass, mass, strict=True)]
        self.kept += kept
        self.rows += rows


@dataclass
class MassObserver:
    """Observer of attention that adds up `LayerMass`. Calls that keep everything are left out."""

    layers: dict[int, LayerMass] = field(default_factory=dict)

    def __call__(self, layer: int, problem: Problem, _out: Any) -> None:
        if problem.keeps_all:
            return
        mass, kept, rows = retained_mass(problem)
        self.layers.setdefault(layer, LayerMass([0.0] * len(mass))).add(mass, kept, rows)


def retained_mass(p: Problem) -> tuple[list[float], float, int]:
    """Over sampled rows: the share of the dense softmax that falls on the kept keys, added up, of each head;
    the kept keys added up, a mean over the heads; and the number of rows."""
    p = on_torch(p)
    heads = p.q.shape[1]
    mass, kept, rows = torch.zeros(heads, dtype=torch.float64), 0.0, 0
    # Where a kernel estimates what to keep, it is what the kernel kept; of whole tiles, so of fewer rows.
    wanted = max(8, p.num_queries // (_ONE_IN * max(1, p.rule.tile // 8)))
    for block in blocks(p, wanted):
        part = p.rows(block)
        listed = dispatch.select(part).to_mask() if p.rule.tile or p.rule.min_share else None
        for chunk in reference.chunks(part):
            scores = torch.where(chunk.allowed, chunk.scores, -math.inf)
            if listed is not None:
                given = listed[:, :, chunk.rows, : scores.shape[-1]].reshape(chunk.kept.shape)
                chunk = replace(chunk, kept=given)
            shares = torch.where(chunk.kept, scores.softmax(-1), 0.0).nansum(-1)  # [B, Hkv, G, R]
            mass += shares.double().sum((0, 3)).flatten().cpu()  # a row with no allowed key has no mass
            kept += float(chunk.kept.sum()) / heads
            rows += shares.shape[0] * shares.shape[3]
    return mass.tolist(), kept, rows


def on_torch(p: Problem) -> Problem:
    """The problem, without its values, on torch tensors."""
    if isinstance(p.q, torch.Tensor):
        return p
    q, k = torch.from_numpy(p.q), torch.from_numpy(p.k)
    return replace(p, q=q, k=k, v=None, mask=None if p.mask is None else torch.tensor(p.mask))
