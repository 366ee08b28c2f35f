"""Sparse-K attention for prompts on GPUs: one list of keys for a tile of queries, in Triton.

The passes, for B x Hkv key heads side by side (kernels in triton_kernels.py):

    sample      from 64 queries and 64 keys: the centre of the keys, and the dimensions that choosing looks at
    prepare     these dimensions of the keys in 8 bits (on older cards 16); means of 64 keys and values
    normalise   queries likewise, and the least score that each row keeps, from an estimate of its log-sum-exp
    score       every key against every tile: a bit that says whether some row keeps it
    collect     the list of each tile, from the bits
    attend      softmax over the list, the window and the means of the blocks

All but the first two are done for slabs of tiles, so that memory is bounded. Bits are Tq/tile x Tk/8 bytes
for each key head, and a list has room for an eighth of the keys: a longer one is read from the bits.

Where a count is given, alone or as the most that is kept, `score` writes numbers in 16 bits instead, and

    choose      the `top_k` best keys of every tile

is in the place of `collect`. Selection is not exact: products are in 8 bits and over a part of the dimensions
(by share 61 of heads of 62 to 128, else at most 125), and the log-sum-exp is an estimate that is too low for
rows in which a single key is nearly all, by half a nat on average. What is chosen is attended to in the
precision of the inputs, in all dimensions.

A mask is taken as two numbers a row (key_ranges.py), so it must let each row see one range of keys.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
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
_SLAB_BYTES: Final = 32 << 20  # that are always allowed,
_SLAB_OF_COUNTS: Final = 64 << 20  # for scores, so that a prompt of 8192 is one slab; and
_SLAB_PART: Final = 8  # of what the inputs and the output take, one part in so many;
_ONE_SLAB_PART: Final = 6  # or one in so many where that is enough for all, as for chunks of prompts
_LEAST_ROOM: Final = 4096  # keys of a list,
_ROOM_PART: Final = 8  # or of all keys one in so many
_WORDS: Final = 256  # of bits, in one step of `collect`
_GROUP: Final = 16  # keys whose largest score stands for them where there are many
_ALL_AT_ONCE: Final = 8192  # keys up to which no groups are made
_ROWS: Final = 512  # of groups up to which 8 warps have enough registers
_LONG: Final = 32768  # keys from which on more query rows for each key read are faster
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
        "attention is not causal": not p.is_causal and p.mask is None,
        "softcap is given": p.softcap is not None,
        "scale is negative": p.scale < 0,
        "stride is given": p.rule.stride > 0,
        f"top_k is more than {_TOP_K}": _TOP_K < p.rule.top_k < p.num_keys,
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
    """Keys of one step of a pass, columns of a program, and options of its launch. Measured on an H100."""

    normalise: dict[str, Any]
    score: dict[str, Any]
    attend: dict[str, Any]
    attend_columns: int


def _launch(head_size: int, num_keys: int, low_bytes: int) -> _Launch:
    """For heads of `head_size`, of which numbers of `low_bytes` are looked at."""
    normalise = {"BN": 64, "num_warps": 4}
    score = {"BN": 64 // low_bytes, "STAGES": 3, "num_warps": 4}
    attend, columns = {"BN": 32, "num_warps": 8, "num_stages": 3, "maxnreg": 128}, _COLUMNS
    if head_size > 128:
        attend = {"BN": 32, "num_warps": 8, "num_stages": 1}
    elif num_keys > _LONG:
        attend, columns = {"BN": 64, "num_warps": 16, "num_stages": 3, "maxnreg": 128}, 2 * _COLUMNS
    return _Launch(normalise, score, attend, columns)


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
        self.slots = max(16, power_of_2(self.head_size))
        self.counted = p.rule.top_k < p.num_keys
        low_size = _low_size(self.head_size, self.counted)
        self.group_slots = power_of_2(self.group)
        # Positions of a program: with the heads of the group they make the columns of its products.
        self.positions = min(p.rule.tile, _COLUMNS // self.group_slots)
        self.parts = p.rule.tile // self.positions
        self.score_positions = min(p.rule.tile, _SCORE_COLUMNS // self.group_slots)
        self.score_parts = p.rule.tile // self.score_positions

        self.padded = -(-p.num_keys // _PAD) * _PAD
        self.blocks = p.num_keys // 64
        self.room = max(_LEAST_ROOM, p.num_keys // _ROOM_PART)
        if self.counted:
            self.room = p.rule.top_k + p.rule.sinks
        self.grouped = p.num_keys > max(_ALL_AT_ONCE, p.rule.top_k * _GROUP)
        self.launch = _launch(max(self.head_size, self.value_size), p.num_keys, low.itemsize)

        def empty(*shape: int, dtype: Any) -> Array:
            return torch.empty(shape, dtype=dtype, device=p.q.device)

        lanes, blocks = self.lanes, max(self.blocks, 1)
        self.centre = empty(lanes, low_size, dtype=torch.float32)
        self.units = empty(lanes, self.kernels.UNITS.value, dtype=torch.float32)
        self.picked = empty(lanes, low_size, dtype=torch.int32)
        self.low = empty(lanes, self.padded, low_size, dtype=low)
        self.low_mean = empty(lanes, self.padded // 64, low_size, dtype=low)
        self.k_mean = empty(lanes, blocks, self.head_size, dtype=p.k.dtype)
        self.v_mean = empty(lanes, blocks, self.value_size, dtype=self.v.dtype)
        columns = p.rule.tile * self.group_slots
        of_tile = columns * low_size * low.itemsize + 4 * self.room + self.padded // 32
        of_tile += self.score_parts * (self.padded * 9 // 4 if self.counted else self.padded // 8)
        around = sum(x.numel() * x.element_size() for x in (p.q, self.k, self.v, p.q))
        slabs = 1
        if self.tiles * lanes * of_tile > around // _ONE_SLAB_PART:
            least = _SLAB_OF_COUNTS if self.counted else _SLAB_BYTES
            most = max(1, max(least, around // _SLAB_PART) // (lanes * of_tile))
            slabs = -(-self.tiles // most)
        self.slab = -(-self.tiles // slabs)  # all alike, for a small one leaves the GPU idle
        rows = lanes, self.slab
        self.low_q = empty(*rows, columns, low_size, dtype=low)
        self.lists = empty(*rows, self.room, dtype=torch.int32)
        self.counts = empty(*rows, dtype=torch.int32)
        self.tail = empty(*rows, self.padded // 64, dtype=torch.float16)
        self.bits = self.scores = self.groups = self.hits = None
        if self.counted:
            self.scores = empty(*rows, self.score_parts, self.padded, dtype=torch.float16)
            self.groups = empty(*rows, self.score_parts, self.padded // _GROUP, dtype=torch.float16)
            self.hits = empty(*rows, self.padded // 256, dtype=torch.int32)
        else:
            self.bits = empty(*rows, self.score_parts, self.padded // 32, dtype=torch.int32)

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
        for start, tiles in self.choose():
            self._attend(start, tiles, out)
        return out

    def choose(self) -> Iterator[tuple[int, int]]:
        """The lists of some tiles after others: the first of them, and how many."""
        self._prepare()
        for start in range(0, self.tiles, self.slab):
            tiles = min(self.slab, self.tiles - start)
            self._normalise(start, tiles)
            self._score(start, tiles)
            (self._choose if self.counted else self._collect)(start, tiles)
            yield start, tiles

    def selection(self) -> Selection:
        """The kept keys of every row."""
        torch = sys.modules["torch"]
        p = self.p
        position = torch.arange(p.num_queries, device=p.q.device) + self.first
        tile = position // p.rule.tile
        of_tiles = [self._listed(tiles) for _, tiles in self.choose()]
        kept = torch.cat(of_tiles, 2)[:, :, tile - tile[0]]
        key = torch.arange(p.num_keys, device=p.q.device)
        if p.ranges is None:
            kept |= key > (tile * p.rule.tile - self.window)[:, None]
            kept &= key <= position[:, None]
        else:
            starts, stops = p.ranges
            kept |= (key >= self.of_tiles[:, tile - tile[0], 1, None])[:, None]
            kept &= ((key >= starts[..., None]) & (key < stops[..., None]))[:, None]
        return Selection.from_kept(kept.repeat_interleave(self.group, 1), p.rule.most_kept(p.num_keys))

    def _listed(self, tiles: int) -> Array:
        """What the lists of the slab hold as they are now, and anything after a tile, [B, Hkv, tiles, Tk]."""
        torch = sys.modules["torch"]
        keys, shape = self.p.num_keys, (*self.p.k.shape[:2], tiles)

        def of_slab(x: Array) -> Array:
            return x.flatten()[: self.lanes * tiles * math.prod(x.shape[2:])].view(*shape, *x.shape[2:])

        if self.bits is not None:
            words = of_slab(self.bits)[:, :, :, 0, :, None]
            bits = words >> torch.arange(32, dtype=torch.int32, device=words.device)
            return (bits & 1).flatten(3)[..., :keys] > 0
        lists = of_slab(self.lists).long()
        listed = torch.arange(self.room, device=lists.device) < of_slab(self.counts)[..., None]
        kept = torch.zeros((*shape, keys + 1), dtype=torch.bool, device=lists.device)
        return kept.scatter_(3, torch.where(listed, lists, keys), True)[..., :keys]

    # ---- The passes

    def _columns(self, positions: int) -> dict[str, Any]:
        """Of programs that work on so many positions."""
        return {
            "G": self.group,
            "T": self.p.rule.tile,
            "TQ": positions,
            "GP": self.group_slots,
            "D": self.head_size,
        }

    def _prepare(self) -> None:
        blocks = 2 if self.slots <= 128 else 1
        q = rows_of((self.p.whole or self.p).q)
        sizes = {"D": self.head_size, "SLOTS": self.slots, "BD": self.low.shape[2]}
        self.kernels.sample[self.lanes,](
            q, self.k, self.units, self.centre, self.picked, self.of_all,
            *_strides(q), *_strides(self.k), self.kv_heads, q.shape[2], self.p.num_keys,
            G=self.group, RANGES=self.masked, **sizes,
        )  # fmt: skip
        self.kernels.prepare[self.padded // 64 // blocks, self.lanes](
            self.k, self.v, self.low, self.k_mean, self.low_mean, self.v_mean, self.units, self.centre,
            self.picked, *_strides(self.k), *_strides(self.v),
            self.kv_heads, self.p.num_keys, self.padded, self.blocks,
            DV=self.value_size, BDV=self.value_slots, BLOCKS=blocks, **sizes,
        )  # fmt: skip

    def _normalise(self, start: int, tiles: int) -> None:
        floor = math.log2(self.p.rule.min_share) if self.p.rule.min_share else 0.0
        self.kernels.normalise[tiles * self.parts, self.lanes](
            self.q, self.low, self.low_mean, self.units, self.picked, self.low_q, *self.ranges,
            self.of_tiles, *_strides(self.q), self.kv_heads, self.p.num_queries, self.padded, self.first,
            start * self.parts, self.tiles, self.p.scale, floor,
            **self._columns(self.positions), SLOTS=self.slots, BD=self.low.shape[2], WINDOW=self.window,
            RANGES=self.masked, **self.launch.normalise,
        )  # fmt: skip

    def _score(self, start: int, tiles: int) -> None:
        for hidden in (False, True) if self.masked else (False,):
            self.kernels.score[tiles * self.score_parts, self.lanes](
                self.low_q, self.low, self.bits, self.scores, self.groups, *self.ranges, self.of_tiles,
                self.kv_heads, self.p.num_queries, self.padded, self.first,
                start * self.score_parts, self.tiles * self.score_parts,
                T=self.p.rule.tile, TQ=self.score_positions, POSITIONS=self.positions, GP=self.group_slots,
                BD=self.low.shape[2], WINDOW=self.window, GROUP=_GROUP if self.grouped else 0,
                RANGES=self.masked, HIDDEN=hidden, COUNT=self.counted, **self.launch.score,
            )  # fmt: skip

    def _collect(self, start: int, tiles: int) -> None:
        rule = self.p.rule
        self.kernels.collect[tiles, self.lanes](
            self.bits, self.lists, self.counts, self.tail, self.of_tiles,
            self.kv_heads, self.padded, self.first, start, self.tiles, self.room,
            T=rule.tile, SUBS=self.score_parts, WINDOW=self.window, SINKS=rule.sinks, WORDS=_WORDS,
            RANGES=self.masked, num_warps=4,
        )  # fmt: skip

    def _choose(self, start: int, tiles: int) -> None:
        rule = self.p.rule
        groups = -(-self.p.num_keys // _GROUP)
        rows = max(16, power_of_2(rule.top_k if self.grouped else groups))
        self.kernels.choose[tiles, self.lanes](
            self.scores, self.groups, self.lists, self.counts, self.hits, self.tail, self.of_tiles,
            self.kv_heads, self.padded, self.first, start, self.tiles,
            T=rule.tile, SUBS=self.score_parts, WINDOW=self.window, SINKS=rule.sinks,
            SINK_SLOTS=power_of_2(rule.sinks), K=rule.top_k, SIZE=self.room, GROUP=_GROUP,
            GROUPS=max(32, power_of_2(groups)) if self.grouped else 0,
            ROWS=rows, WORDS=power_of_2(self.padded // 256), SHARE=rule.min_share > 0, RANGES=self.masked,
            num_warps=16 if rows > _ROWS else 8,
        )  # fmt: skip

    def _attend(self, start: int, tiles: int, out: Array) -> None:
        p = self.p
        positions = min(p.rule.tile, self.launch.attend_columns // self.group_slots)
        self.kernels.attend[tiles * (p.rule.tile // positions), self.lanes](
            self.q, self.k, self.v, self.k_mean, self.v_mean, self.lists, self.counts, self.bits, self.tail,
            out, *self.ranges, self.of_tiles,
            *_strides(self.q), *_strides(self.k), *_strides(self.v), *_strides(out),
            self.kv_heads, p.num_queries, p.num_keys, self.padded, self.blocks, self.first, start, self.tiles,
            self.room, p.scale,
            **self._columns(positions), DV=self.value_size, BD=self.slots, BDV=self.value_slots,
            WINDOW=self.window, SUBS=0 if self.counted else self.score_parts, TAIL=p.rule.tail == "centroid",
            RANGES=self.masked, INT64=max(self._reach(self.k), self._reach(self.v)) >= 2**31,
            **self.launch.attend,
        )  # fmt: skip

    def _reach(self, x: Array) -> int:
        """Elements between the first and the last key of a head."""
        return int(x.stride(2)) * self.p.num_keys


def _strides(x: Array) -> tuple[int, ...]:
    """Of all axes but the last. That of a single batch entry, which is used by nobody, is 0: else it would
    depend on the number of tokens, and kernels are compiled for strides."""
    return (0 if x.shape[0] == 1 else x.stride(0), *x.stride()[1:3])


def _low_size(head_size: int, counted: bool) -> int:
    """The dimensions that choosing looks at, with those of the threshold. By share half are enough, for where
    they show less, more keys are kept. A list of so many keys has none to spare."""
    size = power_of_2(head_size)
    return max(32 if head_size <= 29 else 64, min(size, 128) if counted else size // 2)


def _low_dtype(q: Array) -> Any:
    torch = sys.modules["torch"]
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < _FLOAT8:
        return torch.float16
    return torch.float8_e4m3fn


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, and 1."""
    return 1 << max(0, n - 1).bit_length()
