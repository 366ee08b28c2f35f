"""Write what is generated in README.md and docs/: tables from committed records, and the command line's help.

    python tools/generate_docs.py           writes
    python tools/generate_docs.py --check   fails when something is not up to date

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click

from sparsek import SparseKConfig, recommend_k
from sparsek.cli import COMMANDS, cli
from sparsek.config import budget_range
from sparsek.policy import AUTO_SHARE, auto_top_k, on_cpu
from sparsek.report.tables import markdown_table, milliseconds, with_error, with_quartiles

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks"
_CLI_PAGE = ROOT / "docs" / "cli.md"
TARGET = 0.01  # of KL


def main() -> int:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    wanted = {file: _cli_page() if file == _CLI_PAGE else _filled(file) for file in pages}
    stale = [file for file, text in wanted.items() if not file.exists() or file.read_text() != text]
    if "--check" in sys.argv:
        for file in stale:
            print(f"{file.relative_to(ROOT)} is not up to date: run `make docs`")
        return 1 if stale else 0
    for file in stale:
        file.parent.mkdir(exist_ok=True)
        file.write_text(wanted[file])
        print(f"wrote {file.relative_to(ROOT)}")
    return 0


def summary() -> str:
    """What it gains and costs, one row an engine: the shortest, a middle and the longest prompt measured."""
    default = [r for r in _records("quality.jsonl") if r["config"]["window"]]
    (cpu_cost,) = [r for r in default if r["top_k"] in ("auto", auto_top_k(r["context"]))]
    gpu_cost = max(_records("quality-gpu.jsonl"), key=lambda r: r["context"])
    with_flash = [r for dense, r in _llama_records() if dense == "flash attention on"]
    speed_vllm = _records("speed-vllm.jsonl")
    engines = [
        ("llama.cpp", with_flash, cpu_cost),
        ("Transformers", _records("speed-gpu.jsonl"), gpu_cost),
        ("vLLM", [r for r in speed_vllm if _card(r) == _card(speed_vllm[0])], gpu_cost),
    ]
    rows, machines = [], []
    for name, records, cost in engines:
        ours = [r for r in records if r["n_prompt"] and r["config"] and r.get("n_devices", 1) == 1]
        ours.sort(key=lambda r: r["n_prompt"])
        first = ours[0]
        machine = (
            first["environment"].get("gpu") or f"{first['n_threads']} threads, {first['environment']['cpu']}"
        )
        gains = [f"{r['n_prompt']}: {r['speedup']:.2f}" for r in (first, ours[len(ours) // 2], ours[-1])]
        cost_cells = [f"{cost['ppl_ratio']:.3f}", f"{cost['kl_mean']:.3f}"]
        rows.append([f"{name}, {machine}", *gains, *cost_cells])
        machines.append(f"{first['model']}, cost on {cost['model']} at {cost['context']} tokens")
    titles = ["engine", "short", "middle", "long", "perplexity ratio", "KL"]
    models = "; ".join(f"{name}: {text}" for (name, *_), text in zip(engines, machines, strict=True))
    return (
        f"{markdown_table(titles, rows)}\n\nTokens of a prompt, and how many times as fast as the fastest "
        f"dense attention of the same engine the whole model reads it. {models}. In vLLM on a GPU the "
        "kernels are those of Transformers, where their cost was measured."
    )


def quality() -> str:
    """What K costs: evaluation records."""
    records = _records("quality.jsonl")
    rows = [
        [
            "plain top-K" if r["config"]["window"] == 0 else "default form",
            str(r["top_k"]),
            f"{r['kept_mean']:.0f}",
            f"{r['ppl_ratio']:.3f}",
            f"{r['kl_mean']:.3f}",
            f"{r['same_top']:.2f}",
            f"{r['mass_mean']:.2f}",
        ]
        for r in records
    ]
    titles = ["selection", "K", "keys kept", "perplexity ratio", "KL", "same top token", "mass kept"]
    first = records[0]
    return (
        f"{markdown_table(titles, rows)}\n\n{first['model']}, {first['context']} tokens of {first['text']}. "
        f"{_window(records)}"
    )


def llama() -> str:
    """What K gains in llama.cpp, beside each of its two dense attentions: one row a test."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for dense, r in _llama_records():
        rows.setdefault(_test(r), {})[dense if r["top_k"] == 0 else f"beside {dense}"] = r
    cells = []
    for name, found in rows.items():
        on, off = (
            _beside(found[side], found[f"beside {side}"])
            for side in ("flash attention on", "flash attention off")
        )
        cells.append([name, *on, *off])
    titles = ["test", "flash attention on, t/s", "K = 64", "ratio", "off, t/s", "K = 64", "ratio"]
    first, machine = _records("speed-llama.jsonl")[0], _records("speed-llama.jsonl")[0]["environment"]
    return (
        f"{markdown_table(titles, cells)}\n\n{first['model']}, xllamacpp {machine['xllamacpp_version']}, "
        f"{first['n_threads']} threads, {machine['cpu']} ({machine['isa']}). A ratio is of two that ran in "
        "turns: median of paired repetitions, and quartiles; the two sides are two runs. *dense*: below "
        "`min_context`, by a kernel of ours for prompts and by llama.cpp's for generation. "
        f"{_window(r for found in rows.values() for r in found.values())}"
    )


