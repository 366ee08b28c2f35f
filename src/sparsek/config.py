"""SparseKConfig: which connections a query keeps. One immutable object, checked when it is made.

The fields are the whole user-facing vocabulary of the project; `policy.py` turns them into the numbers
that a kernel needs for one layer and one context length.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, Final, Literal, get_args

TopK = int | Literal["auto"]
Tail = Literal["none", "centroid"]
Select = Literal["auto", "query", "tile"]

_TAILS: Final = get_args(Tail)
_SELECTS: Final = get_args(Select)
_TILES: Final = (32, 64)
_INT32_MAX: Final = 2**31 - 1
_GGUF_PREFIX: Final = "sparsek."


@dataclass(frozen=True)
class SparseKConfig:
    """What each query keeps: its `top_k` best keys, a few keys it always keeps, and a summary of the rest.

    Args:
        top_k: the most keys kept per query by score, outside the always-kept ones; a tuple gives one value
            per layer. "auto" is about sqrt(context); for the lists of tiles as many as have a `min_share`
            of 0.004. With `min_share` it is no limit.
        min_share: keep only keys that get at least this share of the query's softmax over all allowed keys,
            up to 1, and the last allowed position; a larger share keeps fewer. With tiles those that some
            query of the tile gives so much. 0: `top_k` alone says what is kept.
        sinks: allowed keys among the first `sinks` positions are always kept.
        window: the last `window` allowed positions up to the query's own are always kept.
        stride: positions that are multiples of `stride` are always kept; 0 keeps none.
        tail: "centroid" adds one estimated term per block of 64 keys for what was dropped; "none" drops it.
        dense_layers: layers (counted from 0) that keep everything.
        min_context: contexts shorter than this (in tokens) keep everything.
        check_finite: look for NaN and infinity in the inputs, and fail if there are any.
        select: "query" chooses the `top_k` keys for each query alone; "tile" one list of `top_k` keys for a
            tile of neighbouring queries and all heads that share a key head, which GPUs are fast at. "auto"
            is "query" on the CPU. On a GPU it is "tile", with lists of 6 x `top_k` keys (up to 2048) where
            `top_k` is a number, if that is faster than dense attention, and elsewhere dense attention.
        tile: queries of a tile, 32 or 64. The positions of a tile are always kept by its queries.

    Raises:
        ValueError: a field is outside its range; the message names the field, the value and what is allowed.
        TypeError: a field is of the wrong type.
    """

    top_k: TopK | tuple[TopK, ...] = "auto"
    sinks: int = 4
    window: int = 16
    stride: int = 0
    tail: Tail = "centroid"
    dense_layers: tuple[int, ...] = (0,)
    min_context: int = 2048
    check_finite: bool = False
    select: Select = "auto"
    tile: int = 64
    min_share: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", _checked_top_k(self.top_k))
        for name in ("sinks", "window", "stride", "min_context"):
            object.__setattr__(self, name, _checked_int(name, getattr(self, name)))
        if self.tail not in _TAILS:
            raise ValueError(f"tail = {self.tail!r}: must be one of {', '.join(map(repr, _TAILS))}")
        if self.select not in _SELECTS:
            raise ValueError(f"select = {self.select!r}: must be one of {', '.join(map(repr, _SELECTS))}")
        if self.tile not in _TILES or isinstance(self.tile, bool):
            raise ValueError(f"tile = {self.tile!r}: must be 32 or 64")
        object.__setattr__(self, "min_share", _checked_share(self.min_share))
        object.__setattr__(self, "dense_layers", _checked_layers(self.dense_layers))
        if not isinstance(self.check_finite, bool):
            raise TypeError(f"check_finite = {self.check_finite!r}: must be True or False")
        budgets = self.top_k if isinstance(self.top_k, tuple) else (self.top_k,)
        if 0 in budgets and not (self.sinks or self.window or self.stride):
            raise ValueError(
                f"top_k = {self.top_k!r} with sinks = window = stride = 0 keeps no key at all: "
                "top_k must be at least 1, or one of the others positive"
            )

    @classmethod
    def pure(cls, top_k: TopK | tuple[TopK, ...]) -> SparseKConfig:
        """The plain method: the `top_k` best keys in every layer at every length, -inf elsewhere."""
        return cls(top_k, sinks=0, window=0, tail="none", dense_layers=(), min_context=0, select="query")

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError when the fields by layer are not those of a model with so many layers."""
        if isinstance(self.top_k, tuple) and len(self.top_k) != num_layers:
            raise ValueError(
                f"top_k = {self.top_k!r} gives {len(self.top_k)} values and the model has {num_layers} layers"
            )
        if any(layer >= num_layers for layer in self.dense_layers):
            raise ValueError(
                f"dense_layers = {self.dense_layers!r}: the model has the layers 0 to {num_layers - 1}"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types; `from_dict` reads it back."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseKConfig:
        """Missing fields take their defaults; unknown ones are an error."""
        if not isinstance(values, Mapping):
            raise TypeError(f"a configuration must be an object of fields, got {values!r}")
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown field {', '.join(map(repr, unknown))}: known are {', '.join(known)}")
        typed: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        return cls(**typed)

    def to_json(self, *, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> SparseKConfig:
        """Raises ValueError when `text` is not JSON, and as `from_dict` does."""
        try:
            values = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            hint = " (this takes JSON text, not a file's name)" if str(text).endswith(".json") else ""
            raise ValueError(f"not a JSON configuration ({error}): {str(text)[:80]!r}{hint}") from None
        return cls.from_dict(values)

    def to_gguf_metadata(self) -> dict[str, str | int]:
        """The `sparsek.*` keys that a GGUF file carries. Lists are comma lists and shares are decimal
        numbers, like on the command line, so that every viewer shows them and an empty list can be stored."""
        metadata: dict[str, str | int] = {}
        for name, value in self.to_dict().items():
            if name == "check_finite":  # how to run, not what the model wants
                continue
            if isinstance(value, list):
                value = _comma_list(value)
            metadata[_GGUF_PREFIX + name] = repr(value) if isinstance(value, float) else value
        return metadata

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any]) -> SparseKConfig | None:
        """The configuration in a GGUF file's metadata, or None when it carries no `sparsek.*` key."""
        if not isinstance(metadata, Mapping):
            raise TypeError(f"metadata must map keys to values, got {metadata!r}")
        values = {
            key[len(_GGUF_PREFIX) :]: value
            for key, value in metadata.items()
            if isinstance(key, str) and key.startswith(_GGUF_PREFIX)
        }
        if not values:
            return None
        if isinstance(values.get("top_k"), str):
            values["top_k"] = parse_top_k(values["top_k"])
        if isinstance(values.get("dense_layers"), str):
            values["dense_layers"] = parse_layers(values["dense_layers"])
        if isinstance(values.get("min_share"), str):
            values["min_share"] = parse_share(values["min_share"])
        return cls.from_dict(values)


