"""Sparse-K attention for steps of generation on GPUs: one list of keys for each key head, in Triton.

A step reads all of K and V if nothing is known about them. An index is kept next to the cache: the keys in 4
bits and the means of blocks of 64 keys and values, an eighth of the cache's bytes together. The passes
(kernels in triton_decode_kernels.py), for B x Hkv key heads side by side and all parts of the cache at once:

    append   new keys into the index
    survey   scores of the means of blocks; log-sum-exp of every row, estimated
    score    every key: the largest share of the softmax that a row gives it; a histogram of the shares
    attend   softmax over those of the `top_k` best keys, or of those that have `min_share`, and the means of
             those blocks, that are in a part;
             in a part of its own over the sinks and the window
    combine  the parts

What is kept is what `select = "tile"` means for a tile of which one row is there. Selection is not exact:
products are in 4 and 8 bits, shares are compared in steps of a sixteenth of a factor of two, and the
log-sum-exp is an estimate. What is chosen is attended to in the precision of the inputs.

Where the keys begin and end is read on the GPU and all memory is the index's, so that steps can be captured
in a CUDA graph: see `DecodeIndex`. Steps that are called one after another the index captures itself.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

from ..arrays import Array
from ..policy import Rule
from ..problem import Problem
from ..selection import Selection
from . import triton_prefill
from .triton_prefill import interpreted, on_device_of, power_of_2, rows_of, values_of

TAKES = "steps of generation on CUDA tensors of 16 bits, with a KeyIndex, where keys are chosen by tiles"

_BLOCK: Final = 64
_CHUNKS: Final = (1024, 2048)  # least and most keys of a part
_PARTS: Final = 512  # that fill a card
_MEANS: Final = 128  # blocks of a part of `survey`
_BINS: Final = 512
_MOST: Final = 1 << 30  # as good as no limit of a count
_PER_BIT: Final = 16
_COLUMNS: Final = 16
_SAMPLE: Final = 2048  # keys that centres and units are taken from
# Launches, measured on an H100.
_SURVEY: Final[dict[str, Any]] = {"num_warps": 2}
_SCORE: Final[dict[str, Any]] = {"BN": 256, "STAGES": 3, "num_warps": 4}
_ATTEND: Final[dict[str, Any]] = {"BN": 16, "num_warps": 2}
_COMBINE: Final[dict[str, Any]] = {"BN": 32, "num_warps": 1}
_OVERLAP: Final = (9, 0)  # compute capability from which passes can overlap
_UNIT: Final = 0.335  # standard deviations between two of 16 levels: least error for normal numbers

log = logging.getLogger("sparsek")
_capture = threading.Lock()


def why_not(p: Problem) -> str | None:
    """Why this kernel cannot do the call, or None when it can."""
    if p.num_queries != 1:
        return "there is more than one query"
    if p.index is None:
        return "there is no index of the keys"
    if p.first_position != p.num_keys - 1:
        return "the query is not the last of the positions"
    if p.mask is None:
        p = replace(p, is_causal=True)  # the last row sees everything either way
    return triton_prefill.why_not(p)


def attention(p: Problem) -> Array:
    """Sparse-K attention: [B, H, 1, Dv] in the dtype of q."""
    with on_device_of(p.q):
        index, v = _index(p), values_of(p)
        rows = p.k.stride(3) == v.stride(3) == 1  # or they would be copied, in a graph always as many
        if rows and p.ranges is None and index.is_before(p.num_keys) and not capturing(p.q):
            return index.next_step(p.q, p.k, v, p.scale, p.rule)
        out = p.q.new_empty((*p.q.shape[:3], v.shape[3]))
        index.attend(p.q, p.k, v, out, _ready(index, p))
    return out


def select(p: Problem) -> Selection:
    """The keys that `attention` keeps."""
    with on_device_of(p.q):
        index = _index(p)
        return index.select(p.q, p.k, _ready(index, p))


def capturing(x: Array) -> bool:
    """Whether a CUDA graph is made of what is launched."""
    return bool(x.is_cuda and sys.modules["torch"].cuda.is_current_stream_capturing())


def _captured(launch: Callable[[], None]) -> Any:
    """What is launched, not run, but as a CUDA graph; None while another thread makes one, for PyTorch makes
    one at a time. Everything has to be compiled. torch.cuda.graph would wait for the GPU and give unused
    memory back, in the middle of a step.

    Raises:
        RuntimeError: it cannot be captured.
    """
    torch = sys.modules["torch"]
    if not _capture.acquire(blocking=False):
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        stream = _stream(torch.cuda.current_device())
        with torch.inference_mode(False), torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
    finally:
        _capture.release()
    return graph


@cache
def _warn(reason: str) -> None:
    log.warning("steps of generation cost the host more, for they cannot be a CUDA graph here: %s", reason)


@cache
def _stream(device: int) -> Any:
    """Of another pool than PyTorch's usual ones, which another thread may be using."""
    return sys.modules["torch"].cuda.Stream(device, priority=-1)


