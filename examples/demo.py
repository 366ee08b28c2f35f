"""Sparse-K in llama.cpp on a prompt of 8,000 tokens: an answer, then what K gains and what it costs.

Run by `make demo`, two to four minutes on two cores. Everything shown is measured here and now, on the
embedded SmolLM2-135M-Instruct.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparsek import SparseKConfig, _core
from sparsek.bench.counts import scores_used
from sparsek.bench.text import read_text, take_tokens
from sparsek.cli.progress import progress
from sparsek.engines.base import Engine, open_engine
from sparsek.engines.llama_context import BATCH
from sparsek.evaluate.quality import EvalRecord, Windows, evaluate
from sparsek.report.tables import markdown_table
from sparsek.verify import verify

PROMPT_TOKENS = 8000
ANSWER_TOKENS = 48
CHOSEN = SparseKConfig(top_k=64)
QUESTION = "\n\nIn one sentence: what does the `assert` statement of Python do?"
QUARTERS = 4
COST_TOKENS = 2048
# By default a context this short would be dense.
COSTS = [SparseKConfig(top_k=k, min_context=0) for k in (32, 64, 128)]
VERIFIED_LAYERS = (1, 15, 29)


def main() -> None:
    threads = _core.num_threads()
    engine = open_engine("llama", None, threads=threads)
    _, text = read_text(None)
    question = engine.encode_chat(QUESTION)
    passage = engine.decode(take_tokens(engine, text, PROMPT_TOKENS - len(question)))
    prompt = engine.encode_chat(passage + QUESTION)

    print(f"{engine.model} in llama.cpp, {threads} threads.")
    print(f"A prompt of {len(prompt)} tokens of Python's manual, then:{QUESTION}\n")
    answer(engine, prompt)

    print("\nThe same prompt dense and with Sparse-K, in turns.")
    with progress("speed", 2 * parts_of(prompt)) as advance:
        dense, sparse = in_turns(engine, prompt, advance)
    print(speed_table(dense, sparse, len(prompt)))

    print(f"\nWhat K costs, on {COST_TOKENS} tokens:")
    windows = Windows(engine.encode(text), COST_TOKENS)
    with progress("quality", (1 + len(COSTS)) * COST_TOKENS) as advance:
        costs = evaluate(engine, COSTS, windows, text_name="Python manual", advance=advance)
    print(cost_table(engine, costs))
    ours, theirs = sum(sparse), sum(dense)
    print(
        f"\nThe {len(prompt)} tokens take {theirs:.0f} s with llama.cpp's flash attention, "
        f"{ours:.0f} s with K = {CHOSEN.top_k}:\n{theirs / ours:.2f} times as fast. "
        "The rest of the model costs the same for every token;\n"
        "attention grows with the prompt, and so does the gain.\n"
        "Another prompt: sparsek run -f FILE -k 64. Your text's cost: sparsek eval --text FILE."
    )


def answer(engine: Engine, prompt: list[int]) -> None:
    """Answer with Sparse-K, and verify its attention meanwhile."""
    rows, worst = 0, 0.0
    produced: list[int] = []
    with progress(f"answer, K = {CHOSEN.top_k}", parts_of(prompt) + ANSWER_TOKENS) as advance:

        def check(layer: int, problem: object, out: object) -> None:
            nonlocal rows, worst
            found = verify(problem, out, rows=8)  # type: ignore[arg-type]
            rows, worst = rows + found.rows, max(worst, found.max_abs_err)
            if layer == VERIFIED_LAYERS[-1] and not produced:
                advance()

        with engine.observed(check, VERIFIED_LAYERS):
            for token in engine.generate(prompt, ANSWER_TOKENS, CHOSEN):
                produced.append(token)
                advance()
    print(engine.decode(produced).strip())
    print(f"\n({rows} attention rows compared with the float64 reference: largest error {worst:.1e})")


def parts_of(prompt: list[int]) -> int:
    return -(-len(prompt) // BATCH)


def in_turns(
    engine: Engine, prompt: list[int], advance: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Seconds of each part of the prompt, dense and with Sparse-K. They take turns on each part, so that a
    busy moment of the machine meets both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    ways = (engine.prompt(prompt, config) for config in (None, CHOSEN))
    for part in zip(*ways, strict=True):
        for spent, (_, time) in zip(seconds, part, strict=True):
            spent.append(time)
            advance()
    return seconds


def speed_table(dense: Sequence[float], sparse: Sequence[float], tokens: int) -> str:
    """Tokens per second over the whole prompt and in each quarter of it."""
    bounds = [len(dense) * i // QUARTERS for i in range(QUARTERS + 1)]
    edges = [min(BATCH * b, tokens) for b in bounds]
    titles = ["attention", *(f"to {edge}" for edge in edges[1:]), "whole prompt, t/s", "ratio"]
    rows = []
    for name, spent in (("llama.cpp's flash attention", dense), (f"Sparse-K, K = {CHOSEN.top_k}", sparse)):
        quarters = [
            (edges[i + 1] - edges[i]) / sum(spent[bounds[i] : bounds[i + 1]]) for i in range(QUARTERS)
        ]
        whole, ratio = tokens / sum(spent), sum(dense) / sum(spent)
        rows.append([name, *(f"{speed:.0f}" for speed in quarters), f"{whole:.0f}", f"{ratio:.2f}"])
    return f"\nSpeed of the prompt, tokens per second up to each depth:\n\n{markdown_table(titles, rows)}"


def cost_table(engine: Engine, costs: Sequence[EvalRecord]) -> str:
    titles = ["K", "scores kept / full", "perplexity", "ratio to dense", "KL", "same top token"]
    rows = [["dense", "", f"{costs[0].ppl_dense:.3f}", "", "", ""]]
    for config, cost in zip(COSTS, costs, strict=True):
        kept, full = scores_used(config, COST_TOKENS, engine.num_layers, engine.num_heads)
        rows.append(
            [
                str(config.top_k),
                f"{kept / 1e6:.0f} M / {full / 1e6:.0f} M ({kept / full:.0%})",
                f"{cost.ppl:.3f}",
                f"{cost.ppl_ratio:.4f}",
                f"{cost.kl_mean:.4f}",
                f"{cost.same_top:.3f}",
            ]
        )
    return f"\n{markdown_table(titles, rows)}"


if __name__ == "__main__":
    main()
