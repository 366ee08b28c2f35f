"""Tiny random models of several architectures as GGUF files, with a vocabulary of bytes and few tokens more.
Fields and tensors may be changed before they are written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LAYERS, HEADS, KV_HEADS, SIZE = 2, 4, 2, 16
WIDTH = HEADS * SIZE
KIND = gguf.GGUFValueType

BOS, EOS, SPACES = 256, 257, 258  # tokens that are no bytes
MANY_SPACES = 80  # of which the last of them is made
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@dataclass
class TinyModel:
    """Fields and tensors by name; those of the architecture without its prefix."""

    architecture: str
    fields: dict[str, Any]
    of_model: dict[str, Any]
    tensors: dict[str, Any] = field(default_factory=dict)

    def write(self, file: Path) -> Path:
        """In one file."""
        _write(file, self.architecture, self._all_fields(), self.tensors)
        return file

    def write_shards(self, folder: Path, name: str, count: int, *, first_empty: bool = False) -> list[Path]:
        """In `count` files, the first of which has the fields, and no tensors where it is empty."""
        files = [folder / f"{name}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
        names = np.array_split(list(self.tensors), count - first_empty)
        parts = [[], *names] if first_empty else names
        for i, (file, part) in enumerate(zip(files, parts, strict=True)):
            of_shard = {
                "split.no": (i, KIND.UINT16),
                "split.count": (count, KIND.UINT16),
                "split.tensors.count": (len(self.tensors), KIND.INT32),
            }
            fields = {**(self._all_fields() if i == 0 else {}), **of_shard}
            _write(file, self.architecture if i == 0 else None, fields, {n: self.tensors[n] for n in part})
        return files

    def _all_fields(self) -> dict[str, Any]:
        return {**self.fields, **{f"{self.architecture}.{name}": v for name, v in self.of_model.items()}}


def llama(*, says: int | None = None, architecture: str = "llama", context: int = 4096) -> TinyModel:
    """`says`: the token that it always says next."""
    model = _model(architecture, context)
    random = _Random(model)
    random.add("token_embd.weight", _vocabulary(), WIDTH, scale=1.0)
    random.ones("output_norm.weight", WIDTH)
    random.add("output.weight", _vocabulary(), WIDTH)
    for i in range(LAYERS):
        random.attention(f"blk.{i}.")
        random.feed_forward(f"blk.{i}.")
    if says is not None:
        for name, tensor in model.tensors.items():
            tensor[...] = 0 if "attn_output" in name or "ffn_down" in name else tensor
        model.tensors["token_embd.weight"][...] = 1
        model.tensors["output.weight"][says] = 1
    return model


def says_in_a_circle(tokens: list[int], model: TinyModel | None = None) -> TinyModel:
    """It says these tokens, all different, one after the other, and begins anew: after any of them the next,
    and the first after all others."""
    model = model or llama()
    size = len(model.fields["tokenizer.ggml.tokens"])
    for name, tensor in model.tensors.items():
        tensor[...] = 0 if "attn_output" in name or "ffn_down" in name else tensor
    seen, said = (np.zeros((size, WIDTH), np.float32) for _ in range(2))
    seen[:, len(tokens) - 1] = 1  # as after the last
    for i, token in enumerate(tokens):
        seen[token] = np.eye(WIDTH)[i]
        said[tokens[(i + 1) % len(tokens)], i] = 1
    model.tensors |= {"token_embd.weight": seen, "output.weight": said}
    return model


def sentence_piece(words: list[str]) -> TinyModel:
    """A model whose vocabulary is SentencePiece's: bytes, then these words with their first number 259."""
    model, size = llama(), _vocabulary()
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    assert len(tokens) <= size
    tokens += [f"unused{i}" for i in range(size - len(tokens))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (size - 259)]
    del model.fields["tokenizer.ggml.merges"], model.fields["tokenizer.ggml.pre"]
    model.fields |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [0.0] * size,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return model


def lfm2(context: int = 4096) -> TinyModel:
    """A hybrid: layers 0 and 2 are short convolutions, 1 and 3 attend."""
    model, kept = _model("lfm2", context), 3
    model.of_model |= {"block_count": 4, "attention.head_count_kv": [0, KV_HEADS, 0, KV_HEADS]}
    model.of_model["shortconv.l_cache"] = kept
    random = _Random(model)
    random.add("token_embd.weight", _vocabulary(), WIDTH, scale=1.0)
    random.ones("token_embd_norm.weight", WIDTH)
    for i in range(4):
        block = f"blk.{i}."
        random.feed_forward(block)
        if i % 2:
            random.attention(block)
            random.ones(f"{block}attn_q_norm.weight", SIZE)
            random.ones(f"{block}attn_k_norm.weight", SIZE)
        else:
            random.ones(f"{block}attn_norm.weight", WIDTH)
            random.add(f"{block}shortconv.conv.weight", WIDTH, kept)
            random.add(f"{block}shortconv.in_proj.weight", 3 * WIDTH, WIDTH)
            random.add(f"{block}shortconv.out_proj.weight", WIDTH, WIDTH)
    return model


