"""A file that keeps finished parts of long work, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..engines.base import Engine
from ..engines.model_file import fingerprint
from ..engines.naming import naming
from ..engines.text import shown_name


class Journal:
    """Results by key, appended to a file as they come. The first line says which work they belong to.

    A last line that an interruption cut short is dropped. Each result carries a checksum: a file that
    something else has changed is refused. Without a path nothing is kept.
    """

    def __init__(self, path: str | Path | None, work: dict[str, Any]) -> None:
        """`work`: what the results depend on, as JSON types.

        Raises:
            ValueError: the file is of other work, or is no journal. OSError: it cannot be read or written.
        """
        self._path = None if path is None else Path(path)
        self._found: dict[str, Any] = {}
        if self._path is None:
            return
        if self._path.exists() and not self._path.is_file():
            raise ValueError(f"not an ordinary file: {path}")
        if self._path.exists() and self._path.stat().st_size:
            self._read(self._path, work)
        else:
            with naming(path):
                self._path.write_text(json.dumps({"work": work}) + "\n", encoding="utf-8")

    @classmethod
    def of(cls, path: str | Path | None, engine: Engine, text: str, **more: Any) -> Journal:
        """Of work on this engine, its model and this text, with what else its results depend on. Raises as
        the constructor."""
        if path is None:
            return cls(None, {})
        opened = {
            "engine": " ".join([engine.name, engine.version, *([] if engine.device == "cpu" else ["cuda"])]),
            "model": engine.model,
            "model file": shown_name(fingerprint(engine.path)),
        }
        return cls(path, {**opened, "text": _checksum(text), **more})

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The result of `key`; made, and kept, where there is none yet. Results are JSON types."""
        if key not in self._found:
            result = make()
            if self._path is not None:
                with naming(self._path), self._path.open("a", encoding="utf-8") as file:
                    line = {"key": key, "result": result, "checksum": _checksum(key, result)}
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            self._found[key] = result
        return self._found[key]

    def has(self, key: str) -> bool:
        return key in self._found

    def _read(self, path: Path, work: dict[str, Any]) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            first, *lines = (json.loads(line) for line in whole.splitlines())
            kept = dict(first["work"])
            self._found = {line["key"]: line["result"] for line in lines}
            damaged = any(line["checksum"] != _checksum(line["key"], line["result"]) for line in lines)
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged = True
        if damaged:
            raise ValueError(f"not a file to resume from, or damaged: {path}")
        changed = [name for name in work if kept.get(name) != work[name]]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{path} is of other work, its {name} was {kept.get(name)!r} and is now {work[name]!r}: "
                "name another file, or remove this one"
            )
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))


def _checksum(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
