"""The parts of the plug-in for vLLM that need no vLLM; with it they are tested in tests/hosts/vllm."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsek.integrations.vllm_cpu_cache import Packing
from sparsek.integrations.vllm_cuda_cache import gather, split
from sparsek.integrations.vllm_plan import MIN_ROWS, Prompt, others, prompts
from sparsek.integrations.vllm_settings import settings
from sparsek.integrations.vllm_versions import expected_layout, layout_of, tried, unreadable, was_tried

# ---- Plans


@dataclass
class Common:
    """As vLLM's CommonAttentionMetadata."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu_upper_bound: torch.Tensor | None
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    causal: Any = True
    encoder_seq_lens: Any = None
    positions: Any = None

    def replace(self, **changed: Any) -> Common:
        return dataclasses.replace(self, **changed)


def batch(*requests: tuple[int, int], **fields: Any) -> Common:
    """Of requests with so many rows each, over so many keys."""
    rows, keys = torch.tensor(requests, dtype=torch.int32).T
    starts = torch.nn.functional.pad(rows.cumsum(0, dtype=torch.int32), (1, 0))
    total = int(rows.sum())
    common = Common(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=keys,
        seq_lens_cpu_upper_bound=keys,
        num_reqs=len(requests),
        num_actual_tokens=total,
        max_query_len=int(rows.max()),
        max_seq_len=int(keys.max()),
        block_table_tensor=torch.arange(len(requests))[:, None] * 100 + torch.arange(8),
        slot_mapping=torch.arange(total) * 7,
    )
    return common.replace(**fields)


def always(_rows: int, _keys: int) -> bool:
    return True


def test_long_prompts_are_taken_and_the_rest_is_a_batch_of_its_own() -> None:
    common = batch((1, 50), (600, 900), (1, 3000), (20, 20), (MIN_ROWS, 5000))
    taken = prompts(common, always)
    assert taken == (Prompt(1, 1, 600, 900), Prompt(4, 622, MIN_ROWS, 5000))
    left = others(common, taken)
    assert left is not None
    rest, rows = left
    assert isinstance(rows, torch.Tensor)
    assert rows.tolist() == [0, *range(601, 622)]
    assert rest.query_start_loc.tolist() == rest.query_start_loc_cpu.tolist() == [0, 1, 2, 22]
    assert rest.seq_lens.tolist() == [50, 3000, 20]
    assert (rest.num_reqs, rest.num_actual_tokens, rest.max_query_len, rest.max_seq_len) == (3, 22, 20, 3000)
    assert rest.block_table_tensor[:, 0].tolist() == [0, 200, 300]
    assert rest.slot_mapping.tolist() == [7 * row for row in rows.tolist()]


def test_a_rest_in_one_piece_is_a_slice() -> None:
    common = batch((1, 50), (3, 70), (600, 900))
    left = others(common, prompts(common, always))
    assert left is not None
    assert left[1] == slice(0, 4)
    alone = batch((600, 900))
    assert others(alone, prompts(alone, always)) is None


@pytest.mark.parametrize(
    "common",
    [
        batch((MIN_ROWS - 1, 5000)),
        batch((600, 900), causal=False),
        batch((600, 900), causal=torch.tensor([True])),
        batch((600, 900), encoder_seq_lens=torch.tensor([3])),
        batch((600, 900), seq_lens_cpu_upper_bound=None),
        batch((600, 500)),
    ],
    ids=["few rows", "not causal", "causal by request", "encoder", "lengths unknown", "rows without keys"],
)
def test_what_is_not_known_is_left(common: Common) -> None:
    assert prompts(common, always) == ()


def test_what_does_not_gain_is_left() -> None:
    common = batch((600, 900), (300, 4000))
    assert [p.request for p in prompts(common, lambda rows, keys: rows * keys > 1_000_000)] == [1]


# ---- Caches on the CPU


