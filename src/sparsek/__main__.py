"""The `sparsek` command. Without the command-line extra it says how to get it."""

from __future__ import annotations

import sys

from .extras import how_to_install


def main() -> int:
    try:
        from .cli import main as run
        from .cli import streams
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        print(f"sparsek: the command line needs {error.name}: {how_to_install('cli')}", file=sys.stderr)
        return 2
    streams.prepare()
    return run()


if __name__ == "__main__":
    sys.exit(main())
