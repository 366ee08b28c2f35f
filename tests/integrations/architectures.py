"""Every causal and encoder-decoder architecture of the installed Transformers, as a tiny random model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import torch
import transformers
from transformers.models.auto import modeling_auto as auto

VOCABULARY: Final = 97
WINDOW: Final = 16  # of sliding layers
_MOST_WEIGHTS: Final = 100_000_000

# Patterns of an integer field's whole name, and what it is made.
_SIZES: Final = [
    (re.compile(pattern), value)
    for pattern, value in {
        r"(.*_)?vocab_size(_.*)?|.*_vocab": VOCABULARY,
        r".*_token_(id|index)": 2,
        r"(num_|n_)?(\w+_)?(hidden_)?layers?": 4,
        r"(\w+_)?hidden_size|d_model|n_embd|embedding_size": 64,
        r"word_embed_proj_dim|emb(ed)?_dim|dim|lru_width": 64,
        r"rotary_dim": 8,
        r"qk_head_dim": 32,
        r"mamba_(d_head|headdim)|\w*head_dim|d_kv|d_head|head_size|linear_head_dim": 16,
        r"mamba_(n|num)_heads|n_mamba_heads": 8,
        r"(\w+_)?(num_)?key_value_heads|n_kv_heads|kv_n_heads": 2,
        r"(\w+_)?(num_|n_)?(\w+_)?heads?": 4,
        r"(\w+_)?intermediate_size|\w*ffn_dim|\w*ffn_hidden_size|n_inner|d_ff|dff|dim_ff": 64,
        r"\w*lora_rank|adapter_rank|mamba_dt_rank|time_step_rank": 16,
        r"(\w+_)?num_(\w+_)?experts|n_(routed_)?experts": 4,
        r"(\w+_)?experts_per_tok(en)?|moe_topk|moe_k": 2,
        r"n_group|topk_group|num_expert_group|n(um)?_shared_experts|first_k_dense_replace": 1,
        r"sliding_window|\w*attention_window\w*|local_attention_window_len|window_size": WINDOW,
        r"(\w+_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|seq_length": 256,
        r"index_topk": 8,
        r"mamba_d_state|state_size|ssm_state_size": 8,
        r"(mamba_)?n_?groups": 1,
        r"(mamba_)?chunk_size": 32,
    }.items()
]
_HYBRID: Final = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_SLIDING: Final = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
# What follows from nothing in the defaults.
_ALSO: Final[dict[str, dict[str, Any]]] = {
    "bailing_hybrid": {"layer_types": _HYBRID},
    "bamba": {"attn_layer_indices": [1, 3]},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "cohere_compass_text": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _SLIDING}
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {
        "layer_types": _SLIDING,
        "num_kv_shared_layers": 2,
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {"layer_types": _SLIDING, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 12, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {
        "attention_hidden_size": 128,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_headdim": 16,
    },
}


@dataclass(frozen=True)
class Architecture:
    """A class of models. `decodes`: it has an encoder beside its decoder."""

    name: str
    decodes: bool

    def model(self) -> Any:
        """One with random weights. Raises whatever this version of it raises where it cannot be made tiny."""
        model_class = getattr(transformers, self.name)
        config = tiny_config(model_class.config_class)
        with torch.device("meta"):
            size = sum(weight.numel() for weight in model_class(config).parameters())
        if size > _MOST_WEIGHTS:
            raise ValueError(f"{size} weights are not tiny")
        model = model_class(config).eval().float()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim >= 2:  # attention must be peaked, or nothing in it matters
                    factor = 0.5 if "embed" in name else 1.5 * weight.shape[-1] ** -0.5
                    weight.copy_(factor * torch.randn(weight.shape, generator=generator))
        return model


def all_architectures() -> list[Architecture]:
    """In the order of Transformers' own tables."""
    found: dict[str, Architecture] = {}
    for table, decodes in (
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, False),
        (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, True),
        (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, False),  # on texts alone
    ):
        for names in table.values():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, Architecture(name, decodes))
    return list(found.values())


def tiny_config(config_class: Any) -> Any:
    """The default configuration with small sizes in it and in its parts."""
    config = config_class(**_shrunk(config_class()))
    if "is_decoder" in config.to_dict():
        config.is_decoder = True
    return config


def _shrunk(config: Any) -> dict[str, Any]:
    fields = {name: _small(name, value) for name, value in config.to_dict().items()}
    changed = {name: value for name, value in fields.items() if value is not None}
    for part in config.sub_configs or {}:
        changed.pop(part, None)
        if getattr(config, part, None) is not None:
            changed[part] = {"model_type": getattr(config, part).model_type, **_shrunk(getattr(config, part))}
    if "kv_lora_rank" in fields:  # keys and values of all heads come from one latent vector
        changed["num_key_value_heads"] = changed["num_attention_heads"]
    return {**changed, **_ALSO.get(config.model_type, {})}


def _small(name: str, value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    sizes = [size for pattern, size in _SIZES if pattern.fullmatch(name)]
    return min(sizes[0], value) if sizes else None
