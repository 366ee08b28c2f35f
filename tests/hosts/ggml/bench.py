"""Never slower: llama-bench as Debian ships it, with its default flags, alone and with our backend in turns.

    python -m tests.hosts.ggml.bench [--rounds 5] [--long]     one record a test on standard output, as JSON

The table on standard error compares the best of all turns: what else the machine does makes a turn slower,
never faster. The process ends with 1 where ours has less than 0.98 of the tokens a second of the host alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

from sparsek.bench.environment import environment
from sparsek.engines.model_file import embedded_model
from sparsek.integrations.llama_cpp_hosts import installed_backend

from .hosts import Debian

LEAST: Final = 0.98
TESTS: Final = (
    *(("-p", str(n), "-n", "0") for n in (128, 512, 2048)),
    *(("-p", "0", "-n", "32", "-d", str(depth)) for depth in (0, 4096)),
)
LONG: Final = (("-p", "8000", "-n", "0"),)


@dataclass
class Speed:
    """Tokens per second of every repetition of every turn, and what llama-bench says of the test."""

    samples: list[float] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def add(self, record: dict[str, Any]) -> None:
        self.samples += record["samples_ts"]
        names = ("build_commit", "build_number", "model_type", "n_threads", "flash_attn")
        self.about = {name: record[name] for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long", action="store_true", help="A prompt of 8000 tokens too.")
    options = parser.parse_args()
    host = Debian()
    slower = False
    for test in (*TESTS, *(LONG if options.long else ())):
        alone, beside = Speed(), Speed()
        for turn in range(options.rounds):
            pair = [(alone, None), (beside, installed_backend())]
            for speed, backend in pair if turn % 2 == 0 else pair[::-1]:
                (record,) = host.bench(embedded_model(), backend, *test, "-r", "3")
                speed.add(record)
        ratio = max(beside.samples) / max(alone.samples)
        medians = median(beside.samples) / median(alone.samples)
        slower |= ratio < LEAST
        record = {
            "host": "debian",
            "test": " ".join(test),
            **alone.about,
            "alone_ts": alone.samples,
            "sparsek_ts": beside.samples,
            "ratio": ratio,
            "ratio_of_medians": medians,
            "environment": environment(),
        }
        print(json.dumps(record), flush=True)
        figures = f"{max(alone.samples):8.1f} {max(beside.samples):8.1f}  {ratio:.3f} (medians {medians:.3f})"
        print(f"{record['test']:24}{figures}", file=sys.stderr, flush=True)
    return slower


if __name__ == "__main__":
    sys.exit(main())
