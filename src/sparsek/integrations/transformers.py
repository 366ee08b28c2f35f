"""Sparse-K in Hugging Face Transformers 5: `attn_implementation="sparsek"`.

    register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sparsek")

or, on a model that is loaded already, `enable(model, SparseKConfig(top_k=64))`, `disable(model)`, and
`with enabled(model, config): ...`. The configuration lives in `model.config.sparsek` as JSON text, so it is
saved and loaded with the model; for models that are loaded by name `register(config)` is over it.

`SparseKCache` (see transformers_cache.py) makes generation fast.

Which models can be switched on is in transformers_models.py. Their own mask (padding, packed sequences,
sliding window, cache) is obeyed as it is; without a mask rows and keys are aligned as in Transformers' SDPA,
for a StaticCache prefill hands over the whole cache. One thing that the host leaves out is put right: packed
sequences given by `position_ids` alone lose their mask as soon as a cache is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Final, TypeVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..arrays import is_recorded, wants_gradient
from ..config import SparseKConfig
from ..kernels import break_even, dense, dispatch
from ..key_index import KeyIndex
from ..policy import on_gpu, resolve
from ..problem import Ranges, make_problem, with_plain_mask
from .dense_notice import say_if_dense
from .keys_seen import keys_seen
from .observers import Observer, Observers
from .once_per_pass import OncePerPass
from .transformers_cache import SparseKCache, index_of
from .transformers_models import made_for_itself, model_within, unknown_argument, why_not

__all__ = [
    "NAME",
    "SparseKCache",
    "current_config",
    "disable",
    "enable",
    "enabled",
    "observed",
    "register",
    "sparsek_attention",
]

NAME: Final = "sparsek"
_FIELD: Final = "sparsek"  # of the model's config
_DEFAULT: Final = SparseKConfig().to_json()
_ENABLED: Final = "_sparsek_enabled"  # of modules
# Arguments with which some models change what attention means.
_UNSUPPORTED: Final = ("s_aux", "sinks", "position_bias", "indices", "block_indices", "head_mask", "cache")

Model = TypeVar("Model", bound=Any)
_observers = Observers()
_starts: OncePerPass[torch.Tensor | None] = OncePerPass()
_ranges: OncePerPass[Ranges] = OncePerPass()
_registered: str | None = None  # for models that are loaded by name


def register(config: SparseKConfig | None = None) -> None:
    """Make `attn_implementation="sparsek"` known to Transformers. May be called again at any time.

    Args:
        config: for every model that is loaded by this name, in place of what its config.json says; `enable`
            is over it. Without it a model has what its config.json says, or else the default.

    Raises:
        TypeError: `config` is no SparseKConfig.
    """
    global _registered
    if config is not None:
        _registered = _checked(config).to_json()
    AttentionInterface.register(NAME, sparsek_attention)
    AttentionMaskInterface.register(NAME, _mask)


def enable(model: Model, config: SparseKConfig | None = None) -> Model:
    """Switch a loaded model to Sparse-K: a Transformers model, or what PEFT, torch.compile and their like
    made of one. Returns the model.

    Raises:
        TypeError: there is no Transformers model in `model`, or `config` is no SparseKConfig.
        ValueError: the model's attention is more than Sparse-K knows of (see transformers_models.py), or
            `config` has a value per layer and their number is not that of the model's layers.
    """
    register()
    _enable(model_within(model), _checked(SparseKConfig() if config is None else config))
    return model


def _checked(config: SparseKConfig) -> SparseKConfig:
    if not isinstance(config, SparseKConfig):
        raise TypeError(f"config = {config!r}: must be a SparseKConfig")
    return config


def _enable(model: Any, config: SparseKConfig) -> None:
    reason = why_not(model)
    if reason is not None:
        raise ValueError(f"{reason}: Sparse-K cannot be switched on in it")
    text_config = model.config.get_text_config()
    if isinstance(config.top_k, tuple) and len(config.top_k) != text_config.num_hidden_layers:
        raise ValueError(
            f"top_k has {len(config.top_k)} values and the model {text_config.num_hidden_layers} layers: "
            "must be one value per layer"
        )
    before = _implementations(model)
    model.set_attn_implementation(NAME)
    if NAME not in before.values():
        model._attention_before_sparsek = before
    for module in _with_config(model):
        setattr(module.config, _FIELD, config.to_json())
        setattr(module, _ENABLED, True)


def disable(model: Model) -> Model:
    """Back to the attention the model had before `enable`. Does nothing where it was not on."""
    within = model_within(model)
    if _is_on(within):
        within.set_attn_implementation(getattr(within, "_attention_before_sparsek", "sdpa"))
    for module in _with_config(within):
        module.config.__dict__.pop(_FIELD, None)
        module.__dict__.pop(_ENABLED, None)
    return model


@contextlib.contextmanager
def enabled(model: Model, config: SparseKConfig | None = None) -> Iterator[Model]:
    """Sparse-K within the block; afterwards whatever was there before."""
    before = current_config(model)
    enable(model, config)
    try:
        yield model
    finally:
        if before is None:
            disable(model)
        else:
            enable(model, before)


def current_config(model: Any) -> SparseKConfig | None:
    """The configuration that is on in a model, or None."""
    within = model_within(model)
    return _parse(_stored(within)) if _is_on(within) else None


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call `observer(layer, problem, output)` after every Sparse-K attention within the block: for
    measuring, verifying and capturing. `layer` is -1 where a module has no number; `problem` holds q, k, v
    and the rule, `output` is [B, H, Tq, Dv]."""
    with _observers.observed(observer):
        yield


