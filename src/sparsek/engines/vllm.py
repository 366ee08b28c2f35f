"""The engine `vllm`: a model in vLLM, in this process; dense is vLLM's own attention, switched by request."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, Final

import torch

# Before vLLM is loaded: one process, so that attention can be switched and looked at; no report of the use.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB

import vllm

from ..config import SparseKConfig
from ..integrations import vllm_backend as integration
from ..integrations.observers import Observer
from .base import Part, RequestTimes, check_device, of_layers
from .gguf_model import not_finite
from .model_file import find_model
from .random_weights import RandomTokens, randomise
from .text import first_line, shown_name
from .transformers_text import Tokenizer

_LOGIT_ROWS: Final = 256  # rows of [rows, vocabulary] held at once
_CHUNK: Final = {"cuda": 8192, "cpu": 2048}  # tokens of a batch, as vLLM's server has it
_MEMORY: Final = 0.7  # of the device, for vLLM: verifying needs some too
_PROCESSES: Final = "WORLD_SIZE"  # as torchrun sets it


class VllmEngine:
    """See `base.Engine`. Runs in the model's own dtype. Under `torchrun` with several processes the model is
    divided among them (tensor parallel); each then takes part in every call."""

    name = "vllm"
    version = vllm.__version__
    generation_goes_on = False

    def __init__(
        self,
        model: str | None,
        *,
        threads: int | None = None,
        device: str = "cpu",
        flash_attention: bool = True,  # noqa: ARG002  it is flash attention
        rope_scale: float = 1.0,
        random_weights: bool = False,
    ) -> None:
        if rope_scale != 1.0:
            raise ValueError("the engine vllm cannot stretch positions: use the engine llama for that")
        check_device(device)
        platform = "cpu" if vllm.platforms.current_platform.is_cpu() else "cuda"
        if device != platform:
            raise ValueError(f"this vLLM is one for --device {platform}, and {device!r} was given")
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # vLLM goes by it
            torch.set_num_threads(threads)
        self.device, self.path = device, find_model(model)
        if not self.path.is_dir():
            raise ValueError(f"the engine vllm takes a model directory, and this is a file: {self.path}")
        self.model, self.model_config = shown_name(self.path.resolve().name), None
        self._tokenizer: Tokenizer | RandomTokens
        if not random_weights:  # before the model, which takes long to load
            self._tokenizer = Tokenizer(self.path, {})
        self.n_devices = int(os.environ.get(_PROCESSES, "1"))
        self._llm = self._load("dummy" if random_weights else "auto")
        (worker,) = self._llm.collective_rpc(lambda worker: worker)
        self._runner = worker.model_runner
        config = self._llm.llm_engine.model_config
        if random_weights:  # vLLM's own are so small that attention would be even
            randomise(self._runner.model, config.hf_text_config)
            self._tokenizer = RandomTokens(int(config.hf_text_config.vocab_size))
        self.context_length = int(config.max_model_len) - 1  # one token is always generated
        self.num_layers = int(config.hf_text_config.num_hidden_layers)
        self.num_heads = int(config.hf_text_config.num_attention_heads)
        self.head_size = int(config.get_head_size())
        self.num_parameters = sum(p.numel() for p in self._runner.model.parameters())
        contexts = self._llm.llm_engine.vllm_config.compilation_config.static_forward_context
        impls = [(getattr(layer, "impl", None), integration.number_of(layer)) for layer in contexts.values()]
        own = [(impl, number) for impl, number in impls if isinstance(impl, integration.SparseLayer)]
        self._layers = [impl for impl, _ in own]
        numbers = [number for impl, number in own if impl.why_not is None]
        self.sparse_layers = sorted(number for number in numbers if number is not None)
        self.dense = self._layers[0].host_name() if self._layers else "vllm"
        self._requests = 0

    def _load(self, load_format: str) -> Any:
        parallel: dict[str, Any] = {}
        if self.n_devices > 1:
            parallel = {
                "tensor_parallel_size": self.n_devices,
                "distributed_executor_backend": "external_launcher",
            }
        try:
            return vllm.LLM(
                str(self.path),
                attention_backend="CUSTOM",
                load_format=load_format,
                skip_tokenizer_init=True,
                max_num_batched_tokens=_CHUNK[self.device],
                enable_prefix_caching=False,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                gpu_memory_utilization=_MEMORY,
                additional_config={"sparsek": {}},
                **parallel,
            )
        except Exception as error:  # of many kinds
            raise ValueError(f"vLLM cannot load {self.path}: {first_line(error)}") from error

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def encode_chat(self, text: str) -> list[int]:
        return self._tokenizer.encode_chat(text)

    def pieces(self, tokens: Iterable[int]) -> Iterator[bytes]:
        return self._tokenizer.pieces(tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self.pieces(tokens)).decode(errors="replace")

    def prompt(self, tokens: list[int], config: SparseKConfig | None) -> Iterator[tuple[int, float]]:
        (times,) = self.requests([tokens], 1, config)
        yield len(tokens), times.first

    def generation(self, depth: list[int], count: int, config: SparseKConfig | None) -> Callable[[], float]:
        tokens = depth or self.encode("The")[:1]  # generation begins from something

        def once() -> float:
            (times,) = self.requests([tokens], count + 1, config)
            return times.last - times.first

        return once

    def requests(
        self, prompts: Sequence[list[int]], count: int, config: SparseKConfig | None
    ) -> list[RequestTimes]:
        start = time.perf_counter()
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        for outputs in self._run(prompts, count, config, ignore_end=True):
            now = time.perf_counter() - start
            for number, tokens in outputs.items():
                if tokens:
                    first.setdefault(number, now)
                    last[number] = now
        return [RequestTimes(first[i], last[i]) for i in range(len(prompts))]

    def generate(self, tokens: list[int], count: int, config: SparseKConfig | None) -> Iterator[int]:
        told = 0
        for outputs in self._run([tokens], count, config, ignore_end=False):
            for token in outputs.get(0, [])[told:]:
                told += 1
                yield token

    def observed(
        self, observer: Observer, layers: Container[int] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        return integration.observed(of_layers(observer, layers))

    def operations(self) -> dict[str, int]:
        return dict(integration.operations)

    def logits(self, parts: Sequence[Part]) -> Iterator[torch.Tensor]:
        if len(parts) != 1 or parts[0].step is not None:
            raise ValueError(
                "the engine vllm computes a sequence in one way from its beginning to its end: "
                "use the engine llama or transformers for anything else"
            )
        (part,) = parts
        states = self._states(part)
        for chunk in states:
            for row in range(0, len(chunk), _LOGIT_ROWS):
                with torch.inference_mode():
                    logits = self._runner.model.compute_logits(chunk[row : row + _LOGIT_ROWS]).float()
                if not bool(torch.isfinite(logits).all()):
                    raise not_finite(self.model)
                yield logits

    def _states(self, part: Part) -> list[torch.Tensor]:
        """The last hidden states of the tokens that are scored, in the pieces in which vLLM computes them."""
        left, first = len(part.tokens), 0
        states: list[torch.Tensor] = []

        def keep(_module: Any, _inputs: Any, out: Any) -> None:
            nonlocal left, first
            rows = min(left, _CHUNK[self.device])
            if rows and part.scored:
                states.append(out[-first % part.scored : rows : part.scored].clone())
            left, first = left - rows, first + rows

        hook = self._runner.model.register_forward_hook(keep)
        try:
            for _ in self._run([part.tokens], 1, part.config, ignore_end=True):
                pass
        finally:
            hook.remove()
        if left:
            raise ValueError(
                f"the engine vllm computed the last {left} of {len(part.tokens)} tokens where nobody can "
                "look: take a context that is some tokens longer or shorter"
            )
        return states

    def _run(
        self, prompts: Sequence[list[int]], count: int, config: SparseKConfig | None, *, ignore_end: bool
    ) -> Iterator[dict[int, list[int]]]:
        """Greedy continuations, all at once: after each step, the tokens so far of those that went on."""
        engine = self._llm.llm_engine
        if config is not None:
            config.check_layers(self.num_layers)
            self._check_attends()
        params = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=ignore_end, detokenize=False)
        if engine.has_unfinished_requests():
            raise RuntimeError(
                "another call of this engine has not come to its end: close its iterator first"
            )
        numbers: dict[str, int] = {}
        open_requests: set[str] = set()
        try:
            for number, tokens in enumerate(prompts):
                self._requests += 1
                numbers[str(self._requests)] = number
                engine.add_request(str(self._requests), {"prompt_token_ids": tokens}, params)
                open_requests.add(str(self._requests))
            while open_requests:
                with self._attending(config):
                    outputs = engine.step()
                if config is not None:
                    self._check_attends()  # a layer sees its cache at its first prompt
                open_requests -= {out.request_id for out in outputs if out.finished}
                yield {numbers[out.request_id]: list(out.outputs[0].token_ids) for out in outputs}
        finally:
            if open_requests:
                engine.abort_request(list(open_requests), internal=False)

    def _check_attends(self) -> None:
        """Raises ValueError where vLLM keeps the attention of all layers: all would be dense."""
        reasons = [layer.why_not for layer in self._layers]
        if reasons and None not in reasons:
            raise ValueError(
                f"Sparse-K leaves all attention of {self.model} to vLLM {self.version}: {reasons[0]}"
            )

    @contextlib.contextmanager
    def _attending(self, config: SparseKConfig | None) -> Iterator[None]:
        for layer in self._layers:
            layer.sparsek = config if layer.why_not is None else None
        try:
            yield
        finally:
            for layer in self._layers:
                layer.sparsek = None
