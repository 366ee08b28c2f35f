"""`sparsek report`: the pictures and the tables on one page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from ..config import SparseKConfig, budget_name
from ..engines.base import check_fits, default_engine
from ..engines.text import option_text, shown_name
from ..extras import how_to_install
from ..policy import by_share, on_gpu
from .options import (
    Budget,
    Budgets,
    Counts,
    Tokens,
    check_folder,
    check_outputs,
    common_options,
    device_option,
    load,
    make_config,
    make_configs,
    model_option,
    rule_options,
    text_option,
    use_threads,
)
from .output import write_file
from .progress import progress

if TYPE_CHECKING:
    from ..report.records import Records

SENTENCE: Final = "Anna gave the old key to Tom, because he had lost the one that she had made for him."
_MORE_BUDGETS: Final = (16, 64, 256)
_LENGTHS: Final = (512, 2048, 4096)
# Parameters that `eval` and `bench` have too.
_RULE: Final = frozenset(
    {
        "device",
        "config_file",
        "min_share",
        "pure",
        "sinks",
        "window",
        "stride",
        "tail",
        "select",
        "tile",
        "dense_layers",
        "min_context",
        "threads",
    }
)


@click.command("report")
@model_option
@device_option
@text_option
@click.option(
    "-o", "--output", metavar="FILE", default="report.html", show_default=True, help="Where the page goes."
)
@click.option("--images", metavar="DIR", help="Also write each picture as SVG and PNG into this folder.")
@click.option(
    "--records",
    metavar="FILE",
    multiple=True,
    help="Records of bench, eval or tune (json or jsonl); those of bench and eval replace measuring. "
    "Can be repeated.",
)
@click.option(
    "--sentence", default=SENTENCE, metavar="TEXT", help="What attention is drawn on, up to 64 tokens."
)
@click.option("--sentence-k", type=click.IntRange(0), default=4, show_default=True, help="K on the sentence.")
@click.option("--layer", type=int, help="Layer to draw.  [default: that of the head taken]")
@click.option("--head", type=int, help="Head to draw.  [default: the one with most weight on its top-K keys]")
@click.option(
    "-k",
    "--top-k",
    type=Budgets(),
    help="K to measure; the first is the one whose cost and mass are shown, and whose speed at every "
    "length; the others are timed at --context tokens.  "
    "[default: the configuration's, and 16, 64, 256]",
)
@click.option(
    "-c", "--context", type=Tokens(1), default=2048, show_default=True, help="Tokens to measure quality on."
)
@click.option(
    "--lengths", type=Counts(1), help="Prompt lengths to measure speed at.  [default: 512,2048,4096]"
)
@click.option(
    "-r", "--repetitions", type=click.IntRange(1), default=1, show_default=True, help="Of the speed tests."
)
@rule_options
@common_options
def command(
    model: str | None,
    device: str,
    text: str | None,
    output: str,
    images: str | None,
    records: tuple[str, ...],
    sentence: str,
    sentence_k: int,
    layer: int | None,
    head: int | None,
    top_k: list[Budget] | None,
    context: int,
    lengths: list[int] | None,
    repetitions: int,
    threads: int | None,
    seed: int,  # noqa: ARG001
    debug: bool,  # noqa: ARG001
    **rule: Any,
) -> None:
    """What Sparse-K does to a model, on one page that needs no network.

    The web of attention, the scores and the mask of a sentence; the scores that are computed, speed, quality,
    retained mass and the frontier of the two, on your text. Everything is taken from the model or measured in
    the run, which takes minutes, or read from records. Attention and quality are Transformers', speed is
    llama.cpp's where that is installed. With --device cuda all is on a GPU, in Transformers, and tiles of
    queries share their lists of keys whatever the length is.

    \b
    Examples:
      sparsek report
      sparsek report -m model.gguf --text book.txt -o report.html --images pictures
      sparsek report --sentence "The key is under the mat." --layer 10 --head 1
      sparsek tune --max-kl 0.01 --records tune.json && sparsek report --records tune.json
      sparsek bench -p 512,8000 -n 0 -o json > bench.json && sparsek report --records bench.json
    """
    sentence = option_text(sentence, "--sentence")
    if find_spec("matplotlib") is None:
        raise ImportError(f"the pictures need matplotlib: {how_to_install('report')}")
    from ..bench.environment import environment
    from ..bench.text import read_text, take_tokens
    from ..evaluate import for_report
    from ..evaluate.kept_keys import observed_kept
    from ..report import page
    from ..report.parts import Material, parts
    from ..report.records import read_records
    from ..report.series import frontier_of_run
    from ..report.svg import write_images
    from ..report.tensors import capture, small_rule

    ctx = click.get_current_context()
    _check_places(output, images, (text, model, rule["config_file"], *records))
    _configs(top_k, None, rule)  # what is wrong in them shows before the model is loaded
    found = read_records(list(records))
    name, words = read_text(text)
    engine = load("transformers", model, threads, device=device)
    configs = _configs(top_k, engine.model_config, rule)
    if device == "cuda":
        configs = [on_gpu(config) for config in configs]
    configs[0].check_layers(engine.num_layers)
    for count in [context, *(lengths or [])]:
        check_fits(count, engine.context_length)
    with progress("attention", 1) as advance:
        small = small_rule(configs[0], sentence_k)
        attention = capture(engine, sentence, small, layer=layer, head=head)
        advance()
    kept, longest = None, engine.context_length
    if by_share(configs[0]):
        tokens = take_tokens(engine, words, context)
        longest = context
        with progress("kept keys", context) as advance:
            kept = observed_kept(engine, tokens, configs[0], advance)
    costs = for_report.costs(configs[0], engine.num_layers, engine.num_heads, longest, kept)
    if not found.eval:
        tokens = engine.encode(words)
        with progress("quality", (1 + len(configs)) * context) as advance:
            found.eval = for_report.quality(engine, configs, tokens, context, text_name=name, advance=advance)
    if not found.bench:
        lengths = lengths or [n for n in _LENGTHS if n <= engine.context_length]
        fast = default_engine(model) if device == "cpu" else engine.name
        timed = engine if fast == engine.name else load(fast, model, threads)
        with progress("speed", for_report.runs(configs, lengths, context, repetitions)) as advance:
            found.bench = for_report.speed(
                timed,
                configs,
                lengths,
                context,
                text=words,
                threads=use_threads(threads),
                repetitions=repetitions,
                advance=advance,
            )
    material = Material(
        model=engine.model,
        sentence=sentence,
        attention=attention,
        costs=costs,
        records=found,
        points=frontier_of_run(found.eval, found.bench, for_report.mean_keys),
        top_k=budget_name(configs[0]),
        commands=_commands(ctx, attention.layer, attention.head, configs, found, lengths),
        command=_line(ctx, "report", set(ctx.params) - {"debug"}),
        environment=environment(),
    )
    made = parts(material)
    write_file(output, page.page(material, made))
    click.echo(f"wrote {shown_name(output)}")
    if images is not None:
        Path(images).mkdir(exist_ok=True)
        files = write_images([picture for part in made for picture in part.pictures], Path(images))
        click.echo(f"wrote {len(files)} pictures to {shown_name(images)}")


def _check_places(output: str, images: str | None, inputs: Sequence[str | None]) -> None:
    check_outputs(output, inputs=(images, *inputs))
    if images is None:
        return
    if not images or (Path(images).exists() and not Path(images).is_dir()):
        raise click.UsageError(f"this is not a directory: {images!r}")
    check_folder(images)


def _configs(
    budgets: list[Budget] | None, carried: SparseKConfig | None, rule: dict[str, Any]
) -> list[SparseKConfig]:
    """Those to measure; the first is the one that is shown."""
    if budgets is None:
        config = make_config(carried, **rule)
        more = [k for k in _MORE_BUDGETS if k != config.top_k]
        return [config, *(replace(config, top_k=k, min_share=0.0) for k in more)]
    if 0 in budgets:
        given = ",".join(map(str, budgets))
        raise click.UsageError(f"-k {given}: 0 is dense attention, which is measured anyway; leave it out")
    once = {repr(budget): budget for budget in budgets}  # 1 is K, 1.0 a share
    return [config for config in make_configs(list(once.values()), carried, **rule) if config]


# ---- The commands that give the parts again


def _budget(config: SparseKConfig, ctx: click.Context) -> str:
    """What -k is to be for this configuration: a share, where it was not given as --min-share, or K."""
    share = config.min_share if config.top_k == "auto" and ctx.params["min_share"] is None else 0.0
    return repr(share) if share else str(config.top_k)


def _commands(
    ctx: click.Context,
    layer: int,
    head: int,
    configs: list[SparseKConfig],
    found: Records,
    lengths: list[int] | None,
) -> dict[str, str]:
    budgets = [] if isinstance(configs[0].top_k, tuple) else [_budget(c, ctx) for c in configs]
    shown = {"model", "text"} | _RULE
    tile = "--select tile" if configs[0].select == "tile" and ctx.params["select"] is None else ""
    sentence = _line(ctx, "report", {*shown, "sentence", "sentence_k"}, f"--layer {layer} --head {head}")
    k = f"-k {','.join(budgets)}" if budgets else ""
    evaluation = _line(
        ctx, "eval", shown - {"min_context"}, "--engine transformers", f"--context {ctx.params['context']}",
        "--min-context 0", tile, k,
    )  # fmt: skip
    context = ctx.params["context"]
    speed = " && ".join(
        _line(
            ctx,
            "bench",
            shown,
            tile,
            f"-p {p} -n 0 -r {ctx.params['repetitions']}",
            f"-k 0,{ks}" if ks else "",
        )
        for p, ks in _timed(lengths or [], context, budgets)
    )
    read = _line(ctx, "report", {*shown, "records"})
    return {
        "web": sentence,
        "cost": _line(ctx, "report", shown, f"-k {budgets[0]}" if budgets else ""),
        "eval": read if "eval" in found.files else evaluation,
        "bench": read if "bench" in found.files else speed,
        "tune": read if "tune" in found.files else evaluation,
    }


def _timed(lengths: list[int], context: int, budgets: list[str]) -> list[tuple[str, str]]:
    """Prompt lengths and the K timed at them: all at the context, elsewhere the first."""
    others = ",".join(str(n) for n in lengths if n != context)
    tests = [(others, ",".join(budgets[:1]))] if others else []
    return [*tests, (str(context), ",".join(budgets))] if context in lengths else tests


def _line(ctx: click.Context, command: str, names: set[str], *more: str) -> str:
    """A command line with those of the named parameters that were given."""
    words = ["sparsek", command]
    for parameter in ctx.command.params:
        name, value = parameter.name, ctx.params.get(parameter.name or "")
        given = ctx.get_parameter_source(name or "") is ParameterSource.COMMANDLINE
        if name not in names or not given:
            continue
        option = parameter.opts[-1]
        if isinstance(value, bool):
            words.append(option)
        elif isinstance(value, tuple):
            words += [word for x in value for word in (option, str(x))]
        else:
            words += [option, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return " ".join([shown_name(shlex.join(words)), *filter(None, more)])
