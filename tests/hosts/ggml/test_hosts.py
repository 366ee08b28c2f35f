"""Each host, with its default flags: what it computes with our backend, and that this is ours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from sparsek.engines.model_file import embedded_model
from sparsek.integrations.llama_cpp_hosts import installed_backend, instructions

from .fetch import UnavailableError
from .hosts import HOSTS, Host

EVERYTHING = {"top_k": 1 << 30, "sinks": 0, "window": 0, "tail": "none", "dense_layers": [], "min_context": 0}
PURE_TOP_1 = {**EVERYTHING, "top_k": 1}
IN_USE = "sparsek: Sparse-K is in use in layers"


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest) -> Host:
    try:
        return HOSTS[request.param]()
    except UnavailableError as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "manual.txt"
    file.write_text("\n".join(topics.values())[:40_000])
    return file


def config(folder: Path, settings: dict[str, object]) -> str:
    file = folder / "settings.json"
    file.write_text(json.dumps(settings))
    return str(file)


def sparse_operations(log: str) -> tuple[int, int]:
    """Of prompts and of steps, from the line that SPARSEK_STATS=1 asks for."""
    kinds = [re.search(rf"of {kind}: (\d+) with Sparse-K", log) for kind in ("prompts", "steps")]
    assert all(kinds), log[-3000:]
    prompts, steps = (int(found[1]) for found in kinds if found)
    return prompts, steps


def test_the_printed_lines_load_it(host: Host, text: Path) -> None:
    logs = host.as_printed(instructions(installed_backend()), embedded_model(), text)
    if not logs:
        pytest.skip("`sparsek ggml-backend` has no lines for it")
    for program, log in logs.items():
        assert IN_USE in log, f"{program}: {log[-3000:]}"


def test_everything_kept_is_the_hosts_own_text_and_one_key_is_not(
    host: Host, text: Path, tmp_path: Path
) -> None:
    def answer(backend: Path | None, **env: str) -> str:
        return host.run(embedded_model(), text, 400, 12, backend, **env).text

    backend = installed_backend()
    dense = answer(None)
    assert dense.strip()
    assert answer(backend, SPARSEK_CONFIG=config(tmp_path, EVERYTHING)) == dense
    assert answer(backend, SPARSEK_CONFIG=config(tmp_path, PURE_TOP_1)) != dense


def test_a_long_prompt_is_faster_than_with_the_hosts_defaults(host: Host, text: Path) -> None:
    """In turns, the best of two each: 1.5 times on a quiet machine."""
    env = {"SPARSEK_TOP_K": "64", "SPARSEK_STATS": "1"}
    dense, sparse = [], []
    for _ in range(2):
        dense.append(host.run(embedded_model(), text, 4000, 4, None))
        sparse.append(host.run(embedded_model(), text, 4000, 4, installed_backend(), **env))
    assert all(IN_USE in answer.log for answer in sparse), sparse[0].log[-3000:]
    assert all(sparse_operations(answer.log)[0] > 0 for answer in sparse)
    seconds = [min(answer.prompt_s for answer in answers) for answers in (dense, sparse)]
    print(f"\n{type(host).__name__}: 4000 tokens dense {seconds[0]:.2f} s, Sparse-K {seconds[1]:.2f} s")
    assert seconds[1] < seconds[0]


def test_short_prompts_stay_dense(host: Host, text: Path) -> None:
    alone = host.run(embedded_model(), text, 200, 8, None)
    env = {"SPARSEK_TOP_K": "64", "SPARSEK_STATS": "1"}
    beside = host.run(embedded_model(), text, 200, 8, installed_backend(), **env)
    assert beside.text == alone.text
    assert sparse_operations(beside.log) == (0, 0)
