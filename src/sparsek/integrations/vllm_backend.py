"""Sparse-K inside vLLM's own attention backends: what those for CUDA and for the CPU have in common.

    PlanningBuilder   plans a batch: which of its requests Sparse-K takes, and what is left to the host
    SparseLayer       computes these, and hands everything else to the host's implementation

Both are put before the host's own class, and what they do not know stays the host's: steps, short prompts,
sliding windows, softcap, ALiBi, sinks, 8-bit caches, encoders, cascades, CUDA graphs being captured.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Final

import torch
import vllm
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger

from ..config import SparseKConfig
from ..kernels import break_even, dispatch
from ..policy import on_cpu, on_gpu, resolve
from ..problem import make_problem
from .observers import Observer, Observers
from .vllm_plan import Plan, Prompt, Rows, others, prompts
from .vllm_settings import num_layers, settings

log = init_logger("vllm.plugins.sparsek")
_observers = Observers()
operations = {"sparse": 0, "host": 0}  # layers of batches so far, by who computed the prompts in them
MOST_OF_A_PAGE: Final = 4096  # tokens
_HEAD_SIZE: Final = 256
_GROUP_HEADS: Final = 16
_CACHE_DTYPES: Final = ("auto", "float16", "bfloat16", "float32")
_DRAFT: Final = "it is of a draft model"
# Arguments of a layer that change nothing of what attention is.
_KNOWN: Final = ("num_heads", "head_size", "scale", "num_kv_heads", "kv_cache_dtype", "attn_type")


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call `observer(layer, problem, output)` after every Sparse-K attention of this process within the
    block; `output` is [1, H, Tq, Dv]. Problems hold memory that is used again after the call."""
    with _observers.observed(observer):
        yield


class PlanningBuilder:
    """Before a host's metadata builder: where a batch has a `Plan`, its metadata has it as `sparsek`."""

    # What the host would copy from one group of layers to another has the pages of the first in its plan.
    supports_update_block_table = False
    vllm_config: Any
    layer_names: list[str]
    _plans = True

    def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        common, whole = common_attn_metadata, super().build  # type: ignore[misc]
        layer = self._layer() if self._plans and self._is_ours() and not common_prefix_len else None
        taken = () if layer is None else prompts(common, layer.gains)
        if not taken:
            return whole(common_prefix_len, common, *args, **kwargs)
        rest, left = None, others(common, taken)
        if left is not None:
            rest = self.detached(whole(0, left[0], *args, **kwargs)), left[1]
        metadata = whole(common_prefix_len, common, *args, **kwargs)  # last: it owns the host's fixed buffers
        metadata.sparsek = Plan(taken, rest)
        return metadata

    def detached(self, metadata: Any) -> Any:
        """Metadata none of which lies in a buffer that the host fills again for the next."""
        return metadata

    def build_for_cudagraph_capture(self, *args: Any, **kwargs: Any) -> Any:
        with self._unplanned():
            return super().build_for_cudagraph_capture(*args, **kwargs)  # type: ignore[misc]

    def build_for_drafting(self, *args: Any, **kwargs: Any) -> Any:
        with self._unplanned():
            return super().build_for_drafting(*args, **kwargs)  # type: ignore[misc]

    @contextlib.contextmanager
    def _unplanned(self) -> Iterator[None]:
        self._plans = False
        try:
            yield
        finally:
            self._plans = True

    def _is_ours(self) -> bool:
        """Not where the host derives one for another kind of attention from it, as for chunked local ones."""
        return type(self).__module__.startswith(f"{__package__}.")

    def _layer(self) -> SparseLayer | None:
        """A layer of this builder's group in which Sparse-K is on."""
        layers = self.vllm_config.compilation_config.static_forward_context
        found = (getattr(layers.get(name), "impl", None) for name in self.layer_names)
        return next((x for x in found if isinstance(x, SparseLayer) and x.sparsek is not None), None)


