"""The hosts: how each runs a prompt with its default flags, with our backend or without."""

from __future__ import annotations

import json
import shlex
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from . import fetch
from .programs import environment, finished, free_port, post, server

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

    @abstractmethod
    def run(
        self, model: Path, text: Path, tokens: int, generated: int, backend: Path | None, **env: str
    ) -> Answer:
        """Answer the first `tokens` of the file `text`, greedily, with `generated` tokens.

        Args:
            backend: the library of ours that is loaded, by the lines of `sparsek ggml-backend`; None for the
                host alone. env: variables beside the test's own.
        """

    def as_printed(self, lines: Mapping[str, str], model: Path, text: Path) -> dict[str, str]:  # noqa: ARG002
        """What each of its programs writes on standard error when it is started by the lines that
        `sparsek ggml-backend` prints for it. A host for which nothing is printed has none."""
        return {}


class _Program(Host):
    """A program that answers once and prints it as JSON, in its last line."""

    @abstractmethod
    def command(self, model: Path, text: Path, tokens: int, generated: int) -> list[str | Path]: ...

    def run(
        self, model: Path, text: Path, tokens: int, generated: int, backend: Path | None, **env: str
    ) -> Answer:
        command = self.command(model, text, tokens, generated)
        done = finished(command, environment(backend and str(backend), env))
        answer = json.loads(done.stdout.splitlines()[-1])
        return Answer(answer["text"], answer["prompt_s"], done.stderr)


class NodeLlamaCpp(_Program):
    """node-llama-cpp, of npm."""

    def __init__(self) -> None:
        self._folder = fetch.node()

    def command(self, model: Path, text: Path, tokens: int, generated: int) -> list[str | Path]:
        script = self._folder / "answer.mjs"  # Node.js looks for packages where the script is
        shutil.copyfile(HERE / "node_llama_cpp.mjs", script)
        return ["node", script, model, text, str(tokens), str(generated)]

    def as_printed(self, lines: Mapping[str, str], model: Path, text: Path) -> dict[str, str]:  # noqa: ARG002
        compute = "await context.getSequence().evaluateWithoutGeneratingNewTokens(model.tokenize('The end'))"
        script = self._folder / "printed.mjs"
        printed = lines["node-llama-cpp"].replace("model.gguf", str(model))
        script.write_text(f"{printed}\n{compute}\nprocess.exit(0)\n")
        return {"node-llama-cpp": finished(["node", script], environment(None, {})).stderr}


class LibGgml(_Program):
    """libggml-python: ggml alone, so that the prompt is one operation."""

    def __init__(self) -> None:
        self._python = fetch.python_with("libggml-python", "numpy")

    def command(self, model: Path, text: Path, tokens: int, generated: int) -> list[str | Path]:  # noqa: ARG002
        return [self._python, HERE / "libggml_attention.py", str(tokens), str(generated)]


class LlamaCppPython(_Program):
    """llama-cpp-python, which `make test-llama-cpp-python` builds from source. Its default is to compute
    without flash attention; with our backend it is on, as in the lines that are printed."""

    def __init__(self) -> None:
        self._python = fetch.built("llama-cpp-python", "make test-llama-cpp-python")

    def command(self, model: Path, text: Path, tokens: int, generated: int) -> list[str | Path]:
        return [self._python, HERE / "llama_cpp_python.py", model, text, str(tokens), str(generated)]

    def as_printed(self, lines: Mapping[str, str], model: Path, text: Path) -> dict[str, str]:  # noqa: ARG002
        printed = lines["llama-cpp-python"].replace("model.gguf", str(model))
        code = f"{printed}\nllm('The end', max_tokens=1)"
        return {"llama-cpp-python": finished([self._python, "-c", code], environment(None, {})).stderr}


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
        port = free_port()
        variables = environment(backend and self.inside(backend), env)
        with server(self.command(model, port), variables, port) as log:
            prompt = post(port, "tokenize", {"content": text.read_text()})["tokens"][:tokens]
            asked = {"prompt": prompt, "n_predict": generated, "temperature": 0, "cache_prompt": False}
            answer = post(port, "completion", asked)
        return Answer(answer["content"], answer["timings"]["prompt_ms"] / 1000, "".join(log))


