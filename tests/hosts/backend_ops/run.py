"""ggml's own test of backends, for attention, on ours: `make test-backend-ops`.

    python run.py test-backend-ops

Everything is kept, for what ggml compares with is dense. No case may fail, none that we say we support may be
computed by the host for us, and there must be at least as many as SUPPORTED."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from sparsek.integrations.llama_cpp import backend_path

SUPPORTED = 3426
KEEP_ALL = {
    "SPARSEK_TOP_K": str(2**31 - 1),
    "SPARSEK_SINKS": "0",
    "SPARSEK_WINDOW": "0",
    "SPARSEK_TAIL": "none",
    "SPARSEK_MIN_CONTEXT": "0",
}


def main(program: str) -> None:
    others = {name: value for name, value in os.environ.items() if not name.startswith("SPARSEK_")}
    done = subprocess.run(
        [program, "-o", "FLASH_ATTN_EXT", "-b", "SPARSEK"],
        env=others | KEEP_ALL | {"GGML_BACKEND_PATH": str(backend_path()), "SPARSEK_STATS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = Path(program).parent.parent / "output.txt"
    log.write_text(done.stdout)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).splitlines()
    cases = [line for line in lines if line.startswith("  FLASH_ATTN_EXT(")]
    declined = sum("not supported" in line for line in cases)
    passed, run = map(int, _only(r"  (\d+)/(\d+) tests passed", lines).groups())
    totals = _only(r"sparsek: attention operations of prompts: .*", lines)[0]
    by_host = sum(map(int, re.findall(r"(\d+) given back to the host", totals)))
    print(f"{passed} of {run} supported cases pass; {declined} are the host's; the whole output: {log}")
    for line in cases:
        if not line.rstrip().endswith(("OK", "not supported [SPARSEK]")):
            print(line.strip())
    if done.returncode != 0 or passed != run:
        sys.exit("cases fail")
    if by_host:
        sys.exit(f"{by_host} cases were computed by the host, and say nothing of ours")
    if run < SUPPORTED:
        sys.exit(f"{run} supported cases are fewer than the {SUPPORTED} of before")
    if run > SUPPORTED:
        print(f"more than before: write {run} to SUPPORTED in {__file__}")


def _only(pattern: str, lines: list[str]) -> re.Match[str]:
    found = [match for line in lines if (match := re.fullmatch(pattern, line.rstrip()))]
    if len(found) != 1:
        sys.exit(f"{len(found)} lines of test-backend-ops are like {pattern!r}, where one should be")
    return found[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
