"""Reading the records that `bench`, `eval` and `tune` wrote."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..config import SparseKConfig
from ..engines.text import decode_text
from .words import shown_all

Record = dict[str, Any]

_NUMBER: Final = (int, float)
_POSSIBLE: Final = (int, float, type(None))  # a number, or null
# A record's kind is told by its fields. These are the ones that the page uses, with the types they must have.
_FIELDS: Final[dict[str, dict[str, Any]]] = {
    "bench": {
        "engine": str,
        "model": str,
        "n_prompt": int,
        "n_gen": int,
        "n_depth": int,
        "top_k": (int, str),
        "config": (dict, type(None)),
        "backend": str,
        "n_threads": int,
        "avg_ts": _NUMBER,
        "stddev_ts": _NUMBER,
        "speedup": _POSSIBLE,
        "speedup_low": _POSSIBLE,
        "speedup_high": _POSSIBLE,
        "environment": dict,
    },
    "eval": {
        "engine": str,
        "model": str,
        "text": str,
        "context": int,
        "where": str,
        "top_k": (int, str),
        "config": (dict, type(None)),
        "ppl_ratio": _NUMBER,
        "ppl_ratio_se": _POSSIBLE,
        "kl_mean": _NUMBER,
        "kl_se": _POSSIBLE,
        "mass": list,
        "environment": dict,
    },
    "tune": {
        "engine": str,
        "model": str,
        "text": str,
        "context": int,
        "target": str,
        "tuned": dict,
        "uniform": (dict, type(None)),
        "frontier": list,
        "environment": dict,
    },
}
# Fields that records of earlier versions lack, and what stands for them.
_LATER: Final[dict[str, Any]] = {"where": "all", "ppl_ratio_se": None, "kl_se": None, "mass": []}
# Bounds of numbers; those of the others are 0 and _MOST.
_MOST: Final = 1e12
_MOST_TOKENS: Final = 1 << 24
_BOUNDS: Final = {
    "context": (1, _MOST_TOKENS),
    **dict.fromkeys(("n_prompt", "n_gen", "n_depth"), (0, _MOST_TOKENS)),
    **dict.fromkeys(("kl_mean", "kl"), (-1, _MOST)),  # rounding makes a mean of nothing negative
}
_MAY_BE: Final[dict[str, Any]] = {  # checked where they are
    "same_top": _POSSIBLE,
    "samples_ns": list,
    "top_k_used": (int, list, type(None)),
    "kept_mean": _POSSIBLE,
    "kept": list,
}
_BUDGET: Final = re.compile(r"auto|per layer|share [0-9.e-]{1,24}(, K (\d{1,10}|per layer))?", re.ASCII)
_SIGNS: Final = {"bench": "avg_ts", "eval": "kl_mean", "tune": "frontier"}  # a field that no other kind has
_POINT: Final[dict[str, Any]] = {
    "step": str,
    "config": dict,
    "keys": _NUMBER,
    "kl": _NUMBER,
    "kl_se": _NUMBER,
    "speedup": _POSSIBLE,
}


@dataclass
class Records:
    """By kind, as the dictionaries that the files hold; `files` names those that gave some of a kind."""

    bench: list[Record] = field(default_factory=list)
    eval: list[Record] = field(default_factory=list)
    tune: list[Record] = field(default_factory=list)
    files: dict[str, list[str]] = field(default_factory=dict)


def read_records(files: list[str]) -> Records:
    """The records in JSON or JSONL files, as `bench -o json`, `eval -o jsonl` and `tune --records` give them.
    Those of `eval --retrieval`, which no picture shows, are left out.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not JSON, holds no record, or one that is damaged or of an unknown kind.
    """
    found = Records()
    for file in files:
        for number, record in enumerate(_parse(file), 1):
            if isinstance(record, dict) and "logprob" in record and "task" in record:
                continue
            where = f"{file}, record {number}"
            kind = _kind(record, where)
            try:
                record = shown_all((_LATER if kind == "eval" else {}) | record)
            except RecursionError:
                raise ValueError(f"{where}: it is nested too deeply") from None
            _check(record, kind, where)
            getattr(found, kind).append(record)
            names = found.files.setdefault(kind, [])
            if file not in names:
                names.append(file)
    return found


def _parse(file: str) -> list[Any]:
    text = decode_text(Path(file).read_bytes(), f"--records {file}")
    try:
        whole = _loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, (dict, list)):
        records = [whole] if isinstance(whole, dict) else whole
    else:
        records = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                records.append(_loads(line))
            except ValueError as error:
                raise ValueError(f"neither JSON nor JSONL, line {number}: {error}: {file}") from None
    if not records:
        raise ValueError(f"there is no record in it: {file}")
    return records


def _loads(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number that a record can hold")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _kind(record: Any, where: str) -> str:
    if isinstance(record, dict):
        for kind, sign in _SIGNS.items():
            if sign in record:
                return kind
    shown = ", ".join(map(repr, list(record)[:4])) if isinstance(record, dict) else repr(record)[:60]
    raise ValueError(f"{where}: neither of bench nor of eval nor of tune; it holds {shown or 'nothing'}")


def _check(record: Record, kind: str, where: str) -> None:
    _check_fields(record, _FIELDS[kind], f"{where} (of {kind})")
    points: list[Any] = []
    if kind == "tune":
        points = [*record["frontier"], record["tuned"], *filter(None, [record["uniform"]])]
    for point in points:
        if not isinstance(point, dict):
            raise ValueError(f"{where} (of tune): {point!r} is no point")
        _check_fields(point, _POINT, f"{where} (of tune), a point")
    if kind == "eval":
        _check_mass(record["mass"], where)
    for holder in [record, *points]:
        if holder.get("config") is not None:
            try:
                config = SparseKConfig.from_dict(holder["config"])
                if kind == "eval" and record["mass"]:
                    config.check_layers(len(record["mass"]))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{where} (of {kind}): {error}") from None


def _check_fields(holder: Record, wanted: dict[str, Any], where: str) -> None:
    for name, types in (wanted | {n: t for n, t in _MAY_BE.items() if n in holder}).items():
        if name not in holder:
            raise ValueError(f"{where}: the field {name!r} is missing")
        value = holder[name]
        low, high = _BOUNDS.get(name, (0, _MOST))
        good = isinstance(value, types) and not isinstance(value, bool)
        if isinstance(value, _NUMBER):
            good = good and low <= value <= high
        if name == "top_k" and isinstance(value, str):
            good = _BUDGET.fullmatch(value) is not None
        if name == "top_k_used" and isinstance(value, list):
            good = bool(value) and all(type(k) is int and 0 <= k <= _MOST_TOKENS for k in value)
        if not good:
            raise ValueError(f"{where}: {name} = {str(value)[:60]!r} is not what this field holds")


def _check_mass(mass: list[Any], where: str) -> None:
    rows = [row for row in mass if row is not None]
    fine = all(
        isinstance(row, list)
        and len(row) == len(rows[0])
        and row
        and all(isinstance(x, _NUMBER) and not isinstance(x, bool) and 0 <= x <= 1.001 for x in row)
        for row in rows
    )
    if not fine:
        raise ValueError(f"{where} (of eval): mass is not one list of numbers from 0 to 1 per layer")
