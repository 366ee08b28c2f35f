"""Two cards, of which each has half of the layers."""

from __future__ import annotations

import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from .host import ON_CPU, alone
from .test_server import model as exported

# On the CPU vLLM 0.32 loses requests when layers are shared out, with Sparse-K or without.
pytestmark = pytest.mark.skipif(ON_CPU or torch.cuda.device_count() < 2, reason="needs two cards")
model = exported


def taken(_worker: Any) -> int:
    """Attentions that Sparse-K has computed in this worker."""
    from sparsek.integrations import vllm_backend

    return vllm_backend.operations["sparse"]


def answer(folder: Path, parts: int) -> tuple[list[int], list[int]]:
    """Of a prompt of 6000 tokens, greedily; and what each worker had to do."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    import vllm

    llm = vllm.LLM(
        str(folder),
        max_model_len=8192,
        attention_backend="CUSTOM",
        additional_config={"sparsek": {"select": "tile", "top_k": 64}},
        pipeline_parallel_size=parts,
        enforce_eager=True,
        gpu_memory_utilization=0.5,
    )
    tokens = llm.get_tokenizer().encode("\n".join(topics.values()))[:6000]
    params = vllm.SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    (done,) = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    work = llm.collective_rpc(taken)
    llm.llm_engine.engine_core.shutdown()  # this process waits for its children when it ends
    return list(done.outputs[0].token_ids), work


def test_layers_on_two(model: Path) -> None:
    one, two = alone(answer, model, 1), alone(answer, model, 2)
    assert two[0] == one[0]
    assert len(two[1]) == 2
    assert all(two[1])
    assert sum(two[1]) == sum(one[1])  # each layer once, and the dense one in one of the workers
