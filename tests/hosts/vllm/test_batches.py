"""All that a server does with requests: which rows and pages are whose is right in every batch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import vllm

from .host import LLAMA, ON_CPU, alone, compared, layers_of, serving

ALWAYS = {"min_context": 0, "select": "auto" if ON_CPU else "tile"}
GEMMA = {
    **LLAMA,
    "num_hidden_layers": 3,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 64,
    "rope_local_base_freq": 10000.0,
}
LLAMA4 = {
    **LLAMA,
    "num_hidden_layers": 4,
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "intermediate_size_mlp": 128,
    "attention_chunk_size": 512,
    "no_rope_layers": [1, 1, 1, 0],
    "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_layers": [],
    "interleave_moe_layer_step": 1,
    "use_qk_norm": False,
    "attn_temperature_tuning": False,
}


def run(
    llm: Any, lengths: list[int], *, steps: int = 2, prefix: int = 0, cancel: int | None = None
) -> list[list[int]]:
    """Greedy continuations of random prompts, a new one every `steps` steps; their first `prefix` tokens are
    alike. Request number `cancel` is given up on the way."""
    rng, engine, tokens = random.Random(0), llm.llm_engine, {}
    shared = [rng.randrange(512) for _ in range(prefix)]

    def step() -> None:
        tokens.update({out.request_id: list(out.outputs[0].token_ids) for out in engine.step()})

    for i, length in enumerate(lengths):
        ids = (shared + [rng.randrange(512) for _ in range(length)])[: max(length, prefix + 1)]
        params = vllm.SamplingParams(temperature=0, max_tokens=12 + i, ignore_eos=True, detokenize=False)
        engine.add_request(str(i), {"prompt_token_ids": ids}, params)
        for _ in range(steps):
            step()
        if cancel == i:
            engine.abort_request([str(i)])
    while engine.has_unfinished_requests():
        step()
    for i in range(len(lengths)):
        assert i == cancel or len(tokens[str(i)]) == 12 + i
    return [tokens.get(str(i), []) for i in range(len(lengths))]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "block"),
    [
        (4, 2, 64, 32),
        (16, 1, 64, 64),
        (3, 3, 128, 128),
        (9, 3, 64, 256),
        (8, 2, 256, 128),
        (4, 4, 96, 32 if ON_CPU else 16),
    ],
)
def test_chunks_prompts_and_steps_in_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, size: int, block: int
) -> None:
    shape = {**LLAMA, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size}
    shape["hidden_size"] = 32 * heads
    with serving(tmp_path, shape, ALWAYS, block_size=block) as llm, compared(monkeypatch) as seen:
        run(llm, [300, 1100, 40, 700, 260, 1500])
    assert seen.prompts > 10
    assert sum(start > 0 for start in seen.starts) > 5
    assert seen.rests > 10


def test_rows_of_the_host_between_those_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"long_prefill_token_threshold": 300}
    with serving(tmp_path, LLAMA, ALWAYS, **options) as llm, compared(monkeypatch) as seen:
        run(llm, [30, 2000, 20, 1500, 40, 1200], steps=1)
    assert seen.rests > 3
    assert seen.scattered > 3 or not ON_CPU  # on a GPU vLLM puts steps before prompts


def test_prompts_that_begin_alike_share_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"enable_prefix_caching": True}
    with serving(tmp_path, LLAMA, ALWAYS, **options) as llm, compared(monkeypatch) as seen:
        first = run(llm, [1500, 1600], prefix=1000, steps=60)
        assert any(start % 512 for start in seen.starts)  # where the pages of the first prompt end
        chunks = seen.prompts
        assert run(llm, [1500, 1600], prefix=1000, steps=60) == first
    assert seen.prompts == chunks  # all is there already


def test_requests_that_lose_their_pages_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [900, 800, 700, 600]
    options = {"block_size": 32, "num_gpu_blocks_override": 96, "max_model_len": 2048}
    with serving(tmp_path, LLAMA, ALWAYS, **options) as llm, compared(monkeypatch) as seen:
        tokens = run(llm, lengths, steps=1)
    assert seen.prompts > 8
    assert all(tokens)


def test_chunks_change_nothing(tmp_path: Path) -> None:
    """With a K that is a number each row keeps the same keys whatever rows are computed with it. In float32:
    products of other shapes round otherwise."""
    settings = {"top_k": 64, "min_context": 0}
    if not ON_CPU:
        pytest.skip("the tiles of a GPU are cut where chunks end")
    tokens = []
    for chunk in (512, 4096):
        folder = tmp_path / str(chunk)
        folder.mkdir()
        with serving(folder, {**LLAMA, "dtype": "float32"}, settings, max_num_batched_tokens=chunk) as llm:
            tokens.append(run(llm, [300, 3000, 1200], steps=40))
            del llm
    assert tokens[0] == tokens[1]


def test_a_request_that_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, LLAMA, ALWAYS) as llm, compared(monkeypatch) as seen:
        run(llm, [300, 5000, 700], cancel=1)
    assert seen.prompts > 3


def test_layers_with_a_sliding_window_are_the_host_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, GEMMA, ALWAYS) as llm, compared(monkeypatch) as seen:
        why = {name: layer.impl.why_not for name, layer in layers_of(llm).items()}
        run(llm, [300, 2000, 700])
    assert list(why.values()) == ["it has sliding_window", None, "it has sliding_window"]
    assert seen.prompts > 3


def test_groups_of_layers_of_one_kind_have_pages_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ["full_attention"] * 4 + ["sliding_attention"]
    shape = {**GEMMA, "num_hidden_layers": 5, "layer_types": kinds}
    with serving(tmp_path, shape, ALWAYS) as llm, compared(monkeypatch) as seen:
        run(llm, [300, 2000, 40, 700], steps=1)
    assert seen.rests > 3


def test_attention_that_the_host_derives_from_ours_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked local attention: three of four layers, over the last 512 tokens at most."""
    with serving(tmp_path, LLAMA4, ALWAYS) as llm, compared(monkeypatch) as seen:
        run(llm, [300, 2000, 700], steps=1)
    assert seen.prompts > 3
    assert any(start % 512 or start > 512 for start in seen.starts)  # of the one layer that sees everything


