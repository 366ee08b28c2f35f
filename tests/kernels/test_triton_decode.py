"""The GPU kernel for steps of generation, against the reference in float64: on the card where there is one,
elsewhere in Triton's interpreter."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsek import KeyIndex, SparseKConfig
from sparsek.kernels import reference, triton_decode
from sparsek.kernels.triton_decode import DecodeIndex, Step
from sparsek.problem import Problem, make_problem

from .test_triton_prefill import DEVICE, DTYPES, ERROR, ON_CARD, in_float64, with_rule

CONFIG = SparseKConfig(select="tile", top_k=24, min_context=0, dense_layers=())


def cache(
    tokens: int,
    *,
    batch: int = 1,
    kv_heads: int = 1,
    sizes: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v; keys have a common part, as those of models do."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    k = normal(batch, kv_heads, tokens, sizes[0]) + 2 * normal(batch, kv_heads, 1, sizes[0])
    return tuple(x.to(dtype).to(DEVICE) for x in (k, normal(batch, kv_heads, tokens, sizes[1])))  # type: ignore[return-value]


def step_of(
    k: torch.Tensor,
    v: torch.Tensor,
    index: KeyIndex,
    *,
    config: SparseKConfig = CONFIG,
    group: int = 2,
    factor: float = 1.5,
    **more: Any,
) -> Problem:
    generator = torch.Generator().manual_seed(k.shape[2])
    q = torch.randn(k.shape[0], k.shape[1] * group, 1, k.shape[3], generator=generator) * factor
    return make_problem(q.to(k.dtype).to(DEVICE), k, v, config=config, is_causal=True, index=index, **more)


def poison(index: DecodeIndex) -> None:
    """NaN and impossible numbers where a step works."""
    for name in (
        "mean_scores",
        "norms",
        "histogram",
        "shares",
        "of_part",
        "lists",
        "peaks",
        "totals",
        "sums",
    ):
        getattr(index, name).view(torch.uint8).fill_(0xFF)


def assert_right(p: Problem, *, same: float = 0.7) -> torch.Tensor:
    """The output is attention over the kept keys, and at least a share of these is what the definition
    keeps: choosing is in 4 bits."""
    assert triton_decode.why_not(p) is None
    index = triton_decode._index(p)
    triton_decode._ready(index, p)
    poison(index)
    out = triton_decode.attention(p)
    selection = triton_decode.select(p)
    exact = in_float64(p)
    expected = reference.attention(exact, selection)
    assert (out.double() - expected).norm() <= ERROR[p.q.dtype] * expected.norm()
    kept, share = selection.to_mask(), p.rule.min_share
    if share:  # within a factor of three, which the estimate and 4 bits can make of it
        few, many = (
            reference.select(with_rule(exact, min_share=x)).to_mask() for x in (3 * share, share / 3)
        )
        limited = kept.sum(-1) >= p.rule.top_k
        assert (selection.counts <= reference.select(with_rule(exact, min_share=0.0)).counts).all()
        assert not (kept & ~many)[~limited].any()
        assert not (few & ~kept)[~limited].any()
        return out
    wanted = reference.select(exact)
    assert torch.equal(selection.counts, wanted.counts)
    own = wanted.to_mask()
    assert (kept & own).sum() >= same * own.sum()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "config", "shape", "group"),
    [
        (2300, CONFIG, {}, 2),
        (200, replace(CONFIG, tile=32, sinks=0), {"batch": 2, "kv_heads": 2, "sizes": (48, 16)}, 3),
        (1025, replace(CONFIG, tail="none", window=0), {"kv_heads": 2, "sizes": (128, 32)}, 1),
        (1500, replace(CONFIG, top_k=300, sinks=9, window=100), {"sizes": (96, 80)}, 16),
        (1087, replace(CONFIG, top_k=1), {"sizes": (256, 256)}, 1),
        (2300, replace(CONFIG, top_k="auto", min_share=0.01), {}, 2),
        (1500, replace(CONFIG, top_k="auto", min_share=0.002), {"batch": 2, "kv_heads": 2}, 3),
        (1300, replace(CONFIG, top_k=5, min_share=0.001), {}, 1),
        (1300, replace(CONFIG, top_k=1000, min_share=0.02), {}, 4),
    ],
    ids=[
        *("plain", "short", "no tail", "much kept", "large heads"),
        *("share", "share, batch", "share, few", "share, many"),
    ],
)
def test_agrees_with_the_reference(
    tokens: int, config: SparseKConfig, shape: dict[str, Any], group: int, dtype: torch.dtype
) -> None:
    k, v = cache(tokens, dtype=dtype, **shape)
    # The sum of a row is estimated from means: what is spread within a block makes that too small.
    factor = 0.7 if config.min_share else 1.5
    assert_right(step_of(k, v, KeyIndex(), config=config, group=group, factor=factor))


def test_a_growing_cache_is_taken_up_token_by_token() -> None:
    k, v = cache(1200, batch=2)
    index = KeyIndex()
    assert_right(step_of(k[:, :, :1020], v[:, :, :1020], index))
    gpu = index.gpu
    for tokens in (1021, 1022, 1024, 1025, 1090):
        assert_right(step_of(k[:, :, :tokens], v[:, :, :tokens], index))
        assert index.length == tokens
    assert index.gpu is gpu
    fresh = DecodeIndex(k, v, gpu.capacity)
    fresh._calibrated, fresh.centre, fresh.unit = gpu._calibrated, gpu.centre, gpu.unit
    fresh.extend(k, v, 1090)
    assert torch.equal(fresh.low[:, :1090], gpu.low[:, :1090])
    assert torch.equal(fresh.k_mean[:, :17], gpu.k_mean[:, :17])
    assert torch.equal(fresh.v_mean[:, :17], gpu.v_mean[:, :17])


def test_steps_one_after_another_are_launched_at_once_and_the_same() -> None:
    k, v = cache(1100, batch=2)
    fast, slow = KeyIndex(), KeyIndex()

    def steps(first: int, last: int) -> None:
        for tokens in range(first, last):
            p = step_of(k[:, :, :tokens], v[:, :, :tokens], fast)
            if fast.gpu is not None:
                poison(fast.gpu)
            out = triton_decode.attention(p)
            p = replace(p, index=slow)
            triton_decode._ready(triton_decode._index(p), p)
            assert torch.equal(out, triton_decode.attention(p))
            assert fast.length == slow.length == tokens

    steps(1021, 1025)
    assert fast.gpu._like
    assert slow.gpu._like == ()
    assert (fast.gpu._graph is not None) == ON_CARD
    fast, slow = copy.deepcopy(fast), copy.deepcopy(slow)
    assert fast.gpu._graph is None
    steps(1025, 1028)
    fast.truncate(1022), slow.truncate(1022)
    k[:, :, 1022:] = -k[:, :, 1022:]
    steps(1023, 1027)
    k, v = k.clone(), v.clone()
    steps(1027, 1029)
    fast.reorder([1, 0]), slow.reorder([1, 0])
    k, v = k.flip(0), v.flip(0)
    steps(1029, 1031)


def test_steps_that_cannot_be_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that have to be copied; a launch that fails; a capture that fails, or one in another thread."""
    k, v = cache(1100)
    across = v.transpose(2, 3).contiguous().transpose(2, 3)
    index, expected = KeyIndex(), KeyIndex()

    def step(tokens: int, v: torch.Tensor = v) -> None:
        p = step_of(k[:, :, :tokens], v[:, :, :tokens], index)
        out, p = triton_decode.attention(p), replace(p, index=expected)
        triton_decode._ready(triton_decode._index(p), p)
        assert torch.equal(out, triton_decode.attention(p))
        assert index.gpu.lengths.tolist() == [tokens]

    def fails(*_: Any) -> None:
        raise RuntimeError("no room")

    for tokens in (1021, 1022, 1023, 1024):
        step(tokens, across)
    assert index.gpu._graph is None
    step(1025), step(1026)
    with monkeypatch.context() as patch:
        patch.setattr(index.gpu, "attend", fails)
        patch.setattr(index.gpu, "_graph", None)
        patch.setattr(index.gpu, "_capturable", False)
        with pytest.raises(RuntimeError, match="no room"):
            step(1027)
    step(1027), step(1028)
    index.gpu._forget_steps()
    with triton_decode._capture:
        step(1029), step(1030)
    assert index.gpu._graph is None
    with monkeypatch.context() as patch:
        patch.setattr(triton_decode, "_captured", fails)
        patch.setattr(index.gpu, "_capturable", True)
        step(1031), step(1032)
    assert index.gpu._graph is None


