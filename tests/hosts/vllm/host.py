"""vLLM with tiny models of random weights, each forward of which is compared with the host's own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import json
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from sparsek.engines.random_weights import randomise
from sparsek.integrations import vllm_backend

WORST = 0.02  # rounding to bfloat16, of another order of adding
ON_CPU = current_platform.is_cpu()
TAKES_NAMES = hasattr(AttentionBackendEnum, "register")
OWN_NAME = "SPARSEK" if TAKES_NAMES else "CUSTOM"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@contextlib.contextmanager
def serving(folder: Path, shape: dict[str, Any], sparsek: dict[str, Any], **options: Any) -> Iterator[Any]:
    """An LLM of this shape; all that it takes is freed afterwards."""
    (folder / "config.json").write_text(json.dumps(shape))
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_num_batched_tokens": 512,
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": 1 << 30,  # what a test leaves on the card must not end those after it
        "attention_backend": "CUSTOM",
        "disable_log_stats": True,
        **options,
    }
    if ON_CPU:
        del options["gpu_memory_utilization"], options["kv_cache_memory_bytes"]
    llm = vllm.LLM(str(folder), additional_config={"sparsek": sparsek}, **options)
    try:
        # On the CPU vLLM has packed the linear layers by now, and what it made them of stays.
        with contextlib.suppress(ValueError) if ON_CPU else contextlib.nullcontext():
            randomise(model_of(llm), llm.llm_engine.model_config.hf_text_config)
        yield llm
    finally:
        vllm_backend.operations.update(sparse=0, host=0)
        with contextlib.suppress(AttributeError):
            llm.llm_engine.engine_core.shutdown()
        del llm
        with contextlib.suppress(Exception):
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        gc.collect()


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Call it in a process of its own: of a model with CUDA graphs not all memory can be had back."""
    start = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=start) as pool:
        return pool.submit(function, *args).result()


def model_of(llm: Any) -> Any:
    (worker,) = llm.collective_rpc(lambda worker: worker)
    return worker.model_runner.model


def layers_of(llm: Any) -> dict[str, Any]:
    """The attention layers by name."""
    found = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in found.items() if hasattr(layer, "impl")}


@dataclass
class Comparison:
    """What was seen within `compared`: forwards of batches with prompts that were taken, and where the chunks
    of these started; batches with a rest, in one piece or in several; and the largest difference to the
    host's output, in parts of its largest number."""

    batches: int = 0
    starts: list[int] = field(default_factory=list)
    rests: int = 0
    scattered: int = 0
    worst: float = 0.0

    @property
    def prompts(self) -> int:
        return len(self.starts)


@contextlib.contextmanager
def compared(monkeypatch: Any) -> Iterator[Comparison]:
    """Each forward of a batch with a plan is computed by the host as well. Attention itself is dense here,
    for what is compared is everything around it: which rows and which pages are whose."""
    seen, ours = Comparison(), vllm_backend.SparseLayer.forward

    def both(
        self: Any,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        cache: Any,
        metadata: Any,
        output: Any,
        **rest: Any,
    ) -> Any:
        plan = getattr(metadata, "sparsek", None)
        expected = torch.full_like(output, torch.nan)
        if plan is not None:
            output.fill_(torch.nan)
            host = super(vllm_backend.SparseLayer, self).forward
            host(layer, query, key, value, cache, metadata, expected, **rest)
        before = vllm_backend.operations["sparse"]
        out = ours(self, layer, query, key, value, cache, metadata, output, **rest)
        if vllm_backend.operations["sparse"] > before:
            rows = slice(0, metadata.num_actual_tokens)
            difference = (output[rows].float() - expected[rows].float()).abs().max()
            seen.batches += 1
            seen.starts += [p.keys - p.rows for p in plan.prompts]
            seen.rests += plan.rest is not None
            seen.scattered += plan.rest is not None and isinstance(plan.rest[1], torch.Tensor)
            relative = float(difference / expected[rows].float().abs().max())
            assert relative <= WORST, f"{relative} in {layer.layer_name}: {plan.prompts}"
            seen.worst = max(seen.worst, relative)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(vllm_backend.SparseLayer, "forward", both)
        patch.setattr(vllm_backend.SparseLayer, "_keeps_all", lambda *_: False)
        patch.setattr(vllm_backend.dispatch, "attention_into", _dense)
        yield seen


def _dense(out: torch.Tensor, p: Any, _kernel: str) -> None:
    group = p.q.shape[1] // p.k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (p.k, p.v))
    position = torch.arange(p.num_queries, device=out.device) + p.first_position
    mask = torch.arange(p.num_keys, device=out.device) <= position[:, None]
    attend = torch.nn.functional.scaled_dot_product_attention
    out.copy_(attend(p.q, k, v, attn_mask=mask, scale=p.scale))
