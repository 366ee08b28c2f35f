"""A file that keeps finished parts of long work, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..engines.base import Engine


class Journal:
    """Results by key, appended to a file as they come. The first line says which work they belong to.

    A last line that an interruption cut short is dropped. Without a path nothing is kept.
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
        if self._path.exists() and self._path.stat().st_size:
            self._read(self._path, work)
        else:
            self._path.write_text(json.dumps({"work": work}) + "\n", encoding="utf-8")

    @classmethod
    def of(cls, path: str | Path | None, engine: Engine, text: str, **more: Any) -> Journal:
        """Of work on this engine's model and this text, with what else its results depend on. Raises as
        the constructor."""
        model = {"model": engine.model, "engine": f"{engine.name} {engine.version}"}
        return cls(path, {**model, "text": _fingerprint(text), **more})

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The result of `key`; made, and kept, where there is none yet. Results are JSON types."""
        if key not in self._found:
            result = make()
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "result": result}) + "\n")
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
            kept = first["work"]
            self._found = {line["key"]: line["result"] for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"not a file to resume from: {path}") from error
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


def _fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
