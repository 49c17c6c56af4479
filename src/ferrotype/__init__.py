"""ferrotype: whole disks into one portable, compressed, deduplicated, encrypted, incremental file, and back.

The names below are the public interface; ``ferrotype.api`` documents them.  They are loaded when they are first used,
so importing the package costs nothing.
"""

from __future__ import annotations

from ferrotype.version import VERSION as __version__

TYPE_CHECKING = False  # the module ``typing`` takes its time
if TYPE_CHECKING:
    from ferrotype.api import (
        backup,
        checksum,
        compare,
        convert,
        copy,
        info,
        list_snapshots,
        open_disk,
        restore,
        salvage,
        verify,
    )

__all__ = [
    "__version__",
    "backup",
    "checksum",
    "compare",
    "convert",
    "copy",
    "info",
    "list_snapshots",
    "open_disk",
    "restore",
    "salvage",
    "verify",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        from ferrotype import api

        return getattr(api, name)
    raise AttributeError(f"module 'ferrotype' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
