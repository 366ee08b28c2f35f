"""The configuration in the SPARSEK_* variables, for servers that are not ours: the same variables, and of the
same meaning, as in the llama.cpp backend (cpp/ggml/settings.cpp)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from ..config import SparseKConfig, parse_layers, parse_share, parse_top_k

_PREFIX: Final = "SPARSEK_"
_FILE: Final = "SPARSEK_CONFIG"
_OTHERS: Final = (_FILE, "SPARSEK_ISA", "SPARSEK_NUM_THREADS")  # that are no field
_FIELDS: Final = {
    f"{_PREFIX}{f.name.upper()}": f.name for f in fields(SparseKConfig) if f.name != "check_finite"
}
# What Kubernetes sets in every pod beside a Service called sparsek, or sparsek-and-so-on, and Docker for a
# linked container of that name.
_OF_A_SERVICE: Final = re.compile(
    r"SPARSEK(_[A-Z0-9_]+)?_"
    r"(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?|NAME|ENV_.+)",
    re.ASCII,
)
_LONGEST: Final = 1 << 20  # bytes of a file
_MOST: Final = 2**31 - 1


def fields_from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a `SparseKConfig` that the variables give: those of the file that SPARSEK_CONFIG names,
    changed by the variables of single fields.

    Raises:
        ValueError: a variable is unknown, or what it says is wrong; the message names it.
    """
    _refuse_unknown(environ)
    values = _of_file(environ[_FILE]) if _FILE in environ else {}
    for variable, name in _FIELDS.items():
        if variable in environ:
            try:
                values[name] = _value(name, environ[variable])
                SparseKConfig.from_dict({name: values[name]})
            except (ValueError, TypeError) as error:
                raise ValueError(f"{variable}: {error}") from None
    return values


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    """A variable with a typing error in its name would be obeyed by nobody."""
    known = [*_OTHERS, *_FIELDS]
    for variable in environ:
        ours = variable.startswith(_PREFIX) and not _OF_A_SERVICE.fullmatch(variable)
        if ours and variable not in known:
            raise ValueError(f"there is no variable {variable}: known are {', '.join(known)}")


def _of_file(path: str) -> dict[str, Any]:
    given, file = f"{_FILE} = {path!r}", Path(path)
    if not file.exists():
        raise ValueError(f"{given}: there is no such file")
    if not file.is_file():
        raise ValueError(f"{given}: not a file")
    if file.stat().st_size > _LONGEST:
        raise ValueError(f"{given}: longer than 1 MiB")
    try:
        return SparseKConfig.from_json(file.read_text(encoding="utf-8")).to_dict()
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{given}: {error}") from None


def _value(name: str, text: str) -> Any:
    if name == "top_k":
        return parse_top_k(text)
    if name == "dense_layers":
        return parse_layers(text)
    if name in ("tail", "select"):
        return text
    if name == "min_share":
        return parse_share(text)
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= _MOST):
        raise ValueError(f"{name} = {text!r}: must be a whole number from 0 to {_MOST}")
    return int(text)
