"""Small random models of real architectures, and attention functions to compare Sparse-K with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import sdpa_mask

from sparsek import SparseKConfig, attention

VOCABULARY = 97
LAYERS = 3
WINDOW = 24  # of the sliding layers
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}


def llama() -> Any:
    return _made(LlamaForCausalLM, LlamaConfig(**_SHAPE))


def gemma3(window: int = WINDOW, context: int = 512) -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    shape = {**_SHAPE, "max_position_embeddings": context}
    config = Gemma3TextConfig(**shape, sliding_window=window, layer_types=kinds, query_pre_attn_scalar=12)
    return _made(Gemma3ForCausalLM, config)


def gemma2() -> Any:
    """Has a softcap on its scores and one on its logits."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma2Config(
        **_SHAPE,
        sliding_window=WINDOW,
        layer_types=kinds,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=2.0,
    )
    return _made(Gemma2ForCausalLM, config)


def gpt_oss() -> Any:
    """Has attention sinks of its own, which are not supported."""
    return _made(GptOssForCausalLM, GptOssConfig(**_SHAPE, num_local_experts=2, num_experts_per_tok=1))


def _made(model_class: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(12)  # peaked attention: what is kept and dropped must matter
            if "v_proj" in name or "o_proj" in name:
                weight.mul_(4)
    return model


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def use_oracle(model: Any, config: SparseKConfig) -> Any:
    """The reference in float64 under the host's explicit mask, which is always made: no shortcut of the
    integration is in the path."""

    def oracle(
        module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, softcap: Any = None, **_: Any
    ) -> Any:
        assert mask.dtype == torch.bool
        out = attention(
            q.double(),
            k.double(),
            v.double(),
            config=config,
            attn_mask=mask,
            scale=scaling,
            softcap=softcap,
            layer=module.layer_idx,
            backend="reference",
        )
        return out.to(q.dtype).transpose(1, 2).contiguous(), None

    def full_mask(*args: Any, **kwargs: Any) -> Any:
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})

    AttentionInterface.register("oracle", oracle)
    AttentionMaskInterface.register("oracle", full_mask)
    model.set_attn_implementation("oracle")
    return model
