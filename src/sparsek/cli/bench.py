"""`sparsek bench`: speed of a model, dense beside Sparse-K."""

from __future__ import annotations

import statistics
from typing import Any, Final

import click

from ..config import budget_words
from ..report.tables import with_quartiles
from .notes import note, note_dense, note_spread
from .options import (
    Budget,
    Budgets,
    Counts,
    Tokens,
    common_options,
    load,
    make_configs,
    model_options,
    rule_options,
    use_threads,
)
from .output import Column, Records, k_text, output_option
from .progress import progress

COLUMNS: Final = [
    Column("model", lambda r: r.model),
    Column("engine", lambda r: r.engine),
    Column("threads", lambda r: str(r.n_threads), right=True),
    Column("K", k_text, 10),
    Column("test", lambda r: r.test, 13),
    Column("t/s", lambda r: f"{r.avg_ts:.2f} ± {r.stddev_ts:.2f}", 16, right=True),
    Column(
        "ratio",
        lambda r: "" if r.speedup is None else with_quartiles(r.speedup, r.speedup_low, r.speedup_high),
        16,
        right=True,
    ),
    Column("max error", lambda r: "" if r.max_abs_err is None else f"{r.max_abs_err:.1e}", right=True),
]


REQUESTS_COLUMNS: Final = [
    Column("model", lambda r: r.model),
    Column("engine", lambda r: r.engine),
    Column("K", k_text, 11),
    Column("test", lambda r: r.test, 16),
    Column("first token, s", lambda r: f"{statistics.median(r.first_s):.3f}", right=True),
    Column(
        "ratio", lambda r: "" if r.first_speedup is None else with_quartiles(*r.first_speedup), 16, right=True
    ),
    Column("token, ms", lambda r: f"{1000 * statistics.median(r.token_s):.2f}", right=True),
    Column(
        "ratio", lambda r: "" if r.token_speedup is None else with_quartiles(*r.token_speedup), 16, right=True
    ),
    Column("max error", lambda r: "" if r.max_abs_err is None else f"{r.max_abs_err:.1e}", right=True),
]


@click.command("bench")
@model_options
@click.option(
    "-p",
    "--prompts",
    type=Counts(),
    default="512,2048",
    show_default=True,
    help="Prompt lengths; 0 for none.",
)
@click.option(
    "-n",
    "--generate",
    type=Tokens(0),
    default=32,
    show_default=True,
    help="Tokens to generate; 0 for none.",
)
@click.option(
    "-d", "--depths", type=Counts(), default="0", show_default=True, help="Tokens before the generated ones."
)
@click.option(
    "-k",
    "--top-k",
    type=Budgets(),
    help="K to compare, or shares like 0.002; 0 is dense.  [default: 0 and the configuration's]",
)
@click.option(
    "-r", "--repetitions", type=click.IntRange(1), default=3, show_default=True, help="Repetitions."
)
@click.option(
    "--requests",
    type=click.IntRange(1),
    metavar="N",
    help="Send N prompts at once: time to the first token, and per token; engine vllm.",
)
@click.option(
    "--flash-attention/--no-flash-attention",
    default=True,
    help="The dense side: llama.cpp has two kinds of attention.  [default: on, the faster one]",
)
@click.option(
    "--rope-scale",
    type=click.IntRange(1, 1024),
    default=1,
    metavar="X",
    help="Stretch positions, for prompts X times as long as the model's context; engine llama, speed only.",
)
@click.option(
    "--random-weights",
    is_flag=True,
    help="The model directory has a config.json alone: weights of that shape, for speed; engines "
    "transformers and vllm. The share of -k auto is then one with which lists are as long as in real models.",
)
@click.option("--text", metavar="FILE", help="Text to make prompts of.  [default: Python's own manual]")
@rule_options
@common_options
@output_option
def command(
    model: str | None,
    device: str,
    engine: str | None,
    prompts: list[int],
    generate: int,
    depths: list[int],
    top_k: list[Budget] | None,
    repetitions: int,
    requests: int | None,
    flash_attention: bool,
    rope_scale: int,
    random_weights: bool,
    text: str | None,
    threads: int | None,
    seed: int,  # noqa: ARG001
    debug: bool,  # noqa: ARG001
    output: str,
    **rule: Any,
) -> None:
    """Prompt and generation speed: dense attention beside Sparse-K.

    Configurations are timed in alternation, and shown when their test is complete. The ratio is speed over
    dense, the median of paired repetitions and its quartiles; every sparse row was verified against the
    reference in the same run.

    \b
    Examples:
      sparsek bench
      sparsek bench -p 4096,8000 -n 32 -d 4096 -k 0,64,auto
      sparsek bench -p 2048 -n 0 -k 0,64 --min-context 0 -o json
      sparsek bench -p 32000 -n 0 -k 0,auto --rope-scale 4
      sparsek bench --engine vllm -m MODEL --device cuda -p 16384,65536
      sparsek bench --engine vllm -m MODEL --device cuda -p 8192 -n 64 --requests 8
    """
    from ..bench import model as library
    from ..bench.requests import bench_requests
    from ..bench.text import read_text

    make_configs(top_k, None, **rule)  # what is wrong in them shows before the model is loaded
    planned = library.tests(prompts, generate, depths)
    if not planned:
        raise click.UsageError("nothing to measure: -p and -n are both 0")
    _, words = read_text(text)
    opened = load(
        engine,
        model,
        threads,
        device=device,
        flash_attention=flash_attention,
        rope_scale=rope_scale,
        random_weights=random_weights,
    )
    configs = make_configs(top_k, opened.model_config, **rule)
    if top_k is None:
        configs = [None, *configs]
    if requests is not None:
        lengths = [n for n in prompts if n]
        with (
            Records(output, REQUESTS_COLUMNS) as shown,
            progress("bench", len(lengths) * len(configs) * repetitions) as advance,
        ):
            for served in bench_requests(
                opened,
                lengths,
                configs,
                requests=requests,
                generated=generate,
                text=words,
                repetitions=repetitions,
                usual_lists=random_weights,
                advance=advance,
            ):
                shown.add(served)
        return
    records = []
    with (
        Records(output, COLUMNS) as shown,
        progress("bench", len(planned) * len(configs) * repetitions) as advance,
    ):
        for record in library.bench(
            opened,
            planned,
            configs,
            text=words,
            threads=use_threads(threads),
            repetitions=repetitions,
            usual_lists=random_weights,
            advance=advance,
        ):
            records.append(record)
            shown.add(record)
    note_spread(
        [
            (f"{r.test}, {budget_words(k_text(r))}", r.samples_ns, (r.speedup, r.speedup_low, r.speedup_high))
            for r in records
        ]
    )
    why = library.why_no_ratio(records)
    if why is not None:
        note(why)
    channels = opened.num_heads * opened.head_size if device == "cuda" else None
    note_dense(configs, [test.prompt + test.depth + test.generated for test in planned], channels)
