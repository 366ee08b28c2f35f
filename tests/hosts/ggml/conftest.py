"""Real programs with ggml in them, unmodified, and our backend: `make test-hosts`."""

from __future__ import annotations

import pytest

from .hosts import HOSTS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = metafunc.config.getoption("--hosts")
    names = list(HOSTS) if wanted in (None, "all") else wanted.split(",")
    if unknown := set(names) - set(HOSTS):
        raise pytest.UsageError(f"--hosts {wanted}: no host {unknown.pop()!r}; there are {', '.join(HOSTS)}")
    metafunc.parametrize("host", names, indirect=True, scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--hosts") is None:
        for item in items:
            if "hosts/ggml" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="make test-hosts"))