def plain(key: Any, value: Any, cache: Any, slots: Any) -> None:
    """Rows of keys, then rows of values."""
    block, size = cache.shape[2], key.shape[2]
    of_both = cache.view(*cache.shape[:2], 2, block, size)
    for which, x in enumerate((key, value)):
        of_both[slots // block, :, which, slots % block] = x


def columns_of_keys(key: Any, value: Any, cache: Any, slots: Any) -> None:
    """As vLLM packs them for AVX-512: a column for each key, a row for each value."""
    block, size = cache.shape[2], key.shape[2]
    of_both = cache.view(*cache.shape[:2], 2, block * size)
    of_both[:, :, 0].view(-1, cache.shape[1], size, block)[slots // block, :, :, slots % block] = key
    of_both[:, :, 1].view(-1, cache.shape[1], block, size)[slots // block, :, slots % block] = value


def pairs(key: Any, value: Any, cache: Any, slots: Any) -> None:
    """Pairs of channels beside each other, as AMX wants them."""
    block, size = cache.shape[2], key.shape[2]
    of_both = cache.view(*cache.shape[:2], 2, block * size)
    of_keys = of_both[:, :, 0].view(-1, cache.shape[1], size // 2, block, 2)
    of_keys[slots // block, :, :, slots % block] = key.view(*key.shape[:2], size // 2, 2)
    of_both[:, :, 1].view(-1, cache.shape[1], block, size)[slots // block, :, slots % block] = value


def halved(key: Any, value: Any, cache: Any, slots: Any) -> None:
    plain(key / 2, value, cache, slots)


def without_the_last(key: Any, value: Any, cache: Any, slots: Any) -> None:
    key = key.clone()
    key[..., -1] = 0
    plain(key, value, cache, slots)


def heads_exchanged(key: Any, value: Any, cache: Any, slots: Any) -> None:
    plain(key.flip(1), value, cache, slots)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("write", [plain, columns_of_keys, pairs])
@pytest.mark.parametrize(("block", "size"), [(16, 64), (128, 64), (32, 256)])
def test_a_packing_is_learned(write: Callable[..., None], dtype: torch.dtype, block: int, size: int) -> None:
    cache = torch.randn(9, 3, block, 2 * size).to(dtype)
    packing = Packing.learn(write, cache)
    assert packing is not None
    given = torch.randn(2, 2 * block, 3, size).to(dtype)
    write(
        given[0],
        given[1],
        cache,
        torch.cat([torch.arange(block) + 5 * block, torch.arange(block) + 2 * block]),
    )
    for which in range(2):
        out = torch.empty(3, 2 * block, size, dtype=dtype)
        packing.unpack(cache, torch.tensor([5, 2]), which, out)
        torch.testing.assert_close(out.transpose(0, 1), given[which], rtol=0, atol=0)


@pytest.mark.parametrize("write", [halved, without_the_last, heads_exchanged])
def test_a_packing_that_cannot_be_read_is_none(write: Callable[..., None]) -> None:
    assert Packing.learn(write, torch.zeros(4, 2, 32, 128, dtype=torch.bfloat16)) is None


# ---- Caches on CUDA

HEADS, SIZE, BLOCK = 3, 8, 16
# In words; the axes of [pages, layers, keys and values, tokens, heads, channels] as they lie in memory; and
# the order in which vLLM indexes what is left of them for one layer.
SPLIT, PACKED = (0, 2, 3, 4, 5), (0, 4, 3, 2, 5)
CACHES = {
    "split, tokens first": ((1, 0, 2, 3, 4, 5), SPLIT),
    "split, heads first": ((1, 0, 2, 4, 3, 5), SPLIT),
    "split, layers beside each other": ((0, 1, 2, 3, 4, 5), SPLIT),
    "packed, LBNHC": ((1, 0, 3, 4, 2, 5), PACKED),
    "packed, LBHNC": ((1, 0, 4, 3, 2, 5), PACKED),
    "packed, LHBNC": ((1, 4, 0, 3, 2, 5), PACKED),
    "packed, BLHNC": ((0, 1, 4, 3, 2, 5), PACKED),
    "packed, BLNHC": ((0, 1, 3, 4, 2, 5), PACKED),
    "packed, BHLNC": ((0, 4, 1, 3, 2, 5), PACKED),
}


def cache_of(tokens: torch.Tensor, name: str) -> torch.Tensor:
    """What vLLM gives a layer, the middle one of three, of `tokens` [pages, 3, 2, block, heads, channels]."""
    in_memory, order = CACHES[name]
    memory = tokens.permute(in_memory).contiguous()
    back = [in_memory.index(axis) for axis in range(6)]
    cache = memory.permute(back).select(1, 1)  # a view of it
    if order is SPLIT:
        return cache
    # Keys and values of a token are beside each other: one axis.
    packed = cache.permute(0, 3, 2, 1, 4)
    assert packed.stride(3) == SIZE
    return packed.as_strided(
        (*packed.shape[:3], 2 * SIZE), (*packed.stride()[:3], 1), packed.storage_offset()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CACHES)
def test_pages_of_every_layout_give_the_same_keys_and_values(name: str, dtype: torch.dtype) -> None:
    tokens = torch.randn(7, 3, 2, BLOCK, HEADS, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
    numbers = torch.tensor([5, 0, 6, 2], dtype=torch.int32)
    expected = tokens[numbers.long(), 1].permute(1, 3, 0, 2, 4).reshape(2, 1, HEADS, 4 * BLOCK, SIZE)
    cache = cache_of(tokens, name)
    layout = layout_of(cache.shape, HEADS, SIZE)
    assert layout is not None
    assert layout.is_packed == name.startswith("packed")
    space = torch.full((2 * 4 * BLOCK * HEADS * SIZE,), torch.nan, dtype=dtype)
    found = gather(layout, cache, numbers, space)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found.untyped_storage().data_ptr() == space.untyped_storage().data_ptr()
    # As kernels are compiled for before there is a cache.
    assert split(layout, space, HEADS, SIZE).stride() == found.stride()
    assert found.stride(-1) == 1


@pytest.mark.parametrize(
    "shape",
    [(9, 2, 16, 3, 16), (9, 2, 16, 4, 8), (9, 3, 16, 8), (2, 9, 16, 3, 8), (9, 16, 3, 16), (9, 16, 48)],
)
def test_a_cache_of_another_shape_is_not_read(shape: tuple[int, ...]) -> None:
    assert layout_of(shape, HEADS, SIZE) is None
    told = unreadable(shape, "cuda")
    assert str(list(shape)) in told
    assert told.endswith(tried("cuda"))


class Until025:
    """As vLLM's backends up to 0.25."""

    @staticmethod
    def get_kv_cache_shape(blocks: int, block: int, heads: int, size: int) -> tuple[int, ...]:
        return blocks, 2, block, heads, size


class Until027:
    @staticmethod
    def get_kv_cache_shape(blocks: int, block: int, heads: int, size: int) -> tuple[int, ...]:
        return blocks, heads, block, 2 * size


class Since032:
    @classmethod
    def supported_kv_cache_layouts(cls) -> None:
        return None


class Before023:
    @staticmethod
    def get_kv_cache_shape(blocks: int, block: int, heads: int, size: int) -> tuple[int, ...]:
        return 2, blocks, block, heads, size


@pytest.mark.parametrize(
    ("backend", "versions"),
    [
        (Until025, ("0.23", "0.25")),
        (Until027, ("0.27", "0.32", "0.33")),
        (Since032, ("0.27", "0.32", "0.33")),
        (Before023, None),
        (object, None),
    ],
)
def test_the_layout_is_known_before_there_is_a_cache(backend: Any, versions: Any) -> None:
    found = expected_layout(backend, HEADS, SIZE)
    assert (found and found.versions) == versions


def test_versions_that_were_tried() -> None:
    assert [v for v in ("0.23.0", "0.25.1", "0.32.0", "0.3.0", "0.330.0") if was_tried(v, "cuda")] == [
        "0.23.0",
        "0.25.1",
        "0.32.0",
    ]
    assert was_tried("0.32.0+cpu", "cpu")
    assert not was_tried("0.23.0", "cpu")
    assert not was_tried("dev", "cuda")
    assert tried("cuda") == "vLLM 0.23, 0.25, 0.27, 0.32, 0.33 on CUDA"


# ---- Settings


def host(additional: Any = None, layers: int = 4) -> Any:
    """As vLLM's VllmConfig."""
    model = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=layers))
    return SimpleNamespace(additional_config=additional, model_config=model)


def test_additional_config_is_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEK_TOP_K", "32")
    monkeypatch.setenv("SPARSEK_SINKS", "8")
    config = settings(host({"sparsek": {"top_k": 64}, "of somebody else": 1}), "cpu")
    assert config is not None
    assert (config.top_k, config.sinks) == (64, 8)
    assert settings(host({"sparsek": {"top_k": 0}}), "cpu") is None


@pytest.mark.parametrize(
    ("given", "device", "message"),
    [
        ({"top_q": 1}, "cpu", "unknown field 'top_q'"),
        ([1], "cpu", r"additional_config\['sparsek'\] = \[1\]"),
        ({"top_k": [1, 2]}, "cpu", "gives 2 values and the model has 4 layers"),
        ({"dense_layers": [4]}, "cpu", "the model has the layers 0 to 3"),
        ({"select": "tile"}, "cpu", "select = 'tile': must be auto or query on the CPU"),
        ({"select": "query"}, "cuda", "select = 'query': must be auto or tile on a GPU"),
        ({"stride": 8}, "cuda", "stride = 8: must be 0 on a GPU"),
        ({"check_finite": True}, "cpu", "check_finite = True"),
    ],
)
def test_wrong_settings(given: Any, device: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^the settings of Sparse-K: .*{message}"):
        settings(host({"sparsek": given}), device)


# ---- The entry point


def test_the_entry_point_loads_nothing() -> None:
    """Of a vLLM whose users ask for nothing, and where there is none at all."""
    program = (
        "import sys; from sparsek.integrations.vllm import register; register(); register(); "
        "print([name for name in ('torch', 'vllm', 'transformers', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_vllm_that_takes_no_attention_from_outside_is_named(tmp_path: Path) -> None:
    """As before 0.11, or where a later one has it elsewhere."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    program = "from sparsek.integrations.vllm import register; register()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    (line,) = done.stderr.splitlines()
    assert "No module named 'vllm.v1'" in line
    assert f"It works with {tried('cuda')}, and {tried('cpu')}" in line