def test_what_few_tokens_told_is_forgotten() -> None:
    k, v = cache(600)
    k[:, :, :40] *= 0.01
    index = KeyIndex()
    assert_right(step_of(k[:, :, :40], v[:, :, :40], index, config=replace(CONFIG, top_k=2)))
    out = assert_right(step_of(k, v, index))
    assert torch.equal(out, triton_decode.attention(step_of(k, v, KeyIndex())))


def test_a_cache_that_outgrows_its_memory() -> None:
    k, v = cache(2500)
    index = KeyIndex()
    assert_right(step_of(k[:, :, :1000], v[:, :, :1000], index))
    assert_right(step_of(k, v, index))


def test_cropped_reordered_and_copied() -> None:
    k, v = cache(700, batch=2)
    index = KeyIndex()
    assert_right(step_of(k, v, index))
    twin = copy.deepcopy(index)
    index.truncate(500)
    assert index.length == 500
    assert twin.length == 700
    k2, v2 = cache(700, batch=2, seed=1)
    k2[:, :, :500], v2[:, :, :500] = k[:, :, :500], v[:, :, :500]
    assert_right(step_of(k2, v2, index))
    order = torch.tensor([1, 1, 0], device=DEVICE)
    twin.reorder([1, 1, 0])
    out = assert_right(step_of(k[order], v[order], twin))
    assert index.nbytes > 0
    assert out.shape[0] == 3


