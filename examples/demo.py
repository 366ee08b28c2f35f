"""Sparse-K on a real model, in a few minutes: generated text, then what K gains and what it costs.

Run by `make demo`. Everything shown is measured here and now, on the embedded SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from sparsek import SparseKConfig
from sparsek.bench.attention_call import bench_attention, random_inputs
from sparsek.bench.counts import scores_used
from sparsek.bench.model import BenchRecord, Test, bench
from sparsek.bench.text import read_text, take_tokens
from sparsek.cli.output import progress
from sparsek.engines.base import Engine, open_engine
from sparsek.evaluate.quality import EvalRecord, evaluate
from sparsek.report.tables import markdown_table

PROMPT_TOKENS = 2000
ANSWER_TOKENS = 48
GENERATED = 16
REPETITIONS = 3
BUDGETS: tuple[int | str, ...] = (32, 64, "auto")
CHOSEN = 64
# By default prompts this short stay dense: there our own dense kernel is faster still.
CONFIGS = [SparseKConfig(top_k=k, min_context=0) for k in BUDGETS]  # type: ignore[arg-type]
LONG_CONTEXT = 8192
QUESTION = "\n\nIn one sentence: what does the `assert` statement of Python do?"


def main() -> None:
    engine = open_engine("transformers", None)
    _, text = read_text(None)
    passage = engine.decode(take_tokens(engine, text, PROMPT_TOKENS - 64))
    generate(engine, passage)

    steps = 2 * REPETITIONS * (1 + len(CONFIGS)) + (1 + len(CONFIGS))
    print(f"\nMeasuring dense attention and K = {', '.join(map(str, BUDGETS))} ...", file=sys.stderr)
    with progress("measuring", steps) as advance:
        tests = [Test(PROMPT_TOKENS, 0, 0), Test(0, GENERATED, PROMPT_TOKENS)]
        speeds = list(
            bench(
                engine,
                tests,
                [None, *CONFIGS],
                text=text,
                threads=torch.get_num_threads(),
                repetitions=REPETITIONS,
                advance=advance,
            )
        )
        costs = evaluate(
            engine,
            CONFIGS,
            text=text,
            text_name="Python manual",
            context=PROMPT_TOKENS,
            advance=advance,
        )
    prompts, generations = speeds[: 1 + len(CONFIGS)], speeds[1 + len(CONFIGS) :]
    print(table(engine, prompts, generations, costs))
    print(verdict(prompts))
    print(longer_prompts())


def generate(engine: Engine, passage: str) -> None:
    """Answer a question at the end of a long prompt, with Sparse-K."""
    tokens = engine.encode_chat(passage + QUESTION)
    print(f"{engine.model}, a prompt of {len(tokens)} tokens of Python's manual, then:{QUESTION}\n")
    produced = list(engine.generate(tokens, ANSWER_TOKENS, CONFIGS[BUDGETS.index(CHOSEN)]))
    print(f"With Sparse-K, K = {CHOSEN}:\n{engine.decode(produced).strip()}")


def table(
    engine: Engine,
    prompts: Sequence[BenchRecord],
    generations: Sequence[BenchRecord],
    costs: Sequence[EvalRecord],
) -> str:
    titles = ["K", "prompt t/s", "ratio", "generation t/s", "scores kept / full", "ppl ratio", "KL"]
    rows = []
    for config, prompt, generation, cost in zip(
        [None, *CONFIGS], prompts, generations, [None, *costs], strict=True
    ):
        kept, full = scores_used(config, PROMPT_TOKENS, engine.num_layers, engine.num_heads)
        rows.append(
            [
                "dense" if config is None else str(config.top_k),
                f"{prompt.avg_ts:.0f} ± {prompt.stddev_ts:.0f}",
                "1" if prompt.speedup is None else f"{prompt.speedup:.2f}",
                f"{generation.avg_ts:.1f} ± {generation.stddev_ts:.1f}",
                f"{kept / 1e6:.0f} M / {full / 1e6:.0f} M ({kept / full:.0%})",
                "1" if cost is None else f"{cost.ppl_ratio:.4f}",
                "0" if cost is None else f"{cost.kl_mean:.4f}",
            ]
        )
    return f"\n{markdown_table(titles, rows)}\n"


def verdict(prompts: Sequence[BenchRecord]) -> str:
    chosen = prompts[1 + BUDGETS.index(CHOSEN)]
    spread = f"median of {REPETITIONS} pairs, {chosen.speedup_low:.2f} to {chosen.speedup_high:.2f}"
    return (
        f"With K = {CHOSEN} this prompt is processed {chosen.speedup:.2f} times as fast as with dense\n"
        f"attention ({spread}). Most of the time goes into the rest of the model,\n"
        "whose cost per token does not grow; attention's does. By default prompts under\n"
        f"{SparseKConfig().min_context} tokens stay dense; here Sparse-K is shown at work (min_context = 0)."
    )


def longer_prompts() -> str:
    """Attention alone, at the longest context of the model."""
    inputs = random_inputs(tokens=LONG_CONTEXT, queries=LONG_CONTEXT, heads=9, kv_heads=3, head_dim=64)
    record = bench_attention(
        inputs, SparseKConfig(top_k=CHOSEN), threads=torch.get_num_threads(), repetitions=3
    )
    return (
        f"At {LONG_CONTEXT} tokens attention in one layer takes {record.baseline_ms:.0f} ms, dense\n"
        f"(PyTorch), and {record.ms:.0f} ms with K = {CHOSEN}: {record.ratio:.1f} times as fast."
    )


if __name__ == "__main__":
    main()