def _index(p: Problem) -> DecodeIndex:
    assert p.index is not None
    index: DecodeIndex | None = p.index.gpu
    v = values_of(p)
    if index is None or not index.fits(p.k, v) or index.length > p.num_keys:
        room = p.num_keys + p.num_keys // 4
        index = p.index.gpu = DecodeIndex(p.k, v, room)
    return index


def _ready(index: DecodeIndex, p: Problem) -> Step:
    """The step, when all keys are in the index."""
    if p.ranges is None:
        index.extend(p.k, values_of(p), p.num_keys)
        return Step(index.lengths, index.starts, p.scale, p.rule)
    starts, stops = (x[:, 0].contiguous() for x in p.ranges)
    index.extend(p.k, values_of(p), p.num_keys, seen=(starts, stops))
    return Step(stops, starts, p.scale, p.rule)


@dataclass(frozen=True)
class Step:
    """What a step sees and keeps.

    lengths, starts: int32 [B], on the GPU: batch entry b sees the keys [starts[b], lengths[b]), of which the
    last has the position of its query. scale: factor of q.k.

    Raises:
        ValueError: the rule is not one for tiles.
    """

    lengths: Array
    starts: Array
    scale: float
    rule: Rule

    def __post_init__(self) -> None:
        if self.rule.tile == 0:
            raise ValueError('rule: keys are chosen by tiles here: make it of select = "tile"')