def gemma2(window: int, context: int = 4096) -> TinyModel:
    """Layer 0 has a sliding window, layer 1 sees everything."""
    model = _model("gemma2", context)
    model.of_model |= {"attention.sliding_window": window, "final_logit_softcapping": 30.0}
    random = _Random(model)
    random.add("token_embd.weight", _vocabulary(), WIDTH, scale=1.0)
    random.ones("output_norm.weight", WIDTH)
    for i in range(LAYERS):
        random.attention(f"blk.{i}.")
        random.feed_forward(f"blk.{i}.")
        random.ones(f"blk.{i}.post_attention_norm.weight", WIDTH)
        random.ones(f"blk.{i}.post_ffw_norm.weight", WIDTH)
    return model


def bloom(context: int = 4096) -> TinyModel:
    """Positions by ALiBi alone."""
    model = _model("bloom", context)
    model.of_model |= {"attention.head_count_kv": HEADS, "attention.layer_norm_epsilon": 1e-5}
    random = _Random(model)
    random.add("token_embd.weight", _vocabulary(), WIDTH, scale=1.0)
    random.norm("token_embd_norm", WIDTH)
    random.norm("output_norm", WIDTH)
    for i in range(LAYERS):
        block = f"blk.{i}."
        for part, rows in (
            ("attn_qkv", 3 * WIDTH),
            ("attn_output", WIDTH),
            ("ffn_up", WIDTH),
            ("ffn_down", WIDTH),
        ):
            random.add(f"{block}{part}.weight", rows, WIDTH)
            random.add(f"{block}{part}.bias", rows)
        random.norm(f"{block}attn_norm", WIDTH)
        random.norm(f"{block}ffn_norm", WIDTH)
    return model


def gpt_oss(window: int, context: int = 4096) -> TinyModel:
    """Attention sinks in both layers. Layer 0 has a sliding window, layer 1 sees everything."""
    model, experts = _model("gpt-oss", context), 2
    model.of_model |= {
        "attention.sliding_window": window,
        "expert_count": experts,
        "expert_used_count": 1,
        "expert_feed_forward_length": WIDTH,
    }
    random = _Random(model)
    random.add("token_embd.weight", _vocabulary(), WIDTH, scale=1.0)
    random.ones("output_norm.weight", WIDTH)
    random.add("output.weight", _vocabulary(), WIDTH)
    for i in range(LAYERS):
        block = f"blk.{i}."
        random.attention(block)
        random.add(f"{block}attn_output.bias", WIDTH)
        random.add(f"{block}attn_sinks.weight", HEADS, scale=3.0)
        random.ones(f"{block}post_attention_norm.weight", WIDTH)
        random.add(f"{block}ffn_gate_inp.weight", experts, WIDTH)
        random.add(f"{block}ffn_gate_inp.bias", experts)
        for part in ("gate", "up", "down"):
            random.add(f"{block}ffn_{part}_exps.weight", experts, WIDTH, WIDTH)
            random.add(f"{block}ffn_{part}_exps.bias", experts, WIDTH)
    return model


def bert() -> TinyModel:
    """An encoder alone."""
    model = _model("bert", 512)
    model.of_model |= {"attention.causal": False, "pooling_type": 1, "attention.layer_norm_epsilon": 1e-12}
    model.of_model["attention.head_count_kv"] = HEADS
    model.fields["tokenizer.ggml.token_type_count"] = 2
    random = _Random(model)
    random.add("token_embd.weight", _vocabulary(), WIDTH)
    random.add("token_types.weight", 2, WIDTH)
    random.add("position_embd.weight", 512, WIDTH)
    random.norm("token_embd_norm", WIDTH)
    for i in range(LAYERS):
        block = f"blk.{i}."
        for part, rows, columns in (
            *((f"attn_{name}", WIDTH, WIDTH) for name in ("q", "k", "v", "output")),
            ("ffn_up", WIDTH, WIDTH),
            ("ffn_down", WIDTH, WIDTH),
        ):
            random.add(f"{block}{part}.weight", rows, columns)
            random.add(f"{block}{part}.bias", rows)
        random.norm(f"{block}attn_output_norm", WIDTH)
        random.norm(f"{block}layer_output_norm", WIDTH)
    return model


def t5() -> TinyModel:
    """An encoder and a decoder."""
    model = _model("t5", 512)
    model.of_model |= {
        "attention.layer_norm_epsilon": 1e-6,
        "attention.relative_buckets_count": 32,
        "attention.head_count_kv": HEADS,
        "decoder_start_token_id": 0,
    }
    random = _Random(model)
    random.add("token_embd.weight", _vocabulary(), WIDTH)
    for side in ("enc", "dec"):
        random.ones(f"{side}.output_norm.weight", WIDTH)
        for i in range(LAYERS):
            block = f"{side}.blk.{i}."
            random.ones(f"{block}attn_norm.weight", WIDTH)
            random.ones(f"{block}ffn_norm.weight", WIDTH)
            if i == 0:
                random.add(f"{block}attn_rel_b.weight", 32, HEADS)
            kinds = ("attn", "cross_attn") if side == "dec" else ("attn",)
            for name in (f"{kind}_{part}" for kind in kinds for part in "qkvo"):
                random.add(f"{block}{name}.weight", WIDTH, WIDTH)
            if side == "dec":
                random.ones(f"{block}cross_attn_norm.weight", WIDTH)
            random.add(f"{block}ffn_up.weight", WIDTH, WIDTH)
            random.add(f"{block}ffn_down.weight", WIDTH, WIDTH)
    return model


