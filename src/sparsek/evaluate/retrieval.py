"""Retrieval that small models can do: does Sparse-K still find what was said long ago?

    passkey   numbers hidden at several depths of a text, asked for at its end
    lookup    a list of keys and values that fills the context, some asked for at its end
    repeat    a passage, other text, and the passage again: its second occurrence is predicted from the first

Every question is asked in one sequence, with the right answers in it, so that dense and sparse see the same.
Scores are log-probabilities of the right answer, which change before a hit becomes a miss. Passkeys are those
of Mohtashami and Jaggi (2023, Landmark Attention).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from ..bench.counts import top_k_used
from ..bench.environment import environment
from ..config import SparseKConfig, budget_name
from ..engines.base import Engine, Part
from .journal import Journal

TASKS: Final = ("passkey", "lookup", "repeat")
DEPTHS: Final = (0.05, 0.25, 0.5, 0.75, 0.95)
_COLOURS: Final = ("red", "blue", "green", "black", "white")


@dataclass(frozen=True)
class RetrievalRecord:
    """One task at one depth (0: the beginning of the context; None: of no one place).

    `logprob` and `logprob_dense` are natural logarithms of the probability of the right answer, a mean over
    its tokens; `hit` and `hit_dense` whether every token of it was the most likely one (None for a passage).
    `tokens` of the answer. `top_k_used`: as in `quality.EvalRecord`.
    """

    engine: str
    model: str
    text: str
    context: int
    task: str
    depth: float | None
    tokens: int
    top_k: int | str
    config: dict[str, Any] | None
    logprob_dense: float
    logprob: float
    hit_dense: bool | None
    hit: bool | None
    environment: dict[str, Any]
    device: str = "cpu"
    top_k_used: int | list[int] | None = None


@dataclass(frozen=True)
class _Answer:
    """Tokens [start, stop) of a sequence, and the depth of what they repeat."""

    start: int
    stop: int
    depth: float | None


@dataclass(frozen=True)
class _Sequence:
    tokens: list[int]
    answers: list[_Answer]


def check_context(engine: Engine, context: int) -> None:
    """Raises ValueError when retrieval cannot be asked in a context of so many tokens."""
    if not 512 <= context <= engine.context_length:
        raise ValueError(f"context = {context}: retrieval needs 512 to {engine.context_length} tokens")


def retrieve(
    engine: Engine,
    configs: Sequence[SparseKConfig | None],
    *,
    text: str,
    text_name: str,
    context: int,
    seed: int = 0,
    journal: Journal | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[RetrievalRecord]:
    """Each task with each configuration, a task's records together; None among the configurations is dense
    attention, which is measured anyway.

    `advance` is called with `context` after each of the passes, `quality.passes(configs, len(TASKS))`.

    Raises:
        ValueError: `context` is outside 512 .. the model's context, or the text is too short for it.
    """
    check_context(engine, context)
    journal = journal or Journal(None, {})
    words = _Words(engine, text, random.Random(seed), context)
    made = {"passkey": words.passkey, "lookup": words.lookup, "repeat": words.repeat}
    for task in TASKS:
        sequence = made[task]()
        scores = []
        for config in [None, *(c for c in configs if c is not None)]:
            key = f"{task} {context} {seed}: {config and config.to_dict()}"

            def measure(config: SparseKConfig | None = config, sequence: _Sequence = sequence) -> Any:
                return _scores(engine, sequence, config)

            scores.append(journal.get(key, measure))
            advance(context)
        dense, sparse = scores[0], iter(scores[1:])
        for config in configs:
            found = dense if config is None else next(sparse)
            for answer, (logprob_dense, hit_dense), (logprob, hit) in zip(
                sequence.answers, dense, found, strict=True
            ):
                single = task != "repeat"
                yield RetrievalRecord(
                    engine=engine.name,
                    model=engine.model,
                    text=text_name,
                    context=context,
                    task=task,
                    depth=answer.depth,
                    tokens=answer.stop - answer.start,
                    top_k=budget_name(config),
                    config=None if config is None else config.to_dict(),
                    logprob_dense=logprob_dense,
                    logprob=logprob,
                    hit_dense=hit_dense if single else None,
                    hit=hit if single else None,
                    environment=environment(),
                    device=engine.device,
                    top_k_used=top_k_used(config, context, engine.device),
                )


def _scores(engine: Engine, sequence: _Sequence, config: SparseKConfig | None) -> list[tuple[float, bool]]:
    """Of each answer: mean log-probability, and whether it is what the model would have said."""
    first = min(answer.start for answer in sequence.answers) - 1
    parts = [Part(sequence.tokens[:first], config, scored=0)] if first else []
    parts.append(Part(sequence.tokens[first:], config))
    logprobs, best, position = [], [], first
    for chunk in engine.logits(parts):
        following = torch.tensor(sequence.tokens[position + 1 : position + 1 + len(chunk)])
        chunk = chunk[: len(following)].cpu()
        logprobs.append(chunk.log_softmax(-1).gather(1, following[:, None])[:, 0])
        best.append(chunk.argmax(-1) == following)
        position += len(following)
    logprob, hit = torch.cat(logprobs), torch.cat(best)
    spans = [slice(a.start - 1 - first, a.stop - 1 - first) for a in sequence.answers]
    return [(float(logprob[span].double().mean()), bool(hit[span].all())) for span in spans]


class _Words:
    """Makes the sequences, as tokens of the engine."""

    def __init__(self, engine: Engine, text: str, chance: random.Random, context: int) -> None:
        self._engine, self._chance, self._context = engine, chance, context
        self._start = engine.encode("")  # what a tokenizer puts before every text
        self._text = self._tokens(text)
        if len(self._text) < context:
            raise ValueError(
                f"the text has {len(self._text)} tokens, retrieval at {context} needs as many: "
                "take a longer text or a smaller --context"
            )

    def passkey(self) -> _Sequence:
        keys = [self._number() for _ in DEPTHS]
        said = [
            self._tokens(f"\n\nRemember: the pass key of the {colour} door is {key}.\n\n")
            for colour, key in zip(_COLOURS, keys, strict=True)
        ]
        asked = [
            (self._tokens(f"\n\nThe pass key of the {colour} door is"), self._tokens(f" {key}"))
            for colour, key in zip(_COLOURS, keys, strict=True)
        ]
        room = self._room(sum(map(len, said)) + sum(len(q) + len(a) for q, a in asked))
        tokens, at = list(self._start), 0
        for depth, needle in zip(DEPTHS, said, strict=True):
            until = int(depth * room)
            tokens += self._text[at:until] + needle
            at = until
        tokens += self._text[at:room]
        return self._asked(tokens, asked, list(DEPTHS))

    def lookup(self) -> _Sequence:
        pairs: list[tuple[str, str]] = []
        lines: list[list[int]] = []
        questions = len(DEPTHS) * len(self._tokens(f"\nkey {self._number()} value {self._number()}"))
        used = {""}
        while sum(map(len, lines)) < self._room(questions):
            key = ""
            while key in used:
                key = self._number()
            used.add(key)
            pairs.append((key, self._number()))
            lines.append(self._tokens(f"\nkey {key} value {pairs[-1][1]}"))
        lines.pop()
        pairs.pop()
        chosen = [pairs[int(depth * (len(pairs) - 1))] for depth in DEPTHS]
        asked = [(self._tokens(f"\nkey {key} value"), self._tokens(f" {value}")) for key, value in chosen]
        return self._asked([*self._start, *(t for line in lines for t in line)], asked, list(DEPTHS))

    def repeat(self) -> _Sequence:
        length = min(512, self._context // 4)
        passage = self._text[:length]
        between = self._text[length : self._room(length)]
        tokens = [*self._start, *passage, *between, *passage]
        first = len(tokens) - length
        return _Sequence(tokens, [_Answer(first + length // 8, len(tokens), None)])  # once it is recognised

    def _asked(
        self, tokens: list[int], asked: Sequence[tuple[list[int], list[int]]], depths: Sequence[float]
    ) -> _Sequence:
        answers = []
        for (question, answer), depth in zip(asked, depths, strict=True):
            tokens = [*tokens, *question]
            answers.append(_Answer(len(tokens), len(tokens) + len(answer), depth))
            tokens += answer
        return _Sequence(tokens, answers)

    def _room(self, needed: int) -> int:
        return self._context - len(self._start) - needed

    def _tokens(self, text: str) -> list[int]:
        return self._engine.encode(text)[len(self._start) :]

    def _number(self) -> str:
        return str(self._chance.randrange(10000, 100000))
