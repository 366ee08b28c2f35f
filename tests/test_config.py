"""SparseKConfig: what it accepts, that it cannot change, and that every form it is stored in reads back."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from sparsek import SparseKConfig
from sparsek.config import budget_name, budget_range, budget_words, parse_layers, parse_top_k

from .strategies import examples

COUNTS = st.integers(0, 2**31 - 1)
BUDGETS = st.just("auto") | st.integers(1, 2**31 - 1)
CONFIGS = st.builds(
    SparseKConfig,
    top_k=BUDGETS | st.lists(BUDGETS, min_size=1, max_size=40).map(tuple),
    sinks=COUNTS,
    window=COUNTS,
    stride=COUNTS,
    tail=st.sampled_from(("none", "centroid")),
    dense_layers=st.lists(st.integers(0, 200), max_size=5).map(tuple),
    min_context=COUNTS,
    check_finite=st.booleans(),
    min_share=st.floats(0, 1),
)


def test_defaults() -> None:
    assert SparseKConfig() == SparseKConfig(
        top_k="auto", sinks=4, window=16, stride=0, tail="centroid", dense_layers=(0,), min_context=2048,
        check_finite=False, min_share=0.0,
    )  # fmt: skip


def test_pure_is_top_k_alone_everywhere() -> None:
    assert SparseKConfig.pure(64) == SparseKConfig(
        top_k=64, sinks=0, window=0, stride=0, tail="none", dense_layers=(), min_context=0, select="query"
    )


def test_it_cannot_be_changed_but_it_can_be_a_key() -> None:
    config = SparseKConfig()
    with pytest.raises(FrozenInstanceError):
        config.sinks = 1  # type: ignore[misc]
    assert {config: 1}[SparseKConfig()] == 1


def test_integers_of_other_libraries_and_lists_become_plain_ones() -> None:
    config = SparseKConfig(top_k=[np.int64(5), "auto"], sinks=np.int32(1), dense_layers=[3, 0, 3])
    assert config == SparseKConfig(top_k=(5, "auto"), sinks=1, dense_layers=(0, 3))
    assert type(config.sinks) is int
    json.dumps(config.to_dict())


@pytest.mark.parametrize("kept", ["sinks", "window", "stride"])
def test_zero_top_k_is_allowed_beside_always_kept_keys(kept: str) -> None:
    nothing = {"top_k": 0, "sinks": 0, "window": 0, "stride": 0}
    assert SparseKConfig(**{**nothing, kept: 1}).top_k == 0  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keeps no key at all"):
        SparseKConfig(**nothing)  # type: ignore[arg-type]


@examples(100)
@given(CONFIGS)
def test_dict_and_json_read_back(config: SparseKConfig) -> None:
    assert SparseKConfig.from_dict(config.to_dict()) == config
    assert SparseKConfig.from_json(config.to_json()) == config
    assert SparseKConfig.from_json(config.to_json(indent=2)) == config
    assert json.loads(config.to_json()) == config.to_dict()


@examples(100)
@given(CONFIGS)
def test_gguf_metadata_reads_back(config: SparseKConfig) -> None:
    metadata = config.to_gguf_metadata()
    assert all(key.startswith("sparsek.") and type(value) in (str, int) for key, value in metadata.items())
    # check_finite is how to run, not what the model wants.
    assert SparseKConfig.from_gguf_metadata(metadata) == replace(config, check_finite=False)


def test_missing_fields_take_their_defaults() -> None:
    assert SparseKConfig.from_dict({}) == SparseKConfig()
    assert SparseKConfig.from_json('{"top_k": 7}') == SparseKConfig(top_k=7)
    assert SparseKConfig.from_gguf_metadata({"sparsek.top_k": 7}) == SparseKConfig(top_k=7)


@pytest.mark.parametrize(
    "config",
    [
        SparseKConfig(),
        SparseKConfig.pure(64),
        SparseKConfig(top_k=(32, "auto", 128), stride=512, dense_layers=(0, 1, 29), min_context=2**31 - 1),
    ],
)
def test_a_gguf_file_carries_it(config: SparseKConfig, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    for key, value in config.to_gguf_metadata().items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    assert "general.architecture" in metadata  # of which the configuration takes no notice
    assert SparseKConfig.from_gguf_metadata(metadata) == config


def test_a_gguf_file_without_it() -> None:
    assert SparseKConfig.from_gguf_metadata({"general.architecture": "llama", "sparsekit.top_k": 1}) is None


@pytest.mark.parametrize(
    ("text", "top_k"),
    [("64", 64), ("auto", "auto"), (" auto ", "auto"), ("64, auto,0", (64, "auto", 0)), ("0", 0)],
)
def test_top_k_of_the_command_line(text: str, top_k: object) -> None:
    assert parse_top_k(text) == top_k


@pytest.mark.parametrize(
    ("text", "layers"), [("", ()), ("none", ()), ("None ", ()), ("0", (0,)), ("0, 1,29", (0, 1, 29))]
)
def test_layers_of_the_command_line(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


def test_names_of_what_is_kept() -> None:
    assert budget_name(None) == 0
    assert budget_name(SparseKConfig()) == "auto"
    assert budget_name(SparseKConfig(64)) == 64
    assert budget_name(SparseKConfig((8, 16))) == "per layer"
    assert budget_name(SparseKConfig(min_share=0.002)) == "share 0.002"
    assert budget_name(SparseKConfig(64, min_share=0.002)) == "share 0.002, K 64"
    assert budget_range({}) == "auto"
    assert budget_range(SparseKConfig(min_share=0.002).to_dict()) == "share 0.002"
    assert budget_range(SparseKConfig((64, 8)).to_dict()) == "8 to 64"
    assert budget_range(SparseKConfig((64, "auto"), min_share=0.01).to_dict()) == "share 0.01, K auto to 64"
    assert budget_words(64) == "K = 64"
    assert budget_words("auto") == "K = auto"
    assert budget_words("share 0.002, K 64") == "share 0.002, K 64"
