"""Which models of Transformers Sparse-K can be switched on in.

What a layer hands to its attention function need not be all that its attention is. Some models add what they
pass beside the mask (a bias of positions, sinks), some choose keys themselves, and some were never made for
another attention than their own: what those pass leaves out that they are causal. Taken are models that their
authors made for PyTorch's SDPA or for attention functions from outside, and of these the ones whose modules
pass no argument that means something unknown.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Final

import torch
from transformers import PreTrainedModel

# Arguments that are obeyed, that only flash attention needs, or that change nothing.
_KNOWN: Final = {
    *("query", "key", "value", "attention_mask", "scaling", "softcap", "is_causal", "sliding_window"),
    *("position_ids", "dropout", "output_attentions", "deterministic"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
}
_TABLE: Final = "ALL_ATTENTION_FUNCTIONS"  # where modules of Transformers look their attention function up


def model_within(model: Any) -> Any:
    """The Transformers model that `model` is, or the one in it: in what PEFT, torch.compile and others make.

    Raises:
        TypeError: there is none, or there are several side by side.
    """
    if isinstance(model, PreTrainedModel):
        return model
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    found = [module for module in modules if isinstance(module, PreTrainedModel)]
    if not found:
        raise TypeError(f"model is a {type(model).__name__}: must be a Transformers model, or have one in it")
    inside = set(found[0].modules())
    beside = [module for module in found if module not in inside]
    if beside:
        raise TypeError(
            f"there are several Transformers models in the {type(model).__name__}, "
            f"{type(found[0]).__name__} and {type(beside[0]).__name__} among them: pass one of these"
        )
    return found[0]


def why_not(model: Any) -> str | None:
    """Why Sparse-K cannot be switched on in a Transformers model, or None when it can."""
    name, found = type(model).__name__, False
    for part in model.modules():
        part_class: Any = type(part)
        unknown = unknown_argument(part_class)
        if unknown is not None:
            return f"{name}: {unknown}"
        if isinstance(part, PreTrainedModel) and any(map(_attends, part.modules())):
            if not _is_open(part):
                return f"{type(part).__name__} is made for its own attention alone, not even for SDPA"
            found = found or part._can_set_attn_implementation()
    return None if found else f"{name} does not take its attention from Transformers' AttentionInterface"


@lru_cache(maxsize=1024)
def unknown_argument(module_class: type) -> str | None:
    """What modules of this class hand to their attention function that Sparse-K does not know, as a phrase
    that says so; None where there is no such thing, and where the source is not there to tell."""
    for call in _calls(module_class):
        for keyword in call.keywords:
            if keyword.arg is not None and keyword.arg not in _KNOWN:
                return (
                    f"{module_class.__name__} passes {keyword.arg!r}, which sparsek attention does not know"
                )
    return None


@lru_cache(maxsize=1024)
def made_for_itself(module_class: type) -> bool:
    """Whether an attention module comes from a file of models that take no other attention than their own."""
    home = vars(sys.modules.get(module_class.__module__, object))
    models = [x for x in home.values() if isinstance(x, type) and issubclass(x, PreTrainedModel)]
    own = [x for x in models if x.__module__ == module_class.__module__]
    return bool(own) and not any(map(_is_open, own))


def _is_open(model: Any) -> bool:
    """Whether a model, or a class of models, was made for attention functions other than its own."""
    return bool(model._supports_sdpa or model._supports_attention_backend)


def _attends(module: torch.nn.Module) -> bool:
    module_class: Any = type(module)
    return bool(_calls(module_class))


@lru_cache(maxsize=1024)
def _calls(module_class: type) -> tuple[ast.Call, ...]:
    """Where the methods of a class call an attention function from Transformers' table."""
    return tuple(call for method in _methods(module_class) for call in _calls_in(method))


def _methods(module_class: type) -> Iterator[Callable[..., Any]]:
    """Those that name the table, as they are under their decorators."""
    for name in dir(module_class):
        method = inspect.unwrap(getattr(module_class, name, None) or object)
        if inspect.isfunction(method) and _TABLE in method.__code__.co_names:
            yield method


def _calls_in(method: Callable[..., Any]) -> Iterator[ast.Call]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return
    functions: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value and _TABLE in _names(node.value):
            functions |= _names(node.targets[0] if isinstance(node, ast.Assign) else node.target)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
            yield node


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
