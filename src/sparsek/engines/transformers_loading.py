"""Loading a tokenizer and a model with Transformers, from a GGUF file or a directory of any name."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .model_file import utf8_way_to
from .random_weights import randomise
from .text import first_line
from .tokenizer_check import keeps_words_whole


def load_tokenizer(path: Path) -> Any:
    """Raises ValueError when it cannot be loaded, or is not in order."""
    with _quietly("tokenizer", path) as source:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        in_order = keeps_words_whole(tokenizer)
    if in_order:
        return tokenizer
    other = ", or use the engine llama" if path.is_file() else ""
    raise ValueError(
        f"the tokenizer cuts its own words to pieces: Transformers {transformers.__version__} reads it "
        f"wrongly (pip install -U transformers{other}) or it is damaged: {path}"
    )


def load_model(path: Path, dtype: torch.dtype) -> Any:
    """Raises ValueError when it cannot be loaded, lacks weights, or has some that are not finite."""
    with _quietly("model", path) as source:
        model, report = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(f"the model lacks weights, {missing} among them: {path}")
    damaged = _not_finite(model)
    if damaged is not None:
        raise ValueError(f"the weights are not finite, {damaged} among them: {path}")
    return model.eval()


def make_model(path: Path, dtype: torch.dtype, device: str) -> Any:
    """A model with random weights, of the shape in the directory's config.json. Raises ValueError when there
    is none that can be read."""
    with _quietly("configuration", path) as source:
        config = AutoConfig.from_pretrained(**source)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    randomise(model, config.get_text_config())
    return model.eval()


def _not_finite(model: Any) -> str | None:
    """The name of a weight with NaN or infinity in it, which PyTorch's attention may turn into zeros. An
    embedding may have rows that no text uses."""
    embedding = model.get_input_embeddings().weight
    for name, weight in model.named_parameters():
        if weight is not embedding and not torch.isfinite(weight.sum(dtype=torch.float32)):
            return str(name)
    return None


@contextlib.contextmanager
def _quietly(part: str, path: Path) -> Iterator[dict[str, Any]]:
    """Yields what `from_pretrained` is told; without the progress bar that cannot be switched off, and with
    one kind of error."""
    try:
        name = "model.gguf" if path.is_file() else "model"
        # The parts in Rust do not take other names.
        with contextlib.redirect_stderr(io.StringIO()), utf8_way_to([path], [name]) as way:
            yield _source(way)
    except Exception as error:  # a damaged model fails in many ways
        raise ValueError(f"Transformers cannot load the {part} of {path}: {first_line(error)}") from error


def _source(path: Path) -> dict[str, Any]:
    if path.is_file():
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return {"pretrained_model_name_or_path": path}