def _llama_records() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record with the dense attention that it is or is beside: a sparse one follows the dense one of its
    test and run."""
    dense = ""
    for r in _records("speed-llama.jsonl"):
        dense = r["backend"] if r["top_k"] == 0 else dense
        yield dense, r


def _beside(dense: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Both speeds and their ratio. Only llama.cpp tells whether attention was sparse."""
    speeds = [f"{r['avg_ts']:.0f} ± {r['stddev_ts']:.0f}" for r in (dense, ours)]
    if ours["operations"].get("sparse") == 0:
        speeds[1] += " *dense*"
    return [*speeds, _spread(ours)]


def _spread(record: dict[str, Any]) -> str:
    return with_quartiles(record["speedup"], record["speedup_low"], record["speedup_high"])


def speed() -> str:
    """What K gains in Transformers."""
    records = _records("speed-transformers.jsonl")
    rows = [
        [
            _test(r),
            "dense" if r["top_k"] == 0 else str(r["top_k"]),
            f"{r['avg_ts']:.1f} ± {r['stddev_ts']:.1f}",
            "" if r["speedup"] is None else _spread(r),
        ]
        for r in records
    ]
    first, machine = records[0], records[0]["environment"]
    return (
        f"{markdown_table(['test', 'K', 'tokens/s', 'ratio to dense'], rows)}\n\n"
        f"{first['model']} in Transformers {machine['transformers_version']}, {_machine(first)}. "
        f"{_window(records)}"
    )


def attention() -> str:
    """What the attention call gains: ratios, one row a shape."""
    shapes: dict[tuple[Any, ...], dict[tuple[str, str], dict[str, Any]]] = {}
    for r in _records("attention.jsonl"):
        everything = r["top_k"] == r["tokens"]
        shape = (r["heads"], r["kv_heads"], r["head_dim"], r["queries"], r["tokens"], everything, r["top_k"])
        if everything and r["config"]["window"]:
            shape = next(s for s in shapes if s[:5] == shape[:5])  # its default form is dense
        inputs = "random" if r["inputs"] == "random" else "model"
        shapes.setdefault(shape, {})[inputs, "default" if r["config"]["window"] else "plain"] = r
    rows = []
    for (heads, kv_heads, size, queries, tokens, everything, top_k), records in shapes.items():
        first = records["random", "plain"]
        rows.append(
            [
                f"{heads}/{kv_heads} heads of {size}, "
                + (f"{tokens} tokens" if queries == tokens else f"1 query, {tokens} keys"),
                "all" if everything else str(top_k),
                f"{first['baseline_ms']:.{0 if first['baseline_ms'] > 100 else 2}f}",
                *(
                    _ratio(records.get((inputs, form)))
                    for form in ("plain", "default")
                    for inputs in ("random", "model")
                ),
            ]
        )
    titles = ["call", "K", "PyTorch, ms", "plain top-K", "on real text", "default form", "on real text"]
    window = _window(_records("attention.jsonl"))
    return f"{markdown_table(titles, rows)}\n\n{_machine(first)}. {window}"


