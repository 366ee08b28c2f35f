"""Problem: one attention call with its inputs checked, in the one form that every kernel takes.

Inputs are checked here and nowhere else; kernels trust what they are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Any, Final

import numpy as np

from . import arrays
from .arrays import Array
from .config import SparseKConfig
from .key_index import KeyIndex
from .key_ranges import key_ranges
from .policy import Rule, on_gpu, resolve

FORBIDDEN: Final = -9000.0  # added to a score: no weight is left; -1e4 is -9984 in bfloat16
_MAX_SOFTCAP: Final = 1e30  # a larger one is infinite in float32
NO_VALUES: Final = object()  # only the selection is wanted; None would hide a forgotten v

Ranges = tuple[Array, Array] | None


@dataclass(frozen=True)
class Problem:
    """One call of attention.

    Attributes:
        q: [B, H, Tq, D]. k: [B, Hkv, Tk, D]. v: [B, Hkv, Tk, Dv], or None where only the selection is wanted.
        mask: None, or a view [1|B, 1|H, Tq, Tk]: bool (True = allowed) or floating (added to the scores).
        is_causal: a query row sees no later position than its own.
        first_position: position of query row 0; the rows that follow have the positions that follow.
        scale: factor of q.k. softcap: None, or scores become softcap * tanh(score / softcap).
        rule: what each row keeps.
        index: of k and v, for the kernels that can use it.
        starts: int32 [B, Tq], a torch tensor: of causal sequences packed one after another, the first
            position of the row's own. Says what a mask would, which is None then; see `with_mask`.
        whole: the problem of which this is some rows. Estimates that go by all rows are then made as there.
    """

    q: Array
    k: Array
    v: Array | None
    mask: Array | None
    is_causal: bool
    first_position: int
    scale: float
    softcap: float | None
    rule: Rule
    index: KeyIndex | None = None
    starts: Array | None = None
    whole: Problem | None = field(default=None, repr=False)

    @property
    def num_keys(self) -> int:
        return int(self.k.shape[2])

    @property
    def num_queries(self) -> int:
        return int(self.q.shape[2])

    def rows(self, rows: slice) -> Problem:
        """The same problem for the query rows [start, stop) alone."""
        mask = None if self.mask is None else self.mask[:, :, rows]
        starts = None if self.starts is None else self.starts[:, rows]
        first = self.first_position + rows.start
        return replace(
            self,
            q=self.q[:, :, rows],
            mask=mask,
            starts=starts,
            first_position=first,
            whole=self.whole or self,
        )

    def with_mask(self) -> Problem:
        """The same with a mask in the place of `starts`: Tq x Tk memory."""
        if self.starts is None:
            return self
        key = arrays.arange(self.num_keys, self.k)
        return replace(self, mask=key >= self.starts[:, None, :, None], starts=None)

    def with_rule(self, rule: Rule) -> Problem:
        """The same with another rule. What was found out about the mask stays."""
        p = replace(self, rule=rule)
        return p.with_ranges(self.ranges) if "ranges" in vars(self) else p

    def with_ranges(self, ranges: Ranges) -> Problem:
        """The same, of which `ranges` is known already."""
        p = replace(self)
        vars(p)["ranges"] = ranges
        return p

    @property
    def keeps_all(self) -> bool:
        return self.rule.keeps_all(self.num_keys)

    @cached_property
    def ranges(self) -> Ranges:
        """The keys that the mask lets each row see, as `key_ranges` has them: for torch tensors alone.
        Looks at the whole mask, once. None where rows see all up to their position."""
        if self.starts is not None:
            stops = arrays.arange(self.num_queries, self.k) + (self.first_position + 1)
            starts = self.starts.contiguous()
            return starts, stops.to(starts.dtype).expand_as(starts).contiguous()
        if self.mask is None:
            return None
        mask = self.mask.expand(self.q.shape[0], -1, -1, -1)
        return key_ranges(mask, first_position=self.first_position, is_causal=self.is_causal)


def make_problem(
    q: Any,
    k: Any,
    v: Any,
    *,
    config: SparseKConfig,
    attn_mask: Any | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    layer: int | None = None,
    context: int | None = None,
    index: KeyIndex | None = None,
) -> Problem:
    """Check the arguments of a public call and gather them; without v where it is NO_VALUES.

    Raises:
        TypeError: something is not a tensor or array of a floating dtype, or not of the same kind as q.
        ValueError: shapes do not fit each other, a number is out of range, or, with `config.check_finite`,
            an input has NaN or infinity in it.
    """
    if not isinstance(config, SparseKConfig):
        raise TypeError(f"config = {config!r}: must be a SparseKConfig")
    tensors = {"q": q, "k": k} if v is NO_VALUES else {"q": q, "k": k, "v": v}
    _check_kinds(tensors)
    _check_shapes(tensors)
    mask = None if attn_mask is None else _checked_mask(attn_mask, q, k)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    if not isinstance(is_causal, (bool, np.bool_)):
        raise TypeError(f"is_causal = {is_causal!r}: must be True or False")
    _check_number("scale", scale, math.isfinite, "a finite number")
    if softcap is not None:
        _check_number("softcap", softcap, lambda x: 0 < x < _MAX_SOFTCAP, "a positive number, or None")
    if index is not None and not isinstance(index, KeyIndex):
        raise TypeError(f"index = {index!r}: must be a sparsek.KeyIndex, or None")
    if config.check_finite:
        _check_finite(tensors, mask)
    num_keys = int(k.shape[2])
    gpu = arrays.on_gpu(q)
    rule = resolve(on_gpu(config) if gpu else config, num_keys, layer=layer, context=context)
    return Problem(
        q=q,
        k=k,
        v=None if v is NO_VALUES else v,
        mask=mask,
        is_causal=bool(is_causal),
        first_position=num_keys - int(q.shape[2]),  # the queries are the last of the positions
        scale=float(scale),
        softcap=None if softcap is None else float(softcap),
        rule=replace(rule, or_dense=True) if gpu and config.select == "auto" else rule,
        index=index,
    )


def _shape(x: Any) -> str:
    return str(list(x.shape))


def _check_kinds(tensors: dict[str, Any]) -> None:
    q = tensors["q"]
    for name, x in tensors.items():
        _check_kind(name, x)
        if arrays.is_torch(x) != arrays.is_torch(q):
            raise TypeError(f"q is a {type(q).__name__} and {name} a {type(x).__name__}: must be of one kind")
        floating = x.is_floating_point() if arrays.is_torch(x) else x.dtype.char in "efd"
        if not floating or x.dtype.itemsize < 2:
            raise TypeError(
                f"{name} has dtype {x.dtype}: must be float16, bfloat16 (torch only), float32 or float64"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"q has dtype {q.dtype} and {name} {x.dtype}: must be the same")
        if arrays.is_torch(x) and x.is_meta and q.is_meta:
            raise TypeError(f"{name} is a meta tensor: must have data")
        if arrays.is_torch(x) and x.device != q.device:
            raise ValueError(f"q is on {q.device} and {name} on {x.device}: must be on the same device")


def _check_kind(name: str, x: Any) -> None:
    if arrays.is_torch(x):
        if str(x.layout) != "torch.strided" or x.is_nested:
            form = "nested" if x.is_nested else x.layout
            raise TypeError(f"{name} is a {form} tensor: must be an ordinary dense one")
    elif not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a {type(x).__name__}: must be a torch tensor or a numpy array")
    elif not x.dtype.isnative:
        raise TypeError(f"{name} has dtype {x.dtype.str}: must be in this machine's byte order")


def _check_shapes(tensors: dict[str, Any]) -> None:
    for name, x in tensors.items():
        if x.ndim != 4:
            raise ValueError(
                f"{name} has shape {_shape(x)}: must have 4 axes, [batch, heads, tokens, head size]"
            )
    q, k = tensors["q"], tensors["k"]
    if q.shape[3] == 0:
        raise ValueError(f"q has shape {_shape(q)}: the head size must be at least 1")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q has shape {_shape(q)} and k {_shape(k)}: batch and head size must be equal")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads and k {k.shape[1]}: query heads must be a multiple of key/value heads"
        )
    if "v" in tensors and tensors["v"].shape[:3] != k.shape[:3]:
        raise ValueError(
            f"k has shape {_shape(k)} and v {_shape(tensors['v'])}: batch, heads and tokens must be equal"
        )


def _checked_mask(mask: Any, q: Array, k: Array) -> Array:
    if arrays.is_torch(mask) != arrays.is_torch(q) or not hasattr(mask, "shape"):
        raise TypeError(
            f"attn_mask is a {type(mask).__name__} and q a {type(q).__name__}: must be of one kind"
        )
    _check_kind("attn_mask", mask)
    xp = arrays.namespace(mask)
    floating = mask.is_floating_point() if arrays.is_torch(mask) else mask.dtype.char in "efd"
    if mask.dtype != xp.bool and not floating:
        raise TypeError(
            f"attn_mask has dtype {mask.dtype}: must be bool (True = allowed) or floating (added)"
        )
    if arrays.is_torch(mask) and mask.device != q.device:
        raise ValueError(f"q is on {q.device} and attn_mask on {mask.device}: must be on the same device")
    batch, heads, num_queries, _ = q.shape
    full = (batch, heads, num_queries, k.shape[2])
    padded = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(padded) != 4 or any(have not in (1, want) for have, want in zip(padded, full, strict=True)):
        raise ValueError(
            f"attn_mask has shape {_shape(mask)}: must broadcast to [B, H, Tq, Tk] = {list(full)}"
        )
    return xp.broadcast_to(mask.reshape(padded), (*padded[:2], *full[2:]))


def with_plain_mask(p: Problem) -> Problem:
    """The same with a mask of bool, where a floating one only allows and forbids: it is 0, or so low that no
    weight is left (-1e9, the least number of a dtype, -1e4). Not where a row sees nothing but such numbers,
    for then they decide. Looks at all of the mask, so not on a GPU."""
    if p.mask is None or p.mask.dtype == arrays.namespace(p.mask).bool or arrays.on_gpu(p.mask):
        return p
    if arrays.is_torch(p.mask) and arrays.wants_gradient(p.mask):
        return p
    allowed, low = p.mask == 0, p.mask <= FORBIDDEN
    if not bool((allowed | low).all()):
        return p
    lowered = low & (p.mask > -math.inf)
    seen = allowed
    if p.is_causal:
        last = arrays.arange(p.num_queries, p.mask)[:, None] + p.first_position
        causal = arrays.arange(p.num_keys, p.mask) <= last
        seen, lowered = allowed & causal, lowered & causal
    return replace(p, mask=allowed) if bool((seen.any(-1) | ~lowered.any(-1)).all()) else p


def _check_number(name: str, x: Any, good: Callable[[Any], bool], allowed: str) -> None:
    if not isinstance(x, Real):
        raise TypeError(f"{name} = {x!r}: must be {allowed}")
    try:
        fits = good(float(x))
    except OverflowError:
        fits = False
    if not fits:
        raise ValueError(f"{name} = {x!r}: must be {allowed}")


def _check_finite(tensors: dict[str, Any], mask: Array | None) -> None:
    for name, x in tensors.items():
        xp = arrays.namespace(x)
        bad = ~xp.isfinite(x)
        if bool(bad.any()):
            where = [int(axis[0]) for axis in arrays.nonzero(bad)]
            raise ValueError(
                f"{name} has {float(x[tuple(where)])} at {where}: NaN or infinity cannot be attended"
            )
    if mask is not None and mask.dtype != arrays.namespace(mask).bool:
        xp = arrays.namespace(mask)
        if bool((xp.isnan(mask) | (mask == math.inf)).any()):
            raise ValueError(
                "attn_mask has NaN or +infinity in it: must be finite, or -infinity where forbidden"
            )