def sparsek_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function that Transformers calls in every layer.

    query [B, H, Tq, D], key and value [B, Hkv, Tk, D]; returns ([B, Tq, H, Dv], None).

    Raises:
        NotImplementedError: the call is a training step, wants the attention weights, or has one of the
            arguments that change what attention means and are not supported.
    """
    _refuse_unsupported(module, dropout, kwargs)
    num_queries = query.shape[2]
    causal = attention_mask is None and num_queries > 1
    causal = causal and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if causal and key.shape[2] > num_queries and not _has_rows_cut(module):
        # Without a mask this is the prefill of an empty StaticCache: the rest of the cache is not filled yet.
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]
    # Only a causal call without a mask can have lost its packing; positions are then those of the keys.
    packed = causal and position_ids is not None and position_ids.shape[1:] == key.shape[2:3]
    positions = position_ids if packed else None
    config, layer = _stored(module), getattr(module, "layer_idx", None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rest = causal, scale, softcap, sliding_window, config, layer
    index = index_of(key)
    recorded = is_recorded(query, key, value)
    if recorded or (index is None and wants_gradient(query, key, value)):
        # As an operation, for somebody looks into it; that costs 30 microseconds.
        out = _attention_op(query, key, value, attention_mask, positions, *rest)
    else:
        starts = None
        if positions is not None:
            starts = _starts.get(positions, layer, partial(_sequence_starts, positions))
        plain = attention_mask is None and softcap is None and starts is None
        says = not _sees_least(module, sliding_window)
        if plain and query.is_cuda and _is_short(query, key, value, config, layer, sliding_window):
            # At once, for checking and dispatching would take the host longer than this.
            if says:
                say_if_dense(
                    _parse(config), query, key, layer, min(sliding_window or key.shape[2], key.shape[2])
                )
            out = dense.on_gpu(query, key, value, scale, is_causal=causal)
        else:
            out = _attend(query, key, value, attention_mask, starts, *rest, says=says, index=index)
    return out.transpose(1, 2).contiguous(), None


def _sees_least(module: torch.nn.Module, sliding_window: int | None) -> bool:
    """Whether this is a layer with a sliding window in a model that has layers without."""
    kinds = getattr(getattr(module, "config", None), "layer_types", None) or ()
    return sliding_window is not None and "full_attention" in kinds


def _is_short(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: str,
    layer: int | None,
    sliding_window: int | None,
) -> bool:
    """Whether this is a step or a short prompt on a GPU that is dense, and nobody wants to see it."""
    batch, heads, num_queries, size = query.shape
    num_keys, parsed = key.shape[2], _parse(config)
    if _observers or parsed.check_finite or not dense.has_gpu_kernels(query, value):
        return False
    if num_queries == 1:
        short = break_even.step_is_dense(key)
    else:
        short = num_queries == num_keys and break_even.prompt_is_dense(
            num_keys, num_keys, batch * heads * size
        )
    if short and parsed.select == "auto":
        return True
    rule = resolve(on_gpu(parsed), num_keys, layer=layer, context=sliding_window)
    return rule.keeps_all(num_keys) and (short or num_queries == 1)


@torch.library.custom_op("sparsek::attention", mutates_args=())
def _attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    config: str,
    layer: int | None,
) -> torch.Tensor:
    """One opaque operation for torch.compile: everything that depends on values happens inside it."""
    says = sliding_window is None
    starts = None if positions is None else _sequence_starts(positions)
    return _attend(q, k, v, mask, starts, is_causal, scale, softcap, sliding_window, config, layer, says=says)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    starts: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    config: str,
    layer: int | None,
    *,
    says: bool,
    index: KeyIndex | None = None,
) -> torch.Tensor:
    given, parsed = mask, _parse(config)
    seen = keys_seen(q, k, mask, starts, sliding_window, enough=parsed.min_context, layer=layer)
    if says:
        say_if_dense(parsed, q, k, layer, seen)
    if mask is not None and mask.dtype != torch.bool:
        # Transformers writes "forbidden" as the smallest number of the dtype; here it is -inf.
        mask = mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)
    problem = make_problem(
        q,
        k,
        v,
        config=parsed,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        softcap=softcap,
        layer=layer,
        context=seen,
        index=index,
    )
    if is_causal and problem.first_position < 0:
        problem = replace(problem, first_position=0)  # more rows than keys: SDPA aligns the first of both
    if starts is not None:
        starts = starts[:, -problem.num_queries :]
        problem = replace(problem, starts=starts.expand(q.shape[0], -1).contiguous())
    if given is not None and problem.rule.tile and not break_even.dense_by_size(problem):
        problem = problem.with_ranges(_ranges.get(given, layer, lambda: problem.ranges))
    problem = dispatch.settled(with_plain_mask(problem))
    out: torch.Tensor = dispatch.attention(problem)
    _observers.tell(layer, problem, out)
    return out


@_attention_op.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,  # noqa: ARG001
    v: torch.Tensor,
    *_: Any,
) -> torch.Tensor:
    return q.new_empty((*q.shape[:3], v.shape[-1]))


def _no_gradient(*_: Any) -> Any:
    raise NotImplementedError(
        "sparsek attention in Transformers has no gradient: use sparsek.attention() to train through it, or "
        'attn_implementation="sdpa"'
    )


_attention_op.register_autograd(_no_gradient)


def _mask(*args: Any, config: Any = None, **kwargs: Any) -> torch.Tensor | None:
    """Transformers' mask for SDPA: bool [B, 1, Tq, Tk], or None where it is plainly causal."""
    cut = getattr(config, "num_kv_shared_layers", 0) and _is_part_filled(*args, **kwargs)  # see _has_rows_cut
    # Layers that may see what follows (PaliGemma's) do not take None for causal.
    if cut or getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        kwargs["allow_is_causal_skip"] = False
    mask: torch.Tensor | None = sdpa_mask(*args, config=config, **kwargs)
    return mask