def break_even() -> str:
    """Where Sparse-K overtakes our own dense kernel: ratios, one row a shape."""
    shapes: dict[str, list[dict[str, Any]]] = {}
    for r in _records("break-even.jsonl"):
        shapes.setdefault(f"{r['heads']}/{r['kv_heads']} heads of {r['head_dim']}", []).append(r)
    lengths = [f"{r['tokens']} tokens, K {r['top_k']}" for r in next(iter(shapes.values()))]
    rows = [[shape, *(f"{r['ratio']:.2f}" for r in records)] for shape, records in shapes.items()]
    return markdown_table(["call", *lengths], rows)


def gpu() -> str:
    """The attention call on a GPU, prompts and steps of generation; nothing while there are no records."""
    if not (RECORDS / "attention-gpu.jsonl").exists():
        return ""
    records = _records("attention-gpu.jsonl")
    flex = {(r["tokens"], r["top_k"], r["inputs"]): r for r in records if r["baseline"] == "flex"}
    prompts, steps = [], []
    for r in records:
        if r["baseline"] == "flex":
            continue
        measured = [
            _kept(r),
            f"{milliseconds(r['baseline_ms'])} {r['baseline']}",
            milliseconds(r["ms"]),
            with_quartiles(r["ratio"], r["ratio_low"], r["ratio_high"]),
        ]
        checked = [f"{r['max_abs_err']:.1e}", f"{r['peak_mib'] / r['baseline_peak_mib']:.2f}"]
        if r["queries"] == r["tokens"]:
            same = flex.get((r["tokens"], r["top_k"], r["inputs"]))
            beside = f"{same['ratio']:.2f}" if same else "-"
            prompts.append([str(r["tokens"]), *measured, beside, *checked])
        else:
            steps.append([str(r["tokens"]), str(r["batch"]), *measured, f"{r['host_us']:.0f} µs", *checked])
    titles = ["keys of a list", "dense, ms", "ours, ms", "ratio"]
    ends = ["max error", "memory, ours to dense"]
    first, machine = records[0], records[0]["environment"]
    timing = " and ".join(TIMINGS[name] for name in sorted({r["timing"] for r in records}, reverse=True))
    return (
        "The attention call beside the faster of PyTorch's cuDNN and flash attention 2 or, where the record "
        "says so, flash attention 3, on q and k of which rows keep as many keys as the second column says; "
        "what rows of real models keep is below. A ratio "
        "over 1 says that ours is faster. *all*: attention is dense, for that is faster. The ratio to "
        "FlexAttention, where it was measured, is to its time over as many keys in random blocks of 128, "
        "which nobody had to choose; under 1, for choosing is most of the work.\n\n"
        f"{markdown_table(['tokens', *titles, 'ratio to FlexAttention', *ends], prompts)}\n\n"
        'One query over keys that have been indexed, as in a step of generation, with `select="tile"`; '
        '"auto" takes dense attention for fewer keys, see below. Host: what a new token and '
        "its step cost Python, which is not in the other times, for they are replays of CUDA graphs; where "
        "Python calls every step, it is no faster than that.\n\n"
        f"{markdown_table(['keys', 'batch', *titles, 'host', *ends], steps)}\n\n"
        f"{first['heads']}/{first['kv_heads']} heads of {first['head_dim']}, {first['dtype']}, "
        f"{machine['gpu']}, {_cuda(machine)}, Triton {machine['triton_version']}. Times: {timing}. Ratios: "
        "median of paired repetitions, and quartiles. Error: the largest of the output over sampled rows, "
        "against float64 over the same keys. Memory: the peak of one call, inputs included. "
        f"{_window(records)}\n\n{_gpu_model()}{_gpu_quality()}"
    )


