"""Records as the commands write them, with hostile words in them, and a made-up attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsek import SparseKConfig
from sparsek.report.parts import Material
from sparsek.report.records import Records
from sparsek.report.series import Costs
from sparsek.report.tensors import SentenceAttention

SENTENCE = "The cat that the neighbours had seen came back, and it brought two kittens."
CONFIG = SparseKConfig(top_k=64)
HOSTILE = "<script>alert('x')</script> \"q\" & $\\alpha$ </svg>\n\x00\ud800 \U0001f642 שלום"
ENVIRONMENT = {"cpu": f"CPU {HOSTILE}", "cores": 2, "time": "2026-01-02T03:04:05+00:00"}


def bench_record(tokens: int, top_k: int | str, **changed: Any) -> dict[str, Any]:
    """Dense where `top_k` is 0."""
    dense = top_k == 0
    return {
        "engine": "llama",
        "model": "small",
        "n_prompt": tokens,
        "n_gen": 0,
        "n_depth": 0,
        "top_k": top_k,
        "config": None if dense else SparseKConfig(top_k=top_k).to_dict(),  # type: ignore[arg-type]
        "backend": "flash attention on" if dense else "sparsek",
        "n_threads": 2,
        "avg_ts": 100.0 if dense else 150.0,
        "stddev_ts": 5.0,
        "samples_ns": [1, 2],
        "speedup": None if dense else 1.5,
        "speedup_low": None if dense else 1.4,
        "speedup_high": None if dense else 1.7,
        "environment": ENVIRONMENT,
        **changed,
    }


def eval_record(top_k: int | str, kl: float = 0.01, **changed: Any) -> dict[str, Any]:
    """Of a model of three layers and two heads, the first layer dense."""
    return {
        "engine": "transformers",
        "model": "small",
        "text": "book.txt",
        "context": 2048,
        "where": "all",
        "top_k": top_k,
        "config": SparseKConfig(top_k=top_k, min_context=0).to_dict() if top_k != "per layer" else None,
        "ppl_ratio": 1 + kl / 2,
        "ppl_ratio_se": kl / 10,
        "kl_mean": kl,
        "kl_se": kl / 20,
        "same_top": 0.97,
        "mass": [None, [0.9, 0.8], [0.7, 0.95]],
        "environment": ENVIRONMENT,
        **changed,
    }


def tune_record(**changed: Any) -> dict[str, Any]:
    def point(step: str, top_k: Any, keys: float, kl: float) -> dict[str, Any]:
        config = SparseKConfig(top_k=top_k).to_dict()
        return {"step": step, "config": config, "keys": keys, "kl": kl, "kl_se": kl / 9, "speedup": None}

    answer = point("K by layer", (8, 16, "auto"), 60.0, 0.004)
    return {
        "engine": "transformers",
        "model": "small",
        "text": "book.txt",
        "context": 2048,
        "target": "KL <= 0.01",
        "tuned": answer,
        "uniform": point("one K", 64, 120.0, 0.003),
        "frontier": [point("one K", 64, 120.0, 0.003), point("form", 100, 121.0, 0.002), answer],
        "environment": ENVIRONMENT,
        **changed,
    }


def made_up(words: tuple[str, ...], top_k: int = 2) -> SentenceAttention:
    """Random scores of those tokens under the causal mask; the best `top_k` and the first key are kept."""
    size = len(words)
    scores = np.random.default_rng(0).normal(size=(size, size))
    allowed = np.tri(size, dtype=bool)
    always = np.zeros_like(allowed)
    always[:, 0] = True
    best = np.zeros_like(allowed)
    for row in range(size):
        best[row, 1 + np.argsort(-scores[row, 1 : row + 1])[:top_k]] = True
    kept = always | best

    def softmax(among: Any) -> Any:
        weights = np.where(among, np.exp(scores), 0)
        return weights / weights.sum(-1, keepdims=True)

    config = SparseKConfig(top_k, 1, 0, tail="none", dense_layers=(), min_context=0)
    return SentenceAttention(
        words, 1, 0, scores, allowed, kept, always, softmax(allowed), softmax(kept), config, "reasons"
    )


def material(**changed: Any) -> Material:
    """Everything a page needs, without a model."""
    given: dict[str, Any] = {
        "model": f"model {HOSTILE}",
        "sentence": HOSTILE,
        "attention": made_up(("one", "two", "three", "four")),
        "costs": Costs((64, 128), (2080, 8256), (1000, 2000), (4160, 16512), (2000, 4000), "", 0, 2, 1),
        "records": Records(
            bench=[bench_record(n, k) for n in (2048, 4096) for k in (0, 64)],
            eval=[eval_record(k, 0.4 / k) for k in (16, 64)],
            tune=[tune_record()],
            files={"bench": [f"{HOSTILE}.json"], "tune": ["tune.json"]},
        ),
        "points": [],
        "top_k": 64,
        "commands": {"web": f"sparsek report --sentence '{HOSTILE}'"},
        "command": "sparsek report",
        "environment": ENVIRONMENT,
    }
    return Material(**(given | changed))
