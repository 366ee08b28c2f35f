"""The measures of quality, against the same numbers worked out another way."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

from sparsek import SparseKConfig
from sparsek.bench.text import read_text
from sparsek.engines.base import Engine, Part, open_engine
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

    split = context - generated - 1
    losses = _losses(engine, tokens, split, CONFIG, where)
    dense = _losses(engine, tokens, split, None, where)
    assert record.scored == generated
    # llama.cpp rounds activations, to how many bits depends on the processor: what that does to the tokens of
    # dense attention, Sparse-K may differ by too.
    parts = [Part(tokens[:split], None, scored=0), Part(tokens[split : context - 1], None, step=1)]
    rows = torch.cat([row.double().log_softmax(-1) for row in used.logits(parts)])
    own = -rows.gather(1, torch.tensor(tokens[split + 1 :])[:, None])[:, 0] - dense
    tolerance = 1e-4 if name == "transformers" else 3 * own.abs().mean().item()
    assert tolerance < 0.2
    assert record.ppl == pytest.approx(math.exp(losses.mean().item()), rel=tolerance)
    assert record.ppl != record.ppl_dense


def _losses(engine: Engine, tokens: list[int], split: int, config: Any, where: Where) -> torch.Tensor:
    """Of each token after `split`, from a loop of our own over the model and its cache, in Transformers."""
    model = engine._model  # type: ignore[attr-defined]
    cache = SparseKCache(config=model.config)

    def in_part(part: Where) -> Any:
        return enabled(model, config) if config and where == part else contextlib.nullcontext()

    losses = []
    with torch.inference_mode():
        with in_part("prompt"):
            model(torch.tensor([tokens[:split]]), past_key_values=cache)
        with in_part("generation"):
            for i in range(split, len(tokens) - 1):
                logits = model(torch.tensor([[tokens[i]]]), past_key_values=cache).logits[0, -1]
                losses.append(-logits.double().log_softmax(-1)[tokens[i + 1]])
    return torch.stack(losses)


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