def _kept(record: dict[str, Any]) -> str:
    """The keys of a list; by share what rows keep on average."""
    if record["top_k"] == record["tokens"]:
        return "all"
    return f"{record['kept']:.0f}" if record.get("min_share") else str(record["top_k"])


def _gpu_model() -> str:
    """What a whole model gains on a GPU; nothing while there are no records."""
    if not (RECORDS / "speed-gpu.jsonl").exists():
        return ""
    records = _records("speed-gpu.jsonl")
    pairs = zip(records[::2], records[1::2], strict=True)
    rows = [[_test(dense), *_beside(dense, ours)] for dense, ours in pairs]
    machine = records[0]["environment"]
    return (
        "A whole model, of the shape of Llama 3.1 8B with random weights, in unmodified Transformers: "
        '`attn_implementation="sdpa"` beside "sparsek" with its defaults (`make bench-gpu-model`).\n\n'
        f"{markdown_table(['test', 'dense, t/s', 'Sparse-K, t/s', 'ratio'], rows)}\n\n"
        f"One sequence, bfloat16, {machine['gpu']}, Transformers {machine['transformers_version']}, "
        f"{_cuda(machine)}. Ratios: median of {len(records[0]['samples_ns'])} paired repetitions, and "
        "quartiles.\n\n"
    )


def vllm() -> str:
    """What K gains in vLLM on GPUs, card by card, and what it cost where that was measured there."""
    names = "speed-vllm.jsonl", "requests-vllm.jsonl", "quality-vllm-gpu.jsonl"
    records, requests, quality = map(_records, names)
    tables = []
    for card in dict.fromkeys(_card(r) for r in records):
        of_card, at_once, cost = (
            [r for r in some if _card(r) == card] for some in (records, requests, quality)
        )
        tables += [_vllm(of_card, at_once), "Several at once:", _vllm_requests(at_once)]
        if cost:
            tables.append(f"What such lists cost, on SmolLM2: {_vllm_cost(cost)}")
    return "\n\n".join(tables)


def vllm_cpu() -> str:
    """What K gains in vLLM on the CPU, and what it costs."""
    cost = _vllm_cost(_records("quality-vllm.jsonl"))
    return f"{_vllm(_records('speed-vllm-cpu.jsonl'), [])}\n\nWhat it costs: {cost}"


def _card(record: dict[str, Any]) -> str:
    return str(record["environment"].get("gpu"))


def _vllm(records: list[dict[str, Any]], of_same_run: list[dict[str, Any]]) -> str:
    """One row a test: the seconds that it takes."""
    rows, dense = [], {}
    for r in records:
        if r["config"] is None:
            dense = r
            continue
        tokens = r["n_prompt"] or r["n_gen"]
        test = _test(r) if r["n_prompt"] else f"{r['n_gen']} tokens after {r['n_depth']}"
        cards = "" if r["n_devices"] == 1 else f", {r['n_devices']} cards"
        checked = "" if r["max_abs_err"] is None else f"{r['max_abs_err']:.1e}"
        seconds = [f"{tokens / x['avg_ts']:.3f}" for x in (dense, r)]
        rows.append([f"{test}{cards}", *seconds, _spread(r), checked])
    first = records[0]
    machine = first["environment"]
    machines = [r["environment"] for r in (*records, *of_same_run)]
    version = next(m[key] for m in machines for key in ("vllm_version", "vllm_cpu_version") if key in m)
    on_gpu = first["device"] == "cuda"
    where = f"{machine['gpu']}, {_cuda(machine)}" if on_gpu else _machine(first)
    titles = ["test", "dense, s", "Sparse-K, s", "ratio", "max error"]
    what = f"{first['model']}, vLLM {version}, whose own attention is {first['backend']}; {where}"
    how = (
        "A prompt takes until its first token comes. Ratios: median of paired repetitions, and quartiles. "
        "Error: the largest of the output of sampled rows, against float64 over the same keys."
    )
    return f"{markdown_table(titles, rows)}\n\n{what}. {how}"


