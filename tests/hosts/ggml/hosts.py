"""The hosts: how each runs a prompt with its default flags, with our backend or without."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...waiting import HANGS
from . import fetch

HERE: Final = Path(__file__).parent
CONTEXT: Final = 4096


@dataclass(frozen=True)
class Answer:
    """The text, the seconds until its first token, and what the program wrote on standard error."""

    text: str
    prompt_s: float
    log: str


class Host(ABC):
    """A program with ggml in it. Making one raises UnavailableError on a machine that cannot have it."""

    name: str

    @abstractmethod
    def run(
        self, model: Path, text: Path, tokens: int, generated: int, backend: Path | None, **env: str
    ) -> Answer:
        """Answer the first `tokens` of the file `text`, greedily, with `generated` tokens.

        Args:
            backend: the library of ours that is loaded, by the lines of `sparsek ggml-backend`; None for the
                host alone. env: variables beside the test's own.
        """


class _Server(Host):
    """llama.cpp's HTTP server, started for each answer."""

    @abstractmethod
    def command(self, model: Path, port: int) -> list[str]: ...

    def inside(self, path: Path) -> str:
        """The name under which the server sees a file."""
        return str(path)

    def run(
        self, model: Path, text: Path, tokens: int, generated: int, backend: Path | None, **env: str
    ) -> Answer:
        env = {
            name: self.inside(Path(value)) if name == "SPARSEK_CONFIG" else value
            for name, value in env.items()
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with _started(self.command(model, port), _environment(backend and self.inside(backend), env)) as (
            process,
            log,
        ):
            address = f"http://127.0.0.1:{port}"
            _wait(process, address)
            prompt = _post(f"{address}/tokenize", {"content": text.read_text()})["tokens"][:tokens]
            asked = {"prompt": prompt, "n_predict": generated, "temperature": 0, "cache_prompt": False}
            answer = _post(f"{address}/completion", asked)
        return Answer(answer["content"], answer["timings"]["prompt_ms"] / 1000, "".join(log))


class XLlamaCpp(_Server):
    """The newest xllamacpp."""

    name = "xllamacpp"

    def __init__(self) -> None:
        self._python = fetch.python_with("xllamacpp")

    def command(self, model: Path, port: int) -> list[str]:
        return [str(self._python), str(HERE / "xllamacpp_server.py"), str(model), str(port)]


class Debian(_Server):
    """llama-server as Debian's unstable ships it, in a root of its own."""

    name = "debian"

    def __init__(self) -> None:
        self.root = fetch.debian()
        if shutil.which("unshare") is None:
            raise fetch.UnavailableError("there is no unshare")

    def inside(self, path: Path) -> str:
        """A copy in the root, if it is not there."""
        copy = self.root / path.name
        if not copy.exists() or copy.stat().st_mtime < path.stat().st_mtime:
            shutil.copyfile(path, copy)
        return f"/{path.name}"

    def in_root(self, *command: str) -> list[str]:
        """For a user who is not root as well."""
        return ["unshare", "--map-root-user", "chroot", str(self.root), *command]

    def command(self, model: Path, port: int) -> list[str]:
        options = ("-m", self.inside(model), "-c", str(CONTEXT), "--port", str(port))
        return self.in_root("/usr/bin/llama-server", *options)


class NodeLlamaCpp(Host):
    """node-llama-cpp, of npm."""

    name = "node-llama-cpp"

    def __init__(self) -> None:
        self._folder = fetch.node()

    def run(
        self, model: Path, text: Path, tokens: int, generated: int, backend: Path | None, **env: str
    ) -> Answer:
        done = subprocess.run(
            ["node", HERE / "node_llama_cpp.mjs", model, text, str(tokens), str(generated)],
            cwd=self._folder,
            env=_environment(backend and str(backend), env),
            capture_output=True,
            text=True,
            timeout=HANGS,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        answer = json.loads(done.stdout.splitlines()[-1])
        return Answer(answer["text"], answer["prompt_s"], done.stderr)


HOSTS: Final[dict[str, type[Host]]] = {host.name: host for host in (XLlamaCpp, NodeLlamaCpp, Debian)}


def _environment(backend: str | None, env: dict[str, str]) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SPARSEK_", "GGML_", "LLAMA_"))}
    return clean | env | ({} if backend is None else {"GGML_BACKEND_PATH": backend})


@contextlib.contextmanager
def _started(command: list[str], env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The process, and its standard error, which is complete once it has ended."""
    log: list[str] = []
    with subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        try:
            yield process, log
        finally:
            process.terminate()
            try:
                log.append(process.communicate(timeout=30)[1])
            except subprocess.TimeoutExpired:
                process.kill()
                log.append(process.communicate()[1])


def _wait(process: subprocess.Popen[str], address: str) -> None:
    deadline = time.monotonic() + HANGS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ended with {process.returncode}: {process.communicate()[1][-3000:]}"
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{address}/health", timeout=10).close()
            return
        time.sleep(0.2)
    raise TimeoutError(address)


def _post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=HANGS) as answer:
        found: dict[str, Any] = json.load(answer)
    return found
