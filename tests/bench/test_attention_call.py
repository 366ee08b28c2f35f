from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparsek import SparseKConfig
from sparsek.bench.attention_call import AttentionRecord, bench_attention
from sparsek.bench.inputs import random_inputs

RECORDS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", ["attention.jsonl", "break-even.jsonl"])
def test_older_records_are_read(name: str) -> None:
    for line in (RECORDS / name).read_text().splitlines():
        record = AttentionRecord(**json.loads(line))
        assert (record.batch, record.timing) == (1, "calls")
        assert record.host_us is record.peak_mib is record.baseline_peak_mib is None


def test_random_inputs_have_a_batch_and_a_seed() -> None:
    shape = {"tokens": 6, "queries": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "batch": 3}
    one, same, other = (random_inputs(**shape, seed=seed) for seed in (0, 0, 1))
    assert one.q.shape == (3, 4, 2, 8)
    assert one.k.shape == one.v.shape == (3, 2, 6, 8)
    assert torch.equal(one.v, same.v)
    assert not torch.equal(one.v, other.v)


def test_a_baseline_that_is_unknown_or_for_another_device_is_an_error() -> None:
    inputs = random_inputs(tokens=6, queries=6, heads=1, kv_heads=1, head_dim=8)
    messages = {
        "best": "must be one of 'fastest'",
        "flex": "needs a CUDA device",
        "fa3": "needs a GPU like the H100",
    }
    for baseline, message in messages.items():
        with pytest.raises(ValueError, match=message):
            bench_attention(inputs, SparseKConfig.pure(2), baseline=baseline, threads=1, repetitions=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("queries", [4096, 1])
def test_a_record_on_cuda(queries: int) -> None:
    inputs = random_inputs(
        tokens=4096,
        queries=queries,
        heads=8,
        kv_heads=2,
        head_dim=128,
        batch=2,
        dtype="bfloat16",
        device="cuda",
    )
    config = SparseKConfig(select="tile")
    record = bench_attention(inputs, config, index=queries == 1, threads=1, repetitions=2)
    assert (record.device, record.batch, record.timing) == ("cuda", 2, "graph")
    assert record.baseline in ("cudnn", "flash", "fa3")
    assert record.kept is not None
    assert 64 < record.kept < 4096
    inputs_mib = sum(x.nbytes for x in (inputs.q, inputs.k, inputs.v)) / 2**20
    assert record.peak_mib is not None
    assert record.baseline_peak_mib is not None
    assert min(record.peak_mib, record.baseline_peak_mib) > inputs_mib
    assert record.host_us is not None
    assert record.host_us > 0
    assert record.environment["gpu"] == torch.cuda.get_device_name()
