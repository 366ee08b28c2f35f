import pytest

from sparsek import _core


@pytest.fixture(params=_core.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that this machine has, one after the other."""
    name: str = request.param
    monkeypatch.setenv("SPARSEK_ISA", name)
    return name
