"""Another program in this process, with `attn_implementation="sparsek"` registered in Transformers before it
begins: what `sparsek exec` turns into.

    python -m sparsek.integrations.launch CONFIG -m MODULE ARGS...
    python -m sparsek.integrations.launch CONFIG SCRIPT ARGS...

CONFIG is a SparseKConfig as JSON for every model that is loaded by the name, or nothing ("").
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib.util import find_spec

from .._loading import raise_as_usual
from ..config import SparseKConfig


def main(config: str, arguments: list[str]) -> None:
    """Ends as the program ends: what it raises, `SystemExit` among it, is passed on."""
    raise_as_usual()  # a program of which "sparsek" is an argument is not our command
    is_module = arguments[0] == "-m"
    sys.argv = arguments[1:] if is_module else arguments
    program = sys.argv[0]
    reason = _no_module(program) if is_module else _no_script(program)
    if reason is not None:
        print(f"sparsek: {reason}", file=sys.stderr)
        sys.exit(2)
    from .transformers import register

    register(SparseKConfig.from_json(config) if config else None)
    if is_module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        if not getattr(sys.flags, "safe_path", False):
            sys.path[0] = os.path.dirname(os.path.realpath(program))
        runpy.run_path(program, run_name="__main__")


def _no_module(name: str) -> str | None:
    """Why there is no such module to run."""
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{name}.__main__")
            if spec is None:
                return f"the package {name!r} has no __main__ to run"
    except (ModuleNotFoundError, ValueError) as error:
        return f"there is no module {name!r} to run: {error}"
    return f"there is no module {name!r} to run" if spec is None else None


def _no_script(path: str) -> str | None:
    return None if os.path.exists(path) else f"there is no script {path!r} to run"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
