"""What the commands need of an engine, and the table of engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, Protocol

from ..config import SparseKConfig
from ..problem import Problem

# observer(layer, problem, output): called after every Sparse-K attention.
Observer = Callable[[int, Problem, Any], None]

# name, which is that of the extra too: module, class, and the package that it needs
ENGINES: Final = {
    "transformers": ("sparsek.engines.transformers", "TransformersEngine", "transformers"),
    "llama": ("sparsek.engines.llama", "LlamaEngine", "xllamacpp"),
}


class Engine(Protocol):
    """A loaded model. Everywhere `config` = None means the engine's own dense attention.

    Attributes:
        name, version: of the engine. model: the model's name.
        num_layers, num_heads, num_parameters: of the model.
        context_length: the most tokens the model was made for.
        model_config: the Sparse-K configuration that the model file carries, or None.
    """

    name: str
    version: str
    model: str
    num_layers: int
    num_heads: int
    num_parameters: int
    context_length: int
    model_config: SparseKConfig | None

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, text: str) -> list[int]:
        """`text` as a user's message in the model's chat format; plain where it has none."""

    def decode(self, tokens: list[int]) -> str: ...

    def prompt_seconds(self, tokens: list[int], config: SparseKConfig | None) -> float:
        """Time to process a prompt up to its last token's logits."""

    def generation(self, depth: list[int], count: int, config: SparseKConfig | None) -> Callable[[], float]:
        """Process `depth`, untimed; then each call of the result generates `count` tokens after it, from
        the same state, and returns the seconds taken."""

    def generate(self, tokens: list[int], count: int, config: SparseKConfig | None) -> Iterator[int]:
        """Greedy continuation, a token at a time, until `count` tokens or the model's end token. The first
        token comes when the prompt has been processed."""

    def logits(self, tokens: list[int], config: SparseKConfig | None) -> Iterator[Any]:
        """Next-token logits of every position, torch tensors [rows, vocabulary], some rows at a time. All
        attention runs before the first chunk comes."""

    def observed(self, observer: Observer) -> AbstractContextManager[None]:
        """Within the block, `observer` sees every Sparse-K attention."""


def open_engine(name: str, model: str | None, *, threads: int | None = None) -> Engine:
    """Load a model.

    Args:
        model: path of a GGUF file or of a Transformers directory; the embedded model when None.

    Raises:
        ValueError: unknown engine; what is loaded is not a model or is damaged. FileNotFoundError: no such
        model. ImportError: the engine is not installed.
    """
    if name not in ENGINES:
        raise ValueError(f"engine {name!r}: must be one of {', '.join(ENGINES)}")
    module, class_name, package = ENGINES[name]
    if find_spec(package) is None:
        raise ImportError(f"engine {name!r} is not installed: pip install 'sparsek[{name}]'")
    engine: Engine = getattr(import_module(module), class_name)(model, threads=threads)
    return engine
