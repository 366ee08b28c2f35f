"""Models in GGUF files: shards, files that hold no model, and models that do not continue texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf

from sparsek.engines.gguf_model import read_model, read_one_file
from sparsek.engines.model_file import find_model, fingerprint

from .. import tiny_gguf


@pytest.mark.parametrize("first_empty", [False, True])
def test_shards_are_one_model(tmp_path: Path, first_empty: bool) -> None:
    files = tiny_gguf.llama().write_shards(tmp_path, "big", 3, first_empty=first_empty)
    model = read_model(files[0])
    assert model.files == tuple(files)
    assert model.name == "big"
    assert model.of_model("context_length") == 4096
    whole = read_model(tiny_gguf.llama().write(tmp_path / "whole.gguf"))
    assert whole.name == "whole"
    assert [sum(len(h.tensors) for h in m.headers) for m in (model, whole)] == [
        len(tiny_gguf.llama().tensors)
    ] * 2
    assert find_model(str(files[0])) == files[0]


def test_every_shard_counts_in_the_fingerprint(tmp_path: Path) -> None:
    files = tiny_gguf.llama().write_shards(tmp_path, "big", 3)
    prints = [fingerprint(files[0])]
    for file in files:
        file.write_bytes(file.read_bytes() + b"\0")
        prints.append(fingerprint(files[0]))
    assert len(set(prints)) == 4


def test_another_shard_than_the_first(tmp_path: Path) -> None:
    files = tiny_gguf.llama().write_shards(tmp_path, "big", 3)
    for number in (2, 3):
        file = files[number - 1]
        with pytest.raises(
            ValueError, match=rf"shard {number} of 3, give the first, big-00001-of-00003.gguf: {file}"
        ):
            read_model(file)
    renamed = files[1].rename(tmp_path / "second.gguf")
    with pytest.raises(ValueError, match=f"this is shard 2 of 3, give the first: {renamed}"):
        read_model(renamed)


def test_shards_that_are_not_there_or_not_whole(tmp_path: Path) -> None:
    files = tiny_gguf.llama().write_shards(tmp_path, "big", 3)
    data = files[2].read_bytes()
    files[2].write_bytes(data[:-40_000])
    with pytest.raises(ValueError, match=rf"truncated GGUF file .*: {files[2]}"):
        read_model(files[0])
    files[2].write_bytes(files[1].read_bytes())
    with pytest.raises(ValueError, match=f"this is not shard 3 of 3, or of another model: {files[2]}"):
        read_model(files[0])
    files[2].write_text("none")
    with pytest.raises(ValueError, match=rf"not a GGUF file .*: {files[2]}"):
        read_model(files[0])
    files[2].unlink()
    with pytest.raises(ValueError, match=f"shard 3 of 3 is missing: {files[2]}"):
        read_model(files[0])
    renamed = files[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(
        ValueError, match=f"the first of 3 shards must be named NAME-00001-of-00003.gguf.*{renamed}"
    ):
        read_model(renamed)


def test_shards_with_fewer_tensors_than_the_first_says(tmp_path: Path) -> None:
    files = tiny_gguf.llama().write_shards(tmp_path, "big", 2)
    other = tiny_gguf.llama()
    for name in ("up", "down"):
        del other.tensors[f"blk.1.ffn_{name}.weight"]
    other.write_shards(tmp_path, "other", 2)[1].rename(files[1])
    with pytest.raises(ValueError, match="the shards have 20 tensors, and the first says 21"):
        read_model(files[0])


def test_an_engine_without_shards_says_so(tmp_path: Path) -> None:
    file = tiny_gguf.llama().write_shards(tmp_path, "big", 2)[0]
    with pytest.raises(
        ValueError, match="Transformers does not read a GGUF model in shards, take the engine llama"
    ):
        read_one_file(file)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("adapter", "the GGUF file is a LoRA adapter, not a model"),
        ("mmproj", "is a projector for images or sound, not a model"),
        ("imatrix", "is an importance matrix, not a model"),
    ],
)
def test_files_that_hold_no_model(tmp_path: Path, kind: str, message: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_string("general.type", kind)
    writer.add_tensor("a", np.zeros(4, np.float32))
    tiny_gguf.finish(writer)
    with pytest.raises(ValueError, match=message):
        find_model(str(tmp_path / "other.gguf"))


def test_a_file_without_tensors_holds_no_model(tmp_path: Path) -> None:
    model = tiny_gguf.llama()
    model.tensors.clear()
    with pytest.raises(ValueError, match="has no model in it"):
        read_model(model.write(tmp_path / "vocabulary.gguf"))


@pytest.mark.parametrize(
    ("model", "fields", "why"),
    [
        (tiny_gguf.t5, {}, r"it has an encoder \(t5\)"),
        (tiny_gguf.bert, {}, r"its attention is not causal \(bert\)"),
        (tiny_gguf.llama, {"attention.causal": False}, r"its attention is not causal \(llama\)"),
        (tiny_gguf.llama, {"pooling_type": 3}, r"it makes embeddings of them \(llama\)"),
        (tiny_gguf.llama, {"pooling_type": 4}, r"it makes embeddings of them \(llama\)"),
    ],
)
def test_models_that_do_not_continue_texts(
    tmp_path: Path, model: Any, fields: dict[str, Any], why: str
) -> None:
    made = model()
    made.of_model |= fields
    file = made.write(tmp_path / "model.gguf")
    with pytest.raises(
        ValueError, match=f"the model does not continue texts, {why}, take a causal decoder: {file}"
    ):
        find_model(str(file))


def test_a_decoder_that_names_no_pooling_is_taken(tmp_path: Path) -> None:
    model = tiny_gguf.llama()
    model.of_model |= {"pooling_type": 0, "attention.causal": True}
    assert find_model(str(model.write(tmp_path / "model.gguf")))
