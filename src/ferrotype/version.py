"""The program's version: the one place."""

from __future__ import annotations

from typing import Final

VERSION: Final = "0.1.0"
PROGRAM: Final = f"ferrotype {VERSION}"
