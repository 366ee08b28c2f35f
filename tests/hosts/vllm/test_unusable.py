"""A vLLM that Sparse-K cannot use says so, and is not measured; and which layers are asked for."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from vllm.config.attention import AttentionConfig

from sparsek.cli import info as cli_info
from sparsek.cli import main
from sparsek.config import SparseKConfig
from sparsek.engines.vllm import VllmEngine
from sparsek.integrations import vllm_backend
from sparsek.integrations.vllm_versions import tried, unreadable

from .host import LLAMA, ON_CPU, OWN_NAME, layers_of, serving

DEVICE = "cpu" if ON_CPU else "cuda"
ALWAYS = SparseKConfig(min_context=0, select="auto" if ON_CPU else "tile", top_k=16, sinks=1, window=1)
PROMPT = [7] * 3000


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would be logged once as a warning: vLLM's own function for it remembers earlier tests."""
    messages: list[str] = []
    monkeypatch.setattr(vllm_backend.log, "warning_once", lambda text, *args: messages.append(text % args))
    return messages


def with_another_cache(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As a vLLM whose cache has a layout that nobody knows."""
    host = importlib.import_module(f"sparsek.integrations.vllm_{DEVICE}")
    monkeypatch.setattr(host.Layer, name, lambda *_: unreadable([1, 2, 3], DEVICE))


def engine_of(folder: Path, shape: dict[str, Any] = LLAMA) -> VllmEngine:
    (folder / "config.json").write_text(json.dumps(shape))
    with pytest.MonkeyPatch.context() as patch:
        if ON_CPU:  # where vLLM packs its weights; vLLM's own random ones do here
            patch.setattr("sparsek.engines.vllm.randomise", lambda *_: None)
        return VllmEngine(str(folder), device=DEVICE, random_weights=True)


@pytest.mark.parametrize("when", ["why_not_usable", "why_not_readable"])
def test_dense_is_not_measured_against_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str], when: str
) -> None:
    with_another_cache(monkeypatch, when)
    engine = engine_of(tmp_path)
    assert len(engine.requests([PROMPT], 1, None)) == 1
    with pytest.raises(ValueError, match=r"leaves all attention of .* to vLLM .*layout.*It works with vLLM"):
        engine.requests([PROMPT], 1, ALWAYS)
    (message,) = set(told)
    assert tried(DEVICE) in message


def test_a_model_of_which_vllm_keeps_all_layers_is_not_measured(tmp_path: Path) -> None:
    windows = {
        **LLAMA,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 64,
    }
    engine = engine_of(tmp_path, windows)
    with pytest.raises(ValueError, match=r"leaves all attention of .*: it has sliding_window"):
        engine.requests([PROMPT], 1, ALWAYS)


def test_info_tells_whether_this_version_was_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def engines() -> Any:
        assert main(["info", "-o", "json"]) == 0
        return json.loads(capsys.readouterr().out)["engines"]["vllm"]

    assert engines() == "ready"
    monkeypatch.setattr(cli_info, "package_version", {"vllm": "0.99.1"}.get)
    assert engines() == f"vLLM 0.99.1 was not tried: Sparse-K works with {tried('cuda')}"


@pytest.mark.skipif(
    "backend_per_kind" not in AttentionConfig.__dataclass_fields__, reason="this vLLM has one for all layers"
)
@pytest.mark.parametrize(
    ("kinds", "ours"), [({"full_attention": OWN_NAME}, True), ({"sliding_window": OWN_NAME}, False)]
)
def test_kinds_of_layers_can_be_asked_for_apart(tmp_path: Path, kinds: dict[str, str], ours: bool) -> None:
    options: dict[str, Any] = {"attention_backend": None, "attention_config": {"backend_per_kind": kinds}}
    with serving(tmp_path, LLAMA, {}, **options) as llm:
        assert {isinstance(x.impl, vllm_backend.SparseLayer) for x in layers_of(llm).values()} == {ours}
