"""`sparsek serve`: the server in a process of its own, and a client that speaks HTTP with it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("xllamacpp")

from sparsek.engines.model_file import embedded_model

from .. import tiny_gguf
from ..waiting import HANGS
from .conftest import Sparsek

pytestmark = pytest.mark.model

CONTEXT = 4096


class Served:
    """A running `sparsek serve`; what it writes to stderr goes to a file, so that it never waits for us."""

    def __init__(self, log: Path, *options: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "sparsek", "serve", "--port", "0", *options]
        with log.open("w") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), log.read_text()
        self.address = line.split()[-1]

    def get(self, path: str) -> Any:
        with urlopen(self.address + path, timeout=HANGS) as answer:
            return json.load(answer)

    def says(self, pattern: str, count: int = 1) -> list[re.Match[str]]:
        """The lines of the log that are like this, when there are so many."""
        for _ in range(100):
            found = list(re.finditer(f"^{pattern}$", self.log.read_text(), re.MULTILINE))
            if len(found) >= count:
                break
            time.sleep(0.1)
        assert len(found) == count, self.log.read_text()
        return found

    def chat(self, text: str, tokens: int = 8) -> dict[str, Any]:
        with self.request(text, tokens) as answer:
            result: dict[str, Any] = json.load(answer)
        return result

    def stream(self, text: str, tokens: int = 8) -> list[str]:
        """The data of each event."""
        with self.request(text, tokens, stream=True) as answer:
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            lines = [line.decode().strip() for line in answer]
        assert all(line.startswith("data: ") for line in lines if line)
        return [line.removeprefix("data: ") for line in lines if line]

    def request(self, text: str, tokens: int, **more: Any) -> Any:
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "temperature": 0,
            **more,
        }
        request = Request(
            f"{self.address}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return urlopen(request, timeout=HANGS)

    def end(self, number: int = signal.SIGINT) -> int:
        """Exit code."""
        self.process.send_signal(number)
        return self.process.wait(HANGS)

    def counts(self) -> tuple[int, ...]:
        """Operations with Sparse-K, with our dense kernel, and given back; logged at the end."""
        found = re.search(r"operations: (\d+) with Sparse-K, (\d+) .* (\d+) given back", self.log.read_text())
        assert found
        return tuple(map(int, found.groups()))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Any]:
    """Starts servers, and ends those that the test leaves."""
    started: list[Served] = []

    def start(*options: str, debug: bool = True) -> Served:
        more = ["--debug"] if debug else []
        started.append(Served(tmp_path / f"{len(started)}.log", *more, *options))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()


def long_text(sentences: int) -> str:
    return " ".join(f"Item {i} of the list is a box of {i * 7} apples." for i in range(sentences))


def test_answers_with_sparse_k(served: Any) -> None:
    server = served("-c", str(CONTEXT), "--parallel", "2", "-k", "64", "--min-context", "1024")
    assert server.get("/health") == {"status": "ok"}
    assert server.get("/v1/models")["data"][0]["id"] == "SmolLM2-135M-Instruct.Q4_1"

    *chunks, last = server.stream("Who are you?", 16)
    assert last == "[DONE]"
    choices = [choice for chunk in chunks for choice in json.loads(chunk)["choices"]]
    assert len("".join(choice["delta"].get("content") or "" for choice in choices)) > 16
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] in (["stop"], ["length"])

    answer = server.chat(long_text(160) + " How many apples are there?")
    assert 2500 < answer["usage"]["prompt_tokens"] < CONTEXT
    assert answer["choices"][0]["finish_reason"] == "length"

    with ThreadPoolExecutor(2) as pool:
        questions = ["What is two plus two?", "Write the word banana three times."]
        sums, fruit = (a["choices"][0]["message"]["content"] for a in pool.map(server.chat, questions))
    assert "two plus two" in sums.lower()
    assert "banana" in fruit.lower()

    with pytest.raises(HTTPError) as refused:
        server.chat(long_text(400))
    assert refused.value.code == 400
    assert "context size" in json.load(refused.value)["error"]["message"]

    assert server.end() == 0
    sparse, dense, by_host = server.counts()
    assert sparse >= 29 * 3  # 29 of the model's 30 layers, in batches of 512 tokens
    assert dense > 0
    assert by_host == 0


def test_obeys_what_the_model_carries(served: Any, sparsek: Sparsek, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    sparsek("annotate", str(embedded_model()), str(model), "-k", "64", "--min-context", "0")
    server = served("-c", "1024", "-m", str(model))
    server.chat(long_text(20))
    assert server.end() == 0
    sparse, dense, _ = server.counts()
    assert sparse > 0
    assert dense > 0


def test_shards_with_a_name_of_any_bytes(served: Any, tmp_path: Path) -> None:
    first, *_ = tiny_gguf.llama().write_shards(tmp_path, os.fsdecode(b"caf\xe9"), 3, first_empty=True)
    server = served("-c", "64", "-k", "0", "--threads", "1", "-m", str(first))
    assert server.get("/v1/models")["data"][0]["id"] == "caf\\xe9"
    assert server.chat("Hi", 4)["usage"]["completion_tokens"] == 4
    assert server.end() == 0


def test_a_zero_byte_is_part_of_a_question(served: Any, tmp_path: Path) -> None:
    server = served(
        "-c", "64", "-k", "0", "--threads", "1", "-m", str(tiny_gguf.llama().write(tmp_path / "tiny.gguf"))
    )
    whole, cut = (server.chat(text, 1)["usage"]["prompt_tokens"] for text in ("a\0bcd", "a"))
    assert whole == cut + 4


def test_dense_leaves_attention_to_llama_cpp(served: Any) -> None:
    server = served("-c", "512", "-k", "0")
    answer = server.chat("What is two plus two?")["choices"][0]["message"]["content"]
    assert "two plus two" in answer.lower()
    assert server.end(signal.SIGTERM) == 0
    assert server.counts() == (0, 0, 0)


def test_ends_at_once_in_the_middle_of_an_answer(served: Any) -> None:
    server = served("-c", str(CONTEXT), "-k", "64")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.chat, long_text(150), 500)
        time.sleep(1)
        code = server.end()
        with pytest.raises((OSError, HTTPException)):  # the client sees that the connection was closed
            asked.result()
    assert code == 0


READ = r"\d\d:\d\d:\d\d read (\d+) tokens in \d+\.\d\d s \(\d+\.\d tokens/s\), (\d+) from the cache"
WROTE = r"wrote (\d+)(?: in \d+\.\d\d s \(\d+\.\d tokens/s\))?"


def test_says_what_it_does(served: Any) -> None:
    """At the start, of every answer, and of requests that get none; nothing else."""
    options = ["-c", "1024", "--parallel", "2", "-k", "32", "--min-context", "512", "--threads", "1"]
    server = served(*options, debug=False)
    server.says("SmolLM2-135M-Instruct.Q4_1: K 32, context 1024, slots 2, threads 1")
    server.says("attention: Sparse-K from 512 tokens of context on; dense layers: 0")

    answers = [server.chat("Hi", 1), server.chat(long_text(40)), server.chat(long_text(40) + " Why?")]
    lines = server.says(f"{READ}; {WROTE}; (Sparse-K|dense, below min_context 512)", 3)
    for line, usage in zip(lines, [answer["usage"] for answer in answers], strict=True):
        read, cached, written = map(int, line.groups()[:3])
        assert read + cached == usage["prompt_tokens"]
        assert cached == usage["prompt_tokens_details"]["cached_tokens"]
        assert written == usage["completion_tokens"]
    assert int(lines[2][2]) > 512
    assert [line[4] for line in lines] == ["dense, below min_context 512", "Sparse-K", "Sparse-K"]

    with server.request("Hi", 3, n=2):
        pass
    server.says(f"{READ}; {WROTE}; .*", 5)
    with pytest.raises(HTTPError, match="400"):
        server.request("Hi", 3, n=3)
    with pytest.raises(HTTPError, match="400"):
        server.chat(long_text(100))
    server.says(r"\S+ refused: request \(\d+ tokens\) exceeds the available context size \(1024 tokens\).*")

    answer = server.request(long_text(45), 900, stream=True)
    answer.readline()
    answer.close()
    server.says(r"\S+ broken off by the client after \d+ tokens")
    assert server.end() == 0
    assert len(server.log.read_text().splitlines()) == 2 + 5 + 2


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["-k", "0"], "llama.cpp's own, dense, for K is 0"),
        (
            ["-k", "8"],
            r"dense, for the context of 256 tokens is below min_context, 2048 \(--min-context 0 uses",
        ),
        (["-k", "300", "--min-context", "0"], "dense, for K 300 keeps all of the 256 tokens"),
        (["--dense-layers", "0,1", "--min-context", "0"], "dense, for dense_layers names every layer"),
        (["--min-context", "0"], "Sparse-K; dense layers: 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_says_whether_sparse_k_will_run(served: Any, tmp_path: Path, options: list[str], why: str) -> None:
    model = str(tiny_gguf.llama().write(tmp_path / "tiny.gguf"))
    server = served("-c", "128", "--threads", "1", "-m", model, *options, debug=False)
    server.says(f"attention: {why}.*")
    assert server.chat("Hello", 2)["usage"]["completion_tokens"] == 2
    server.says(f"{READ}; {WROTE}; {'Sparse-K' if why.startswith('Sparse') else 'dense'}.*")


def test_says_that_the_attention_of_a_model_is_not_taken(served: Any, tmp_path: Path) -> None:
    model = str(tiny_gguf.mamba().write(tmp_path / "mamba.gguf"))
    server = served("-c", "128", "--threads", "1", "-m", model, "--min-context", "0", debug=False)
    server.says("attention: llama.cpp's own, dense: Sparse-K does not take that of this model")


def test_keys_and_metrics(served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ["-c", "128", "--threads", "1", "-m", str(tiny_gguf.llama().write(tmp_path / "tiny.gguf"))]
    open_to_all = served(*model)
    with pytest.raises(HTTPError, match="501"):
        open_to_all.get("/metrics")
    server = served(*model, "--metrics", "--api-key", "first", "--api-key", "second")
    assert server.get("/health") == {"status": "ok"}
    with pytest.raises(HTTPError, match="401"):
        server.chat("Hi")
    for key in ("first", "second"):
        request = Request(server.address + "/metrics", headers={"Authorization": f"Bearer {key}"})
        with urlopen(request, timeout=HANGS) as answer:
            assert b"llamacpp:prompt_tokens_total" in answer.read()
    monkeypatch.setenv("LLAMA_API_KEY", "third")
    with pytest.raises(HTTPError, match="401"):
        served(*model).chat("Hi")


def test_port_in_use(sparsek_fails: Sparsek) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = sparsek_fails("serve", "--port", port, "-c", "512", "-k", "0")
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "/no/such.gguf"], "no such model: '/no/such.gguf'"),
        (["-c", "9000"], "9000 tokens are more than the model's context of 8192"),
        (["-c", "1"], "1 is not in the range"),
        (["-k", "32,64"], "-k 32,64: serve takes one K"),
        (["--parallel", "0"], "0 is not in the range"),
        (["--port", "70000"], "70000 is not in the range"),
        (["--host", "no.such.host"], "cannot listen on no.such.host, port 8080"),
        (["--sinks", "-1"], "sinks = -1: must be an integer from 0"),
        (["--embeddings"], "serve has no --embeddings: llama.cpp's own llama-server has it"),
        (["--reranking", "-c", "512"], "serve has no --reranking: llama.cpp's own llama-server has it"),
        (["--mmproj", "file"], "serve has no --mmproj: "),
        (["--api-key", ""], "--api-key '': must be printable ASCII characters without spaces"),
        (["--api-key", "a\nb"], "--api-key 'a\\nb': must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_error_line(sparsek_fails: Sparsek, arguments: list[str], message: str) -> None:
    assert message in sparsek_fails("serve", *arguments)
