"""The measures of quality, against the same numbers worked out another way."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch

from sparsek import SparseKConfig
from sparsek.bench.text import read_text
from sparsek.engines.base import Engine, open_engine
from sparsek.evaluate.attention_mass import retained_mass
from sparsek.evaluate.journal import Journal
from sparsek.evaluate.quality import EvalRecord, Where, Windows, evaluate, perplexity
from sparsek.integrations.transformers import SparseKCache, enabled
from sparsek.problem import make_problem

CONFIG = SparseKConfig(top_k=6, sinks=1, window=4, dense_layers=(0, 3), min_context=0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine("transformers", None)


@pytest.mark.model
def test_measures_are_those_of_the_models_own_logits(engine: Engine) -> None:
    """Perplexity from the model's own loss; KL and same top token from its full logits."""
    _, text = read_text(None)
    context, windows = 300, 2
    planned = Windows(engine.encode(text), context, windows)
    (record,) = evaluate(engine, [CONFIG], planned, text_name="x")

    assert torch.is_grad_enabled(), "evaluating must leave PyTorch as it was"
    model = engine._model  # type: ignore[attr-defined]
    ids = torch.tensor(engine.encode(text)[: context * windows]).view(windows, context)
    with torch.inference_mode():
        dense = model(ids, labels=ids)
        with enabled(model, CONFIG):
            sparse = model(ids, labels=ids)
    assert record.ppl_dense == pytest.approx(dense.loss.exp().item(), rel=1e-4)
    assert record.ppl == pytest.approx(sparse.loss.exp().item(), rel=1e-4)
    p, q = (out.logits[:, :-1].double().log_softmax(-1) for out in (dense, sparse))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    assert record.kl_mean == pytest.approx(kl.item(), rel=1e-3)
    assert record.same_top == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=2e-3)
    assert (record.windows, record.context, record.text) == (windows, context, "x")


@pytest.mark.model
def test_mass_and_kept_keys_leave_out_dense_layers(engine: Engine) -> None:
    _, text = read_text(None)
    (record,) = evaluate(engine, [CONFIG], Windows(engine.encode(text), 300), text_name="x")
    assert record.kept_mean is not None
    assert 10.5 < record.kept_mean <= 11  # 1 + 4 + 6, a little less in the first rows
    assert record.mass_mean is not None
    assert 0.5 < record.mass_mean < 1
    assert [heads is None for heads in record.mass] == [layer in (0, 3) for layer in range(30)]
    assert [kept is None for kept in record.kept] == [layer in (0, 3) for layer in range(30)]
    assert all(len(heads) == 9 for heads in record.mass if heads)


def test_retained_mass_of_a_case_worked_by_hand() -> None:
    """Scores 0, 1, 2 (natural): keeping the best of three keeps e^2 / (1 + e + e^2)."""
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([0.0, 1.0, 2.0]).view(1, 1, 3, 1)
    problem = make_problem(q, k, k, config=SparseKConfig.pure(1), scale=1.0)
    mass, kept, rows = retained_mass(problem)
    e = torch.tensor(1.0).exp().item()
    assert mass == [pytest.approx(e**2 / (1 + e + e**2))]
    assert (kept, rows) == (1, 1)


def test_retained_mass_of_rows_that_see_nothing() -> None:
    q = k = torch.ones(1, 1, 2, 1)
    mask = torch.tensor([[False, False], [True, True]])
    assert retained_mass(make_problem(q, k, k, config=SparseKConfig.pure(1), attn_mask=mask)) == ([0.5], 1, 2)


@pytest.mark.model
@pytest.mark.parametrize("where", ["prompt", "generation"])
@pytest.mark.parametrize("name", ["transformers", "llama"])
def test_sparse_in_one_part_alone(engine: Engine, name: str, where: Where) -> None:
    """The loss of the generated tokens, from a loop of our own over the model's own cache."""
    if name == "llama":
        pytest.importorskip("xllamacpp")
    _, text = read_text(None)
    context, generated = 150, 8
    tokens = engine.encode(text)[:context]
    used = engine if name == "transformers" else open_engine(name, None)
    planned = Windows(tokens, context, where=where, generated=generated)
    (record,) = evaluate(used, [CONFIG], planned, text_name="x")

    model = engine._model  # type: ignore[attr-defined]
    split = context - generated - 1
    cache = SparseKCache(config=model.config)
    loss = 0.0
    with torch.inference_mode():
        with enabled(model, CONFIG) if where == "prompt" else contextlib.nullcontext():
            model(torch.tensor([tokens[:split]]), past_key_values=cache)
        with enabled(model, CONFIG) if where == "generation" else contextlib.nullcontext():
            for i in range(split, context - 1):
                logits = model(torch.tensor([[tokens[i]]]), past_key_values=cache).logits[0, -1]
                loss -= logits.double().log_softmax(-1)[tokens[i + 1]].item() / generated
    assert record.scored == generated
    tolerance = 1e-4 if name == "transformers" else 0.03  # llama.cpp rounds activations to 8 bits
    assert record.ppl == pytest.approx(math.exp(loss), rel=tolerance)
    assert record.ppl != record.ppl_dense


@pytest.mark.model
def test_an_interrupted_evaluation_gives_the_same_answer(engine: Engine, tmp_path: Path) -> None:
    _, text = read_text(None)
    planned = Windows(engine.encode(text), 128, 2)
    work = {"text": "x"}

    def run(file: Path, advance: Callable[[int], None] = lambda _: None) -> EvalRecord:
        (record,) = evaluate(
            engine, [CONFIG], planned, text_name="x", journal=Journal(file, work), advance=advance
        )
        return replace(record, environment={})

    whole = run(tmp_path / "whole")
    steps = []

    def stop(tokens: int) -> None:
        steps.append(tokens)
        if sum(steps) > 300:  # of 2 * 2 * 128
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop)
    told: list[int] = []
    assert run(tmp_path / "cut", told.append) == whole
    assert sum(told) == 2 * 2 * 128
    assert whole.kl_se is not None
    assert 0 < whole.kl_se < whole.kl_mean


def test_a_loss_beyond_all_numbers_is_said() -> None:
    assert perplexity(2.0) == pytest.approx(math.exp(2))
    with pytest.raises(ValueError, match="the perplexity is e to the power of 5000: are the weights damaged"):
        perplexity(5e3)
