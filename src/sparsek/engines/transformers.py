"""The engine `transformers`: a model in Hugging Face Transformers, from a GGUF file or a directory."""

from __future__ import annotations

import contextlib
import copy
import inspect
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, Final

import torch
import transformers
from transformers import Cache, DynamicCache

from ..config import SparseKConfig
from ..integrations import transformers as integration
from ..integrations.observers import Observer
from .base import Part, check_device, head_size_of, of_layers
from .gguf_model import not_finite, read_one_file
from .model_file import find_model
from .random_weights import RandomTokens
from .text import shown_name
from .transformers_loading import load_model, make_model
from .transformers_text import Tokenizer

_LOGIT_ROWS: Final = 256  # rows of [rows, vocabulary] held at once


class TransformersEngine:
    """See `base.Engine`. Runs in float32 on the CPU and in bfloat16 on a CUDA device."""

    name = "transformers"
    version = transformers.__version__
    sparse_layers = None
    n_devices = 1

    def __init__(
        self,
        model: str | None,
        *,
        threads: int | None = None,
        device: str = "cpu",
        flash_attention: bool = True,  # noqa: ARG002  PyTorch decides
        rope_scale: float = 1.0,
        random_weights: bool = False,
    ) -> None:
        if rope_scale != 1.0:
            raise ValueError(
                "the engine transformers cannot stretch positions: use the engine llama for that"
            )
        check_device(device)
        self.device = device
        self.generation_goes_on = device == "cuda"
        self.path = path = find_model(model)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if threads is not None:
            torch.set_num_threads(threads)
        self.model, metadata = shown_name(path.name), {}
        if path.is_file():
            file = read_one_file(path)
            self.model, metadata = file.name, file.metadata
        self.model_config = SparseKConfig.from_gguf_metadata(metadata)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._tokenizer: Tokenizer | RandomTokens
        if random_weights:
            self._model = make_model(path, dtype, device)
            self._tokenizer = RandomTokens(int(self._model.config.get_text_config().vocab_size))
        else:
            self._tokenizer = Tokenizer(path, metadata)
            self._model = load_model(path, dtype).to(device)
        config = self._model.config.get_text_config()
        try:
            self.num_layers = int(config.num_hidden_layers)
            self.num_heads = int(config.num_attention_heads)
            self.head_size = head_size_of(config)
            self.context_length = int(config.max_position_embeddings)
            self._vocabulary = int(config.vocab_size)
        except AttributeError as error:
            name = type(self._model).__name__
            raise ValueError(
                f"{name} is not supported, its configuration is unlike Llama's: {error}"
            ) from None
        self.num_parameters = int(self._model.num_parameters())
        self.dense = str(config._attn_implementation)

    def encode(self, text: str) -> list[int]:
        return self._known(self._tokenizer.encode(text))

    def encode_chat(self, text: str) -> list[int]:
        return self._known(self._tokenizer.encode_chat(text))

    def _known(self, tokens: list[int]) -> list[int]:
        """The tokens, if the model has them all."""
        most = max(tokens, default=0)
        if most >= self._vocabulary:
            raise ValueError(
                f"the tokenizer is of another model: it gives the token {most}, and the model has the tokens "
                f"0 to {self._vocabulary - 1}: {self.path}"
            )
        return tokens

    def pieces(self, tokens: Iterable[int]) -> Iterator[bytes]:
        return self._tokenizer.pieces(tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self.pieces(tokens)).decode(errors="replace")

    def prompt(self, tokens: list[int], config: SparseKConfig | None) -> Iterator[tuple[int, float]]:
        with self._attending(config):
            start = time.perf_counter()
            self._step(self._ids(tokens), self._cache(config))
            seconds = time.perf_counter() - start
        yield len(tokens), seconds

    def generation(self, depth: list[int], count: int, config: SparseKConfig | None) -> Callable[[], float]:
        tokens = depth or self.encode("The")[:1]  # generation begins from something
        at_depth = self._cache(config)
        with self._attending(config):
            token = first = self._step(self._ids(tokens), at_depth)

        def once() -> float:
            nonlocal token
            cache = at_depth
            if not self.generation_goes_on:  # a copy, for a sliding-window cache cannot be cropped back
                token, cache = first, copy.deepcopy(at_depth)
            with self._attending(config):
                start = time.perf_counter()
                for _ in range(count):
                    token = self._step(token, cache)
                return time.perf_counter() - start

        return once

    def generate(self, tokens: list[int], count: int, config: SparseKConfig | None) -> Iterator[int]:
        cache = self._cache(config)
        ids, ends = self._ids(tokens), self._end_tokens()
        for _ in range(count):
            with self._attending(config):  # not across the yield: others may use the model in between
                ids = self._step(ids, cache)
            token = int(ids)
            if token in ends:
                return
            yield token

    def observed(
        self, observer: Observer, layers: Container[int] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        return integration.observed(of_layers(observer, layers))

    def operations(self) -> dict[str, int]:
        return {}

    def logits(self, parts: Sequence[Part]) -> Iterator[torch.Tensor]:
        whole = len(parts) == 1 and parts[0].step is None
        cache = None if whole else self._cache(next((p.config for p in parts if p.config), None))
        for part in parts:
            step = part.step or len(part.tokens)
            for start in range(0, len(part.tokens), step):
                states = self._states(part.tokens[start : start + step], part.config, cache)
                if not part.scored:
                    continue
                states = states[-start % part.scored :: part.scored]
                for row in range(0, len(states), _LOGIT_ROWS):
                    yield self._finite(self._head(states[row : row + _LOGIT_ROWS]).float())

    def _states(self, tokens: list[int], config: SparseKConfig | None, cache: Cache | None) -> torch.Tensor:
        """The body's last hidden states, [tokens, hidden size]: all logits at once would take gigabytes."""
        hidden: list[torch.Tensor] = []
        body = self._model.base_model
        hook = body.register_forward_hook(lambda _m, _a, out: hidden.append(out.last_hidden_state))
        try:
            with torch.inference_mode(), self._attending(config):
                last = self._model(self._ids(tokens), **self._using(cache), logits_to_keep=1).logits[0, -1]
        finally:
            hook.remove()
        states = hidden[-1][0]
        self._check_head(states[-1:], last)
        return states

    @torch.inference_mode()
    def _head(self, states: torch.Tensor) -> torch.Tensor:
        """From the body's last hidden states to logits, as the model's own forward does it."""
        head = self._model.get_output_embeddings()
        # In 16 bits the rounding of logits alone would be a distance of some 0.001.
        scores = torch.nn.functional.linear(states.float(), head.weight.float())
        if getattr(head, "bias", None) is not None:
            scores = scores + head.bias.float()
        cap = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def _check_head(self, states: torch.Tensor, expected: torch.Tensor) -> None:
        tolerance = 1e-3 if expected.dtype == torch.float32 else 0.1
        ours = self._head(states)[0]
        if not torch.allclose(ours, self._finite(expected).float(), rtol=tolerance, atol=tolerance):
            raise NotImplementedError(
                f"{type(self._model).__name__} does more between its last layer and its logits than "
                "one projection: evaluation does not know this model yet"
            )

    def _finite(self, logits: torch.Tensor) -> torch.Tensor:
        if not bool(torch.isfinite(logits).all()):
            raise not_finite(self.model)
        return logits

    def _attending(self, config: SparseKConfig | None) -> contextlib.AbstractContextManager[Any]:
        if config is None:
            return contextlib.nullcontext()
        config.check_layers(self.num_layers)
        return integration.enabled(self._model, config)

    def _cache(self, config: SparseKConfig | None) -> Cache:
        return (integration.SparseKCache if config else DynamicCache)(config=self._model.config)

    def _using(self, cache: Cache | None) -> dict[str, Any]:
        """As arguments of the model's forward; Transformers 5.24 renamed one of them."""
        if cache is None:
            return {"use_cache": False}
        renamed = "cache" in inspect.signature(self._model.forward).parameters
        return {"cache" if renamed else "past_key_values": cache, "use_cache": True}

    @torch.inference_mode()
    def _step(self, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Append `ids` to the cache; returns the greedy next token [1, 1]."""
        logits = self._model(ids, **self._using(cache), logits_to_keep=1).logits
        token: torch.Tensor = self._finite(logits[:, -1]).argmax(-1, keepdim=True)
        if token.is_cuda:
            torch.cuda.synchronize()
        return token

    def _ids(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor([tokens], device=self._model.device)

    def _end_tokens(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return {int(e) for e in [*ends, self._tokenizer.eos] if e is not None}
