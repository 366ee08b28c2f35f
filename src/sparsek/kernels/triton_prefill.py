"""Sparse-K attention for prompts on GPUs: one list of keys for a tile of queries, in Triton.

The passes, for B x Hkv key heads side by side (kernels in triton_kernels.py):

    prepare     keys in 8 bits (on older cards 16), centred; means of blocks of 64 keys and values
    normalise   log-sum-exp of every row, estimated from the means of blocks
    score       every key against every tile: the largest share of the softmax that a row gives the key
    choose      the `top_k` best keys of every tile
    attend      softmax over the list, the window and the means of the blocks

Nothing of size Tq x Tk is kept for each head: scores are Tq/tile x Tk in 16 bits for each key head, and made
and used up in slabs of tiles. Selection is not exact: products are in 8 bits, and the log-sum-exp is an
estimate that is too low for rows in which a single key is nearly all, by half a nat on average. Lists hold
0.998 of what the best lists hold (SmolLM2, 8192 tokens). What is chosen is attended to in the precision of
the inputs.

A mask is taken as two numbers a row (key_ranges.py), so it must let each row see one range of keys.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

from ..arrays import Array, is_torch, wants_gradient
from ..config import SparseKConfig
from ..policy import resolve
from ..problem import Problem
from ..selection import Selection

TAKES = "causal prompts on CUDA tensors of 16 bits, where keys are chosen by tiles"

_DTYPES: Final = ("float16", "bfloat16")
_HEAD_SIZE: Final = 256
_GROUP_HEADS: Final = 16
_TOP_K: Final = 2048
_SINKS: Final = 64
_MAX_TOKENS: Final = 1_000_000  # `choose` counts groups in 16 bits
_OLDEST: Final = (8, 0)  # compute capability: Ampere
_FLOAT8: Final = (8, 9)
_SLAB_BYTES: Final = 256 << 20
_GROUP: Final = 16  # keys whose largest score stands for them where there are many
_ALL_AT_ONCE: Final = 8192  # keys up to which no groups are made
_ROWS: Final = 512  # of groups up to which 8 warps have enough registers
_LONG: Final = 16384  # tokens from which on larger steps are faster
_PAD: Final = 256
_COLUMNS: Final = 128  # query rows of one product
_SCORE_COLUMNS: Final = 256


def why_not(p: Problem) -> str | None:
    """Why this kernel cannot do the call, or None when it can."""
    if not p.rule.tile:
        return "each query chooses its own keys"
    if p.keeps_all:
        return "the rule keeps everything"
    if not is_torch(p.q):
        return "the inputs are NumPy arrays"
    if find_spec("triton") is None:
        return "Triton is not installed"
    return _why_not_here(p) or _why_not_so(p)


def _why_not_here(p: Problem) -> str | None:
    torch = sys.modules["torch"]
    if p.q.device.type != "cuda":
        return None if interpreted() else f"the inputs are on {p.q.device}"
    capability = torch.cuda.get_device_capability(p.q.device)
    if capability < _OLDEST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
    return None


def _why_not_so(p: Problem) -> str | None:
    dtype = str(p.q.dtype).removeprefix("torch.")
    values = values_of(p)
    reasons = {
        f"the dtype is {dtype}": dtype not in _DTYPES,
        "keys are chosen by their share": p.rule.min_share > 0,
        "attention is not causal": not p.is_causal and p.mask is None,
        "softcap is given": p.softcap is not None,
        "scale is negative": p.scale < 0,
        "stride is given": p.rule.stride > 0,
        f"top_k is more than {_TOP_K}": p.rule.top_k > _TOP_K,
        f"sinks are more than {_SINKS}": p.rule.sinks > _SINKS,
        f"the head size is more than {_HEAD_SIZE}": max(p.q.shape[3], values.shape[3]) > _HEAD_SIZE,
        f"a key head has more than {_GROUP_HEADS} heads": p.q.shape[1] // p.k.shape[1] > _GROUP_HEADS,
        f"there are more than {_MAX_TOKENS} tokens": p.num_keys > _MAX_TOKENS,
        "there are more queries than keys": not 0 <= p.first_position <= p.num_keys - p.num_queries,
        "there is nothing to compute": 0 in p.q.shape or 0 in values.shape,
        "a gradient is wanted": wants_gradient(p.q, p.k, p.v, p.mask),
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is None and p.mask is not None and p.ranges is None:  # last: it looks at the whole mask
        return "the mask is not one range of keys for each row"
    return reason


def variants(config: SparseKConfig, queries: int, longest: int) -> list[tuple[int, int]]:
    """Calls after which no other kernel will be compiled for causal calls of up to `queries` rows over up to
    `longest` keys, of other numbers and otherwise alike: (keys, rows), the largest last."""
    lists = {resolve(config, 1 << i).top_k for i in range(longest.bit_length() + 1)}
    edges = {1 << i for i in range(longest.bit_length())} | {keys * _GROUP for keys in lists}
    counts = {keys for edge in edges for keys in (edge, edge + 1)} | {longest}
    few = [(n, min(n, queries, _COLUMNS)) for n in sorted(counts) if n <= longest]
    return [(n, rows) for n, rows in few if not resolve(config, n).keeps_all(n)] + [
        (longest, min(longest, queries))
    ]


def attention(p: Problem, out: Array | None = None) -> Array:
    """Sparse-K attention: [B, H, Tq, Dv] in the dtype of q; in `out` where that is given, whose last axis is
    contiguous."""
    with on_device_of(p.q):
        return _Call(p).run(out)


def select(p: Problem) -> Selection:
    """The keys that `attention` keeps. The lists of all rows: much memory for many rows."""
    with on_device_of(p.q):
        return _Call(p).selection()


def on_device_of(x: Array) -> AbstractContextManager[None]:
    """Triton launches on PyTorch's current device, which need not be that of the tensors."""
    return sys.modules["torch"].cuda.device(x.device) if x.is_cuda else nullcontext()


