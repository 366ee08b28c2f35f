"""A model in GGUF files: one, or shards with the names that llama.cpp gives, NAME-00001-of-00003.gguf."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .gguf_header import GgufHeader, read_header
from .text import shown_name

_SHARD: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_NO_POOLING: Final = 0
# What `general.type` says of files that go with a model.
_NO_MODEL: Final = {
    "adapter": "a LoRA adapter",
    "mmproj": "a projector for images or sound",
    "imatrix": "an importance matrix",
}


@dataclass(frozen=True)
class GgufModel:
    """`files` in their order, one or all shards, and what each says of itself."""

    files: tuple[Path, ...]
    headers: tuple[GgufHeader, ...]

    @property
    def path(self) -> Path:
        """The file that stands for the model, the first."""
        return self.files[0]

    @property
    def metadata(self) -> dict[str, Any]:
        return self.headers[0].metadata

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def name(self) -> str:
        """For people: the file's, without what makes it a shard's."""
        shard = shard_name(self.path) if len(self.files) > 1 else None
        return shown_name(self.path.stem if shard is None else shard[0])

    def of_model(self, name: str) -> Any:
        """The field of the architecture with this name, or None."""
        return self.metadata.get(f"{self.architecture}.{name}")


def read_model(file: Path) -> GgufModel:
    """Read the headers of a model's files, and check them.

    Raises:
        ValueError: `file` is not whole, has no model in it, or is not the first of its shards; another shard
            is missing, is not whole, or belongs to another model. OSError: one cannot be read.
    """
    header = read_header(file)
    files = _shards(file, header.metadata)
    headers = (header, *(_shard_header(other, i, len(files)) for i, other in enumerate(files) if i))
    _check_is_model(file, headers)
    return GgufModel(files, headers)


def read_one_file(file: Path) -> GgufModel:
    """As `read_model`, for an engine that cannot read shards. Raises ValueError for these too."""
    model = read_model(file)
    if len(model.files) > 1:
        raise ValueError(
            "Transformers does not read a GGUF model in shards, take the engine llama, or one file, which "
            f"sparsek annotate makes of the {len(model.files)}: {file}"
        )
    return model


def shard_name(file: Path) -> tuple[str, int, int] | None:
    """From a shard's name: what it begins with, which one it is, counted from 0, and the number of shards;
    None where it is no shard's."""
    found = _SHARD.fullmatch(file.name)
    return None if found is None else (found[1], int(found[2]) - 1, int(found[3]))


def shard_path(folder: Path, prefix: str, number: int, count: int) -> Path:
    """Of the shard `number`, counted from 0."""
    return folder / f"{prefix}-{number + 1:05d}-of-{count:05d}.gguf"


def check_generates(model: GgufModel) -> None:
    """Raises ValueError when the metadata say that the model does not continue texts. What only the engine
    knows, it has to tell."""
    if model.of_model("decoder_start_token_id") is not None:
        raise does_not_generate(model, "it has an encoder")
    if model.of_model("attention.causal") is False:
        raise does_not_generate(model, "its attention is not causal")
    if model.of_model("pooling_type") not in (None, _NO_POOLING):
        raise does_not_generate(model, "it makes embeddings of them")


def does_not_generate(model: GgufModel, why: str) -> ValueError:
    """What to raise for a model that is no causal decoder."""
    return ValueError(
        f"the model does not continue texts, {why} ({model.architecture}), take a causal decoder: "
        f"{model.path}"
    )


def not_finite(name: str) -> ValueError:
    """What to raise for a model that gives NaN."""
    return ValueError(f"the logits of {name} are not finite: are its weights damaged?")


def _shards(file: Path, metadata: dict[str, Any]) -> tuple[Path, ...]:
    """All files of the model whose first is `file`."""
    number, count = (metadata.get(f"split.{name}") or 0 for name in ("no", "count"))
    if not isinstance(number, int) or not isinstance(count, int):
        raise ValueError(f"damaged GGUF file (it is shard {number!r} of {count!r}): {file}")
    if count <= 1:
        return (file,)
    if number != 0:
        raise ValueError(f"this is shard {number + 1} of {count}, give the first{_first_name(file)}: {file}")
    named = shard_name(file)
    if named is None or named[1:] != (0, count):
        name = shard_path(Path(), "NAME", 0, count)
        raise ValueError(f"the first of {count} shards must be named {name}, to find the others: {file}")
    files = tuple(shard_path(file.parent, named[0], i, count) for i in range(count))
    for i, other in enumerate(files):
        if not other.is_file():
            raise ValueError(f"shard {i + 1} of {count} is missing: {other}")
    return files


def _first_name(file: Path) -> str:
    named = shard_name(file)
    return "" if named is None else f", {shard_path(Path(), named[0], 0, named[2])}"


def _shard_header(file: Path, number: int, count: int) -> GgufHeader:
    header = read_header(file)
    found = (header.metadata.get("split.no"), header.metadata.get("split.count"))
    if found != (number, count):
        raise ValueError(f"this is not shard {number + 1} of {count}, or of another model: {file}")
    return header


def _check_is_model(file: Path, headers: tuple[GgufHeader, ...]) -> None:
    metadata, found = headers[0].metadata, sum(len(header.tensors) for header in headers)
    kind = _NO_MODEL.get(metadata.get("general.type", ""))
    if kind is not None:
        raise ValueError(f"the GGUF file is {kind}, not a model: {file}")
    if not found or "general.architecture" not in metadata:
        raise ValueError(f"the GGUF file has no model in it: {file}")
    named = metadata.get("split.tensors.count", found) if len(headers) > 1 else found
    if named != found:
        raise ValueError(f"the shards have {found} tensors, and the first says {named}: {file}")
