"""Every command, on the embedded model, at sizes that take seconds."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsek import SparseKConfig, __version__, policy
from sparsek.bench import planted
from sparsek.bench.attention_call import AttentionRecord
from sparsek.bench.model import BenchRecord
from sparsek.cli import COMMANDS, main
from sparsek.engines.model_file import embedded_model
from sparsek.evaluate.quality import EvalRecord

from .conftest import Sparsek

SPARSE = ["--min-context", "0", "--dense-layers", "0,1"]


def fields(record: type) -> set[str]:
    return set(record.__dataclass_fields__)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples(sparsek: Sparsek, name: str) -> None:
    text = sparsek(name, "--help")
    assert f"sparsek {name}" in text
    assert "Examples:" in text


def test_top_level_help_lists_the_commands(sparsek: Sparsek) -> None:
    text = sparsek("--help")
    assert all(name in text for name in COMMANDS)


def test_the_version_is_told(sparsek: Sparsek) -> None:
    assert sparsek("-V") == sparsek("--version") == f"sparsek {__version__}\n"


def test_numbers_of_tokens_in_k(sparsek: Sparsek) -> None:
    assert "auto at 32768 tokens" in sparsek("info", "-c", "32k")
    call = ["bench-attention", "--queries", "1", "-k", "4", "-r", "1", "-o", "json", "-t", "1"]
    records = json.loads(sparsek(*call, "--tokens", "1k,1500,2K", "--min-context", "1k"))
    assert [r["tokens"] for r in records] == [1024, 1500, 2048]
    assert [r["config"]["min_context"] for r in records] == [1024] * 3
    assert [r["n_threads"] for r in records] == [1] * 3


@pytest.mark.parametrize(
    ("words", "number", "expected"),
    [
        ("sparsek be", 1, ["bench", "bench-attention"]),
        ("sparsek eval --cont", 2, ["--context"]),
        ("sparsek bench -o js", 3, ["json", "jsonl"]),
    ],
)
def test_completion_in_a_shell(words: str, number: int, expected: list[str]) -> None:
    """What the script of `_SPARSEK_COMPLETE=bash_source sparsek` asks for."""
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(number), "_SPARSEK_COMPLETE": "bash_complete"}
    code = "import sys; from sparsek.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **asked}
    )
    assert [line.split(",")[1] for line in done.stdout.splitlines()] == expected


def test_help_needs_nothing_heavy() -> None:
    """--help must be instant: no PyTorch behind it."""
    code = "import sys; from sparsek.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_info_tells_the_processor_and_the_kernels(sparsek: Sparsek) -> None:
    facts = json.loads(sparsek("info", "-o", "json", "--context", "8192"))
    assert facts["processor"]["threads"] >= 1
    assert facts["processor"]["instruction set"] in facts["processor"]["SPARSEK_ISA can be"]
    assert facts["engines"]["transformers"] == "ready"
    assert facts["auto at 8192 tokens"]["K"].startswith("96")
    assert facts["GPU"]["name"] == (
        torch.cuda.get_device_name() if torch.cuda.is_available() else "PyTorch finds no CUDA device"
    )
    assert "reference" in sparsek("info")


@pytest.mark.model
def test_run_answers(sparsek: Sparsek) -> None:
    text = sparsek("run", "-p", "Name the capital of France.", "-n", "16", "-k", "16", *SPARSE)
    assert "Paris" in text


@pytest.mark.model
def test_run_reads_a_file_and_continues_it(
    sparsek: Sparsek, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("One, two, three, four, five, six,")
    assert "seven" in sparsek("run", "-f", str(file), "--raw", "-n", "4", "-k", "0")
    capsys.readouterr()


@pytest.mark.model
def test_bench_records(sparsek: Sparsek) -> None:
    options = ["-p", "96", "-n", "3", "-d", "0,64", "-k", "0,8", "-r", "2", *SPARSE]
    records = json.loads(sparsek("bench", *options, "-o", "json"))
    assert [(r["n_prompt"], r["n_gen"], r["n_depth"], r["top_k"]) for r in records] == [
        (96, 0, 0, 0),
        (96, 0, 0, 8),
        (0, 3, 0, 0),
        (0, 3, 0, 8),
        (0, 3, 64, 0),
        (0, 3, 64, 8),
    ]
    for record in records:
        assert set(record) == fields(BenchRecord)
        assert record["avg_ts"] > 0
        assert len(record["samples_ns"]) == 2
        assert record["environment"]["torch_version"]
        sparse = record["top_k"] != 0
        assert (record["speedup"] is not None) == sparse
        assert (record["verified_rows"] > 0) == sparse
        if sparse:
            assert SparseKConfig.from_dict(record["config"]).top_k == 8
            assert record["max_abs_err"] < 1e-4


@pytest.mark.parametrize("inputs", ["random", pytest.param("model", marks=pytest.mark.model)])
def test_bench_attention_records(sparsek: Sparsek, inputs: str) -> None:
    options = ["--tokens", "300,130", "-k", "8", "--inputs", inputs, "-r", "3", *SPARSE]
    records = json.loads(sparsek("bench-attention", *options, "-o", "json"))
    assert [r["tokens"] for r in records] == [300, 130]
    for record in records:
        assert set(record) == fields(AttentionRecord)
        assert record["max_abs_err"] < 1e-5
        assert record["verified_rows"] >= 64
        assert record["ratio_low"] <= record["ratio"] <= record["ratio_high"]
        assert (record["heads"], record["kv_heads"], record["head_dim"]) == (9, 3, 64)
        assert (record["batch"], record["dtype"], record["timing"]) == (1, "float32", "calls")
        assert record["baseline"] == "sdpa"
        assert [record[name] for name in ("host_us", "peak_mib", "baseline_peak_mib")] == [None] * 3


@pytest.mark.parametrize("baseline", ["topk-mask", "none"])
def test_bench_attention_baselines(sparsek: Sparsek, baseline: str) -> None:
    options = ["--tokens", "200", "--queries", "3", "-k", "8", "--baseline", baseline, "-r", "1", *SPARSE]
    (record,) = json.loads(sparsek("bench-attention", *options, "-o", "json"))
    assert record["queries"] == 3
    assert (record["ratio"] is None) == (baseline == "none")


def test_bench_attention_of_a_batch(sparsek: Sparsek) -> None:
    options = ["bench-attention", "--tokens", "100", "-k", "4", "-r", "1", *SPARSE]
    (record,) = json.loads(sparsek(*options, "--batch", "2", "-o", "json"))
    assert record["batch"] == 2
    assert record["max_abs_err"] < 1e-5
    assert sparsek(*options, "--batch", "2").startswith("| batch |")
    assert "batch" not in sparsek(*options)


def test_bench_attention_on_cuda_is_in_bfloat16(
    sparsek_fails: Sparsek, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(**given: object) -> None:
        raise ValueError(f"{given['dtype']} on {given['device']}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(planted, "planted_inputs", stop)
    call = ["bench-attention", "--device", "cuda"]
    assert sparsek_fails(*call) == "sparsek: bfloat16 on cuda"
    assert sparsek_fails(*call, "--dtype", "float16") == "sparsek: float16 on cuda"


def test_a_k_with_a_point_is_a_share(sparsek: Sparsek, sparsek_fails: Sparsek) -> None:
    call = ["bench-attention", "--tokens", "200", "-r", "1", "--heads", "3", "--baseline", "none", *SPARSE]
    by_k, by_option = (
        json.loads(sparsek(*call, *given, "-o", "json"))[0]
        for given in (["-k", "0.01"], ["--min-share", "0.01"])
    )
    assert by_k["config"] == by_option["config"]
    assert (by_k["config"]["top_k"], by_k["min_share"]) == ("auto", 0.01)
    assert by_k["kept"] == by_option["kept"] < 200
    assert " share 0.01 " in sparsek(*call, "-k", "0.01")
    both = json.loads(sparsek(*call, "-k", "8", "--min-share", "0.01", "-o", "json"))[0]
    assert (both["top_k"], both["min_share"]) == (8, 0.01)
    assert "a share of the softmax like 0.002" in sparsek_fails(*call, "-k", "1.5")


def test_output_formats_agree(sparsek: Sparsek) -> None:
    options = ["bench-attention", "--tokens", "100,120", "-k", "4", "-r", "1", "--heads", "3", *SPARSE]
    table = sparsek(*options, "-o", "md").splitlines()
    assert [len(line) for line in table] == [len(table[0])] * 4
    lines = [json.loads(line) for line in sparsek(*options, "-o", "jsonl").splitlines()]
    rows = list(csv.DictReader(io.StringIO(sparsek(*options, "-o", "csv"))))
    assert [line["tokens"] for line in lines] == [int(row["tokens"]) for row in rows] == [100, 120]
    assert json.loads(rows[0]["config"]) == lines[0]["config"]
    assert rows[0]["environment.cpu"] == lines[0]["environment"]["cpu"]


@pytest.mark.model
def test_eval_records(sparsek: Sparsek) -> None:
    options = ["--context", "128", "--windows", "2", "-k", "8,auto", *SPARSE]
    records = json.loads(sparsek("eval", *options, "-o", "json"))
    assert [r["top_k"] for r in records] == [8, "auto"]
    for record in records:
        assert set(record) == fields(EvalRecord)
        assert record["ppl_ratio"] == pytest.approx(record["ppl"] / record["ppl_dense"])
        assert 0 < record["mass_mean"] <= 1
    assert records[0]["kl_mean"] > records[1]["kl_mean"] > 0


@pytest.mark.model
def test_csv_has_one_value_a_cell(sparsek: Sparsek) -> None:
    options = ["-k", "0,8", *SPARSE, "-o", "csv"]
    for command in (["eval", "--context", "64"], ["bench", "-p", "16", "-n", "0", "-r", "2"]):
        dense, sparse = csv.DictReader(io.StringIO(sparsek(*command, *options)))
        assert not {"mass", "kept", "samples_ns", "environment", "operations"}.intersection(sparse)
        assert (dense["config"], dense["top_k_used"], sparse["top_k_used"]) == ("", "", "8")
        others = [text for name, text in sparse.items() if name != "config"]
        assert not any(text.startswith(("[", "{")) for text in others)
        assert SparseKConfig.from_json(sparse["config"]).dense_layers == (0, 1)


@pytest.mark.model
def test_records_say_what_auto_was(sparsek: Sparsek, monkeypatch: pytest.MonkeyPatch) -> None:
    """And tables show that, whatever auto means by then."""
    monkeypatch.setattr(policy, "AUTO_MIN", 40)
    for command in (["eval", "--context", "64"], ["bench", "-p", "16", "-n", "0", "-r", "1"]):
        (record,) = json.loads(sparsek(*command, "-k", "auto", *SPARSE, "-o", "json"))
        assert (record["top_k"], record["top_k_used"]) == ("auto", 40)
        assert "| auto (40) " in sparsek(*command, "-k", "auto", *SPARSE)


@pytest.mark.model
def test_a_share_is_no_number_in_records(sparsek: Sparsek) -> None:
    for command in (["eval", "--context", "64"], ["bench", "-p", "16", "-n", "0", "-r", "1"]):
        (record,) = json.loads(sparsek(*command, "-k", "0.01", *SPARSE, "-o", "json"))
        assert (record["top_k"], record["top_k_used"]) == ("share 0.01", None)
        assert "| share 0.01 " in sparsek(*command, "-k", "0.01", *SPARSE)


@pytest.mark.model
def test_eval_of_keeping_everything_costs_nothing(sparsek: Sparsek) -> None:
    call = ("eval", "--context", "128", "-k", "128", "--pure", "-o", "json", "--engine")
    (record,) = json.loads(sparsek(*call, "transformers"))
    assert record["ppl_ratio"] == pytest.approx(1, abs=1e-5)
    assert record["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert record["same_top"] == 1
    # Weights of 4 bits make a last bit's difference large; llama.cpp's own two ways are as far apart.
    (record,) = json.loads(sparsek(*call, "llama"))
    assert record["ppl_ratio"] == pytest.approx(1, abs=5e-3)
    assert 0 < record["kl_mean"] < 1e-2


@pytest.mark.model
def test_default_configuration_costs_little_and_pure_top_k_much(sparsek: Sparsek) -> None:
    """The quality that the project promises, on real text."""
    call = ("eval", "--engine", "transformers", "--context", "2048", "-k", "48", "-o", "json")
    (default,) = json.loads(sparsek(*call, "--min-context", "0"))
    assert 0 < default["kept_mean"] < 70
    assert default["ppl_ratio"] < 1.02
    assert default["kl_mean"] < 0.012
    (pure,) = json.loads(sparsek(*call, "--pure"))
    assert pure["ppl_ratio"] > 1.03
    assert pure["kl_mean"] > 4 * default["kl_mean"]


@pytest.mark.model
def test_config_file_and_options_on_top_of_it(sparsek: Sparsek, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(SparseKConfig(top_k=5, sinks=1, window=3, min_context=0).to_json())
    options = ["--config", str(file), "--window", "9", "--dense-layers", "none", "--context", "64"]
    (record,) = json.loads(sparsek("eval", *options, "-k", "5", "-o", "json"))
    expected = SparseKConfig(top_k=5, sinks=1, window=9, min_context=0, dense_layers=())
    assert SparseKConfig.from_dict(record["config"]) == expected
    (record,) = json.loads(sparsek("eval", *options, "-o", "json"))  # its K too, where -k is not given
    assert SparseKConfig.from_dict(record["config"]) == expected


def test_a_k_that_is_not_used_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench-attention", "--tokens", "64", "-k", "8", "-r", "1", "--baseline", "none"]) == 0
    assert (
        "note: at 64 tokens attention is dense whatever K is: min_context is 2048" in capsys.readouterr().err
    )
    assert main(["bench-attention", "--tokens", "64", "-k", "8", "-r", "1", "--min-context", "0"]) == 0
    assert "note" not in capsys.readouterr().err


def test_a_result_is_as_exact_with_an_index(sparsek: Sparsek) -> None:
    """The sums are in another order, so that the last bits may differ."""
    call = (
        "bench-attention",
        "--tokens",
        "500",
        "--queries",
        "1",
        "-k",
        "20",
        "--min-context",
        "0",
        "-r",
        "1",
    )
    with_index, without = (json.loads(sparsek(*call, "-o", "json", *more))[0] for more in (["--index"], []))
    assert (with_index["index"], without["index"]) == (True, False)
    assert 0 < with_index["max_abs_err"] < 1e-5
    assert 0 < without["max_abs_err"] < 1e-5
    assert with_index["kept"] == without["kept"]


@pytest.mark.model
def test_eval_of_a_text_from_standard_input_resumes(
    sparsek: Sparsek, sparsek_fails: Sparsek, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kept.jsonl"
    text = " ".join(f"Box {i} holds {i * 7 % 13} apples." for i in range(150))
    options = ["--text", "-", "--context", "512", "-k", "0,8", *SPARSE, "--retrieval", "--resume", str(file)]

    def run() -> list[dict[str, object]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        records = json.loads(sparsek("eval", *options, "-o", "json"))
        return [{name: x for name, x in record.items() if name != "environment"} for record in records]

    first = run()
    assert [r["top_k"] for r in first[:2]] == [0, 8]
    assert [r["text"] for r in first] == ["standard input"] * len(first)
    assert {r["task"] for r in first[2:]} == {"passkey", "lookup", "repeat"}
    size = file.stat().st_size
    assert run() == first
    assert file.stat().st_size == size
    text += " And more."
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert "is of other work, its text was" in sparsek_fails("eval", *options)


@pytest.mark.model
@pytest.mark.parametrize("where", ["prompt", "generation"])
def test_eval_of_sparse_in_one_part(sparsek: Sparsek, where: str) -> None:
    options = ["--context", "128", "--generated", "16", "-k", "4", *SPARSE]
    (record,) = json.loads(sparsek("eval", *options, "--where", where, "-o", "json"))
    assert (record["where"], record["scored"]) == (where, 16)
    assert record["kl_mean"] > 0


@pytest.mark.model
def test_eval_does_not_resume_with_another_model_of_the_same_name(
    sparsek: Sparsek, sparsek_fails: Sparsek, tmp_path: Path
) -> None:
    file, journal = tmp_path / "model.gguf", str(tmp_path / "journal")
    shutil.copy(embedded_model(), file)
    arguments = ["eval", "-m", str(file), "--context", "32", "-k", "8", "--resume", journal]
    sparsek(*arguments)
    file.write_bytes(file.read_bytes() + b"\0")
    assert "is of other work, its model file was" in sparsek_fails(*arguments)


def test_eval_tells_what_was_scored(sparsek: Sparsek) -> None:
    table = sparsek("eval", "--context", "64", "--where", "prompt", "--generated", "8", "-k", "auto")
    assert "Scored: the last 8 of 64 tokens. Sparse-K: in the prompt alone." in table
    assert "auto (32)" in table


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-m", "sparsek", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_tune_writes_what_eval_takes(sparsek: Sparsek, tmp_path: Path) -> None:
    config, records = tmp_path / "config.json", tmp_path / "records.json"
    output = ["-o", str(config), "--records", str(records)]
    table = sparsek("tune", "--context", "128", "--min-context", "0", "--max-kl", "0.05", *output)
    assert "KL <= 0.05" in table
    found = json.loads(records.read_text())
    assert SparseKConfig.from_json(config.read_text()).to_dict() == found["config"]
    (record,) = json.loads(sparsek("eval", "--context", "128", "--config", str(config), "-o", "json"))
    assert record["config"] == found["config"]
    assert record["top_k"] == "per layer"
