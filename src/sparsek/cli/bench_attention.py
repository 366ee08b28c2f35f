"""`sparsek bench-attention`: the attention call alone."""

from __future__ import annotations

from typing import Any, Final

import click

from ..config import SparseKConfig, budget_words
from ..engines.base import check_device
from ..kernels.dispatch import BACKENDS
from ..policy import on_device
from ..report.tables import milliseconds, rule_text, with_quartiles
from .notes import note_dense, note_spread
from .options import (
    Budget,
    Budgets,
    Counts,
    Tokens,
    common_options,
    make_configs,
    rule_options,
    use_threads,
)
from .output import Column, Records, output_option
from .progress import progress


def _rule(record: Any) -> str:
    """What was asked to be kept."""
    return rule_text(record.top_k, record.min_share, record.tokens)


_BATCH: Final = Column("batch", lambda r: str(r.batch), right=True)
COLUMNS: Final = [
    Column("inputs", lambda r: r.inputs),
    Column("dtype", lambda r: r.dtype),
    Column("heads", lambda r: f"{r.heads}/{r.kv_heads}x{r.head_dim}"),
    Column("queries", lambda r: str(r.queries), right=True),
    Column("tokens", lambda r: str(r.tokens), 7, right=True),
    Column("K", _rule, 11, right=True),
    Column("kept", lambda r: "" if r.kept is None else f"{r.kept:.0f}", 5, right=True),
    Column("ms", lambda r: milliseconds(r.ms), 8, right=True),
    Column("baseline", lambda r: r.baseline),
    Column("baseline ms", lambda r: "" if r.baseline_ms is None else milliseconds(r.baseline_ms), right=True),
    Column(
        "ratio",
        lambda r: "" if r.ratio is None else with_quartiles(r.ratio, r.ratio_low, r.ratio_high),
        16,
        right=True,
    ),
    Column("max error", lambda r: f"{r.max_abs_err:.1e}", right=True),
]
# The embedded model's shape, so that both kinds of inputs have one default.
_HEADS, _KV_HEADS, _HEAD_DIM = 9, 3, 64
_DTYPES: Final = {"cpu": "float32", "cuda": "bfloat16"}