def _vllm_requests(records: list[dict[str, Any]]) -> str:
    rows = []
    for dense, ours in zip(records[::2], records[1::2], strict=True):
        requests = f"{ours['n_requests']} prompts of {ours['n_prompt']}, {ours['n_gen']} tokens each"
        cells = [requests]
        for times, ratio, factor in (("first_s", "first_speedup", 1), ("token_s", "token_speedup", 1000)):
            cells += [f"{factor * median(r[times]):.{1 if factor > 1 else 2}f}" for r in (dense, ours)]
            cells.append(with_quartiles(*ours[ratio]))
        rows.append(cells)
    titles = [
        "requests",
        "first token, dense, s",
        "Sparse-K",
        "ratio",
        "per token, dense, ms",
        "Sparse-K",
        "ratio",
    ]
    return markdown_table(titles, rows)


def _vllm_cost(records: list[dict[str, Any]]) -> str:
    (r,) = [r for r in records if r["config"]]
    return (
        f"perplexity ratio {with_error(r['ppl_ratio'], r['ppl_ratio_se'])}, "
        f"KL {with_error(r['kl_mean'], r['kl_se'])}, same top token {r['same_top']:.3f}, "
        f"{r['kept_mean']:.0f} keys kept ({r['context']} tokens of {r['text']})."
    )


def _gpu_quality() -> str:
    """What the lists of tiles cost on real models."""
    rows = []
    for r in _records("quality-gpu.jsonl"):
        ratio, kl = with_error(r["ppl_ratio"], r["ppl_ratio_se"]), with_error(r["kl_mean"], r["kl_se"])
        rows.append(
            [
                r["model"],
                r["text"],
                str(r["context"]),
                _keys_of_a_list(r),
                f"{r['kept_mean']:.0f}",
                ratio,
                kl,
                f"{r['same_top']:.3f}",
            ]
        )
    titles = ["model", "text", "tokens", "keys of a list", "keys kept", "perplexity ratio", "KL", "same top"]
    return (
        "What such lists cost, on models that are at hand here (`sparsek eval --device cuda --select tile`, "
        "one window, float32, beside dense attention in the same run; for models so small "
        '"auto" is dense at 8192 tokens). pydoc_data.topics is Python\'s manual, python-sources.txt the '
        "first 260,000 characters of its library's modules, from a on.\n\n"
        f"{markdown_table(titles, rows)}"
    )


def _keys_of_a_list(record: dict[str, Any]) -> str:
    if record["config"].get("min_share"):
        return str(record["top_k"])  # "share 0.002"
    top_k = record.get("top_k_used", record["config"]["top_k"])
    if top_k is None:
        return f"share {AUTO_SHARE:g}"
    return str(_FIRST_AUTO if top_k == "auto" else top_k)


_FIRST_AUTO = 384  # keys, of "auto" at 8192 tokens in the first records, which do not say what it was
Study = dict[str, dict[int, dict[float, dict[str, Any]]]]  # records by model, context and K or share
TIMINGS = {"graph": "replayed CUDA graphs", "calls": "plain calls"}


def _cuda(machine: dict[str, Any]) -> str:
    """PyTorch and what it calls; 91501 is cuDNN 9.15.1."""
    cudnn = machine["cudnn"]  # null where it could not be read
    known = f", cuDNN {cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}" if cudnn else ""
    return f"PyTorch {machine['torch_version']}, CUDA {machine['cuda']}{known}"


def study_kl() -> str:
    """KL by context and K, a table for each model."""
    return _study_tables(_study(), "K {}", lambda r: f"{r['kl_mean']:.4f}")


