"""Switching Sparse-K on and off in a model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from sparsek import SparseKConfig
from sparsek.integrations import transformers as integration

from .architectures import Architecture
from .tiny_models import LAYERS, gpt_oss, llama, tokens

CONFIG = SparseKConfig(top_k=3, sinks=1, window=2, dense_layers=(), min_context=0)


def tiny(name: str) -> Any:
    return Architecture(name, decodes=True).model()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(tokens(1, 60), use_cache=False).logits


def test_enable_then_disable_restores_the_model() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    before = logits(model)
    assert integration.enable(model, CONFIG) is model
    assert integration.current_config(model) == CONFIG
    assert not torch.equal(logits(model), before)
    integration.disable(model)
    assert model.config._attn_implementation == "eager"
    assert integration.current_config(model) is None
    assert torch.equal(logits(model), before)


def test_disable_without_enable_changes_nothing() -> None:
    model = llama()
    before = model.config._attn_implementation
    integration.disable(model)
    assert model.config._attn_implementation == before


def test_context_manager_restores_what_was_there() -> None:
    model = llama()
    with integration.enabled(model, CONFIG):
        inner = SparseKConfig.pure(7)
        with integration.enabled(model, inner):
            assert integration.current_config(model) == inner
        assert integration.current_config(model) == CONFIG
    assert integration.current_config(model) is None
    with pytest.raises(RuntimeError, match="inside"), integration.enabled(model, CONFIG):
        raise RuntimeError("inside")
    assert integration.current_config(model) is None


def test_two_models_have_their_own_configurations() -> None:
    one, other = integration.enable(llama(), CONFIG), integration.enable(llama(), SparseKConfig.pure(999))
    assert not torch.equal(logits(one), logits(other))
    torch.testing.assert_close(logits(other), logits(integration.disable(other)), rtol=1e-4, atol=1e-4)


def test_from_pretrained_takes_the_name_and_the_saved_configuration(tmp_path: Path) -> None:
    saved = integration.enable(llama(), CONFIG)
    saved.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert SparseKConfig.from_json(written["sparsek"]) == CONFIG
    assert "_sparsek_enabled" not in written
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sparsek").eval()
    assert integration.current_config(loaded) == CONFIG
    torch.testing.assert_close(logits(loaded), logits(saved))


def test_a_configuration_that_is_registered_is_over_the_saved_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration, "_registered", None)
    integration.enable(llama(), CONFIG).save_pretrained(tmp_path)
    integration.register(SparseKConfig.pure(7))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sparsek").eval()
    assert integration.current_config(loaded) == SparseKConfig.pure(7)
    with integration.enabled(loaded, SparseKConfig.pure(8)):
        assert integration.current_config(loaded) == SparseKConfig.pure(8)
    seen: set[int] = set()
    with integration.observed(lambda _layer, problem, _out: seen.add(problem.rule.top_k)):
        logits(integration.enable(loaded, SparseKConfig.pure(9)))
    assert seen == {9}
    with pytest.raises(TypeError, match="config = 7: must be a SparseKConfig"):
        integration.register(7)


def test_default_configuration() -> None:
    assert integration.current_config(integration.enable(llama())) == SparseKConfig()


def test_one_budget_per_layer() -> None:
    everything_but_last = SparseKConfig.pure((1000, 1000, 2))
    model, seen = integration.enable(llama(), everything_but_last), {}
    with integration.observed(lambda layer, problem, _: seen.update({layer: problem.rule.top_k})):
        logits(model)
    assert seen == {0: 60, 1: 60, 2: 2}


def test_wrong_number_of_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=f"top_k has 2 values and the model {LAYERS} layers"):
        integration.enable(llama(), SparseKConfig.pure((1, 2)))


def test_training_is_refused() -> None:
    model = integration.enable(llama(), CONFIG).train()
    with pytest.raises(NotImplementedError, match=r"does not support training: call model\.eval\(\)"):
        logits(model)


def test_gradients_are_refused() -> None:
    model = integration.enable(llama(), CONFIG)
    loss = model(tokens(1, 20), use_cache=False).logits.sum()
    with pytest.raises(NotImplementedError, match="no gradient"):
        loss.backward()


def test_attention_weights_are_refused() -> None:
    model = integration.enable(llama(), CONFIG)
    with pytest.raises(NotImplementedError, match="no attention weights"):
        model(tokens(1, 20), output_attentions=True)


def test_attention_sinks_of_the_model_are_refused() -> None:
    with pytest.raises(
        ValueError, match="GptOssAttention passes 's_aux', which sparsek attention does not know"
    ):
        integration.enable(gpt_oss(), CONFIG)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gpt_oss, "GptOssAttention passes 's_aux'"),
        (
            lambda: tiny("NllbMoeForConditionalGeneration"),
            "NllbMoeAttention is of models that are made for their",
        ),
    ],
)
def test_refused_models_that_were_loaded_with_our_name_say_so_at_the_first_call(
    make: Any, message: str
) -> None:
    integration.register()
    model = make()
    model.set_attn_implementation(integration.NAME)
    with pytest.raises(NotImplementedError, match=message):
        model(tokens(1, 20))


def test_wrapped_models_are_switched() -> None:
    inner = llama()
    adapted = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["q_proj", "v_proj"])).eval()
    for wrapper in (adapted, torch.compile(inner), torch.nn.DataParallel(inner)):
        dense = logits(inner)
        with integration.enabled(wrapper, CONFIG) as same:
            assert same is wrapper
            assert integration.current_config(wrapper) == CONFIG
            assert not torch.equal(logits(inner), dense)
        assert integration.current_config(wrapper) is None
        torch.testing.assert_close(logits(inner), dense)


def test_prefix_tuning_keeps_its_prefix() -> None:
    """The prefix comes as a cache that is filled already."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(llama(), config).eval()
    with torch.no_grad():
        dense = model(tokens(2, 30)).logits
        with integration.enabled(model, SparseKConfig.pure(999)):
            torch.testing.assert_close(model(tokens(2, 30)).logits, dense, rtol=1e-4, atol=1e-4)


def test_what_holds_no_model_or_several_is_refused() -> None:
    with pytest.raises(TypeError, match="model is a Linear: must be a Transformers model, or have one in it"):
        integration.enable(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model is a str"):
        integration.enable("model")
    with pytest.raises(TypeError, match="several Transformers models in the ModuleList"):
        integration.enable(torch.nn.ModuleList([llama(), llama()]))


def test_model_with_attention_of_its_own_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(ValueError, match="BloomForCausalLM does not take its attention"):
        integration.enable(model, CONFIG)
    assert integration.current_config(model) is None
