"""lm-evaluation-harness over Transformers, started by `sparsek exec`: `make test-lm-eval`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

pytest.importorskip("lm_eval")

ROOT = Path(__file__).parents[3]
WORDS = 400  # of a passage
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{rest}}}}"
target_delimiter: " "
"""
CONTINUE = """
output_type: loglikelihood
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""
GENERATE = """
output_type: generate_until
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a directory, and two tasks: to judge how a passage goes on, and to go on."""
    folder = tmp_path_factory.mktemp("lm-eval")
    subprocess.run([sys.executable, ROOT / "tools" / "export_model.py", folder / "model"], check=True)
    words = "\n".join(topics[name] for name in sorted(topics)).split()
    passages = [words[i : i + WORDS + 20] for i in range(0, 4 * WORDS, WORDS)]
    lines = [
        json.dumps({"text": " ".join(passage[:WORDS]), "rest": " ".join(passage[WORDS:])})
        for passage in passages
    ]
    (folder / "passages.jsonl").write_text("\n".join(lines))
    for name, kind in (("judge", CONTINUE), ("write", GENERATE)):
        text = TASK.format(name=name, data=folder / "passages.jsonl") + kind
        (folder / f"{name}.yaml").write_text(text)
    return folder


def lm_eval(folder: Path, attention: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    model = f"pretrained={folder / 'model'},attn_implementation={attention},dtype=float32"
    return subprocess.run(
        [sys.executable, "-m", *launcher, "--model", "hf", "--model_args", model, "--tasks", "judge,write"]
        + ["--include_path", str(folder), "--device", "cpu", "--batch_size", "1", "--log_samples"]
        + ["--output_path", str(folder / "results.json")],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        check=False,
    )


def results(folder: Path, attention: str, *launcher: str) -> tuple[float, list[Any]]:
    """Perplexity of how the passages go on, and what is written after each."""
    for old in folder.glob("*.json*"):
        if old.name != "passages.jsonl":
            old.unlink()
    done = lm_eval(folder, attention, *launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = folder.glob("results_*.json")
    (samples,) = folder.glob("samples_write_*.jsonl")
    texts = [json.loads(line)["resps"] for line in samples.read_text().splitlines()]
    return json.loads(file.read_text())["results"]["judge"]["perplexity,none"], texts


def test_k_reaches_the_models_of_lm_eval(folder: Path) -> None:
    exec_ = ("sparsek", "exec")
    dense = results(folder, "sdpa", "lm_eval")
    every_key = results(folder, "sparsek", *exec_, "-k", "0", "-m", "lm_eval")
    few = results(folder, "sparsek", *exec_, "--pure", "-k", "2", "-m", "lm_eval")
    assert every_key[0] == pytest.approx(dense[0], rel=1e-4)
    assert every_key[1] == dense[1]
    assert few[0] > 1.2 * dense[0]
    assert few[1] != dense[1]


def test_without_exec_the_name_is_unknown(folder: Path) -> None:
    done = lm_eval(folder, "sparsek", "lm_eval")
    assert done.returncode != 0
    assert "sparsek" in done.stderr
