"""The program's version: the one place."""

from __future__ import annotations

TYPE_CHECKING = False  # the module ``typing`` takes its time
if TYPE_CHECKING:
    from typing import Final

VERSION: Final = "0.1.0"
PROGRAM: Final = f"ferrotype {VERSION}"
