"""What an image needs from outside itself: parents, data files, extents, segments, a key.

What is lacking there is no damage of the image.  Its headers still tell what it is, so its module goes on without,
and says in ``Image.missing`` why the disk cannot be read as things are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from ferrotype.errors import DeviceError, FerrotypeError, FormatError, KeyRefused, UsageError

__all__ = ["attempt"]

T = TypeVar("T")

_LACKING: Final = (FormatError, UsageError, DeviceError, KeyRefused)


def attempt(bring: Callable[[], T]) -> tuple[T | None, FerrotypeError | None]:
    """What ``bring`` gets from outside the image, or why it cannot; one of the two is None.

    ``bring`` must not look at the image itself: errors of its own bytes are to be raised.
    """
    try:
        return bring(), None
    except _LACKING as error:
        return None, error
