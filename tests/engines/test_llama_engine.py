"""The engine llama on tiny models: texts stay whole, what llama.cpp refuses is told, and nothing that it
returns is ignored."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("xllamacpp")

from sparsek import SparseKConfig
from sparsek.engines.base import Part, attending_layers
from sparsek.engines.llama import LlamaEngine
from sparsek.engines.llama_text import _whole
from sparsek.integrations import llama_cpp as integration

from .. import tiny_gguf
from ..tiny_gguf import BOS, EOS, MANY_SPACES, SPACES, TinyModel

TEXT = "The quick brown fox jumps over the lazy dog."
SPARSE = SparseKConfig(top_k=8, dense_layers=(), min_context=0)

Opened = Callable[[TinyModel], LlamaEngine]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    def write_and_open(model: TinyModel) -> LlamaEngine:
        return LlamaEngine(str(model.write(tmp_path / "tiny.gguf")), threads=1)

    return write_and_open


# ---- Texts


def test_long_tokens_are_printed_whole(opened: Opened) -> None:
    engine = opened(tiny_gguf.llama(says=SPACES))
    made = list(engine.generate(engine.encode("x"), 20, None))
    assert made == [SPACES] * 20
    assert engine.decode(made) == " " * (20 * MANY_SPACES)


def test_what_a_buffer_is_too_small_for_is_asked_for_again() -> None:
    given, sizes = b"0123456789", []

    def fill(sign: int) -> Callable[[Any, int], int]:
        def filled(room: Any, size: int) -> int:
            sizes.append(size)
            if size < len(given):
                return sign * len(given)
            room[: len(given)] = given
            return len(given)

        return filled

    for sign in (-1, 1):
        assert _whole(fill(sign), ctypes.c_char, 4) == given
    assert sizes == [4, 10, 4, 10]
    for fill_nothing in (lambda _room, _size: -(2**31), lambda _room, size: -size - 1):
        with pytest.raises(ValueError, match="the text is too long"):
            _whole(fill_nothing, ctypes.c_char, 4)


def test_no_end_token_behind_a_text(opened: Opened) -> None:
    model = tiny_gguf.llama()
    model.fields["tokenizer.chat_template"] = tiny_gguf.CHATML
    expected = opened(model)
    model.fields["tokenizer.ggml.add_eos_token"] = True
    engine = opened(model)
    for text in (TEXT, "", "</s>"):
        assert engine.encode(text) == expected.encode(text)
        assert engine.encode_chat(text) == expected.encode_chat(text)
    assert engine.encode("") == [BOS]
    assert engine.encode_chat("x</s>").count(EOS) == 1  # markup that stands in the text stays


def test_a_zero_byte_never_cuts_a_text(opened: Opened) -> None:
    model = tiny_gguf.llama()
    model.fields["tokenizer.chat_template"] = tiny_gguf.CHATML
    engine = opened(model)
    for encode in (engine.encode, engine.encode_chat):
        with pytest.raises(ValueError, match=r"zero byte \(U\+0000\), at character 5"):
            encode("Hello\0 there")


def test_chat_formats(opened: Opened) -> None:
    model = tiny_gguf.llama()
    assert opened(model).encode_chat("Hi") == opened(model).encode("Hi")
    model.fields["tokenizer.chat_template"] = tiny_gguf.CHATML
    engine = opened(model)
    text = "a long line\n" * 2000
    assert text.strip() in engine.decode(engine.encode_chat(text))


# ---- What llama.cpp refuses, in its own words


def with_unknown_tokenizer(model: TinyModel) -> None:
    model.fields["tokenizer.ggml.pre"] = "unheard-of"


def without_a_key(model: TinyModel) -> None:
    del model.of_model["block_count"]


def without_a_tensor(model: TinyModel) -> None:
    del model.tensors["blk.1.attn_v.weight"]


def with_a_tensor_of_another_shape(model: TinyModel) -> None:
    model.tensors["blk.1.attn_v.weight"] = np.zeros((3, 64), np.float32)


def of_unknown_architecture(model: TinyModel) -> None:
    model.architecture = "unheard-of"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_unknown_tokenizer, "unknown pre-tokenizer type: 'unheard-of'"),
        (without_a_key, "key not found in model: llama.block_count"),
        (without_a_tensor, "tensor 'blk.1.attn_v.weight' not found"),
        (with_a_tensor_of_another_shape, "tensor 'blk.1.attn_v.weight' has wrong shape"),
        (of_unknown_architecture, "unknown model architecture: 'unheard-of'"),
    ],
)
def test_the_first_error_is_told(opened: Opened, change: Callable[[TinyModel], None], reason: str) -> None:
    model = tiny_gguf.llama()
    change(model)
    with pytest.raises(ValueError, match=rf"llama.cpp cannot load .*tiny\.gguf: .*{reason}"):
        opened(model)
    opened(tiny_gguf.llama())  # and does not stay


def test_the_log_of_the_host_keeps_its_errors() -> None:
    logs: list[Any] = []
    integration.keep_log(lambda callback, show: logs.extend([callback, show]))
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    log = kind(logs[0].value)
    integration.take_errors()
    for level, text in [
        (3, b"a warning\n"),
        (5, b"more\n"),
        (4, b"load: error loading model: it"),
        (5, b" is\n"),
    ]:
        log(level, text, None)
    log(4, b"failed to load\n", None)
    assert integration.take_errors() == "load: error loading model: it is\nfailed to load\n"
    log(4, b"\n", None)
    log(4, b"load: error loading model: init: too large\n", None)
    assert integration.cause() == "too large"
    assert integration.cause() == "no reason given"


@pytest.mark.parametrize(
    ("fields", "of_model", "why"),
    [
        ({"tokenizer.ggml.model": "no_vocab"}, {}, "it has no vocabulary"),
        ({}, {"pooling_type": 0, "attention.causal": True}, None),
    ],
)
def test_what_only_llama_cpp_knows(
    opened: Opened, fields: dict[str, Any], of_model: dict[str, Any], why: str | None
) -> None:
    model = tiny_gguf.llama()
    model.fields |= fields
    model.of_model |= of_model
    if why is None:
        opened(model)
    else:
        with pytest.raises(ValueError, match=f"the model does not continue texts, {why}"):
            opened(model)


def test_an_encoder_that_does_not_say_so(opened: Opened) -> None:
    model = tiny_gguf.t5()
    del model.of_model["decoder_start_token_id"]
    with pytest.raises(ValueError, match="it has an encoder"):
        opened(model)
    model = tiny_gguf.bert()
    del model.of_model["attention.causal"], model.of_model["pooling_type"]
    with pytest.raises(ValueError, match="it has no cache"):
        opened(model)


# ---- Logits


@pytest.mark.parametrize("name", ["blk.1.attn_k.weight", "blk.1.attn_v.weight", "output.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("config", [None, SPARSE], ids=["dense", "sparse"])
def test_logits_that_are_not_finite(
    opened: Opened, name: str, value: float, config: SparseKConfig | None
) -> None:
    model = tiny_gguf.llama()
    model.tensors[name][1, 1] = value
    engine = opened(model)
    tokens = engine.encode(TEXT)
    for run in (
        lambda: list(engine.generate(tokens, 2, config)),
        lambda: list(engine.prompt(tokens, config)),
        lambda: list(engine.logits([Part(tokens, config)])),
        lambda: engine.generation(tokens, 2, config),
    ):
        with pytest.raises(ValueError, match="the logits of tiny are not finite: are its weights damaged"):
            run()


# ---- Models with a state, which cannot be rolled back


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        (tiny_gguf.lfm2, {1: [41, 42, 43], 3: [41, 42, 43]}),
        (lambda: tiny_gguf.gemma2(window=16), {0: [16, 16, 16], 1: [41, 42, 43]}),
        (tiny_gguf.llama, {0: [41, 42, 43], 1: [41, 42, 43]}),
    ],
    ids=["hybrid", "sliding window", "llama"],
)
def test_generation_begins_at_the_same_depth_each_time(
    opened: Opened, model: Callable[[], TinyModel], keys: dict[int, list[int]]
) -> None:
    engine = opened(model())
    generate = engine.generation(engine.encode(TEXT)[:40], 3, SPARSE)
    outputs = []
    for _ in range(3):
        seen: dict[int, list[int]] = {}
        values: list[float] = []

        def look(layer: int, problem: Any, out: Any, seen: Any = seen, values: Any = values) -> None:
            seen.setdefault(layer, []).append(int(problem.mask[0, 0].sum()))
            values.append(float(out.sum()))

        with engine.observed(look):
            assert generate() > 0
        assert seen == keys
        outputs.append(values)
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_model_without_attention_generates_again(opened: Opened) -> None:
    engine = opened(tiny_gguf.mamba())
    before = engine.operations()
    generate = engine.generation(engine.encode(TEXT), 3, SPARSE)
    assert all(generate() > 0 for _ in range(3))
    assert engine.operations() == before


def test_what_llama_cpp_cannot_take_back_is_an_error(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened(tiny_gguf.lfm2())
    monkeypatch.setattr(type(engine._model), "has_state", False)
    generate = engine.generation(engine.encode(TEXT)[:40], 3, None)
    generate()
    with pytest.raises(ValueError, match="cannot go back to the first 40 after 43 tokens of 44"):
        generate()


def test_operations_of_layers_that_attend(opened: Opened) -> None:
    engine = opened(tiny_gguf.lfm2())
    assert attending_layers(engine) == [1, 3]
    tokens = engine.encode(TEXT)
    for config, who in ((None, "host"), (SPARSE, "sparse")):
        before = engine.operations()
        list(engine.prompt(tokens, config))
        done = {name: count - before[name] for name, count in engine.operations().items()}
        assert done == {"sparse": 0, "dense": 0, "host": 0, who: 2}
    assert attending_layers(opened(tiny_gguf.mamba())) == []


def test_a_context_that_is_full(opened: Opened) -> None:
    engine = opened(tiny_gguf.llama())
    context = engine._new_context(256, None)
    context.submit([1] * 256)
    with pytest.raises(
        ValueError, match=r"llama.cpp has no room for more after 256 tokens of 256, with tiny"
    ):
        context.submit([1])


# ---- Names


@pytest.mark.parametrize("name", [b"caf\xe9.gguf", "café.gguf".encode(), b"a|b\nc.gguf"])
def test_names_of_any_bytes(tmp_path: Path, name: bytes) -> None:
    file = tmp_path / os.fsdecode(name)
    tiny_gguf.llama().write(tmp_path / "a.gguf").rename(file)
    engine = LlamaEngine(str(file), threads=1)
    assert engine.model == os.fsdecode(name).removesuffix(".gguf").replace("\udce9", "\\xe9")


@pytest.mark.parametrize("first_empty", [False, True])
def test_a_model_in_shards_is_the_model(tmp_path: Path, first_empty: bool) -> None:
    files = tiny_gguf.llama().write_shards(tmp_path, "big", 3, first_empty=first_empty)
    whole = tiny_gguf.llama().write(tmp_path / "whole.gguf")
    engines = [LlamaEngine(str(file), threads=1) for file in (files[0], whole)]
    assert [engine.model for engine in engines] == ["big", "whole"]
    made = [list(engine.generate(engine.encode(TEXT), 5, None)) for engine in engines]
    assert made[0] == made[1]
