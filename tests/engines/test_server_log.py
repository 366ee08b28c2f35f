"""Lines of llama.cpp's server, as it writes them, and what becomes of them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from sparsek.engines.server_log import Answer, ServerLog

# One answer alone, then two at a time, of which the second is refused.
ALONE = """\
0.01.0.1 I slot get_availabl: id  1 | task -1 | selected slot by LRU, t_last = -1
0.01.0.2 I slot launch_slot_: id  1 | task 6 | processing task, is_child = 0
0.54.9.1 I slot print_timing: id  1 | task 6 | prompt eval time =     803.90 ms /     7 tokens ( ...)
0.54.9.2 I slot print_timing: id  1 | task 6 |        eval time =     431.97 ms /     5 tokens ( ...)
0.54.9.3 I slot print_timing: id  1 | task 6 |       total time =    1235.87 ms /    12 tokens
0.54.9.5 I slot      release: id  1 | task 6 | stop processing: n_tokens = 288, truncated = 0"""
LONG = """\
1.0.0.1 I slot launch_slot_: id  0 | task 9 | processing task, is_child = 0
1.0.0.2 I slot launch_slot_: id  1 | task 12 | processing task, is_child = 0
1.0.0.3 E srv    send_error: task id = 12, error: request (3001 tokens) exceeds the available context size
1.0.0.4 I slot      release: id  1 | task 12 | stop processing: n_tokens = 1, truncated = 0
1.0.0.5 I slot print_timing: id  0 | task 9 | prompt eval time =     800.00 ms /     600 tokens ( ...)
1.0.0.6 I slot print_timing: id  0 | task 9 |        eval time =       0.00 ms /     1 tokens ( ...)
1.0.0.7 I slot      release: id  0 | task 9 | stop processing: n_tokens = 600, truncated = 0"""


def answers_of(lines: str, sparse: int, *, unsaid: int = 0, min_context: int = 512) -> list[Answer]:
    """`sparse`: the count of sparse operations when an answer ends."""
    found: list[Answer] = []

    def describe(answer: Answer) -> str:
        found.append(answer)
        return "answer"

    said: list[str] = []
    log = ServerLog(describe, said.append, min_context=min_context, unsaid=unsaid, sparse=lambda: sparse)
    for line in lines.splitlines():
        log.feed(line)
    assert said == ["answer"] * len(found)
    return found


def test_an_answer() -> None:
    expected = Answer(read=7, cached=277, written=5, read_seconds=0.8039, write_seconds=0.43197, tokens=288)
    assert answers_of(ALONE, 30) == [expected]  # 288 tokens lie in 512 cells, but are below min_context
    assert answers_of(ALONE, 30, min_context=288) == [replace(expected, sparse=True)]


def test_of_two_at_a_time_one_is_refused() -> None:
    refused, answer = answers_of(LONG, 40)
    assert refused.error == "request (3001 tokens) exceeds the available context size"
    assert (answer.read, answer.cached, answer.written, answer.sparse) == (600, 0, 1, True)
    assert answers_of(LONG, 0)[1].sparse is False


def test_broken_off_and_unsaid() -> None:
    begun = ALONE.splitlines()[1]
    ended = ALONE.splitlines()[-1]
    (answer,) = answers_of(f"{begun}\n{ended}", 0)
    assert answer.broken_off
    assert answer.tokens == 288
    assert answers_of(f"{ALONE}\n{begun}\n{ended}", 0, unsaid=1) == [answer]


def test_what_is_for_the_user_is_passed_on() -> None:
    lines = [
        "0.0.0.1 I srv          init: loading",
        "more of it",
        "0.0.0.2 E srv    load_model: failed",
        "more of that",
        "0.0.0.3 W srv          init: no key",
        "sparsek: the backend says",
    ]
    said: list[str] = []
    log = ServerLog(str, said.append, min_context=0, sparse=lambda: 0)
    for line in lines:
        log.feed(line)
    assert said == [lines[2], lines[3], lines[5]]
    said.clear()
    log = ServerLog(str, said.append, min_context=0, show=True, sparse=lambda: 0)
    for line in lines:
        log.feed(line)
    assert said == lines


def test_standard_error_of_c_alone_is_tapped() -> None:
    code = """
import ctypes, os, sys
from sparsek.engines.server_log import Tap
libc = ctypes.CDLL(None)
libc.perror(b"before")
tap = Tap(lambda line: print(f"fed: {line}"))
libc.perror(b"within")
print("of Python", file=sys.stderr)
os.write(2, b"to the descriptor\\n")
tap.close()
libc.perror(b"after")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert [line.split(":")[:2] for line in done.stdout.splitlines()] == [["fed", " within"]]
    lines = [line.split(":")[0] for line in done.stderr.splitlines()]
    assert lines == ["before", "of Python", "to the descriptor", "after"]