def study_shares() -> str:
    """KL and kept keys by context and share, a table for each model."""
    return _study_tables(
        _study(by_share=True),
        "share {:g}",
        lambda r: f"{r['kl_mean']:.4f} ({r['kept_mean']:.0f})",
        " In brackets: keys kept.",
    )


def _study_tables(studied: Study, title: str, cell: Callable[[dict[str, Any]], str], note: str = "") -> str:
    tables = []
    for model, by_context in studied.items():
        budgets = sorted({k for found in by_context.values() for k in found})
        rows = [
            [str(context), *(cell(found[k]) if k in found else "-" for k in budgets)]
            for context, found in by_context.items()
        ]
        text = next(iter(next(iter(by_context.values())).values()))["text"]
        table = markdown_table(["tokens", *map(title.format, budgets)], rows)
        tables.append(f"{table}\n\n{model}, {text}.{note}")
    return "\n\n".join(tables)


def study_rules() -> str:
    """The K that is needed beside the rules of thumb."""
    studied = _study()
    contexts = sorted({context for found in studied.values() for context in found})
    rows = []
    for context in contexts:
        rule = recommend_k(context)
        needed = [_needed(studied[model].get(context, {})) for model in studied]
        rows.append(
            [str(context), *needed, f"{context**0.5:.0f}", f"{rule.low} to {rule.high}", str(rule.auto)]
        )
    return markdown_table(["tokens", *studied, "sqrt(N)", "N/64 to N/32", "auto"], rows)


def study_tiles() -> str:
    """Lists of tiles beside the K that costs as much where each query has its own."""
    studied, rows = _study(), []
    for r in _records("quality-gpu.jsonl"):
        found = studied.get(r["model"], {}).get(r["context"], {})
        if not found:
            continue
        same = _needed(found, r["kl_mean"])
        rows.append([r["model"], str(r["context"]), _keys_of_a_list(r), f"{r['kl_mean']:.4f}", same])
    return markdown_table(["model", "tokens", "keys of a list", "KL", "K of each query with that KL"], rows)


def _needed(found: dict[float, dict[str, Any]], target: float = TARGET) -> str:
    """The smallest K whose KL is `target`, between the measured ones."""
    points = sorted((k, r["kl_mean"]) for k, r in found.items())
    if not points:
        return "-"
    if points[0][1] <= target:
        return f"under {points[0][0]}"
    for (k0, kl0), (k1, kl1) in itertools.pairwise(points):
        if kl1 <= target:
            share = math.log(kl0 / target) / math.log(kl0 / kl1)
            return f"{k0 * (k1 / k0) ** share:.0f}"
    return f"over {points[-1][0]}"


def study_forms() -> str:
    """What changes when one part of the form does, a table for each model."""
    default, pure = _form(SparseKConfig(top_k=64)), _form(SparseKConfig.pure(64))
    rows: dict[str, dict[str, list[str]]] = {}
    for r in _records("choosing-k.jsonl"):
        if r["context"] != 4096 or r["top_k"] != 64:
            continue
        form = _form(r["config"])
        changed = {n: v for n, v in form.items() if v != default[n]}
        name = ", ".join(f"{n} = {v}" for n, v in changed.items()) or "the default form"
        if form == pure:
            name = "plain top-K"
        cells = [f"{r['kept_mean']:.0f}", with_error(r["ppl_ratio"], r["ppl_ratio_se"])]
        rows.setdefault(r["model"], {})[name] = [*cells, f"{r['kl_mean']:.4f}", f"{r['mass_mean']:.3f}"]
    titles = ["form", "keys kept", "perplexity ratio", "KL", "mass kept"]
    return "\n\n".join(
        f"{markdown_table(titles, [[name, *cells] for name, cells in found.items()])}\n\n{model}."
        for model, found in rows.items()
    )


