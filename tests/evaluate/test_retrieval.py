"""The sequences that are asked, and the scores of their answers."""

from __future__ import annotations

import random
import re

import pytest

pytest.importorskip("transformers")

import torch

from sparsek import SparseKConfig
from sparsek.bench.text import read_text
from sparsek.engines.base import Engine, open_engine
from sparsek.evaluate.retrieval import DEPTHS, TASKS, _Words, retrieve
from sparsek.integrations.transformers import enabled

pytestmark = pytest.mark.model

CONTEXT = 520
CONFIG = SparseKConfig(top_k=8, sinks=2, window=8, min_context=0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine("transformers", None)


def words(engine: Engine) -> _Words:
    return _Words(engine, read_text(None)[1], random.Random(3), CONTEXT)


def test_every_passkey_stands_at_its_depth_and_is_asked_for(engine: Engine) -> None:
    sequence = words(engine).passkey()
    assert len(sequence.tokens) == CONTEXT
    text = engine.decode(sequence.tokens)
    said = re.findall(r"pass key of the (\w+) door is (\d{5})\.\n", text)
    assert len(said) == len(DEPTHS)
    answers = [engine.decode(sequence.tokens[a.start : a.stop]).strip() for a in sequence.answers]
    assert answers == [key for _, key in said]
    places = [text.index(f"door is {key}.") / len(text) for _, key in said]
    assert places == sorted(places)
    assert places[0] < 0.15


def test_every_key_is_listed_once_and_asked_for_with_its_value(engine: Engine) -> None:
    sequence = words(engine).lookup()
    assert CONTEXT - 60 < len(sequence.tokens) <= CONTEXT
    pairs = re.findall(r"key (\d{5}) value (\d{5})", engine.decode(sequence.tokens))
    listed, asked = pairs[: -len(DEPTHS)], pairs[-len(DEPTHS) :]
    assert len({key for key, _ in listed}) == len(listed)
    assert set(asked) <= set(listed)
    assert listed.index(asked[0]) < listed.index(asked[-1])


def test_the_passage_comes_twice(engine: Engine) -> None:
    sequence = words(engine).repeat()
    (answer,) = sequence.answers
    assert len(sequence.tokens) == answer.stop == CONTEXT
    length = CONTEXT // 4
    assert sequence.tokens[:length] == sequence.tokens[-length:]
    assert sequence.tokens[length : 2 * length] != sequence.tokens[:length]


def test_scores_are_those_of_the_models_own_logits(engine: Engine) -> None:
    _, text = read_text(None)
    records = list(retrieve(engine, [None, CONFIG], text=text, text_name="x", context=CONTEXT, seed=3))
    assert [r.top_k_used for r in records if r.config is not None] == [8] * 11
    assert [r.task for r in records if r.config is None] == [TASKS[0]] * 5 + [TASKS[1]] * 5 + [TASKS[2]]
    sequence = words(engine).passkey()
    model = engine._model  # type: ignore[attr-defined]
    ids = torch.tensor([sequence.tokens])
    with torch.inference_mode():
        dense = model(ids).logits[0]
        with enabled(model, CONFIG):
            sparse = model(ids).logits[0]
    passkeys = [r for r in records if r.task == "passkey" and r.config is not None]
    for answer, record in zip(sequence.answers, passkeys, strict=True):
        expected = ids[0, answer.start : answer.stop]
        for logits, logprob, hit in (
            (dense, record.logprob_dense, record.hit_dense),
            (sparse, record.logprob, record.hit),
        ):
            rows = logits[answer.start - 1 : answer.stop - 1].double()
            assert logprob == pytest.approx(
                rows.log_softmax(-1).gather(1, expected[:, None]).mean().item(), abs=1e-4
            )
            assert hit == bool((rows.argmax(-1) == expected).all())
    same = [r for r in records if r.config is None]
    assert all(r.logprob == r.logprob_dense and r.hit == r.hit_dense for r in same)


def test_a_context_too_short_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="context = 100: retrieval needs 512 to 8192 tokens"):
        next(retrieve(engine, [CONFIG], text="word " * 999, text_name="x", context=100))
    with pytest.raises(ValueError, match=r"the text has .* tokens, retrieval at 600 needs as many"):
        next(retrieve(engine, [CONFIG], text="word", text_name="x", context=600))
