"""Real programs with ggml in them, unmodified, and our backend: `make test-hosts`."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--hosts"):
        for item in items:
            if "hosts/ggml" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason="make test-hosts"))