def study_tune() -> str:
    """What tuning finds."""
    rows = []
    for r in _records("tune.jsonl"):
        uniform = r["uniform"]
        rows.append(
            [
                r["model"],
                r["target"],
                f"{uniform['config']['top_k']}, {uniform['keys']:.0f} keys",
                f"{budget_range(r['config'])}, {r['tuned']['keys']:.0f} keys",
                f"{r['saved']:.0%}",
                f"{r['tuned']['kl']:.4f}",
                f"{r['held']['kl_mean']:.4f}",
            ]
        )
    titles = ["model", "target", "one K", "K by layer", "saved", "KL tuned on", "KL held back"]
    first = _records("tune.jsonl")[0]
    return (
        f"{markdown_table(titles, rows)}\n\n{first['context']} tokens. Keys: how many a query attends to, a "
        "mean over all rows and layers, those of dense layers included."
    )


def _study(*, by_share: bool = False) -> Study:
    """Records of the default form with a K, or with a share."""
    default = _form(SparseKConfig(top_k=64))
    found: Study = {}
    for r in _records("choosing-k.jsonl"):
        share = r["config"].get("min_share", 0.0)
        if bool(share) == by_share and _form({**r["config"], "top_k": 64, "min_share": 0.0}) == default:
            of_context = found.setdefault(r["model"], {}).setdefault(r["context"], {})
            of_context[share if by_share else r["top_k"]] = r
    return found


def _form(config: SparseKConfig | dict[str, Any]) -> dict[str, Any]:
    """What is kept. `min_context` is no part of it: the study's contexts are all above it."""
    # Old ones have fewer fields.
    whole = SparseKConfig.from_dict(config) if isinstance(config, dict) else config
    return {name: value for name, value in on_cpu(whole).to_dict().items() if name != "min_context"}


def _window(records: Iterable[dict[str, Any]]) -> str:
    """What windows the default form had in these records."""
    windows = {r["config"]["window"] for r in records if r["config"] and r["config"]["window"]}
    return f"Window: {', '.join(map(str, sorted(windows)))}."


def _ratio(record: dict[str, Any] | None) -> str:
    if record is None:
        return "-"
    dense = " dense" if record["top_k"] == record["tokens"] and record["config"]["window"] else ""
    return f"{record['ratio']:.2f}{dense}"


def _machine(record: dict[str, Any]) -> str:
    machine = record["environment"]
    return (
        f"{record['n_threads']} threads, {machine['cpu']} ({machine['isa']}), "
        f"PyTorch {machine['torch_version']}"
    )


PARTS: dict[str, Callable[[], str]] = {
    "summary": summary,
    "quality": quality,
    "llama": llama,
    "speed": speed,
    "attention": attention,
    "break_even": break_even,
    "gpu": gpu,
    "vllm": vllm,
    "vllm_cpu": vllm_cpu,
    "study_kl": study_kl,
    "study_shares": study_shares,
    "study_rules": study_rules,
    "study_forms": study_forms,
    "study_tiles": study_tiles,
    "study_tune": study_tune,
}


def _test(record: dict[str, Any]) -> str:
    if record["n_prompt"]:
        return f"prompt of {record['n_prompt']}"
    return f"generation after {record['n_depth']}"


def _records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RECORDS / name).read_text().splitlines()]


def _filled(file: Path) -> str:
    def fill(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- generated: {name} -->\n{PARTS[name]()}\n<!-- end -->"

    return re.sub(r"<!-- generated: (\w+) -->.*?<!-- end -->", fill, file.read_text(), flags=re.DOTALL)


_CLI_INTRODUCTION = (
    "Generated from `sparsek --help`. Numbers of tokens can be written as `4k` or `128k`, in steps of 1024."
)


def _cli_page() -> str:
    """The help of every command, as the command line prints it."""
    parts = ["# The command line", "", _CLI_INTRODUCTION, ""]
    context = click.Context(cli, info_name="sparsek", help_option_names=["-h", "--help"])
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        help_text = command.get_help(
            click.Context(command, info_name=name, parent=context, terminal_width=100)
        )
        parts += [
            f"## sparsek {name}",
            "",
            "```text",
            *(line.rstrip() for line in help_text.splitlines()),
            "```",
            "",
        ]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
