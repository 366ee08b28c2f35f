"""tools/generate_docs.py: the parts whose records may not be there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("click")

from sparsek import SparseKConfig
from sparsek.bench.attention_call import AttentionRecord

ENVIRONMENT = {
    "gpu": "Some GPU",
    "cuda": "13.0",
    "cudnn": 91501,
    "torch_version": "2.11.0+cu130",
    "triton_version": "3.6.0",
}


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, with records in `tmp_path`."""
    file = Path(__file__).parents[1] / "tools" / "generate_docs.py"
    spec = importlib.util.spec_from_file_location("generate_docs", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RECORDS", tmp_path)
    return module


def record(**changed: Any) -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(AttentionRecord.__dataclass_fields__)
    values.update(
        tokens=8192, queries=8192, heads=32, kv_heads=8, head_dim=128, top_k=384, dtype="bfloat16", ms=0.5,
        baseline="cudnn", baseline_ms=1.25, ratio=2.5, ratio_low=2.4, ratio_high=2.6, max_abs_err=0.012,
        config=SparseKConfig(select="tile").to_dict(), environment=ENVIRONMENT, batch=1, timing="graph",
        peak_mib=300.0, baseline_peak_mib=200.0, host_us=400.0,
    )  # fmt: skip
    return {**values, **changed}


def test_without_records_of_a_gpu_nothing_is_said(tool: ModuleType) -> None:
    assert tool.gpu() == ""


def test_records_of_a_gpu_are_two_tables(tool: ModuleType, tmp_path: Path) -> None:
    records = [
        record(),
        record(tokens=1024, queries=1024, top_k=1024, baseline="flash"),
        record(baseline="flex", ratio=1.75),
        record(queries=1, batch=8, ms=0.0125, baseline_ms=0.05, ratio=4.0, baseline="flash"),
    ]
    (tmp_path / "attention-gpu.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    quality = {
        "model": "M",
        "text": "T",
        "device": "cuda",
        "config": SparseKConfig().to_dict(),
        "context": 8192,
        "kept_mean": 462.6,
    }
    quality |= {"ppl_ratio": 1.001, "ppl_ratio_se": 0.002, "kl_mean": 0.009, "kl_se": 0.001, "same_top": 0.96}
    (tmp_path / "quality-gpu.jsonl").write_text(json.dumps(quality) + "\n")
    text = tool.gpu()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    ours = ["0.5000", "2.50 (2.40-2.60)"]
    assert rows[2:4] == [
        ["8192", "384", "1.25 cudnn", *ours, "1.75", "1.2e-02", "1.50"],
        ["1024", "all", "1.25 flash", *ours, "-", "1.2e-02", "1.50"],
    ]
    assert rows[9] == ["M", "T", "8192", "384", "463", "1.0010 ± 0.0020", "0.0090 ± 0.0010", "0.960"]
    assert rows[6:7] == [
        ["8192", "8", "384", "0.0500 flash", "0.0125", "4.00 (2.40-2.60)", "400 µs", "1.2e-02", "1.50"],
    ]
    assert "32/8 heads of 128, bfloat16, Some GPU, PyTorch 2.11.0+cu130, CUDA 13.0, cuDNN 9.15.1" in text
    assert "Times: replayed CUDA graphs." in text


def test_a_whole_model_on_a_gpu_is_a_table_beside_them(tool: ModuleType, tmp_path: Path) -> None:
    dense = {
        "n_prompt": 0,
        "n_depth": 4096,
        "avg_ts": 16.2,
        "stddev_ts": 1.3,
        "speedup": None,
        "samples_ns": [1, 2, 3],
        "operations": {},
    }
    dense["environment"] = ENVIRONMENT | {"transformers_version": "5.17.0"}
    ours = dense | {"avg_ts": 48.6, "speedup": 3.0, "speedup_low": 2.8, "speedup_high": 3.1}
    (tmp_path / "attention-gpu.jsonl").write_text(json.dumps(record()) + "\n")
    (tmp_path / "quality-gpu.jsonl").write_text("")
    assert "A whole model" not in tool.gpu()
    (tmp_path / "speed-gpu.jsonl").write_text(json.dumps(dense) + "\n" + json.dumps(ours) + "\n")
    text = tool.gpu()
    row = next(line for line in text.splitlines() if line.startswith("| generation"))
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "generation after 4096",
        "16 ± 1",
        "49 ± 1",
        "3.00 (2.80-3.10)",
    ]
    assert "Some GPU, Transformers 5.17.0, PyTorch 2.11.0+cu130, CUDA 13.0, cuDNN 9.15.1." in text
    assert "median of 3 paired" in text
