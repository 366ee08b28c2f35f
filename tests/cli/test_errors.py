"""Bad input: exit code 2 and one line that quotes it and says what to do."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch

from sparsek.cli import main
from sparsek.engines import base
from sparsek.engines.model_file import embedded_model

from .conftest import Sparsek

README = str(Path(__file__).parents[2] / "README.md")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'. sparsek --help lists them."),
        (["benc"], "No such command 'benc'. Did you mean 'bench'?"),
        (["ggml_backend"], "No such command 'ggml_backend'. Did you mean 'ggml-backend'?"),
        (["bench", "--prompst", "9"], "No such option '--prompst'. Did you mean '--prompts'?"),
        (["run", "-p", "x", "--temp", "0.7"], "run has no --temp: it is greedy, it takes the most likely"),
        (["run", "--top-p=0.9"], "run has no --top-p: it is greedy"),
        (["serve", "--temperature", "0"], "serve has no --temperature: each request brings its own sampling"),
        (["eval", "-c", "4q"], "'4q' is not a number of tokens, as in 4096 or 4k"),
        (["eval", "-c", "9k"], "context = 9216: must be 2 to 8192"),
        (["bench", "-p", "k"], "'k' is not a number of tokens >= 0"),
        (["bench", "-n", "-1k"], "'-1k' is not a number of tokens, as in 4096 or 4k"),
        (["run", "-p", "x", "--min-context", "-1"], "-1 is not in the range x>=0"),
        (["run"], "prompt is empty: pass -p TEXT, -f FILE, or -f - for standard input"),
        (["run", "-p", "x", "-c", "4k"], "run has no -c: its context is as long as the prompt and -n need"),
        (["run", "-p", " "], "prompt is empty"),
        (["run", "-p", "x", "-k", "32,64"], "-k 32,64: run takes one K"),
        (["run", "-p", "x", "-k", "many"], "'many' is not a K"),
        (["run", "-p", "x", "-k", "-3"], "'-3' is not a K"),
        (["run", "-p", "x", "-n", "0"], "0 is not in the range"),
        (["run", "-p", "x", "-m", "/no/such.gguf"], "no such model: '/no/such.gguf'"),
        (["run", "-f", "/no/such.txt"], "No such file or directory: /no/such.txt"),
        (["run", "-p", "x", "--engine", "abacus"], "'abacus' is not one of"),
        (["run", "-p", "x", "--sinks", "-1"], "sinks = -1: must be an integer from 0"),
        (["run", "-p", "x", "--tail", "cut"], "'cut' is not one of"),
        (["run", "-p", "x", "--dense-layers", "first"], "dense_layers = 'first'"),
        (["run", "-p", "x", "--threads", "0"], "0 is not in the range"),
        (["bench", "-p", "0", "-n", "0"], "nothing to measure"),
        (["bench", "-p", "12,a"], "'a' is not a number of tokens"),
        (
            ["bench", "-p", "9000", "-n", "0", "-k", "0"],
            "9000 tokens are more than the model's context of 8192",
        ),
        (["eval", "--context", "9000"], "context = 9000: must be 2 to 8192"),
        (["eval", "--context", "1"], "context = 1: must be 2 to 8192"),
        (["eval", "--windows", "0"], "windows = 0: must be at least 1"),
        (["eval", "--where", "prompt", "--generated", "4096"], "generated = 4096: must be 1 to 4095"),
        (["eval", "--retrieval", "-o", "csv"], "-o csv holds one kind of record"),
        (["eval", "--retrieval", "--context", "100"], "context = 100: retrieval needs 512 to 8192"),
        (["eval", "--dense-layers", "30"], "dense_layers = (30,): the model has the layers 0 to 29"),
        (["eval", "--generated", "5"], "--generated needs --where prompt or --where generation"),
        (["eval", "--text", "a\x1b[31mred"], "No such file or directory: a\\x1b[31mred"),
        (["tune", "--max-kl", "0.1", "--context", "64"], "context = 64: must be at least 128"),
        (["tune", "--max-kl", "0.1", "-o", "/tmp"], "this is a directory, give a file: '/tmp'"),
        (["tune", "--max-kl", "0.1", "-o", "/tmp/c", "--records", "/tmp/c"], "two uses: '/tmp/c'"),
        (["tune", "--max-kl", "0.1", "-o", "/tmp/c", "--resume", "/tmp/c"], "two uses: '/tmp/c'"),
        (["tune", "--max-kl", "0.1", "-o", README, "--text", README], "this file has two uses"),
        (["tune"], "give one target: --max-kl, --max-ppl-ratio or --min-speedup"),
        (["tune", "--max-kl", "0.1", "--min-speedup", "2"], "give one target"),
        (["tune", "--max-kl", "nan"], "max_kl = nan: must be above 0"),
        (["tune", "--max-kl", "0.1", "-o", "/no/such/c.json"], "no such directory: '/no/such'"),
        (["tune", "--max-kl", "0.1", "--context", "1024"], "attention is dense below min_context = 2048"),
        (["tune", "--max-kl", "0.1", "--context", "8192", "--text", README], "2 window(s) of 8192 need"),
        (["bench-attention", "--heads", "9", "--kv-heads", "2", "--tokens", "64"], "q has 9 heads and k 2"),
        (["bench-attention", "--tokens", "0"], "'0' is not a number of tokens >= 1"),
        (["bench-attention", "--tokens", "8", "--queries", "9"], "9 queries are more than 8 tokens"),
        (
            ["bench-attention", "--inputs", "model", "--layer", "30", "--tokens", "8"],
            "layer = 30: the model has",
        ),
        (["bench-attention", "-k", "0"], "give a K to measure"),
        (["bench-attention", "--batch", "0"], "0 is not in the range"),
        (["bench-attention", "--batch", "2", "--inputs", "model"], "--batch is for random inputs"),
        (["bench-attention", "--baseline", "flex"], "--baseline flex needs --device cuda"),
        (["info", "--context", "0"], "0 is not in the range"),
        (
            ["tune", "--max-kl", "1", "--device", "cuda", "--engine", "llama"],
            "device 'cuda' needs the engine tra",
        ),
        *(
            pytest.param(
                [*call, "--device", "cuda"],
                f"device 'cuda': PyTorch {torch.__version__} finds no CUDA device",
                marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
            )
            for call in (
                ["bench-attention", "--tokens", "8"],
                ["eval", "--engine", "transformers"],
                ["tune", "--max-kl", "1"],
                ["report", "-o", "/tmp/page.html"],
            )
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_error_line(sparsek_fails: Sparsek, arguments: list[str], message: str) -> None:
    assert message in sparsek_fails(*arguments)


def test_prompt_longer_than_the_context(sparsek_fails: Sparsek, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("word " * 9000)
    line = sparsek_fails("run", "-f", str(file), "--raw", "-n", "10")
    assert re.search(r"the prompt has 9\d\d\d tokens and 10 are to be generated: 9\d\d\d is more", line)
    assert line.endswith("the model's context of 8192")


def test_model_that_is_not_gguf(sparsek_fails: Sparsek, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04 not a model")
    assert f"not a GGUF file (it begins with 'PK\\x03\\x04'): {file}" in sparsek_fails(
        "run", "-p", "x", "-m", str(file)
    )


@pytest.mark.parametrize("size", [4, 20, 1000, 2_000_000, 50_000_000])
def test_truncated_model(sparsek_fails: Sparsek, tmp_path: Path, size: int) -> None:
    file = tmp_path / "cut.gguf"
    with embedded_model().open("rb") as whole:
        file.write_bytes(whole.read(size))
    assert "truncated GGUF file" in sparsek_fails("run", "-p", "x", "-m", str(file))


def test_directory_without_a_model(sparsek_fails: Sparsek, tmp_path: Path) -> None:
    assert "it has no config.json" in sparsek_fails("run", "-p", "x", "-m", str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the text is empty"),
        (b"  \n ", "the text is empty"),
        (b"\xff\xfe\x00binary", "not a UTF-8 text"),
        (b"too short", "the text has 2 tokens"),
        (b"begins well\0 and ends", "text.txt has a zero byte (U+0000), at byte 11: take it out"),
    ],
)
def test_bad_text(sparsek_fails: Sparsek, tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    assert message in sparsek_fails("eval", "--text", str(file), "--context", "64")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON configuration"),
        ("[1]", "must be an object of fields"),
        ('{"topk": 3}', "unknown field 'topk': known are top_k"),
        ('{"top_k": -3}', "top_k = -3"),
    ],
)
def test_bad_configuration_file(sparsek_fails: Sparsek, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    line = sparsek_fails("run", "-p", "x", "--config", str(file))
    assert str(file) in line
    assert message in line


def test_no_standard_input(sparsek_fails: Sparsek, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert "--text - reads standard input, and there is none" in sparsek_fails("eval", "--text", "-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "-p", "x", "-m", "/no/such.gguf"], "no such model: '/no/such.gguf'"),
        (["run"], "the prompt is empty: pass -p TEXT, -f FILE, or -f - for standard input"),
    ],
)
def test_debug_shows_the_traceback_before_the_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*arguments, "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == f"sparsek: {message}"


def test_a_defect_is_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(base, "open_engine", broken)
    with pytest.raises(KeyError, match="oops"):
        main(["run", "-p", "x"])


@pytest.mark.parametrize(
    "command",
    [
        ["run", "-f"],
        ["run", "--raw", "--engine", "transformers", "-f"],
        ["eval", "--text"],
        ["bench", "--text"],
        ["tune", "--max-kl", "0.1", "--text"],
        ["report", "--text"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"before\0after", r"has a zero byte (U+0000), at byte 6: take it out"),
        (b"caf\xe9 au lait", "is not a UTF-8 text (invalid continuation byte at byte 3)"),
    ],
)
def test_every_command_takes_a_text_whole_or_not_at_all(
    sparsek_fails: Sparsek,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    content: bytes,
    message: str,
) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    assert sparsek_fails(*command, str(file)) == f"sparsek: {command[-1]} {file} {message}"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert sparsek_fails(*command, "-") == f"sparsek: standard input {message}"


@pytest.mark.parametrize("option", [["run", "-p"], ["report", "--sentence"]], ids=" ".join)
def test_text_of_an_option_is_whole_too(sparsek_fails: Sparsek, option: list[str]) -> None:
    assert f"{option[1]} has a zero byte (U+0000), at character 1" in sparsek_fails(*option, "a\0b")
    assert f"{option[1]} is not UTF-8 text: '\\xe9' at character 1" in sparsek_fails(*option, "a\udce9b")


def test_a_name_that_is_not_utf8_is_quoted_by_its_bytes(sparsek_fails: Sparsek) -> None:
    assert sparsek_fails("run", "-p", "x", "-m", "caf\udce9") == "sparsek: no such model: 'caf\\xe9'"
    assert sparsek_fails("run", "-f", "caf\udce9") == "sparsek: No such file or directory: caf\\xe9"
    assert sparsek_fails("run", "-f", "caf\udcc3\udca9").endswith("café")  # as a C locale gives it
