"""Errors of the system that say which file they are about: those of writing, as of a full disk, do not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def naming(what: object) -> Iterator[None]:
    """An OSError in the block that names no file names `what`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(what)) from error
