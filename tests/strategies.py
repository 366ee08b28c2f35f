"""Hypothesis strategies: attention calls of every kind that a kernel must get right.

A `Case` is a handful of names and numbers, so a failing example prints in a few lines; `Case.build()` makes
the tensors from it, always the same ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from sparsek import SparseKConfig

Array = Any  # numpy.ndarray or torch.Tensor

DTYPES = {
    "torch": ("float16", "bfloat16", "float32", "float64"),
    "numpy": ("float16", "float32", "float64"),
}
VALUES = ("normal", "integers", "equal", "huge", "tiny")
LAYOUTS = ("contiguous", "transposed", "sliced")
MASKS = ("none", "padding", "packed", "sliding window", "random", "additive")
BLOCK_EDGES = (63, 64, 65, 127, 128, 129)


def examples(count: int) -> settings:
    """The same examples on every run: a failure in CI is a failure at home."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@dataclass(frozen=True)
class Call:
    """The arguments of one call. `exact`: no rounding can change the order of the scores."""

    q: Array
    k: Array
    v: Array
    config: SparseKConfig
    attn_mask: Array | None = None
    is_causal: bool = False
    scale: float | None = None
    softcap: float | None = None
    exact: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `attention` and `select`."""
        names = ("config", "attn_mask", "is_causal", "scale", "softcap")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Case:
    """What a call is made from."""

    library: str
    dtype: str
    batch: int
    kv_heads: int
    group: int
    num_queries: int
    num_keys: int
    head_size: int
    value_size: int
    values: str
    layout: str
    mask: str
    is_causal: bool
    scale: float | None
    softcap: float | None
    config: SparseKConfig
    seed: int

    def build(self) -> Call:
        rng = np.random.default_rng(self.seed)
        heads = self.kv_heads * self.group
        q = self._tensor(rng, heads, self.num_queries, self.head_size)
        k = self._tensor(rng, self.kv_heads, self.num_keys, self.head_size)
        v = self._tensor(rng, self.kv_heads, self.num_keys, self.value_size)
        mask = self._mask(rng)
        # Sums of integers are exact, scaled by a power of two too; random scores in float64 are never close
        # enough to swap. A softcap brings any scores together.
        if self.values in ("integers", "equal"):
            exact = abs(math.frexp(self._scale)[0]) in (0, 0.5)
        else:
            exact = self.dtype == "float64"
        exact = exact and self.softcap is None
        return Call(q, k, v, self.config, mask, self.is_causal, self.scale, self.softcap, exact)

    @property
    def _scale(self) -> float:
        return 1 / math.sqrt(self.head_size) if self.scale is None else self.scale

    def _tensor(self, rng: np.random.Generator, heads: int, tokens: int, size: int) -> Array:
        shape = (self.batch, heads, tokens, size)
        if self.values == "equal":
            x = np.ones(shape)
        elif self.values == "integers":
            x = rng.integers(-2, 3, shape).astype(float)
        else:
            x = rng.standard_normal(shape) * {"normal": 1, "huge": 1e4, "tiny": 1e-4}[self.values]
        return laid_out(self._cast(x), self.layout)

    def _cast(self, x: np.ndarray[Any, Any]) -> Array:
        if self.library == "numpy":
            return x if x.dtype == bool else x.astype(self.dtype)
        tensor = torch.from_numpy(x)
        return tensor if tensor.dtype == torch.bool else tensor.to(getattr(torch, self.dtype))

    def _mask(self, rng: np.random.Generator) -> Array | None:
        if self.mask == "none":
            return None
        full = (self.batch, self.kv_heads * self.group, self.num_queries, self.num_keys)
        key = np.arange(self.num_keys)
        position = (np.arange(self.num_queries) + self.num_keys - self.num_queries)[:, None]
        if self.mask == "padding":  # on the left for some sequences, on the right for others
            first = rng.integers(0, self.num_keys, (self.batch, 1, 1, 1))
            mask = key >= first if rng.integers(2) else key <= first
        elif self.mask == "packed":
            sequence = np.cumsum(rng.random(self.num_keys) < 0.05)
            mask = sequence == sequence[np.maximum(position, 0)]
        elif self.mask == "sliding window":
            mask = abs(position - key) < rng.integers(1, self.num_keys + 1)
        else:
            shape = tuple(n if rng.integers(2) else 1 for n in full[:2]) + full[2:]
            mask = (rng.random(shape) < 0.7) & (rng.random((*shape[:3], 1)) < 0.8)  # some rows see nothing
        if self.mask == "additive":
            # Multiples of 1/8 stay exact in every dtype, and so do their sums with exact scores.
            bias = rng.integers(-16, 17, mask.shape) / 8
            mask = np.where(mask, bias, -np.inf) if rng.integers(2) else bias
        return self._cast(mask)


def laid_out(x: Array, layout: str) -> Array:
    """The same values in other memory. [B, T, H, D] is how models hold them; what lies between the rows of
    a slice is NaN, so that reading it shows."""
    xp: Any = torch if isinstance(x, torch.Tensor) else np
    if layout == "transposed":
        return xp.stack([x[:, h] for h in range(x.shape[1])], 2).swapaxes(1, 2)
    if layout == "sliced":
        return xp.stack([x, xp.full_like(x, np.nan)], 3)[:, :, :, 0]
    return x


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """Any case, with the `fixed` fields as given, or drawn from the strategies given."""

    def pick(name: str, strategy: st.SearchStrategy[Any]) -> Any:
        value = fixed.get(name, strategy)
        return draw(value) if isinstance(value, st.SearchStrategy) else value

    library = pick("library", st.sampled_from(tuple(DTYPES)))
    # Fewer keys than queries, and the edges of the 64-key blocks, more often than by chance.
    num_keys = pick("num_keys", st.integers(1, 40) | st.integers(64, 150) | st.sampled_from(BLOCK_EDGES))
    num_queries = pick("num_queries", st.integers(1, 40) | st.just(min(num_keys, 40)))
    head_size = pick("head_size", st.integers(1, 33))
    return Case(
        library=library,
        dtype=pick("dtype", st.sampled_from(DTYPES[library])),
        batch=pick("batch", st.integers(1, 2)),
        kv_heads=pick("kv_heads", st.integers(1, 3)),
        group=pick("group", st.integers(1, 3)),
        num_queries=num_queries,
        num_keys=num_keys,
        head_size=head_size,
        value_size=pick("value_size", st.integers(1, 20).filter(lambda n: n != head_size)),
        values=pick("values", st.sampled_from(VALUES)),
        layout=pick("layout", st.sampled_from(LAYOUTS)),
        mask=pick("mask", st.sampled_from(MASKS)),
        is_causal=pick("is_causal", st.booleans()),
        scale=pick("scale", st.sampled_from((None, None, 1.0, 0.5, -0.25, 0.3, 0.0))),
        softcap=pick("softcap", st.sampled_from((None, None, 0.5, 2.0, 30.0))),
        config=pick("config", configs(num_keys)),
        seed=pick("seed", st.integers(0, 2**32 - 1)),
    )


@st.composite
def configs(draw: st.DrawFn, num_keys: int) -> SparseKConfig:
    """Sparse at every layer and length; from one kept key to more than there are."""
    top_k = draw(st.integers(0, 12) | st.integers(1, num_keys + 10))
    if draw(st.sampled_from((False, False, True))):
        return SparseKConfig.pure(max(1, top_k))
    sinks, window, stride = draw(st.tuples(st.integers(0, 6), st.integers(0, 70), st.integers(0, 9)))
    if not (sinks or window or stride):
        top_k = max(1, top_k)
    tail = draw(st.sampled_from(("none", "centroid", "centroid")))
    return SparseKConfig(top_k, sinks, window, stride, tail, dense_layers=(), min_context=0)


# Calls in which whole blocks are allowed and lose keys, so that the centroid tail has something to say.
# With top_k = 0 the dropped keys can be far better than the kept ones.
tail_cases = cases(
    num_keys=st.integers(64, 150) | st.sampled_from(BLOCK_EDGES[1:]),
    mask=st.sampled_from(("none", "padding", "packed", "sliding window", "additive")),
    values=st.sampled_from(("normal", "integers", "huge")),
    config=st.builds(
        SparseKConfig,
        top_k=st.integers(0, 20),
        sinks=st.integers(1, 6),
        window=st.integers(0, 30),
        stride=st.sampled_from((0, 0, 7)),
        tail=st.just("centroid"),
        dense_layers=st.just(()),
        min_context=st.just(0),
    ),
)
