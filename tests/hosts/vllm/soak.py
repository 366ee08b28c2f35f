"""A server under mixed requests for some minutes, its memory watched.

    python -m tests.hosts.vllm.soak MODEL [SECONDS [BACKEND]]

BACKEND is CUSTOM, or CPU_ATTN for what the host does without Sparse-K. Long and short prompts, streams,
clients that go away, prompts that are too long, prefixes that come again.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import openai
import psutil

from .test_server import Server, serving_at

CLIENTS = 6


def main(model: Path, seconds: float = 600, backend: str = "CUSTOM") -> None:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    options = ["--attention-backend", backend, "--max-num-batched-tokens", "2048"]
    # A small cache, all pages of which are soon in use: until then the memory of the server grows.
    small = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving_at(model, Path(folder), *options, **small) as server,
    ):
        until, done, memory = time.monotonic() + seconds, Counter[str](), []
        text = server.tokens(8000)
        clients = [
            threading.Thread(target=client, args=(server, text, i, until, done)) for i in range(CLIENTS)
        ]
        for thread in clients:
            thread.start()
        while any(thread.is_alive() for thread in clients):
            time.sleep(5)
            memory.append(_resident())
        quarter = max(1, len(memory) // 4)
        quarters = [max(memory[i * quarter : (i + 1) * quarter]) // 2**20 for i in range(4)]
        print(dict(done), f"memory of the server: {quarters} MiB in each quarter")
        assert not done["lost"], "requests were lost"
        assert quarters[-1] < 1.05 * quarters[1], "memory grows"


def client(server: Server, text: list[int], number: int, until: float, done: Counter[str]) -> None:
    rng = random.Random(number)
    while time.monotonic() < until:
        kind = rng.choices(("short", "long", "stream", "gone", "too long"), (4, 3, 3, 2, 1))[0]
        start = rng.choice((0, 0, rng.randrange(4000)))  # often the same prefix
        length = (
            9000
            if kind == "too long"
            else rng.randint(10, 300)
            if kind == "short"
            else rng.randint(300, 3500)
        )
        prompt = (text[start:] + text)[:length]
        try:
            if kind in ("stream", "gone"):
                stream = server.answer(prompt, 24, stream=True, seed=0)
                parts = 0
                for _ in stream:
                    parts += 1
                    if kind == "gone" and parts == 2:
                        stream.close()
                        break
                answered = parts > 1
            else:
                answered = bool(server.answer(prompt, 12).usage.completion_tokens)
            done[kind if answered else "lost"] += 1
        except openai.BadRequestError:
            done["too long, refused" if kind == "too long" else "lost"] += 1
        except openai.OpenAIError as error:
            print(type(error).__name__, error)
            done["lost"] += 1


def _resident() -> int:
    """Bytes of all processes below this one."""
    found = 0
    for process in psutil.Process().children(recursive=True):
        try:
            found += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(float, sys.argv[2:3]), *sys.argv[3:4])
