"""Random weights for models of the shape that a `config.json` says: for measuring speed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch

from .base import head_size_of
from .text import check_text

_SPREAD: Final = 0.02  # of linear layers, as models have it before they are trained
_WRITING: Final = ("o_proj.weight", "down_proj.weight")  # layers that add to the hidden states
_MATCHING: Final = ("qkv_proj.weight", "q_proj.weight", "k_proj.weight")
_SIZE: Final = 1.6  # of the numbers in q and k: rows then keep about as many keys of 8192 as of 131072
_WEAKEST: Final = 0.04  # of their dimensions beside the strongest
# A token has two digits, which stay for so many tokens, and have these parts of its embedding's energy.
_SLOW: Final = 256, 0.8
_FAST: Final = 4, 0.2


@torch.no_grad()
def randomise(model: torch.nn.Module, config: Any) -> None:
    """Fill the weights of a model of this Transformers configuration.

    Linear layers are normal numbers, norms 1, biases 0. What layers add to the hidden states is little beside
    the embeddings, so that tokens stay apart and all layers are alike. Tokens near each other are alike, with
    `RandomTokens`, as in texts: with independent ones rows would keep most of a few thousand keys, and hardly
    any of a hundred thousand. In real heads the dimensions of q and k differ in size; so they do here, alike
    in both halves of a head, which rotary positions mix: the slowest are the largest.

    Raises:
        ValueError: the model has no layers with the names that those of queries and keys have here, or they
        are no matrices, as in vLLM on the CPU, which packs them.
    """
    torch.manual_seed(0)
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_size = head_size_of(config)
    written = _SPREAD / math.sqrt(2 * int(config.num_hidden_layers))
    size = torch.linspace(math.sqrt(_WEAKEST), 1, -(-head_size // 2)).square().repeat(2)[:head_size]
    size *= _SIZE / size.square().mean().sqrt() / math.sqrt(config.hidden_size)
    matched = False
    for name, weight in model.named_parameters():
        if weight.dtype.itemsize < 2:
            continue
        if weight.ndim == 1:
            weight.fill_(0 if name.endswith("bias") else 1)
        elif "embed" in name:
            _embed(weight, int(config.vocab_size))
        else:
            weight.normal_(0, written if name.endswith(_WRITING) else _SPREAD)
        if weight.ndim == 2 and name.endswith(_MATCHING):
            rows = len(weight)
            if "qkv" in name:  # the heads of this process, those of the values last
                rows = rows * (heads + kv_heads) // (heads + 2 * kv_heads)
            of_heads = weight[:rows].view(-1, head_size, weight.shape[1])
            of_heads.normal_().mul_(size.to(weight)[:, None])
            matched = True
    if not matched:
        raise ValueError(
            f"random weights: a model of type {config.model_type!r} has none of the layers "
            f"{', '.join(name.removesuffix('.weight') for name in _MATCHING)} as a matrix"
        )


def _embed(weight: torch.Tensor, vocabulary: int) -> None:
    """The embeddings of all tokens, or in one of several processes of some: [tokens, hidden]."""
    base = math.isqrt(vocabulary)
    token = torch.arange(len(weight), device=weight.device)
    slow, fast = (torch.randn(base, weight.shape[1]).to(weight) for _ in range(2))
    weight.copy_(math.sqrt(_SLOW[1]) * slow[token // base % base])
    weight.add_(math.sqrt(_FAST[1]) * fast[token % base])


class RandomTokens:
    """For a model whose weights are random: as many tokens as a text has bytes."""

    eos = None

    def __init__(self, vocabulary: int) -> None:
        self._base = math.isqrt(vocabulary)

    def encode(self, text: str) -> list[int]:
        generator = torch.Generator().manual_seed(0)
        count = len(check_text(text).encode())

        def digits(steady: int) -> torch.Tensor:
            drawn = torch.randint(self._base, (-(-count // steady),), generator=generator)
            return drawn.repeat_interleave(steady)[:count]

        slow, fast = digits(_SLOW[0]), digits(_FAST[0])
        return (slow * self._base + fast).tolist()

    encode_chat = encode

    def pieces(self, tokens: Iterable[int]) -> Iterator[bytes]:
        return (bytes([token % 256]) for token in tokens)
