"""The compiled core: processor features, instruction sets, threads, and their environment variables."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sparsek import _core

X86_FEATURES = {
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl",
    "avx512_vnni", "avx512_bf16", "amx_int8",
}  # fmt: skip
ARM_FEATURES = {"neon", "dotprod", "i8mm"}
# The same, as Linux writes them on Arm.
ARM_FLAGS = {"asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm"}


def linux_features() -> set[str]:
    """What /proc/cpuinfo says of the first processor, in our names."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        pytest.skip("no /proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines():
        title, _, flags = line.partition(":")
        if title.strip() in ("flags", "Features"):
            found = set(flags.split())
            if platform.machine() == "x86_64":
                return found & X86_FEATURES
            return {ARM_FLAGS[flag] for flag in found & ARM_FLAGS.keys()}
    pytest.skip("/proc/cpuinfo lists no flags")


def call(function: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`sparsek._core.<function>()` in a process with these environment variables."""
    program = f"""
from sparsek import _core
try:
    print(_core.{function}())
except ValueError as error:
    raise SystemExit(str(error))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPARSEK_")}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_features_agree_with_linux():
    features = _core.cpu_features()
    assert features.keys() == X86_FEATURES | ARM_FEATURES
    assert {name for name, present in features.items() if present} == linux_features()


def test_the_fastest_set_is_the_default():
    available = _core.available_isas()
    assert available[0] == "portable"
    assert call("isa").stdout.strip() == available[-1]
    assert call("isa", SPARSEK_ISA="").stdout.strip() == available[-1]


@pytest.mark.parametrize("isa", _core.available_isas())
def test_a_set_can_be_forced(isa: str):
    assert call("isa", SPARSEK_ISA=isa).stdout.strip() == isa


def test_the_environment_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch):
    for isa in _core.available_isas():
        monkeypatch.setenv("SPARSEK_ISA", isa)
        assert _core.isa() == isa


@pytest.mark.parametrize("wrong", ["sse9", "AVX2", "portable "])
def test_a_wrong_set_is_quoted_beside_what_runs(wrong: str):
    result = call("isa", SPARSEK_ISA=wrong)
    choice = ", ".join(f"'{isa}'" for isa in _core.available_isas())
    assert result.returncode == 1
    assert result.stderr.strip() == f"SPARSEK_ISA = '{wrong}': this machine can run {choice}"


def test_threads_default_to_the_processors_allowed():
    threads = int(call("num_threads").stdout)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert 1 <= threads <= (allowed or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no processor affinity here")
def test_threads_follow_the_affinity(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SPARSEK_NUM_THREADS", raising=False)
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert _core.num_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("threads", ["1", "3", "1024"])
def test_the_number_of_threads_can_be_set(threads: str):
    assert call("num_threads", SPARSEK_NUM_THREADS=threads).stdout.strip() == threads


@pytest.mark.parametrize("wrong", ["0", "-2", "1025", "1.5", "many"])
def test_a_wrong_number_of_threads_is_quoted(wrong: str):
    result = call("num_threads", SPARSEK_NUM_THREADS=wrong)
    assert result.returncode == 1
    assert result.stderr.strip() == (
        f"SPARSEK_NUM_THREADS = '{wrong}': must be a whole number from 1 to 1024"
    )
