"""How long tests wait. A machine that does other things too is slow, so nothing here tells fast from slow."""

from __future__ import annotations

from typing import Final

HANGS: Final = 300  # seconds after which what a test waits for is taken to have hung