def _is_part_filled(batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, **_: Any) -> bool:  # noqa: ARG001
    """Whether this is the prefill of a StaticCache, with room behind the last token."""
    return bool(kv_length > q_offset + q_length)


def _has_rows_cut(module: torch.nn.Module) -> bool:
    """Whether without a mask the rows are the last positions of the keys. In layers that read the keys of
    earlier ones (Gemma 3n and 4) only those rows may be left whose logits are wanted."""
    return bool(getattr(module, "is_kv_shared_layer", False))


def _sequence_starts(positions: torch.Tensor) -> torch.Tensor | None:
    """The first index of each token's own sequence, int32 [B, T], from positions [B, T]; None for one.

    A sequence begins where positions fall back to 0. In rows that have such places and never repeat another
    position, a 0 after a 0 is a sequence of one token; where positions come in groups, it belongs to a group.
    Other steps are no new sequence.
    """
    step, zero = positions.diff(dim=-1), positions[:, 1:] == 0
    begins = zero & (step < 0)
    if not bool(begins.any()):
        return None
    grouped = ((step == 0) & ~zero).any(-1, keepdim=True)
    begins = begins | (zero & ~grouped & begins.any(-1, keepdim=True))
    index = torch.arange(1, positions.shape[1], dtype=torch.int32, device=positions.device)
    starts = torch.where(begins, index, 0).cummax(-1).values
    return torch.nn.functional.pad(starts, (1, 0))


def _refuse_unsupported(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if module.training or dropout:
        raise NotImplementedError("sparsek attention does not support training: call model.eval() first")
    if not torch.compiler.is_compiling():
        _refuse_class(type(module))
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            'sparsek attention has no attention weights to return: use attn_implementation="eager" for '
            "output_attentions=True"
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{type(module).__name__} passes {name!r}, which sparsek attention does not support: "
                'use attn_implementation="eager" for this model'
            )


def _refuse_class(module_class: type) -> None:
    """For models that were loaded with our name for their attention; `enable` has looked at this already."""
    reason = unknown_argument(module_class)
    if reason is None and made_for_itself(module_class):
        reason = f"{module_class.__name__} is of models that are made for their own attention alone"
    if reason is not None:
        raise NotImplementedError(f'{reason}: use attn_implementation="eager" for this model')


def _is_on(model: Any) -> bool:
    """Whether Sparse-K is on in a part of the model; what is around it may not ask for attention by name."""
    return NAME in _implementations(model).values()


def _implementations(model: Any) -> dict[str, str]:
    """The attention of the model ("") and of each of its parts, as `set_attn_implementation` takes it."""
    parts = {key: getattr(model.config, key) for key in model.config.sub_configs}
    named = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return {"": model.config._attn_implementation, **named}


def _with_config(model: Any) -> list[Any]:
    """The model and those of its modules that hold a configuration, of the whole or of a part."""
    return [m for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")]


def _stored(module: Any) -> str:
    """Of a module that `enable` has seen what it set; of others what `register` was told, or else what the
    model brought with it."""
    text = getattr(getattr(module, "config", None), _FIELD, _DEFAULT)
    if _registered is not None and not getattr(module, _ENABLED, False):
        text = _registered
    if not isinstance(text, str):
        raise ValueError(
            f"the model's configuration has {_FIELD} = {text!r}: must be JSON text of a SparseKConfig"
        )
    return text


@lru_cache(maxsize=64)
def _parse(config: str) -> SparseKConfig:
    return SparseKConfig.from_json(config)