@click.command("bench-attention")
@click.option(
    "--tokens", type=Counts(1), default="8192", show_default=True, help="Keys, and queries unless given."
)
@click.option("--queries", type=Tokens(1), help="Query rows, the last of the tokens.  [default: all]")
@click.option("--heads", type=click.IntRange(1), default=_HEADS, show_default=True, help="Query heads.")
@click.option(
    "--kv-heads", type=click.IntRange(1), default=_KV_HEADS, show_default=True, help="Key/value heads."
)
@click.option("--head-dim", type=click.IntRange(1), default=_HEAD_DIM, show_default=True, help="Head size.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Batch entries.")
@click.option(
    "-k", "--top-k", type=Budgets(), help="K, or shares like 0.002.  [default: the configuration's]"
)
@click.option(
    "--inputs",
    type=click.Choice(["planted", "random", "model"]),
    help="planted: random numbers with strong connections, as many as --kept says and as they lie in real "
    "heads; random: normal numbers, which have none; model: q, k, v of a model on real text.  [default: "
    "planted on a GPU, for shares and with --kept, else random]",
)
@click.option(
    "--kept",
    type=click.IntRange(1),
    help="For --inputs planted: the keys that a row keeps, by the first share of -k.  [default: as many as "
    "in real models, of 8192 on a GPU 450 by a share of 0.004 and on the CPU 117 by 0.002]",
)
@click.option("-m", "--model", metavar="PATH", help="Model for --inputs model.  [default: embedded model]")
@click.option("--layer", type=click.IntRange(0), help="Its layer.  [default: the middle one]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of q, k and v.  [default: float32; on CUDA bfloat16]",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Device."
)
@click.option(
    "--baseline",
    type=click.Choice(["fastest", "sdpa", "fa3", "dense", "topk-mask", "flex", "none"]),
    default="fastest",
    show_default=True,
    help="The fastest dense attention that is here; PyTorch's, on CUDA the faster of cuDNN and flash "
    "attention 2; flash attention 3, from vLLM or flash-attn; our own; top-K as a -inf mask over PyTorch's; "
    "or, on CUDA, FlexAttention over as many keys in random blocks.",
)
@click.option(
    "--index", is_flag=True, help="With the keys indexed beforehand, as in a SparseKCache: for few --queries."
)
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="Kernel.")
@click.option(
    "-r", "--repetitions", type=click.IntRange(1), default=7, show_default=True, help="Repetitions."
)
@rule_options
@common_options
@output_option
def command(
    tokens: list[int],
    queries: int | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int,
    top_k: list[Budget] | None,
    inputs: str | None,
    kept: int | None,
    model: str | None,
    layer: int | None,
    dtype: str | None,
    device: str,
    baseline: str,
    index: bool,
    backend: str,
    repetitions: int,
    threads: int | None,
    seed: int,
    debug: bool,  # noqa: ARG001
    output: str,
    **rule: Any,
) -> None:
    """One attention call: verified against the float64 reference, then timed beside a baseline.

    Ours and the baseline are timed in alternation; the ratio is the median of the pairs and its quartiles. On
    CUDA both are replayed as CUDA graphs, so that the host's part does not count.

    \b
    Examples:
      sparsek bench-attention
      sparsek bench-attention --tokens 8192 --heads 9 --kv-heads 3 --head-dim 64 -k 64 -o json
      sparsek bench-attention --tokens 2048,4096 -k 32,64 --pure --inputs model
      sparsek bench-attention --tokens 32768 --queries 1 --index -k 128
      sparsek bench-attention --device cuda --heads 32 --kv-heads 8 --head-dim 128 --tokens 8192,32768
      sparsek bench-attention --device cuda --heads 32 --kv-heads 8 --head-dim 128 --kept 1200 --baseline fa3
    """
    from ..bench.attention_call import bench_attention
    from ..bench.capture import model_inputs
    from ..bench.inputs import random_inputs
    from ..bench.planted import planted_inputs

    configs = [config for config in make_configs(top_k, None, **rule) if config]
    if not configs:
        raise click.UsageError("-k 0 is dense attention, which is the baseline: give a K to measure")
    shares = [config for config in configs if config.min_share]
    if inputs is None:
        inputs = "planted" if device == "cuda" or shares or kept is not None else "random"
    planted_for = on_device(shares[0] if shares else SparseKConfig(), device)
    if queries is not None and queries > min(tokens):
        raise click.UsageError(f"{queries} queries are more than {min(tokens)} tokens")
    if batch > 1 and inputs == "model":
        raise click.UsageError("--batch is for random inputs: the model reads one text")
    if kept is not None and inputs != "planted":
        raise click.UsageError("--kept is for --inputs planted")
    if baseline == "flex" and device != "cuda":
        raise click.UsageError("--baseline flex needs --device cuda")
    dtype = dtype or _DTYPES[device]
    count = use_threads(threads)
    check_device(device)
    records = []
    calls = len(tokens) * len(configs) * repetitions * (1 + (baseline != "none"))
    with (
        Records(output, [_BATCH, *COLUMNS] if batch > 1 else COLUMNS) as shown,
        progress("bench-attention", calls) as advance,
    ):
        for length in tokens:
            rows = queries or length
            if inputs == "model":
                given = model_inputs(
                    model, tokens=length, queries=rows, layer=layer, dtype=dtype, device=device
                )
            else:
                shape: dict[str, Any] = {
                    "tokens": length,
                    "queries": rows,
                    "heads": heads,
                    "kv_heads": kv_heads,
                    "head_dim": head_dim,
                    "batch": batch,
                    "dtype": dtype,
                    "device": device,
                    "seed": seed,
                }
                if inputs == "planted":
                    given = planted_inputs(kept=kept, config=planted_for, **shape)
                else:
                    given = random_inputs(**shape)
            for config in configs:
                records.append(
                    bench_attention(
                        given,
                        config,
                        baseline=baseline,
                        backend=backend,
                        index=index,
                        threads=count,
                        repetitions=repetitions,
                        advance=advance,
                    )
                )
                shown.add(records[-1])
    note_spread(
        [
            (
                f"{r.tokens} tokens, {budget_words(_rule(r))}",
                r.samples_ns,
                (r.ratio, r.ratio_low, r.ratio_high),
            )
            for r in records
        ]
    )
    note_dense(configs, tokens, batch * heads * head_dim if device == "cuda" else None)
