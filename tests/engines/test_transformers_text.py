"""Texts and tokens in Transformers: of GGUF files, and of directories of any name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sparsek.engines import transformers as engine
from sparsek.engines.model_file import embedded_model
from sparsek.engines.transformers_text import _bos

from .. import tiny_gguf


@pytest.mark.parametrize(
    ("metadata", "bos"),
    [
        ({"add_bos_token": True, "bos_token_id": 2}, 2),
        ({"add_bos_token": False, "bos_token_id": 2, "model": "llama"}, None),
        ({"bos_token_id": 2, "model": "llama"}, 2),
        ({"bos_token_id": 2, "model": "gpt2"}, None),
        ({"add_bos_token": "false", "bos_token_id": 2}, None),
        ({"add_bos_token": True}, None),
    ],
)
def test_what_a_file_says_of_the_beginning(metadata: dict[str, Any], bos: int | None) -> None:
    assert _bos({f"tokenizer.ggml.{name}": value for name, value in metadata.items()}) == bos


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> engine.TransformersEngine:
    model = tiny_gguf.llama()
    model.fields["tokenizer.chat_template"] = tiny_gguf.CHATML
    return engine.TransformersEngine(str(model.write(tmp_path_factory.mktemp("chat") / "a.gguf")))


def test_a_text_begins_as_the_file_says(
    loaded: engine.TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, chat = loaded.encode("Some text"), loaded.encode_chat("Hello")
    monkeypatch.setattr(loaded._tokenizer, "_bos", 17)
    assert loaded.encode("Some text") == [17, *text]
    monkeypatch.setattr(loaded._tokenizer, "_bos", chat[0])
    assert loaded.encode_chat("Hello") == chat  # once


def test_no_chat_template(loaded: engine.TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded._tokenizer._tokenizer, "chat_template", "")
    assert loaded.encode_chat("Hello") == loaded.encode("Hello")


@pytest.mark.parametrize("text", ["a\0b", "\0", "a\udcffb"])
def test_a_text_that_is_none_is_refused(loaded: engine.TransformersEngine, text: str) -> None:
    for encode in (loaded.encode, loaded.encode_chat):
        with pytest.raises(ValueError, match=r"the text (has a zero byte|is not UTF-8)"):
            encode(text)


@pytest.mark.parametrize("wanted", [True, False, None])
def test_an_end_token_is_not_put_behind_texts(tmp_path: Path, wanted: bool | None) -> None:
    model = tiny_gguf.llama()
    if wanted is not None:
        model.fields["tokenizer.ggml.add_eos_token"] = wanted
    opened = engine.TransformersEngine(str(model.write(tmp_path / "a.gguf")))
    assert opened.encode("") == [tiny_gguf.BOS]
    assert opened.encode("xy") == [tiny_gguf.BOS, *b"xy"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory: tiny, with the embedded model's tokenizer."""
    made, source = tmp_path_factory.mktemp("models") / "tiny", embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(made)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(made)
    return made


@pytest.mark.parametrize("name", [b"caf\xe9", "b\u00fccher|\n".encode()], ids=repr)
def test_a_directory_may_have_any_name(folder: Path, tmp_path: Path, name: bytes) -> None:
    target = tmp_path / os.fsdecode(name)
    try:
        target.symlink_to(folder)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    opened = engine.TransformersEngine(str(target))
    assert opened.model == name.decode(errors="backslashreplace")
    assert opened.decode(opened.encode("The cat")) == "The cat"


def test_a_directory_with_a_damaged_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "damaged"
    shutil.copytree(folder, target)
    description = json.loads((target / "tokenizer.json").read_text())
    description["model"]["merges"] = []
    (target / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"cuts its own words to pieces.*damaged$") as error:
        engine.TransformersEngine(str(target))
    assert "engine llama" not in str(error.value)


def test_a_tokenizer_of_another_model_is_told(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "smaller"
    shutil.copytree(folder, target)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=200, **sizes)).save_pretrained(target)
    opened = engine.TransformersEngine(str(target))
    with pytest.raises(
        ValueError, match=r"gives the token \d+, and the model has the tokens 0 to 199: .*smaller"
    ):
        opened.encode("The cat sat on the mat.")
