"""What the copy of a boot sector says: its file system is alive, or may be a leftover, or nothing at all.

    the same sizes and clusters        it is alive
    one byte over and over, or none    no copy was made: nothing is said against it
    another layout, or something else  what wrote there took the place of one of the two

Serial numbers, labels, flags and counts are not asked: programs change them in one of the two alone, and where free
space lies does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable

from ferrotype.block import Source, read
from ferrotype.errors import DeviceError, FormatError, InvalidImage

__all__ = ["copy_at", "require_copy"]

_SECTOR = 512  # bytes; the boot sectors of all that have copies say everything in these


def copy_at(source: Source, at: int) -> bytes | None:
    """The sector there; None where no copy was made, it cannot be read, or it would lie outside."""
    if at <= 0 or at + _SECTOR > source.size:
        return None
    try:
        raw = read(source, at, _SECTOR)
    except DeviceError:
        return None
    return raw if raw.count(raw[0]) < _SECTOR else None


def require_copy(source: Source, at: int, alike: Callable[[bytes], bool]) -> None:
    """Raises InvalidImage where there is a copy at byte ``at`` that is not ``alike``."""
    raw = copy_at(source, at)
    if raw is None:
        return
    try:
        if alike(raw):
            return
    except FormatError:  # what it says cannot be laid out
        pass
    raise InvalidImage(
        f"its backup boot sector at byte {at} does not have the same layout, so it may be a leftover under something"
        " else; its own checker puts that right",
        offset=at,
    )
