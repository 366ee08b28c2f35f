"""Which configuration a vLLM server has: `additional_config`, over SPARSEK_* variables, over the default."""

from __future__ import annotations

import logging
import os
from typing import Any, Final

from ..config import SparseKConfig
from .environment import fields_from_environment

log = logging.getLogger("vllm.plugins.sparsek")
_KEY: Final = "sparsek"


def settings(vllm_config: Any, device: str) -> SparseKConfig | None:
    """The configuration for a server with this `VllmConfig`; None where it is `top_k` 0: dense attention.

    Args:
        device: "cpu" or "cuda".

    Raises:
        ValueError, TypeError: what is given is wrong; the message says what, and what is allowed.
    """
    fields = fields_from_environment(os.environ)
    try:
        fields |= _additional(getattr(vllm_config, "additional_config", None))
        config = SparseKConfig.from_dict(fields)
        _check(config, device, num_layers(vllm_config))
    except (ValueError, TypeError) as error:
        raise type(error)(f"the settings of Sparse-K: {error}") from None
    return None if config.top_k == 0 else config


def _additional(given: Any) -> dict[str, Any]:
    """vLLM takes any object there, and for a dictionary only we know our key in it."""
    if not isinstance(given, dict):
        return {}
    if _KEY not in given:
        ours = sorted(given.keys() & SparseKConfig().to_dict().keys())
        if ours:
            log.warning(
                "additional_config has %s: settings of Sparse-K go into an object %r in it", ours, _KEY
            )
        return {}
    fields = given[_KEY]
    if not isinstance(fields, dict):
        raise TypeError(f"additional_config[{_KEY!r}] = {fields!r}: must be an object of fields")
    return fields


def _check(config: SparseKConfig, device: str, num_layers: int) -> None:
    if config.check_finite:
        raise ValueError("check_finite = True: a server cannot stop for one request, it must be False")
    other = "query" if device == "cuda" else "tile"
    if config.select == other:
        meant = "auto or tile on a GPU" if device == "cuda" else "auto or query on the CPU"
        raise ValueError(f"select = {other!r}: must be {meant}")
    if device == "cuda" and config.stride:
        raise ValueError(
            f"stride = {config.stride}: must be 0 on a GPU, its kernels keep none by their place"
        )
    config.check_layers(num_layers)


def num_layers(vllm_config: Any) -> int:
    """Of the model of a `VllmConfig`, without those of a draft."""
    return int(vllm_config.model_config.hf_text_config.num_hidden_layers)
