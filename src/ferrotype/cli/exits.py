"""Error class -> exit code: the one table."""

from __future__ import annotations

from typing import Final

from ferrotype import errors
from ferrotype.trouble import lacks_memory, why

OK: Final = 0
NO: Final = 1
WARNINGS: Final = 8
STOPPED: Final = 130

_CODES: Final[tuple[tuple[type[Exception], int], ...]] = (
    (errors.UsageError, 2),
    (errors.Refused, 3),
    (errors.FormatError, 4),
    (errors.IntegrityError, 4),
    (errors.KeyRefused, 5),
    (errors.DeviceError, 6),
    (errors.StoreError, 6),
    (errors.Locked, 7),
    (errors.Cancelled, STOPPED),
)


def code_of(error: BaseException) -> int:
    """The exit code of an error."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return 6 if isinstance(error, OSError) or lacks_memory(error) else 70


def says(error: BaseException) -> str:
    """One sentence for the user."""
    if isinstance(error, errors.FerrotypeError):
        return str(error)
    if lacks_memory(error):
        return "there is not enough memory; close other programs, or raise the limit (ulimit -v), and start again"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{why(error) if error.errno else error}"
    return f"a fault in ferrotype: {type(error).__name__}: {error}; please report it"