@pytest.mark.parametrize("factor", [1e-6, 30.0])
def test_tiny_and_huge_scores(factor: float) -> None:
    k, v = cache(1100)
    assert_right(step_of(k, v, KeyIndex(), factor=factor), same=0.5)


def test_equal_keys_go_to_the_lower_position() -> None:
    k, v = cache(1100)
    p = step_of(torch.ones_like(k), v, KeyIndex(), config=replace(CONFIG, sinks=2))
    assert triton_decode.select(p).indices[0, 0, 0, :26].tolist() == list(range(26))
    assert_right(p)


def test_a_step_reads_on_the_gpu_where_its_keys_end() -> None:
    """What a CUDA graph replays: the same launches, while `lengths` grows."""
    k, v = cache(1300, batch=2)
    index = DecodeIndex(k, v, k.shape[2])
    index.extend(k, v, 1150)
    lengths = torch.full((2,), 1150, dtype=torch.int32, device=DEVICE)
    p = step_of(k, v, KeyIndex())
    step = Step(lengths, torch.zeros_like(lengths), p.scale, p.rule)
    out = torch.empty_like(p.q)

    def once() -> None:
        lengths.add_(1)
        index.append(k, v, lengths, 1)
        poison(index)
        index.attend(p.q, k, v, out, step)

    if ON_CARD:
        once()
        lengths.sub_(1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
    for tokens in range(1151, 1154):
        graph.replay() if ON_CARD else once()
        part = replace(p, k=k[:, :, :tokens], v=v[:, :, :tokens], first_position=tokens - 1, index=KeyIndex())
        ready = triton_decode._index(part)
        triton_decode._ready(ready, part)
        ready.centre, ready.unit, ready.low = index.centre, index.unit, index.low
        torch.testing.assert_close(out, triton_decode.attention(part), rtol=0, atol=2e-3)


def overlap(p: Problem) -> float:
    """The share of what the definition keeps that the kernel keeps."""
    kept, own = triton_decode.select(p).to_mask(), reference.select(in_float64(p)).to_mask()
    return float((kept & own).sum() / own.sum())


def test_an_entry_that_sees_nothing_is_zero() -> None:
    k, v = cache(300, batch=2)
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    out = assert_right(step_of(k, v, KeyIndex(), attn_mask=mask))
    assert (out[1] == 0).all()


def test_padding_on_the_left_does_not_tell_what_keys_are_like() -> None:
    k, v = cache(1500, batch=2)
    mask = torch.ones(2, 1, 1, 1500, dtype=torch.bool, device=DEVICE)
    mask[1, ..., :300] = False
    k[1, :, :300] = 60000
    assert_right(step_of(k, v, KeyIndex(), attn_mask=mask))


def test_one_outlier_does_not_make_all_other_keys_equal() -> None:
    k, v = cache(1500)
    k[:, :, 0] *= 100
    assert overlap(step_of(k, v, KeyIndex())) > 0.8


def test_what_was_cropped_away_is_forgotten() -> None:
    k, v = cache(600)
    index = KeyIndex()
    assert_right(step_of(k * 0.01, v, index))
    index.truncate(0)
    assert overlap(step_of(k, v, index)) == overlap(step_of(k, v, KeyIndex()))


def test_a_shorter_cache_is_another_one() -> None:
    index = KeyIndex()
    assert_right(step_of(*cache(1500), index))
    assert_right(step_of(*cache(1100, seed=7), index))


def test_entries_that_are_not_there_leave_no_index() -> None:
    for entries in ([], [5]):
        index = KeyIndex()
        assert_right(step_of(*cache(200), index))
        index.reorder(entries)
        assert index.length == 0
        assert_right(step_of(*cache(200), index))


def test_inference_mode_and_no_grad_can_take_turns() -> None:
    k, v = cache(300)
    index = KeyIndex()
    with torch.inference_mode():
        assert_right(step_of(k[:, :, :290], v[:, :, :290], index))
    with torch.no_grad():
        assert_right(step_of(k, v, index))


def test_from_the_first_token_on() -> None:
    k, v = cache(1100)
    index = DecodeIndex(k, v, 1100)
    for length in (1, 2, 1100):
        index.extend(k, v, length)
    assert torch.isfinite(index.centre).all()
    assert torch.isfinite(index.unit).all()


def test_more_tokens_than_there_is_room_for() -> None:
    k, v = cache(1300)
    index = DecodeIndex(k, v, 1000)
    with pytest.raises(ValueError, match="length = 1300: the index is for 1024 tokens"):
        index.extend(k, v, 1300)
    p = step_of(k, v, KeyIndex(), config=replace(CONFIG, select="query"))
    with pytest.raises(ValueError, match="keys are chosen by tiles here"):
        Step(index.lengths, index.starts, 1.0, p.rule)


@pytest.mark.skipif(not ON_CARD, reason="needs 9 GB of a GPU's memory")
def test_more_than_2_to_the_31_elements() -> None:
    near = cache(8200)
    far = torch.empty(2, 1, 8200, 1, 2**18, dtype=near[0].dtype, device=DEVICE)
    k, v = (x.transpose(1, 2)[..., :64] for x in far)
    k.copy_(near[0]), v.copy_(near[1])
    out = triton_decode.attention(step_of(k, v, KeyIndex()))
    assert torch.equal(out, triton_decode.attention(step_of(*near, KeyIndex())))


def test_what_it_does_not_take() -> None:
    k, v = cache(200)
    p = step_of(k, v, KeyIndex())
    assert triton_decode.why_not(p) is None
    assert triton_decode.why_not(replace(p, index=None)) == "there is no index of the keys"
    two = replace(p, q=p.q.expand(1, 2, 2, 64))
    assert triton_decode.why_not(two) == "there is more than one query"
    assert triton_decode.why_not(replace(p, softcap=3.0)) == "softcap is given"
    first = replace(p, first_position=0)
    assert triton_decode.why_not(first) == "the query is not the last of the positions"