def parse_top_k(text: str) -> TopK | tuple[TopK, ...]:
    """One K ("64", "auto"), or a comma list with one per layer; a list of one ends with a comma."""
    budgets = tuple(_parse_budget(part) for part in text.removesuffix(",").split(","))
    return budgets if "," in text else budgets[0]


def parse_layers(text: str) -> tuple[int, ...]:
    """A comma list of layer numbers; "" and "none" are the empty list."""
    if text.strip().lower() in ("", "none"):
        return ()
    try:
        return tuple(int(part) for part in text.removesuffix(",").split(","))
    except ValueError:
        raise ValueError(f"dense_layers = {text!r}: must be layer numbers like 0,1 or none") from None


def parse_share(text: str) -> float:
    """A share of the softmax, like "0.002"."""
    if re.fullmatch(r"\d*\.?\d+(e-?\d+)?", text, re.ASCII | re.IGNORECASE) is None:
        raise ValueError(f"min_share = {text!r}: must be a number from 0 to 1")
    return float(text)


def _comma_list(values: list[Any]) -> str:
    if not values:
        return "none"
    return f"{values[0]}," if len(values) == 1 else ",".join(map(str, values))


def _parse_budget(text: str) -> TopK:
    if text.strip() == "auto":
        return "auto"
    if not (text.strip().isascii() and text.strip().isdecimal() and len(text) < 20):
        raise ValueError(f'top_k = {text!r}: must be an integer >= 0 or "auto"')
    return int(text)


def _checked_top_k(value: Any) -> TopK | tuple[TopK, ...]:
    if isinstance(value, (tuple, list)):
        if not value:
            raise ValueError('top_k = (): must be an integer >= 0, "auto", or one of these per layer')
        return tuple(_checked_budget(item) for item in value)
    return _checked_budget(value)


def _checked_budget(value: Any) -> TopK:
    if isinstance(value, str):
        if value == "auto":
            return "auto"
        raise ValueError(f'top_k = {value!r}: must be an integer >= 0, "auto", or one of these per layer')
    return _checked_int("top_k", value)


def _checked_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} = {value!r}: must be an integer >= 0")
    number = int(value.__index__())
    if not 0 <= number <= _INT32_MAX:
        raise ValueError(f"{name} = {value!r}: must be an integer from 0 to {_INT32_MAX}")
    return number


def _checked_share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"min_share = {value!r}: must be a number from 0 to 1")
    try:
        share = float(value)
    except OverflowError:
        share = math.inf
    if not 0 <= share <= 1:
        raise ValueError(f"min_share = {value!r}: must be a number from 0 to 1")
    return share


def _checked_layers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list, set, frozenset, range)):
        raise TypeError(f"dense_layers = {value!r}: must be a tuple of layer numbers, like (0, 1)")
    return tuple(sorted({_checked_int("dense_layers", layer) for layer in value}))


def budget_name(config: SparseKConfig | None) -> int | str:
    """K as records have it, or the share and K beside it; None is an engine's own dense attention, 0."""
    if config is None:
        return 0
    budget: int | str = "per layer" if isinstance(config.top_k, tuple) else config.top_k
    return _with_share(budget, config.min_share) if config.min_share else budget


def budget_words(name: int | str) -> str:
    """What `budget_name` or `budget_range` gave, in a sentence: "K = 64", "share 0.002, K 64"."""
    return str(name) if str(name).startswith("share") else f"K = {name}"


def _with_share(budget: int | str, share: float) -> str:
    if not share:
        return str(budget)
    return f"share {share:g}" if budget == "auto" else f"share {share:g}, K {budget}"


def budget_range(config: Mapping[str, Any]) -> str:
    """K of a configuration's fields, for people: where it is given per layer, from the smallest to the
    largest, "auto" as the least; with the share beside it or in its place."""
    top_k, share = config.get("top_k", "auto"), config.get("min_share", 0.0)
    if isinstance(top_k, (tuple, list)):
        ordered = sorted(top_k, key=lambda k: -1 if k == "auto" else k)
        top_k = f"{ordered[0]} to {ordered[-1]}"
    return _with_share(top_k, share)


# An engine with it runs as it does without us, and its attention can be observed.
KEEP_ALL: Final = SparseKConfig.pure(2**31 - 1)