def test_layers_of_a_draft_are_the_host_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "draft"
    small.mkdir()
    (small / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 1}))
    draft = {"method": "draft_model", "model": str(small), "num_speculative_tokens": 2}
    draft["attention_backend"] = "CUSTOM"
    settings = {**ALWAYS, "top_k": [32, 64]}
    options = {"speculative_config": draft, "max_num_seqs": 16}  # of more, drafts alone would fill a batch
    with serving(tmp_path, LLAMA, settings, **options) as llm, compared(monkeypatch) as seen:
        why = {name: layer.impl.why_not for name, layer in layers_of(llm).items()}
        run(llm, [300, 1500])
    assert sorted(why.values(), key=str) == [None, None, "it is of a draft model"]
    assert seen.prompts > 3


@pytest.mark.parametrize(
    ("shape", "options", "why"),
    [
        (
            {"attn_logit_softcapping": 30.0, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
            {},
            "soft",
        ),
        ({}, {"kv_cache_dtype": "fp8"}, "its cache is fp8"),
    ],
)
def test_what_is_not_taken_is_the_host_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any], options: dict[str, Any], why: str
) -> None:
    with serving(tmp_path, {**GEMMA, **shape} if shape else LLAMA, ALWAYS, **options) as llm:
        reasons = [layer.impl.why_not for layer in layers_of(llm).values()]
        with compared(monkeypatch) as seen:
            run(llm, [300, 700])
    assert all(reason is not None for reason in reasons)
    assert any(why in reason for reason in reasons)
    assert seen.batches == 0


def prompts_beside_drafts(folder: Path) -> int:
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    options = {"speculative_config": drafts, "max_num_seqs": 16}
    with pytest.MonkeyPatch.context() as patch, serving(folder, LLAMA, ALWAYS, **options) as llm:
        with compared(patch) as seen:
            run(llm, [300, 1500])
        return seen.prompts


def test_steps_of_several_drafts_are_the_host_s(tmp_path: Path) -> None:
    # After it vLLM 0.32 starts no other model in the process, for it stumbles over a module of Numba's.
    assert alone(prompts_beside_drafts, tmp_path) > 3