class DecodeIndex:
    """What is known of the keys and values of one layer's cache, for up to `capacity` tokens, and the memory
    that a step works in. k [B, Hkv, tokens, D], v [B, Hkv, tokens, Dv].

    A CUDA graph of a step, with k and v in which all tokens have their place already:

        index = DecodeIndex(k, v, capacity=k.shape[2])
        index.extend(k, v, length)  # the prompt
        lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
        starts = torch.zeros_like(lengths)
        step = Step(lengths, starts, head_size**-0.5, resolve(SparseKConfig(select="tile"), k.shape[2]))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            lengths += 1
            # here the model writes the new token's key and value to k and v at lengths - 1
            index.append(k, v, lengths, 1)
            index.attend(q, k, v, out, step)  # q and out: [B, H, 1, D]

    (`resolve` is in sparsek.policy.) Run the same lines once before capturing, for that compiles the passes.

    Raises:
        ValueError: more tokens than `capacity` are to be taken up.
    """

    def __init__(self, k: Array, v: Array, capacity: int) -> None:
        from . import triton_decode_kernels  # needs Triton, which only GPU kernels do

        self.kernels: Any = triton_decode_kernels
        self.batch, self.kv_heads, _, self.head_size = k.shape
        self.value_size = v.shape[3]
        work = power_of_2(self.batch * self.kv_heads * capacity // _PARTS)
        self.chunk = min(max(work, _CHUNKS[0]), _CHUNKS[1])
        self.parts = -(-capacity // self.chunk)
        self.capacity = self.parts * self.chunk
        self.length = 0
        self._calibrated = 0  # from so many tokens
        self._dtype, self._device = k.dtype, k.device
        self._overlap = k.is_cuda and sys.modules["torch"].cuda.get_device_capability(k.device) >= _OVERLAP
        self._capturable = bool(k.is_cuda)
        self._slots = max(64, power_of_2(self.head_size))
        self._value_slots = max(16, power_of_2(self.value_size))
        with sys.modules["torch"].inference_mode(False):  # what is made in it cannot be changed outside
            self._make_known()
            self._make_work()

    def _make_known(self) -> None:
        """What is known of keys and values; filled by `extend`."""
        torch = sys.modules["torch"]
        blocks = self.capacity // _BLOCK
        self.low = self._empty(self.capacity, self._slots // 2, dtype=torch.uint8)
        self.centre = self._empty(self._slots, dtype=torch.float32)
        self.unit = self._empty(self._slots, dtype=torch.float32)
        self.k_mean = self._empty(blocks, self.head_size, dtype=self._dtype)
        self.v_mean = self._empty(blocks, self.value_size, dtype=self._dtype)

    def _empty(self, *shape: int, dtype: Any) -> Array:
        torch = sys.modules["torch"]
        return torch.empty((self.batch * self.kv_heads, *shape), dtype=dtype, device=self._device)

    def _make_work(self) -> None:
        """The memory of a step."""
        torch = sys.modules["torch"]
        parts = self.parts + 1  # the last has the sinks and the window
        self.num_norms = -(-self.capacity // (_BLOCK * _MEANS)) + 1
        self.lengths = torch.zeros(self.batch, dtype=torch.int32, device=self._device)
        self.starts = torch.zeros_like(self.lengths)
        self._filled = 0  # what `lengths` holds
        self.mean_scores = self._empty(self.capacity // _BLOCK, _COLUMNS, dtype=torch.float32)
        self.norms = self._empty(self.num_norms, 2, _COLUMNS, dtype=torch.float32)
        self.histogram = self._empty(_BINS, dtype=torch.int32)
        self.shares = self._empty(self.capacity, dtype=torch.float16)
        self.of_part = self._empty(self.parts, _BINS, dtype=torch.int16)
        self.lists = self._empty(self.capacity, dtype=torch.int32)
        self.peaks = self._empty(parts, _COLUMNS, dtype=torch.float32)
        self.totals = self._empty(parts, _COLUMNS, dtype=torch.float32)
        self.sums = self._empty(parts, _COLUMNS, self.value_size, dtype=torch.float32)
        self._forget_steps()

    def _forget_steps(self) -> None:
        """What `next_step` knows of the step before."""
        self._like: tuple[Any, ...] = ()
        self._graph: Any = None
        self._q: Any = None
        self._out: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory."""
        torch = sys.modules["torch"]
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, torch.Tensor))

    def fits(self, k: Array, v: Array) -> bool:
        """Whether it can be the index of k and v."""
        mine = self.batch, self.kv_heads, self.head_size, self.value_size, self._dtype, self._device
        theirs = k.shape[0], k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device
        return mine == theirs and k.shape[2] <= self.capacity

    # ---- The cache grows, shrinks, changes places

    def extend(self, k: Array, v: Array, length: int, seen: tuple[Array, Array] | None = None) -> None:
        """Take up the tokens that are new among the first `length`, of which entry b sees [seen[0][b],
        seen[1][b]), or all."""
        if length > self.capacity:
            raise ValueError(f"length = {length}: the index is for {self.capacity} tokens")
        if length > 0 and not self._is_calibrated(length):
            self._calibrate(k, length, seen)
            self.length = 0
        self._fill(length)
        if length > self.length:
            self.append(k, v, self.lengths, length - self.length)
        self.length = length

    def _fill(self, length: int) -> None:
        if self._filled != length:
            self.lengths.fill_(length)
            self._filled = length

    def _is_calibrated(self, length: int) -> bool:
        """Whether it is for so many tokens. What few told is not good for many."""
        return self._calibrated > 0 and self._calibrated >= min(length // 4, _SAMPLE)

    def _calibrate(self, k: Array, length: int, seen: tuple[Array, Array] | None) -> None:
        """Centres and units of the channels, from a sample of the keys that are seen. The largest and the
        smallest of each channel count as less: one outlier would make all others equal."""
        torch = sys.modules["torch"]
        self._calibrated = length
        count = min(length, _SAMPLE)
        starts, stops = (0, length) if seen is None else (x.long()[:, None] for x in seen)
        at = starts + torch.arange(count, device=k.device) * (stops - starts) // count
        at = at.expand(self.batch, count)[:, None, :, None].expand(-1, self.kv_heads, -1, self.head_size)
        sample = k.detach().gather(2, at).flatten(0, 1).float().nan_to_num(0, 0, 0).sort(1).values
        sample = sample.clamp(sample[:, count // 50, None], sample[:, -1 - count // 50, None])
        spread, centre = torch.std_mean(sample, 1, correction=0)
        self.centre.zero_()[:, : self.head_size] = centre
        self.unit.fill_(1.0)[:, : self.head_size] = (spread * _UNIT).clamp_min(1e-6)

    def append(self, k: Array, v: Array, lengths: Array, count: int) -> None:
        """Take up the last `count` of the first lengths [B] tokens of each batch entry."""
        k, v = rows_of(k), rows_of(v)
        blocks = 1 if count == 1 else count // _BLOCK + 2
        self.kernels.append[blocks, self.batch * self.kv_heads](
            k, v, self.low, self.centre, self.unit, self.k_mean, self.v_mean, lengths,
            *k.stride()[:3], *v.stride()[:3], self.kv_heads, count, self.capacity,
            D=self.head_size, DV=self.value_size, BD=self._slots, BDV=self._value_slots,
        )  # fmt: skip

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.length = min(self.length, length)
        self._calibrated *= self.length > 0

    def reorder(self, entries: Sequence[int]) -> DecodeIndex | None:
        """Batch entry i becomes what entry entries[i] was. None where there is no such entry."""
        if not entries or not all(0 <= entry < self.batch for entry in entries):
            return None
        torch = sys.modules["torch"]
        heads = torch.arange(self.kv_heads)
        lanes = torch.as_tensor(entries)[:, None] * self.kv_heads + heads
        lanes = lanes.flatten().to(self._device)
        self.batch = len(entries)
        with torch.inference_mode(False):
            for name in ("low", "centre", "unit", "k_mean", "v_mean"):
                setattr(self, name, getattr(self, name)[lanes])
            self._make_work()
        return self

    def copy(self) -> DecodeIndex:
        """One that goes its own way."""
        torch = sys.modules["torch"]
        twin = copy.copy(self)
        with torch.inference_mode(False):
            for name, x in vars(self).items():
                if isinstance(x, torch.Tensor):
                    setattr(twin, name, x.clone())
        twin._forget_steps()
        return twin

    # ---- A step

    def is_before(self, length: int) -> bool:
        """Whether `next_step` can take a cache of `length` tokens: one more than are known."""
        return self.length == length - 1 > 0 and self._is_calibrated(length)

    def next_step(self, q: Array, k: Array, v: Array, scale: float, rule: Rule) -> Array:
        """Take up one more token and attend: [B, H, 1, Dv].

        A step like the one before, of a cache that is still at the same address, is launched as a CUDA graph
        of what that launched: one launch costs the host less than five.
        """
        torch = sys.modules["torch"]
        like = k.data_ptr(), v.data_ptr(), k.stride(), v.stride(), q.shape, scale, rule
        fresh = like != self._like
        if fresh:
            self._forget_steps()
            with torch.inference_mode(False):
                self._q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
                self._out = torch.empty((*q.shape[:3], self.value_size), dtype=q.dtype, device=q.device)
        self._q.copy_(q)
        self._fill(self.length)
        step = Step(self.lengths, self.starts, scale, rule)
        self._filled, self._like = -1, ()  # until it has come to its end
        if self._graph is None and not fresh and self._capturable:
            try:
                self._graph = _captured(lambda: self._one_more(k, v, step))
            except RuntimeError as error:
                self._capturable = False
                _warn(str(error))
        if self._graph is None:
            self._one_more(k, v, step)
        else:
            self._graph.replay()
        self._like = like
        self.length = self._filled = self.length + 1
        return self._out.clone()

    def _one_more(self, k: Array, v: Array, step: Step) -> None:
        self.lengths += 1
        self.append(k, v, self.lengths, 1)
        self.attend(self._q, k, v, self._out, step)

    def attend(self, q: Array, k: Array, v: Array, out: Array, step: Step) -> None:
        """Sparse-K attention of q [B, H, 1, D] into out [B, H, 1, Dv]; no synchronisation, no new memory."""
        q, k, v = rows_of(q), rows_of(k), rows_of(v)
        self._score(q, k, step)
        lanes, group = self.batch * self.kv_heads, q.shape[1] // self.kv_heads
        rule = step.rule
        self.kernels.attend[self.parts + 1, lanes](
            q, k, v, self.v_mean, self.mean_scores, step.lengths, step.starts, self.shares, self.histogram,
            self.of_part, self.lists, self.peaks, self.totals, self.sums,
            *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], self.kv_heads, self.capacity, step.scale,
            **self._sizes(group), **self._values_sizes(), **_window(rule), SINKS=rule.sinks,
            K=min(rule.top_k, _MOST), LAST=_last_bin(rule), TAIL=rule.tail == "centroid", CHUNK=self.chunk,
            PARTS=power_of_2(self.parts), **_ATTEND, **self._follows(),
        )  # fmt: skip
        self.kernels.combine[group, lanes](
            self.peaks, self.totals, self.sums, step.lengths, step.starts, out, *out.stride()[:2],
            self.kv_heads, self.parts,
            G=group, **self._values_sizes(), **_window(rule), CHUNK=self.chunk,
            **_COMBINE, **self._follows(),
        )  # fmt: skip

    def _score(self, q: Array, k: Array, step: Step) -> None:
        """The passes up to the shares of all keys and their histogram."""
        lanes, sizes = self.batch * self.kv_heads, self._sizes(q.shape[1] // self.kv_heads)
        self.kernels.survey[self.num_norms, lanes](
            q, k, self.k_mean, step.lengths, step.starts, self.mean_scores, self.norms, self.histogram,
            *q.stride()[:2], *k.stride()[:3], self.kv_heads, self.capacity, step.scale,
            **sizes, **_window(step.rule), MEANS=_MEANS, OVERLAP=self._overlap, **_SURVEY,
        )  # fmt: skip
        self.kernels.score[self.parts, lanes](
            q, self.low, self.centre, self.unit, self.norms, step.lengths, step.starts, self.shares,
            self.histogram, self.of_part,
            *q.stride()[:2], self.kv_heads, self.capacity, self.num_norms, step.scale,
            **sizes, **_window(step.rule), SINKS=step.rule.sinks, CHUNK=self.chunk,
            NORMS=power_of_2(self.num_norms), PACKED=not interpreted(),
            **_SCORE, **self._follows(),
        )  # fmt: skip

    def _follows(self) -> dict[str, bool]:
        """For a pass that starts while the one before it still runs."""
        return {"OVERLAP": self._overlap, "launch_pdl": self._overlap}

    def _sizes(self, group: int) -> dict[str, int]:
        return {"G": group, "D": self.head_size, "BD": self._slots}

    def _values_sizes(self) -> dict[str, int]:
        return {"DV": self.value_size, "BDV": self._value_slots}

    def select(self, q: Array, k: Array, step: Step) -> Selection:
        """The keys that `attend` keeps, chosen again from the shares."""
        torch = sys.modules["torch"]
        self._score(rows_of(q), rows_of(k), step)
        rule, num_keys = step.rule, k.shape[2]
        j = torch.arange(num_keys, device=k.device)
        starts, lengths = (x.long()[:, None, None] for x in (step.starts, step.lengths))
        window = ((lengths - 1) // rule.tile * rule.tile - max(rule.window, 1) + 1).clamp_min(0)
        seen = (j >= starts) & (j < lengths)
        shares = self.shares.view(self.batch, self.kv_heads, -1)[..., :num_keys].float()
        bins = (shares * -_PER_BIT).clamp(0, _BINS - 1).long()
        candidate = seen & (j >= rule.sinks) & (j < window) & (bins <= _last_bin(rule))
        order = torch.where(candidate, bins * num_keys + j, _BINS * num_keys).argsort(-1)
        best = torch.zeros_like(bins, dtype=torch.bool).scatter_(-1, order[..., : rule.top_k], True)
        kept = (best & candidate) | (seen & ((j < rule.sinks) | (j >= window)))
        kept = kept.repeat_interleave(q.shape[1] // self.kv_heads, 1)
        return Selection.from_kept(kept[:, :, None], rule.most_kept(num_keys))


def _last_bin(rule: Rule) -> int:
    """The last bin that has keys with the share that is wanted."""
    last = _BINS - 1
    return min(last, int(-math.log2(rule.min_share) * _PER_BIT)) if rule.min_share else last


def _window(rule: Rule) -> dict[str, int]:
    return {"T": rule.tile, "WINDOW": max(rule.window, 1)}
