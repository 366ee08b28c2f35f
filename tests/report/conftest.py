from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from sparsek.engines.base import Engine, open_engine
from sparsek.report.tensors import SentenceAttention, capture, small_rule

from ..report import samples


@pytest.fixture(scope="session")
def engine() -> Engine:
    return open_engine("transformers", None)


@pytest.fixture(scope="session")
def attention(engine: Engine) -> SentenceAttention:
    return capture(engine, samples.SENTENCE, small_rule(samples.CONFIG, 3), layer=11, head=3)
