"""Draw docs/images/selection.svg: one head's attention on a sentence, dense and with the kept keys marked.

Everything drawn is computed from the embedded model's own q and k; run by `make docs`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm

from sparsek import SparseKConfig, select
from sparsek.engines.base import open_engine
from sparsek.problem import Problem

FILE = Path(__file__).parent.parent / "docs" / "images" / "selection.svg"
SENTENCE = (
    "The cat that the neighbours had seen in the garden all summer came back in the autumn, and this time "
    "it brought two kittens."
)
LAYER, HEAD, K = 11, 3, 4
CONFIG = SparseKConfig(top_k=K, sinks=1, window=2, tail="none", dense_layers=(), min_context=0)


def main() -> None:
    plt.switch_backend("svg")
    plt.rcParams["svg.hashsalt"] = "sparsek"  # the same picture gives the same file
    engine = open_engine("transformers", None)
    tokens = engine.encode(SENTENCE)
    captured: dict[int, Problem] = {}
    with engine.observed(lambda layer, problem, _out: captured.update({layer: problem})):
        list(engine.prompt(tokens, SparseKConfig.pure(10_000)))
    q, k = captured[LAYER].q, captured[LAYER].k
    key = k[:, HEAD // (q.shape[1] // k.shape[1])]
    scores = (q[:, HEAD] @ key.transpose(-1, -2) * q.shape[-1] ** -0.5)[0]
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    kept = select(q, k, config=CONFIG, is_causal=True).to_mask()[0, HEAD]
    draw([engine.decode([t]) for t in tokens], weights, kept, future)
    print(f"wrote {FILE}")


def draw(words: list[str], weights: torch.Tensor, kept: torch.Tensor, future: torch.Tensor) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    allowed, chosen = int((~future).sum()), int(kept.sum())
    panels = [
        (f"Dense attention: all {allowed} scores", weights.masked_fill(future, torch.nan)),
        (f"Sparse-K, K = {K}, 1 sink, window 2: {chosen} of them", weights.masked_fill(~kept, torch.nan)),
    ]
    for axis, (title, shown) in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=11)
        axis.imshow(future.float().where(future, torch.nan), cmap="Greys", vmin=0, vmax=6)
        image = axis.imshow(shown.clamp(min=1e-3), cmap="viridis", norm=LogNorm(1e-3, 1))
        ticks: dict[str, Any] = {"labels": [w.strip() for w in words], "fontsize": 6}
        axis.set_xticks(range(len(words)), rotation=90, **ticks)
        axis.set_yticks(range(len(words)), **ticks)
        axis.set_xlabel("key")
        axis.set_ylabel("query")
    figure.colorbar(image, ax=axes, shrink=0.7, label="attention weight before dropping")
    FILE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FILE, metadata={"Date": None})


if __name__ == "__main__":
    main()
