"""Flash attention "auto", the default of every llama.cpp: the host asks with a graph of one token a sequence
who takes attention, and gives up flash attention where that is not the device of the layer."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest

pytest.importorskip("xllamacpp")

from sparsek import SparseKConfig
from sparsek.integrations import llama_cpp as integration

from .llama_host import Context, Host, write_float_model

pytestmark = pytest.mark.model

AUTO, LAYERS = -1, 2
SPARSE = SparseKConfig(top_k=8, sinks=4, window=16, dense_layers=(), min_context=0)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    file = tmp_path_factory.mktemp("model") / "float.gguf"
    write_float_model(file, LAYERS)
    return Host(file)


@pytest.fixture(scope="module")
def tokens(host: Host) -> list[int]:
    return host.encode("\n".join(topics.values())[:3000])[:300]


@pytest.fixture(autouse=True)
def _settings() -> Any:
    yield
    integration.configure(None)


def auto(host: Host, config: SparseKConfig | None, **parameters: Any) -> Context:
    return Context(host, config, flash_attn_type=AUTO, **parameters)


def sparse(context: Context, tokens: list[int]) -> int:
    """How many operations were Sparse-K's, while so many tokens were processed."""
    before = integration.counts().sparse
    context.extend(tokens, last=1)
    return integration.counts().sparse - before


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"n_seq_max": 4, "kv_unified": False, "tokens": 2048},
        {"n_seq_max": 4, "kv_unified": True},
        {"n_seq_max": 40, "kv_unified": True},
        {"n_seq_max": 256, "kv_unified": True},
        {"offload_kqv": False},
        {"op_offload": False},
        {"embeddings": True},
    ],
    ids=str,
)
def test_prompts_and_steps_are_ours(host: Host, tokens: list[int], parameters: dict[str, Any]) -> None:
    context = auto(host, SPARSE, **parameters)
    assert sparse(context, tokens) == LAYERS
    assert sparse(context, tokens[:1]) == LAYERS
    assert sparse(context, tokens[:1]) == LAYERS


def test_in_batches_too_short_to_be_told_from_the_question(host: Host, tokens: list[int]) -> None:
    context = auto(host, SPARSE, n_ubatch=64, n_batch=64)
    for start in range(0, 256, 64):  # the host's own, as its graph is used again until the cache has grown
        context.extend(tokens[start : start + 64], last=1)
    assert sparse(context, tokens[256:]) == LAYERS
    assert sparse(context, tokens[:1]) == LAYERS


def test_after_a_warm_up(host: Host, tokens: list[int]) -> None:
    context = auto(host, SPARSE)
    context.extend(tokens[:2])
    context.remove(0, 0)
    assert sparse(context, tokens) == LAYERS


@pytest.mark.parametrize("batch", [64, 512])
def test_contexts_beside_each_other(host: Host, tokens: list[int], batch: int) -> None:
    first = auto(host, SPARSE)
    assert sparse(first, tokens) == LAYERS
    second = auto(host, SPARSE, n_ubatch=batch, n_batch=batch)
    # One that was made and does nothing takes nothing from the others but, at most, the next graph.
    first.extend(tokens[:1])
    assert sparse(first, tokens[:2]) == LAYERS
    third = auto(host, SPARSE)
    del first
    assert sparse(third, tokens) == LAYERS
    second.extend(tokens[:batch], last=1)
    assert sparse(second, tokens[:batch]) == LAYERS
    assert sparse(second, tokens[:1]) == LAYERS


def test_without_a_k_it_is_the_hosts_flash_attention(host: Host, tokens: list[int]) -> None:
    before = integration.counts()
    got, on, off = (Context(host, None, flash_attn_type=kind).extend(tokens, last=9) for kind in (AUTO, 1, 0))
    assert integration.counts() == before
    assert np.array_equal(got, on)
    assert not np.array_equal(got, off)
