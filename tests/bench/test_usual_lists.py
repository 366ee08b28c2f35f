from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from sparsek import SparseKConfig
from sparsek.bench.kept import mean_kept, usual_kept
from sparsek.bench.usual_lists import with_usual_lists
from sparsek.engines.base import Engine, open_engine
from sparsek.engines.random_weights import randomise
from sparsek.problem import make_problem

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
AUTO = SparseKConfig(min_context=0, dense_layers=(), select="tile")


@pytest.fixture
def random_model(tmp_path: Path) -> Engine:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return open_engine("transformers", str(tmp_path), random_weights=True)


def test_rows_of_random_weights_keep_as_many_as_is_usual(random_model: Engine) -> None:
    tokens = random_model.encode("The quick brown fox jumps over the lazy dog. " * 24)[:1024]
    config = with_usual_lists(AUTO, random_model, tokens, [0, 1, 2])
    assert config is not None
    assert 0 < config.min_share < 0.02
    found: dict[int, float] = {}

    def count(layer: int, p: Any, _out: Any) -> None:
        asking = make_problem(p.q, p.k, p.v, config=config, is_causal=True, scale=p.scale)
        found[layer] = mean_kept(asking)

    with random_model.observed(count):
        list(random_model.prompt(tokens, config))
    assert len(found) == 3  # all layers are alike
    usual = usual_kept(1024)
    for kept in found.values():
        assert abs(kept - usual) < 0.15 * usual


def test_what_was_asked_for_stays(random_model: Engine) -> None:
    tokens = random_model.encode("x" * 300)
    for config in (None, SparseKConfig(top_k=64), SparseKConfig(min_share=0.01), SparseKConfig()):
        assert with_usual_lists(config, random_model, tokens, [0, 1, 2]) is config
    assert with_usual_lists(AUTO, random_model, [], [0, 1, 2]) is AUTO
    assert with_usual_lists(AUTO, random_model, tokens, []) is AUTO


@pytest.mark.parametrize(("engine", "model"), [("llama", None), ("transformers", None), ("llama", "folder")])
def test_random_weights_need_a_configuration_alone(engine: str, model: str | None, tmp_path: Path) -> None:
    given = str(tmp_path) if model else None
    with pytest.raises(ValueError, match=r"random weights are for .*were given"):
        open_engine(engine, given, random_weights=True)


def test_a_configuration_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot load the configuration of .*"):
        open_engine("transformers", str(tmp_path), random_weights=True)


def test_tokens_near_each_other_are_alike(random_model: Engine) -> None:
    tokens = torch.tensor(random_model.encode("x" * 1022))
    assert len(tokens) == 1022
    assert 0 <= tokens.min() <= tokens.max() < LLAMA["vocab_size"]
    assert torch.equal(tokens, torch.tensor(random_model.encode("y" * 1022)))
    same = [float((tokens[n:] == tokens[:-n]).float().mean()) for n in (1, 4, 256)]
    assert same[0] > 0.7 > 0.3 > same[1]
    assert same[2] < 0.1
    base = math.isqrt(LLAMA["vocab_size"])
    slow = tokens // base
    assert (slow[1:] != slow[:-1]).sum() <= 3


def test_a_model_whose_queries_cannot_be_found_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    config = LlamaConfig(**{**LLAMA, "hidden_size": 8})
    with pytest.raises(ValueError, match=r"type 'llama' has none of the layers qkv_proj, q_proj, k_proj"):
        randomise(model, config)
