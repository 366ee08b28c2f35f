"""Says once that attention is dense in a model that is switched on: for its user it would look as if Sparse-K
gained nothing and cost nothing."""

from __future__ import annotations

import logging
from typing import Any, Final

from ..config import SparseKConfig
from ..kernels.break_even import prompt_is_dense

log = logging.getLogger("sparsek.transformers")
_said: Final[set[tuple[SparseKConfig, str]]] = set()


def say_if_dense(config: SparseKConfig, query: Any, key: Any, layer: int | None, seen: int) -> None:
    """Each configuration says each of its reasons once in a process. Nothing is said of steps of generation,
    which are as their prompt was, and where it is the user who wants every key.

    Args:
        query: [B, H, Tq, D]. key: [B, Hkv, Tk, D].
        seen: how many keys the row sees that sees most, in this layer and in every other of the model.
    """
    batch, heads, num_queries, size = query.shape
    if num_queries == 1:
        return
    on_gpu = query.is_cuda and config.select == "auto"  # see break_even.py
    everywhere = 'select="tile" with min_context=0' if on_gpu else "min_context=0"
    whole = num_queries == key.shape[2]  # of other prompts a part is in the cache
    if on_gpu and whole and prompt_is_dense(num_queries, num_queries, batch * heads * size):
        if _drops(config, layer, seen):
            _say(config, f"to {num_queries} tokens on a GPU, for that is faster", everywhere)
    elif seen < config.min_context and _drops(config, layer, config.min_context):
        reason = f"while the context is below min_context, {seen} < {config.min_context} tokens"
        _say(config, reason, everywhere)


def _drops(config: SparseKConfig, layer: int | None, num_keys: int) -> bool:
    """Whether less than all of so many keys was asked for in this layer."""
    budget = config.top_k
    if isinstance(budget, tuple):
        if layer is None or not 0 <= layer < len(budget):
            return False
        budget = budget[layer]
    return layer not in config.dense_layers and (budget == "auto" or budget < num_keys)


def _say(config: SparseKConfig, reason: str, everywhere: str) -> None:
    kind = config, reason.split(maxsplit=1)[0]
    if kind not in _said:
        _said.add(kind)
        log.warning("Sparse-K is on, but attention is dense %s (%s uses K everywhere)", reason, everywhere)