class XLlamaCpp(_Server):
    """xllamacpp, of a version or the newest."""

    def __init__(self, package: str = "xllamacpp") -> None:
        self._python = fetch.python_with(package)

    def command(self, model: Path, port: int) -> list[str]:
        return [str(self._python), str(HERE / "xllamacpp_server.py"), str(model), str(port)]

    def as_printed(self, lines: Mapping[str, str], model: Path, text: Path) -> dict[str, str]:  # noqa: ARG002
        code = lines["xllamacpp"].replace("model.gguf", str(model))
        return {"xllamacpp": finished([self._python, "-c", code], environment(None, {})).stderr}


class Debian(_Server):
    """llama.cpp as Debian's unstable ships it, in a root of its own."""

    def __init__(self) -> None:
        self.root = fetch.debian()
        try:
            finished(self._in_root("llama-server", "--version"), environment(None, {}))
        except (FileNotFoundError, AssertionError) as error:
            raise fetch.UnavailableError(f"this user may not change the root: {error}") from error

    def inside(self, path: Path) -> str:
        """A copy in the root, if it is not there."""
        copy = self.root / path.name
        if not copy.exists() or copy.stat().st_mtime < path.stat().st_mtime:
            shutil.copyfile(path, copy)
        return f"/{path.name}"

    def _in_root(self, program: str, *arguments: str) -> list[str]:
        """For a user who is not root as well."""
        return ["unshare", "--map-root-user", "chroot", str(self.root), f"/usr/bin/{program}", *arguments]

    def command(self, model: Path, port: int) -> list[str]:
        options = ("-m", self.inside(model), "-c", str(CONTEXT), "--port", str(port))
        return self._in_root("llama-server", *options)

    def bench(self, model: Path, backend: Path | None, *options: str) -> list[dict[str, Any]]:
        """The records of llama-bench."""
        command = self._in_root("llama-bench", "-m", self.inside(model), "-o", "jsonl", *options)
        done = finished(command, environment(backend and self.inside(backend), {}))
        return [json.loads(line) for line in done.stdout.splitlines()]

    def as_printed(self, lines: Mapping[str, str], model: Path, text: Path) -> dict[str, str]:
        start = text.with_name("start.txt")
        start.write_text("The end")
        files = {"model.gguf": self.inside(model), "prompt.txt": self.inside(start)}
        quick = {"llama-completion": ("-n", "1", "-no-cnv"), "llama-bench": ("-r", "1", "-n", "0")}
        logs = {}
        for program, more in quick.items():
            command, env = self._printed(lines[program].replace("8192", "2048"), files)
            logs[program] = finished([*command, *more], env).stderr
        command, env = self._printed(lines["llama-server"], files)
        port = free_port()
        with server([*command, "--port", str(port)], env, port) as log:
            pass
        return logs | {"llama-server": "".join(log)}

    def _printed(self, line: str, files: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        """Command and environment of a line for a shell."""
        words = [files.get(word, word) for word in shlex.split(line)]
        given = dict(word.split("=", 1) for word in words if "=" in word)
        backend = self.inside(Path(given.pop("GGML_BACKEND_PATH")))
        command = words[1 + len(given) :]
        return self._in_root(*command), environment(backend, given)


_OLDER: Final = "xllamacpp==2026.9.10809"  # of another interface of ggml
HOSTS: Final[dict[str, Callable[[], Host]]] = {
    "libggml-python": LibGgml,
    "xllamacpp": XLlamaCpp,
    "xllamacpp-pinned": lambda: XLlamaCpp(fetch.pinned("xllamacpp")),
    "xllamacpp-older": lambda: XLlamaCpp(_OLDER),
    "node-llama-cpp": NodeLlamaCpp,
    "debian": Debian,
    "llama-cpp-python": LlamaCppPython,
}
