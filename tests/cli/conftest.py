from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("transformers")

from sparsek.cli import main
from sparsek.engines import base

Sparsek = Callable[..., str]


@pytest.fixture(autouse=True, scope="session")
def _load_the_embedded_model_once() -> Iterator[None]:
    """Loading takes seconds; every command asks `open_engine` for the model."""
    real, loaded = base.open_engine, {}

    def open_engine(name: str | None, model: str | None, **options: Any) -> base.Engine:
        if model is not None:
            return real(name, model, **options)
        name = name or base.default_engine(None)
        key = name, *options.items()
        if key not in loaded:
            loaded[key] = real(name, None, **options)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "open_engine", open_engine)
        yield


@pytest.fixture
def sparsek(capsys: pytest.CaptureFixture[str]) -> Sparsek:
    """Run a command that must succeed; returns what it printed on stdout."""

    def run(*arguments: str) -> str:
        code = main(list(arguments))
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return run


@pytest.fixture
def sparsek_fails(capsys: pytest.CaptureFixture[str]) -> Sparsek:
    """Run a command that must fail with exit code 2 and one line on stderr; returns that line."""

    def run(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        lines = printed.err.splitlines()
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("sparsek: ")
        return lines[0]

    return run