def values_of(p: Problem) -> Array:
    """v, or what stands for it where only the selection is wanted."""
    return p.k if p.v is None else p.v


def rows_of(x: Array) -> Array:
    """Any strides but for the last axis, which is contiguous."""
    return x if x.stride(3) == 1 else x.contiguous()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class _Launch:
    """Keys of one step of a pass, and the options of its launch. Measured on an H100."""

    normalise: dict[str, Any]
    score: dict[str, Any]
    attend: dict[str, Any]


def _launch(head_size: int, num_keys: int, low_bytes: int) -> _Launch:
    if head_size > 128:
        return _Launch(
            {"BN": 32, "num_warps": 8},
            {"BN": 64 // low_bytes, "STAGES": 2, "num_warps": 8},
            {"BN": 32, "num_warps": 8, "num_stages": 1},
        )
    long = num_keys > _LONG
    return _Launch(
        {"BN": 32, "num_warps": 4},
        {"BN": 64 // low_bytes, "STAGES": 3, "num_warps": 4},
        {"BN": 64 if long else 32, "num_warps": 8, "num_stages": 2 if long else 3, "maxnreg": 128},
    )


class _Call:
    """One call: its sizes, its memory, and its passes in their order."""

    def __init__(self, p: Problem) -> None:
        from . import triton_kernels  # needs Triton, which only GPU kernels do

        torch = sys.modules["torch"]
        self.kernels: Any = triton_kernels
        self.p = p
        batch, heads, _, self.head_size = p.q.shape
        self.kv_heads = p.k.shape[1]
        self.group = heads // self.kv_heads
        self.q, self.k, self.v = rows_of(p.q), rows_of(p.k), rows_of(values_of(p))
        self.value_size = self.v.shape[3]
        self.value_slots = max(16, power_of_2(self.value_size))
        self.window = max(p.rule.window, 1)  # a tile's own positions are always kept
        self.first = p.first_position
        self.tiles = -(-(self.first + p.num_queries) // p.rule.tile) - self.first // p.rule.tile
        self.lanes = batch * self.kv_heads  # work side by side
        self.masked = p.ranges is not None
        self.ranges: tuple[Any, Any] = (None, None)
        self.of_tiles: Any = None
        self.of_all: Any = None
        if p.ranges is not None:
            of_whole = None if p.whole is None else p.whole.ranges
            self.ranges = p.ranges
            self.of_tiles = self._of_tiles(*p.ranges)
            self.of_all = self._of_all(*(of_whole or p.ranges))

        low = _low_dtype(p.q)
        self.group_slots = power_of_2(self.group)
        # Positions of a program: with the heads of the group they make the columns of its products.
        self.positions = min(p.rule.tile, _COLUMNS // self.group_slots)
        self.parts = p.rule.tile // self.positions
        self.score_positions = min(p.rule.tile, _SCORE_COLUMNS // self.group_slots)
        self.score_parts = p.rule.tile // self.score_positions

        self.padded = -(-p.num_keys // _PAD) * _PAD
        self.blocks = p.num_keys // 64
        self.size = p.rule.top_k + p.rule.sinks
        self.grouped = p.num_keys > max(_ALL_AT_ONCE, p.rule.top_k * _GROUP)
        self.launch = _launch(max(self.head_size, self.value_size), p.num_keys, low.itemsize)

        def empty(*shape: int, dtype: Any) -> Array:
            return torch.empty(shape, dtype=dtype, device=p.q.device)

        padded_size = max(32, power_of_2(self.head_size))
        self.low = empty(self.lanes, self.padded, padded_size, dtype=low)
        self.low_mean = empty(self.lanes, self.padded // 64, padded_size, dtype=low)
        self.units = empty(self.lanes, 2, dtype=torch.float32)
        self.k_mean = empty(self.lanes, max(self.blocks, 1), self.head_size, dtype=p.k.dtype)
        self.v_mean = empty(self.lanes, max(self.blocks, 1), self.value_size, dtype=self.v.dtype)
        programs = self.tiles * self.parts
        columns = self.positions * self.group_slots
        self.low_q = empty(self.lanes, programs, columns, padded_size, dtype=low)
        self.normaliser = empty(self.lanes, programs, columns, dtype=torch.float32)
        self.lists = empty(self.lanes, self.tiles, self.size, dtype=torch.int32)
        self.counts = empty(self.lanes, self.tiles, dtype=torch.int32)
        self.tail = empty(self.lanes, self.tiles, self.padded // 64, dtype=torch.float16)
        per_tile = self.lanes * self.score_parts * self.padded * 2
        self.slab = max(1, min(self.tiles, _SLAB_BYTES // per_tile))
        rows = self.lanes, self.slab * self.score_parts
        self.scores = empty(*rows, self.padded, dtype=torch.float16)
        self.groups = empty(*rows, self.padded // _GROUP, dtype=torch.float16)
        self.hits = empty(self.lanes, self.tiles, self.padded // 256, dtype=torch.int32)

    def _of_tiles(self, starts: Array, stops: Array) -> Array:
        """[B, tiles, 2]: the first key that some row of a tile sees, and the first of the tile's window."""
        torch = sys.modules["torch"]
        tile, none = self.p.rule.tile, self.p.num_keys
        before = self.first % tile
        after = self.tiles * tile - before - self.p.num_queries

        def least(of_rows: Array) -> Array:
            of_rows = torch.where(starts < stops, of_rows, none)
            of_rows = torch.nn.functional.pad(of_rows, (before, after), value=none)
            return of_rows.view(-1, self.tiles, tile).amin(2)

        own = torch.arange(self.tiles, dtype=torch.int32, device=starts.device) * tile + self.first - before
        begin = torch.minimum(least((stops - 1) // tile * tile), own)
        window = (begin - self.window + 1).clamp(min=0)
        return torch.stack((torch.minimum(least(starts), window), window), 2)

    def _of_all(self, starts: Array, stops: Array) -> Array:
        """[B, 2]: the keys [start, stop) that the rows see."""
        torch = sys.modules["torch"]
        start, stop = torch.where(starts < stops, starts, self.p.num_keys).amin(1), stops.amax(1)
        return torch.stack((torch.minimum(start, stop), stop), 1)

    def run(self, out: Array | None = None) -> Array:
        if out is None:
            out = self.p.q.new_empty((*self.p.q.shape[:3], self.value_size))
        self.choose()
        self._attend(out)
        return out

    def choose(self) -> None:
        self._prepare()
        self._normalise()
        for start in range(0, self.tiles, self.slab):
            tiles = min(self.slab, self.tiles - start)
            self._score(start, tiles)
            self._choose(start, tiles)

    def selection(self) -> Selection:
        """The kept keys of every row, from the lists."""
        torch = sys.modules["torch"]
        self.choose()
        p = self.p
        position = torch.arange(p.num_queries, device=p.q.device) + self.first
        tile = position // p.rule.tile
        lists = self.lists.view(*p.k.shape[:2], self.tiles, self.size).long()
        counts = self.counts.view(*p.k.shape[:2], self.tiles, 1)
        listed = torch.arange(self.size, device=p.q.device) < counts
        lists = torch.where(listed, lists, p.num_keys)
        kept = torch.zeros((*lists.shape[:3], p.num_keys + 1), dtype=torch.bool, device=p.q.device)
        kept = kept.scatter_(3, lists, True)[..., : p.num_keys][:, :, tile - tile[0]]
        key = torch.arange(p.num_keys, device=p.q.device)
        if p.ranges is None:
            kept |= key > (tile * p.rule.tile - self.window)[:, None]
            kept &= key <= position[:, None]
        else:
            starts, stops = p.ranges
            kept |= (key >= self.of_tiles[:, tile - tile[0], 1, None])[:, None]
            kept &= ((key >= starts[..., None]) & (key < stops[..., None]))[:, None]
        return Selection.from_kept(kept.repeat_interleave(self.group, 1), p.rule.most_kept(p.num_keys))

    # ---- The passes

    def _columns(self) -> dict[str, Any]:
        return {
            "G": self.group,
            "T": self.p.rule.tile,
            "TQ": self.positions,
            "GP": self.group_slots,
            "D": self.head_size,
            "BD": self.low.shape[2],
        }

    def _prepare(self) -> None:
        blocks = 2 if self.low.shape[2] <= 128 else 1
        q = rows_of((self.p.whole or self.p).q)
        self.kernels.prepare[self.padded // 64 // blocks, self.lanes](
            q, self.k, self.v, self.low, self.k_mean, self.low_mean, self.v_mean,
            self.units, self.of_all,
            *_strides(q), *_strides(self.k), *_strides(self.v),
            self.kv_heads, q.shape[2], self.p.num_keys, self.padded, self.blocks,
            G=self.group, D=self.head_size, DV=self.value_size, BD=self.low.shape[2], BDV=self.value_slots,
            BLOCKS=blocks, RANGES=self.masked,
        )  # fmt: skip

    def _normalise(self) -> None:
        self.kernels.normalise[self.tiles * self.parts, self.lanes](
            self.q, self.low, self.low_mean, self.units, self.low_q, self.normaliser, *self.ranges,
            *_strides(self.q), self.kv_heads, self.p.num_queries, self.padded, self.first, self.p.scale,
            **self._columns(), RANGES=self.masked, **self.launch.normalise,
        )  # fmt: skip

    def _score(self, start: int, tiles: int) -> None:
        for hidden in (False, True) if self.masked else (False,):
            self.kernels.score[tiles * self.score_parts, self.lanes](
                self.low_q, self.low, self.units, self.normaliser, self.scores, self.groups, *self.ranges,
                self.of_tiles, self.kv_heads, self.p.num_queries, self.padded, self.first,
                start * self.score_parts, self.tiles * self.score_parts, self.p.scale,
                T=self.p.rule.tile, TQ=self.score_positions, POSITIONS=self.positions, GP=self.group_slots,
                BD=self.low.shape[2], WINDOW=self.window, GROUP=_GROUP if self.grouped else 0,
                RANGES=self.masked, HIDDEN=hidden, **self.launch.score,
            )  # fmt: skip

    def _choose(self, start: int, tiles: int) -> None:
        rule = self.p.rule
        groups = -(-self.p.num_keys // _GROUP)
        rows = max(16, power_of_2(rule.top_k if self.grouped else groups))
        self.kernels.choose[tiles, self.lanes](
            self.scores, self.groups, self.lists, self.counts, self.hits, self.tail, self.of_tiles,
            self.kv_heads, self.padded, self.first, start, self.tiles,
            T=rule.tile, SUBS=self.score_parts, WINDOW=self.window, SINKS=rule.sinks,
            SINK_SLOTS=power_of_2(rule.sinks), K=rule.top_k, SIZE=self.size, GROUP=_GROUP,
            GROUPS=max(32, power_of_2(groups)) if self.grouped else 0,
            ROWS=rows, WORDS=power_of_2(self.padded // 256), RANGES=self.masked,
            num_warps=16 if rows > _ROWS else 8,
        )  # fmt: skip

    def _attend(self, out: Array) -> None:
        p = self.p
        self.kernels.attend[self.tiles * self.parts, self.lanes](
            self.q, self.k, self.v, self.k_mean, self.v_mean, self.lists, self.counts, self.tail, out,
            *self.ranges, self.of_tiles,
            *_strides(self.q), *_strides(self.k), *_strides(self.v), *_strides(out),
            self.kv_heads, p.num_queries, p.num_keys, self.padded, self.blocks, self.first, self.tiles,
            p.scale,
            **self._columns(), DV=self.value_size, BDV=self.value_slots,
            WINDOW=self.window, SIZE=self.size, TAIL=p.rule.tail == "centroid", RANGES=self.masked,
            INT64=max(self._reach(self.k), self._reach(self.v)) >= 2**31, **self.launch.attend,
        )  # fmt: skip

    def _reach(self, x: Array) -> int:
        """Elements between the first and the last key of a head."""
        return int(x.stride(2)) * self.p.num_keys


def _strides(x: Array) -> tuple[int, ...]:
    """Of all axes but the last. That of a single batch entry, which is used by nobody, is 0: else it would
    depend on the number of tokens, and kernels are compiled for strides."""
    return (0 if x.shape[0] == 1 else x.stride(0), *x.stride()[1:3])


def _low_dtype(q: Array) -> Any:
    torch = sys.modules["torch"]
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < _FLOAT8:
        return torch.float16
    return torch.float8_e4m3fn


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, and 1."""
    return 1 << max(0, n - 1).bit_length()
