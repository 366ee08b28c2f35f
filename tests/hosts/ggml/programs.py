"""Programs that a test starts: those that end by themselves, and servers, which are asked over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...waiting import HANGS


def environment(backend: str | None, env: dict[str, str]) -> dict[str, str]:
    """This process's variables without those that the hosts or the backend read, and these."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SPARSEK_", "GGML_", "LLAMA_"))}
    return clean | env | ({} if backend is None else {"GGML_BACKEND_PATH": backend})


def finished(command: Sequence[str | Path], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The program, which must end well."""
    done = subprocess.run(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}: {done.stderr[-3000:]}"
    return done


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def server(command: Sequence[str | Path], env: dict[str, str], port: int) -> Iterator[list[str]]:
    """A server, which answers by now. What it wrote on standard error is in the list once it has ended."""
    log: list[str] = []
    with (
        tempfile.TemporaryFile("w+", errors="replace") as written,
        subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=written) as process,
    ):
        try:
            _wait(process, port)
            yield log
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            process.kill()
            written.seek(0)
            log.append(written.read())
            if process.returncode not in (0, None):
                print(log[0][-3000:])


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + HANGS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ended with {process.returncode}"
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
            return
        time.sleep(0.2)
    raise TimeoutError(f"no answer at port {port}")


def post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    address, kind = f"http://127.0.0.1:{port}/{path}", {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(body).encode(), kind)
    with urllib.request.urlopen(request, timeout=HANGS) as answer:
        found: dict[str, Any] = json.load(answer)
    return found