def mamba(layers: int = LAYERS) -> TinyModel:
    """A model without attention."""
    model, inner, state, rank, kernel = _model("mamba", 4096), 2 * WIDTH, 16, 4, 4
    model.of_model |= {
        "block_count": layers,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "ssm.conv_kernel": kernel,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": rank,
    }
    random = _Random(model)
    random.add("token_embd.weight", _vocabulary(), WIDTH)
    random.ones("output_norm.weight", WIDTH)
    for i in range(layers):
        block = f"blk.{i}."
        random.ones(f"{block}attn_norm.weight", WIDTH)
        random.add(f"{block}ssm_in.weight", 2 * inner, WIDTH)
        random.add(f"{block}ssm_conv1d.weight", inner, kernel)
        random.add(f"{block}ssm_conv1d.bias", inner)
        random.add(f"{block}ssm_x.weight", rank + 2 * state, inner)
        random.add(f"{block}ssm_dt.weight", inner, rank)
        random.add(f"{block}ssm_dt.bias", inner)
        model.tensors[f"{block}ssm_a"] = -np.ones((inner, state), np.float32)
        random.ones(f"{block}ssm_d", inner)
        random.add(f"{block}ssm_out.weight", WIDTH, inner)
    return model


class _Random:
    """Adds tensors to a model."""

    def __init__(self, model: TinyModel) -> None:
        self._model, self._rng = model, np.random.default_rng(0)

    def add(self, name: str, *shape: int, scale: float = 0.15) -> None:
        self._model.tensors[name] = (scale * self._rng.standard_normal(shape)).astype(np.float32)

    def ones(self, name: str, size: int) -> None:
        self._model.tensors[name] = np.ones(size, np.float32)

    def norm(self, name: str, size: int) -> None:
        self.ones(f"{name}.weight", size)
        self._model.tensors[f"{name}.bias"] = np.zeros(size, np.float32)

    def attention(self, block: str) -> None:
        self.ones(f"{block}attn_norm.weight", WIDTH)
        for name, rows in (("q", WIDTH), ("k", KV_HEADS * SIZE), ("v", KV_HEADS * SIZE), ("output", WIDTH)):
            self.add(f"{block}attn_{name}.weight", rows, WIDTH)

    def feed_forward(self, block: str) -> None:
        self.ones(f"{block}ffn_norm.weight", WIDTH)
        for name in ("gate", "up", "down"):
            self.add(f"{block}ffn_{name}.weight", WIDTH, WIDTH)


def _model(architecture: str, context: int) -> TinyModel:
    of_model = {
        "context_length": context,
        "block_count": LAYERS,
        "embedding_length": WIDTH,
        "feed_forward_length": WIDTH,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": SIZE,
        "attention.value_length": SIZE,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": SIZE,
        "rope.freq_base": 10000.0,
        "vocab_size": _vocabulary(),
    }
    tokens = _tokens()
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in (BOS, EOS) else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": ["Ġ t", "h e"],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.add_bos_token": True,
    }
    return TinyModel(architecture, fields, of_model)


def _vocabulary() -> int:
    return len(_tokens())


def _tokens() -> list[str]:
    """Every byte as byte-level BPE writes it, and what is named above."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    written = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [*(written[byte] for byte in range(256)), "<s>", "</s>", "Ġ" * MANY_SPACES, "Ġt", "he"]


def _write(file: Path, architecture: str | None, fields: dict[str, Any], tensors: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(file, architecture or "none")
    if architecture is None:
        writer.kv_data[0].clear()
    for name, value in fields.items():
        value, kind = value if isinstance(value, tuple) else (value, _kind(value))
        if name == "general.alignment":
            writer.data_alignment = value
        writer.add_key_value(name, value, kind, sub_type=_inner(value) if isinstance(value, list) else None)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    finish(writer)


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _kind(value: Any) -> Any:
    kinds: Iterable[tuple[type, Any]] = (
        (bool, KIND.BOOL),
        (int, KIND.UINT32),
        (float, KIND.FLOAT32),
        (str, KIND.STRING),
        (list, KIND.ARRAY),
    )
    return next(kind for python, kind in kinds if isinstance(value, python))


def _inner(values: list[Any]) -> Any:
    kinds = {str: KIND.STRING, float: KIND.FLOAT32, int: KIND.INT32}
    return kinds[type(values[0])]
