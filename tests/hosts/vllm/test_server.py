"""`vllm serve` as users start it, with a real model, and OpenAI's own client."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import openai
import pytest

from .host import ON_CPU, OWN_NAME

START = 300  # seconds, at most
KEEP_ALL = '{"sparsek": {"top_k": 1000000, "min_context": 0}}'
TEXT = "\n".join(topics.values())


@dataclass
class Server:
    client: openai.OpenAI
    model: str
    log: Path

    def complete(self, prompt: Any, tokens: int = 16, **options: Any) -> str:
        return str(self.answer(prompt, tokens, **options).choices[0].text)

    def answer(self, prompt: Any, tokens: int = 16, *, cache: str = "", **options: Any) -> Any:
        """Greedily. `cache`: the name of a prefix cache; a new one is empty."""
        if cache:
            options["extra_body"] = {"cache_salt": cache}
        return self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=tokens, temperature=0, **options
        )

    def tokens(self, count: int, start: int = 0) -> list[int]:
        """Tokens of real text: the same ones for the same numbers."""
        url = str(self.client.base_url).replace("/v1/", "/tokenize")
        request = urllib.request.Request(
            url,
            data=json.dumps({"model": self.model, "prompt": TEXT[start : start + 8 * count]}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            tokens: list[int] = json.load(answer)["tokens"]
        return tokens[:count]


class serving_at:  # noqa: N801
    """`vllm serve` of a model with these options, in processes of its own."""

    def __init__(self, model: Path, folder: Path, *options: str, **environment: str) -> None:
        self.model, self.log, self.options, self.environment = model, folder / "log", options, environment

    def __enter__(self) -> Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            **self.environment,
        }
        del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
        environment.setdefault(
            "VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0))))
        )
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        command += [
            "--served-model-name",
            "smol",
            "--port",
            str(port),
            "--max-model-len",
            "8192",
            *self.options,
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", timeout=120)
        self.wait(client)
        return Server(client, "smol", self.log)

    def wait(self, client: openai.OpenAI) -> None:
        until = time.monotonic() + START
        while time.monotonic() < until and self.process.poll() is None:
            try:
                client.models.list()
                return
            except openai.APIConnectionError:
                time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(f"the server does not start: {self.log.read_text()[-3000:]}")

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as vLLM takes it."""
    folder = tmp_path_factory.mktemp("model") / "smol"
    tool = Path(__file__).parents[3] / "tools" / "export_model.py"
    subprocess.run([sys.executable, str(tool), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # In float32, for texts are compared that were computed in products of other shapes.
    options = ["--attention-backend", OWN_NAME, "--enable-prompt-tokens-details"]
    options += ["--max-num-batched-tokens", "2048", "--dtype", "float32" if ON_CPU else "bfloat16"]
    with serving_at(model, tmp_path_factory.mktemp("server"), *options) as running:
        yield running


def test_the_configuration_is_logged_once(server: Server) -> None:
    assert server.log.read_text().count("Sparse-K attends to long prompts") == 1


def test_a_long_prompt_and_its_answer_as_a_stream(server: Server) -> None:
    prompt = server.tokens(8000)
    stream = server.answer(prompt, stream=True, cache="stream")
    parts = [part.choices[0].text for part in stream if part.choices]
    assert len(parts) > 4
    assert "".join(parts) == server.complete(prompt, cache="whole")


def test_eight_requests_of_different_lengths_at_once(server: Server) -> None:
    prompts = [server.tokens(300 * (i + 1), start=1000 * i) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(server.complete, prompts))
    assert all(together)
    if ON_CPU:
        # From 2048 tokens on K goes by where a chunk ends, and chunks by what else is in a batch.
        short = [prompt for prompt in prompts if len(prompt) < 2048]
        assert together[: len(short)] == [server.complete(prompt, cache="alone") for prompt in short]


def test_a_prefix_that_is_there_already(server: Server) -> None:
    prefix, questions = server.tokens(3000, 20000), [server.tokens(400, start) for start in (60000, 90000)]
    server.complete(prefix + questions[0])
    from_cache = server.answer(prefix + questions[1])
    assert from_cache.usage.prompt_tokens_details.cached_tokens > 2500
    anew = server.answer(prefix + questions[1], cache="empty")
    assert not getattr(anew.usage.prompt_tokens_details, "cached_tokens", 0)
    assert from_cache.choices[0].text == anew.choices[0].text or not ON_CPU


def test_a_client_that_goes_away(server: Server) -> None:
    stream = server.client.completions.create(
        model=server.model, prompt=server.tokens(6000, start=5000), max_tokens=500, stream=True
    )
    next(iter(stream))
    stream.close()
    assert server.complete(server.tokens(3000, start=7000))


def test_too_long_a_prompt_is_refused(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="8192"):
        server.complete([5] * 9000)
    assert server.complete(server.tokens(200))


def test_keeping_everything_is_dense(model: Path, tmp_path: Path) -> None:
    """The same tokens, greedily, with our backend as without it, by either name; also in processes that are
    spawned, and are told the backend's name before they have loaded the plug-in."""
    texts = []
    for name in (None, "CUSTOM", OWN_NAME):
        folder = tmp_path / str(len(texts))
        folder.mkdir()
        options = ["--attention-backend", name, "--additional-config", KEEP_ALL] if name else []
        spawned = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"} if name == OWN_NAME else {}
        with serving_at(model, folder, *options, "--enforce-eager", **spawned) as server:
            texts.append([server.complete(server.tokens(n), 32) for n in (100, 3000)])
            assert ("Sparse-K attends" in server.log.read_text()) == bool(name)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["--additional-config", '{"sparsek": {"top_q": 64}}'], {}, "unknown field 'top_q'"),
        (["--additional-config", '{"sparsek": {"top_k": -1}}'], {}, "top_k = -1"),
        (
            ["--additional-config", '{"sparsek": {"dense_layers": [99]}}'],
            {},
            "the model has the layers 0 to 29",
        ),
        ([], {"SPARSEK_TOP_Q": "64"}, "there is no variable SPARSEK_TOP_Q"),
        ([], {"SPARSEK_TAIL": "short"}, "SPARSEK_TAIL: tail = 'short'"),
    ],
)
def test_wrong_settings_are_told_at_the_start(
    model: Path, tmp_path: Path, options: list[str], environment: dict[str, str], message: str
) -> None:
    start = serving_at(
        model, tmp_path, "--attention-backend", "CUSTOM", "--enforce-eager", *options, **environment
    )
    with pytest.raises(RuntimeError, match="does not start"), start:
        pass
    assert message in start.log.read_text()


def test_nothing_changes_for_who_does_not_ask(model: Path, tmp_path: Path) -> None:
    with serving_at(model, tmp_path, "--enforce-eager", SPARSEK_TOP_Q="64") as server:
        assert server.complete(server.tokens(3000))
        log = server.log.read_text()
    assert "Sparse-K" not in log
    assert ON_CPU or "FLASH_ATTN" in log
