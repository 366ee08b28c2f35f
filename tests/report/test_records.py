from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsek.report.records import read_records
from sparsek.report.words import shown_all

from .samples import bench_record, eval_record, tune_record

RETRIEVAL = {"task": "passkey", "logprob": -1.0}


def written(folder: Path, text: str | bytes, name: str = "records.json") -> str:
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(file)


@pytest.mark.parametrize("lines", [False, True])
def test_kinds_are_told_apart(tmp_path: Path, lines: bool) -> None:
    records = [bench_record(64, 0), eval_record(16), RETRIEVAL, tune_record(), bench_record(64, 8)]
    text = "\n".join(map(json.dumps, records)) + "\n\n" if lines else json.dumps(records, indent=2)
    file = written(tmp_path, text)
    found = read_records([file])
    assert [len(found.bench), len(found.eval), len(found.tune)] == [2, 1, 1]
    assert found.bench[1] == shown_all(records[4])
    assert found.files == {"bench": [file], "eval": [file], "tune": [file]}


def test_one_record_alone(tmp_path: Path) -> None:
    assert len(read_records([written(tmp_path, json.dumps(tune_record()))]).tune) == 1


def test_no_files() -> None:
    found = read_records([])
    assert not found.bench
    assert not found.files


def test_committed_records_are_read() -> None:
    folder = Path(__file__).parents[2] / "benchmarks"
    found = read_records([str(folder / "quality.jsonl"), str(folder / "speed-llama.jsonl")])
    assert found.bench
    assert found.eval


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there is no record in it"),
        ("[]", "there is no record in it"),
        (b"\xff\xfe", "not a UTF-8 text"),
        ('{"a": 1', "neither JSON nor JSONL, line 1"),
        ("[" * 100_000, "nested too deeply"),
        ("3\n4", "record 1: neither of bench nor of eval nor of tune; it holds 3"),
        ('{"tokens": 4, "ms": 1}', "neither of bench nor of eval nor of tune; it holds 'tokens', 'ms'"),
        ({**bench_record(64, 8), "avg_ts": "fast"}, "avg_ts = 'fast'"),
        ({**bench_record(64, 8), "n_prompt": True}, "n_prompt = 'True'"),
        ({**eval_record(16), "kl_mean": float("nan")}, "NaN is no number"),
        ({**eval_record(16), "kl_mean": 10**400}, "kl_mean = '1000"),
        ({**eval_record(16), "kl_se": -3}, "kl_se = '-3'"),
        ({**eval_record(16), "same_top": "abc"}, "same_top = 'abc'"),
        ({**eval_record(16), "context": 0}, "context = '0'"),
        ({**eval_record(16), "context": 10**9}, "context = '1000000000'"),
        ({**eval_record(16), "top_k": "x" * 900}, "top_k = 'xxx"),
        ({**eval_record(16), "mass": [None, [0.1, -5]]}, "mass is not one list of numbers from 0 to 1"),
        ({**bench_record(64, 8), "samples_ns": 5}, "samples_ns = '5'"),
        ({**bench_record(64, 8), "avg_ts": -5.0}, "avg_ts = '-5.0'"),
        (
            {**eval_record(16), "mass": [None, [0.1], [0.1, 0.2]]},
            "mass is not one list of numbers from 0 to 1 per layer",
        ),
        ({**eval_record(16), "config": {"top_k": -1}}, "top_k = -1: must be an integer from 0"),
        ({**eval_record(16), "config": {"top_k": [1, 2]}}, "gives 2 values and the model has 3 layers"),
        ({**tune_record(), "frontier": [3]}, "3 is no point"),
        ({**tune_record(), "tuned": {"step": "x"}}, "a point: the field 'config' is missing"),
        ({k: v for k, v in eval_record(16).items() if k != "context"}, "the field 'context' is missing"),
    ],
)
def test_errors_name_the_file(tmp_path: Path, content: Any, message: str) -> None:
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    file = written(tmp_path, text, "bad file.json")
    with pytest.raises(ValueError, match=r"bad file\.json") as error:
        read_records([file])
    assert message in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        read_records([str(tmp_path / "absent.json")])
