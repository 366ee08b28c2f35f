"""From a configuration to the numbers of one attention call, and the rules of thumb for K."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from typing import Any

from .config import SparseKConfig, Tail, TopK

AUTO_STEP = 16
AUTO_MIN = 32
# "auto" for the lists of tiles: those keys that get this share of the softmax of some row of one. Kernels
# keep about what 0.0025 would, for their sums are too low.
AUTO_SHARE = 0.004
NO_LIMIT = 2**31 - 1  # of a count
_LIST_PER_K = 6  # about as good as K for each query: docs/choosing-k.md
_LONGEST_LIST = 2048  # that the GPU kernels take
_MAX_CONTEXT = 2**53  # what a float counts exactly


@dataclass(frozen=True)
class Rule:
    """What a kernel is told for one call. `top_k >= Tk` without `min_share` means: keep every allowed key
    (dense attention). `tile`: queries that share one list of keys; 0 where each has its own. `or_dense`:
    dense attention will do where that is faster."""

    top_k: int
    sinks: int
    window: int
    stride: int
    tail: Tail
    tile: int = 0
    or_dense: bool = False
    min_share: float = 0.0

    def keeps_all(self, num_keys: int) -> bool:
        return self.top_k >= num_keys and not self.min_share

    def dense(self, num_keys: int) -> Rule:
        """The rule that keeps everything."""
        return replace(self, top_k=num_keys, min_share=0.0, or_dense=False)

    def most_kept(self, num_keys: int) -> int | None:
        """The most keys that one row can keep, of `num_keys`; None by share: the scores say."""
        if self.min_share:
            return None
        strided = -(-num_keys // self.stride) if self.stride else 0
        return min(num_keys, self.top_k + self.sinks + self.window + self.tile + strided)


def resolve(
    config: SparseKConfig, num_keys: int, *, layer: int | None = None, context: int | None = None
) -> Rule:
    """The rule for one call over `num_keys` keys.

    Args:
        layer: the layer's number, from 0; without it no layer counts as dense.
        context: how many keys the row sees that sees most, where that is less than `num_keys` (sliding
            windows, caches with room left, several sequences beside each other). `min_context` and "auto" go
            by it.

    Raises:
        TypeError: `layer` is no integer.
        ValueError: `top_k` is given per layer and `layer` is missing or outside the list.
    """
    if layer is not None and (isinstance(layer, bool) or not hasattr(layer, "__index__")):
        raise TypeError(f"layer = {layer!r}: must be the number of a layer, or None")
    context = num_keys if context is None else min(context, num_keys)
    budget = config.top_k
    if isinstance(budget, tuple):
        if layer is None or not 0 <= layer < len(budget):
            raise ValueError(
                f"top_k = {budget!r} gives one value for each of {len(budget)} layers: "
                f"layer = {layer!r} must be one of 0 to {len(budget) - 1}"
            )
        budget = budget[layer]
    tile = config.tile if config.select == "tile" else 0
    budget, share = _auto(config, context) if budget == "auto" else (budget, config.min_share)
    top_k = NO_LIMIT if share and budget == NO_LIMIT else min(budget, num_keys)
    window = max(config.window, 1) if share else config.window  # no key may have the share
    rule = Rule(top_k, config.sinks, window, config.stride, config.tail, tile, min_share=share)
    sees_no_more = budget >= context and not share
    is_dense = context < config.min_context or layer in config.dense_layers or sees_no_more
    return rule.dense(num_keys) if is_dense else rule


@lru_cache(maxsize=64)
def on_gpu(config: SparseKConfig) -> SparseKConfig:
    """What a configuration means on a GPU: `select = "auto"` is "tile" there, with lists of 6 x `top_k` keys
    that are no longer than the kernels take, but where `top_k` is."""

    def list_of(budget: TopK) -> TopK:
        return budget if budget == "auto" else max(budget, min(_LIST_PER_K * budget, _LONGEST_LIST))

    if config.select != "auto":
        return config
    budgets = config.top_k
    lists = tuple(map(list_of, budgets)) if isinstance(budgets, tuple) else list_of(budgets)
    return replace(config, top_k=lists, select="tile")


def on_cpu(config: SparseKConfig) -> SparseKConfig:
    """What a configuration means on the CPU: `select = "auto"` is "query" there."""
    return replace(config, select="query") if config.select == "auto" else config


def on_device(config: SparseKConfig, device: str) -> SparseKConfig:
    """What a configuration means on "cpu" or "cuda": who chooses keys is settled, and the length of lists."""
    return on_gpu(config) if device == "cuda" else on_cpu(config)


def fixed(config: SparseKConfig, context_length: int, device: str = "cpu") -> SparseKConfig:
    """`config` with numbers for "auto", as they are at this context and on this device, "cpu" or "cuda"; it
    stays "auto" where that is by share."""
    config = on_gpu(config) if device == "cuda" else config
    if by_share(config):
        return config

    def number(budget: TopK) -> TopK:
        return auto_top_k(context_length) if budget == "auto" else budget

    budgets = config.top_k
    return replace(
        config, top_k=tuple(map(number, budgets)) if isinstance(budgets, tuple) else number(budgets)
    )


def by_share(config: SparseKConfig) -> bool:
    """Whether how many keys a row keeps depends on the scores, in some layer. Of a configuration as it is on
    its device."""
    budgets = config.top_k if isinstance(config.top_k, tuple) else (config.top_k,)
    return config.min_share > 0 or ("auto" in budgets and config.select == "tile")


def _auto(config: SparseKConfig, context_length: int) -> tuple[int, float]:
    """The most keys that "auto" keeps, and the share that they must have."""
    if by_share(config):
        return NO_LIMIT, config.min_share or AUTO_SHARE
    return auto_top_k(context_length), 0.0


def auto_top_k(context_length: int) -> int:
    """About sqrt(N): the nearest multiple of 16, and at least 32."""
    return max(AUTO_MIN, AUTO_STEP * round(math.sqrt(context_length) / AUTO_STEP))


@dataclass(frozen=True)
class Recommendation:
    """A range of K worth trying, and the value that "auto" would take."""

    low: int
    high: int
    auto: int


def recommend_k(context_length: int, num_parameters: float | None = None) -> Recommendation:
    """The published rules of thumb for K. They are starting points: what K costs on a model must be measured.

    By context: N/64 to N/32, which is 32-64 at 2048 tokens and 64-128 at 4096. By model size, where it is
    given: 32-64 below 13 billion parameters, 64-128 below 70 billion, 128-256 from there on; the range
    returned then spans both rules. `auto` is the sqrt(N) rule.

    Raises:
        TypeError: a value is no number.
        ValueError: a value is not positive.
    """
    if not _is_number(context_length):
        raise TypeError(f"context_length = {context_length!r}: must be a positive number of tokens")
    if not 0 < context_length <= _MAX_CONTEXT:
        raise ValueError(f"context_length = {context_length!r}: must be a positive number of tokens")
    low, high = max(1, int(context_length // 64)), max(1, int(context_length // 32))
    if num_parameters is not None:
        if not _is_number(num_parameters):
            raise TypeError(f"num_parameters = {num_parameters!r}: must be positive, like 7e9")
        if not num_parameters > 0:
            raise ValueError(f"num_parameters = {num_parameters!r}: must be positive, like 7e9")
        by_size = (32, 64) if num_parameters < 13e9 else (64, 128) if num_parameters < 70e9 else (128, 256)
        low, high = min(low, by_size[0]), max(high, by_size[1])
    return Recommendation(low, high, auto_top_k(context_length))


def _is_number(x: Any) -> bool:
    return isinstance(x, Real)