class SparseLayer:
    """Before a host's attention implementation. A host's subclass adds `pages` and what `reserve` needs.

    Attributes:
        sparsek: what prompts keep in this layer; None: it is the host's.
        why_not: why this layer cannot be Sparse-K's, or None.
    """

    device: str
    kernel: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    _was_read = False
    _spaces: ClassVar[dict[tuple[Any, ...], torch.Tensor]] = {}  # that all layers share

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = get_current_vllm_config()
        given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        self.why_not = _why_not_so(given) or _why_not_there(vllm_config)
        self.sparsek = None
        self.num_layers = num_layers(vllm_config)
        self.longest = int(vllm_config.model_config.max_model_len)
        if _is_draft(vllm_config):
            self.why_not = _DRAFT
            return
        config = settings(vllm_config, self.device)
        _tell(config)
        if self.why_not is None:
            self.sparsek = config
            self._leave(self.why_not_usable())

    def host_name(self) -> str:
        """The host's own attention, in words."""
        raise NotImplementedError

    def why_not_usable(self) -> str | None:
        """Why this vLLM's cache or interface is not one that we can use, as far as that is known before the
        model is loaded; or None."""
        return None

    def why_not_readable(self, layer: Any, kv_cache: torch.Tensor) -> str | None:
        """Why the host's cache is not one that we can read, or None."""
        raise NotImplementedError

    def pages(self, kv_cache: torch.Tensor, numbers: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, ...]:
        """The first `num_keys` keys and values in these pages of the cache, each [1, Hkv, Tk, D]."""
        raise NotImplementedError

    def space(self, dtype: torch.dtype, device: torch.device, tokens: int) -> torch.Tensor:
        """Room for keys and values of so many tokens, [2 * tokens * Hkv * D], the same at every call."""
        key, size = (dtype, device), 2 * tokens * self.num_kv_heads * self.head_size
        space = self._spaces.get(key)
        if space is None or len(space) < size:
            space = self._spaces[key] = torch.zeros(size, dtype=dtype, device=device)
        return space[:size]

    def reserve(self, layer: Any, query: torch.Tensor, output: torch.Tensor) -> str | None:
        """Take all memory that the longest prompt needs, and compile all kernels, while vLLM measures what
        is left. Returns why this layer cannot be Sparse-K's, or None."""
        raise NotImplementedError

    def gains(self, rows: int, keys: int) -> bool:
        """Whether Sparse-K is worth while for the last `rows` of a prompt's `keys` tokens so far."""
        config = self.sparsek
        if config is None or keys < config.min_context:
            return False
        if self.device == "cpu" or config.select != "auto":
            return True
        return not break_even.prompt_is_dense(rows, keys, self.num_heads * self.head_size)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,  # no keys and values where they are in the cache already
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        host = super().forward  # type: ignore[misc]
        plan = None
        if self.sparsek is not None and not any(x is not None for x in (*args, *kwargs.values())):
            if attn_metadata is None:
                self._leave(self.reserve(layer, query, output))
            else:
                plan = getattr(attn_metadata, "sparsek", None)
        if plan is None or not self._readable(layer, kv_cache) or self._keeps_all(plan, number_of(layer)):
            operations["host"] += 1
            done: torch.Tensor = host(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
            return done
        operations["sparse"] += 1
        if plan.rest is not None:
            metadata, rows = plan.rest
            _of_rows(host, rows, layer, query, key, value, kv_cache, metadata, output)
        for prompt in plan.prompts:
            self._attend(prompt, layer, query, kv_cache, attn_metadata.block_table, output)
        return output

    def _leave(self, why_not: str | None) -> None:
        """The layer is the host's from now on, where there is a reason."""
        if why_not is not None:
            self.why_not, self.sparsek = why_not, None
            log.warning_once("Sparse-K leaves attention to vLLM %s: %s", vllm.__version__, why_not)

    def _readable(self, layer: Any, kv_cache: torch.Tensor) -> bool:
        if not self._was_read:
            self._was_read = True
            self._leave(self._why_not_this(layer) or self.why_not_readable(layer, kv_cache))
        return self.sparsek is not None

    def _why_not_this(self, layer: Any) -> str | None:
        """Why a layer of this name is the host's."""
        number = number_of(layer)
        if number is not None and number >= self.num_layers:
            return _DRAFT
        by_layer = self.sparsek is not None and isinstance(self.sparsek.top_k, tuple)
        name = getattr(layer, "layer_name", "")
        return f"top_k is given by layer, and {name!r} has no number" if by_layer and number is None else None

    def _keeps_all(self, plan: Plan, number: int | None) -> bool:
        """Whether in this layer some prompt keeps everything, which the host is best at."""
        config = self._rule()
        return any(resolve(config, p.keys, layer=number).keeps_all(p.keys) for p in plan.prompts)

    def _rule(self) -> SparseKConfig:
        """The configuration as it is on this device: whether to be dense has been decided."""
        assert self.sparsek is not None
        return (on_gpu if self.device == "cuda" else on_cpu)(self.sparsek)

    def _attend(
        self,
        prompt: Prompt,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        rows = slice(prompt.start, prompt.start + prompt.rows)
        k, v = self.pages(kv_cache, block_table[prompt.request], prompt.keys)
        self.attend(query[rows], k, v, output[rows], self._rule(), number_of(layer))

    def attend(
        self,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output: torch.Tensor,
        config: SparseKConfig,
        number: int | None,
    ) -> None:
        """Of query [tokens, H, D] over the keys of which they are the last, into output [tokens, H, D]."""
        q, out = (x.view(len(x), self.num_heads, -1).transpose(0, 1)[None] for x in (query, output))
        problem = make_problem(q, k, v, config=config, is_causal=True, scale=self.scale, layer=number)
        dispatch.attention_into(out, problem, self.kernel)
        _observers.tell(number, problem, out)


def number_of(layer: Any) -> int | None:
    """The number of a layer, from a name like model.layers.3.self_attn.attn; None where that is not clear."""
    numbers = [int(part) for part in str(getattr(layer, "layer_name", "")).split(".") if part.isdecimal()]
    return numbers[0] if len(numbers) == 1 else None


def _of_rows(
    host: Callable[..., Any],
    rows: Rows,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kv_cache: torch.Tensor,
    metadata: Any,
    output: torch.Tensor,
) -> None:
    """The host's attention for some rows of the batch."""
    out = output[rows]
    k, v = (None if x is None else x[rows] for x in (key, value))
    host(layer, query[rows], k, v, kv_cache, metadata, out)
    if not isinstance(rows, slice):
        output[rows] = out


def _why_not_so(given: dict[str, Any]) -> str | None:
    """Why a layer with these arguments is the host's."""
    heads, kv_heads = given["num_heads"], given["num_kv_heads"]
    attn_type = str(getattr(given.get("attn_type"), "value", given.get("attn_type", "decoder")))
    reasons = {
        f"it is {attn_type} attention": attn_type != "decoder",
        f"its cache is {given.get('kv_cache_dtype')}": given.get("kv_cache_dtype") not in _CACHE_DTYPES,
        f"its head size is {given['head_size']}": given["head_size"] > _HEAD_SIZE,
        f"{heads // kv_heads} heads share a key head": heads // kv_heads > _GROUP_HEADS,
    }
    # Sliding windows, softcap, ALiBi, sinks, caches of other layers, and what later versions think of.
    for name, x in given.items():
        nothing = x is None or (name == "logits_soft_cap" and x == 0)
        reasons[f"it has {name}"] = name not in _KNOWN and not nothing
    return next((reason for reason, holds in reasons.items() if holds), None)


def _is_draft(vllm_config: Any) -> bool:
    """Whether the model that is being made is one that guesses tokens for another."""
    speculative: Any = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if draft is None:
        return False
    return bool(vllm_config.model_config.model == draft.model != speculative.target_model_config.model)


def _why_not_there(vllm_config: Any) -> str | None:
    """Why in a server like this all layers are the host's."""
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            return f"{name} is {getattr(parallel, name)}"
    return "VLLM_BATCH_INVARIANT is set" if getattr(vllm.envs, "VLLM_BATCH_INVARIANT", False) else None


_told: list[SparseKConfig | None] = []


def _tell(config: SparseKConfig | None) -> None:
    """Log the configuration, once for a process."""
    if config in _told:
        return
    _told.append(config)
    if config is None:
        log.info("Sparse-K is off: top_k = 0. Attention is dense.")
    else:
        log.info("Sparse-K attends to long prompts: %s", config.to_json())
