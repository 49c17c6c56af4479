"""Room for a new disk image: what it takes, as far as that is known before its disk is read.

preallocated     the whole disk, whatever it holds: refused at once where that is not free
plain            at most what is not known to be zeros: told, since data that turns out to be zeros takes no room
packed, or over a backing file         nobody knows
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ferrotype.block import Source
from ferrotype.errors import WriteError
from ferrotype.extents import State
from ferrotype.formats import Roomy, Spec
from ferrotype.formats.registry import writer
from ferrotype.job import Job
from ferrotype.trouble import free_bytes
from ferrotype.units import KiB, format_size

if TYPE_CHECKING:
    from ferrotype.engine.writing import NewImage

__all__ = ["Need", "check_room", "free_for", "need_of", "not_enough"]

_PIECE: Final = 16 * KiB  # bytes; shorter stretches of zeros are written like data


def free_for(path: Path) -> int | None:
    """Bytes that a file at ``path``, be it there or not, may still grow by; None where nobody knows."""
    try:
        return free_bytes(path if path.exists() else Path(os.path.realpath(path)).parent)
    except OSError:
        return None


def not_enough(path: Path, needed: int, free: int) -> WriteError:
    """The error for a file that finds no room."""
    return WriteError(
        f"{path}: there is not enough space: {format_size(needed)} ({needed} bytes) are needed and "
        f"{format_size(free)} ({free} bytes) are free; make room, or choose another place; nothing was written"
    )


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a new image takes up, tables left aside; None: nobody knows."""

    least: int
    most: int | None
    free: int | None  # where it is to be

    def check(self, path: Path) -> None:
        """Raise WriteError where the image cannot fit."""
        if self.free is not None and self.least > self.free:
            raise not_enough(path, self.least, self.free)

    def as_json(self) -> dict[str, object]:
        return {"estimated_stored_bytes": self.most, "free_on_target_bytes": self.free}

    @property
    def text(self) -> str:
        """The same, as the end of a sentence."""
        most = "" if self.most is None else f", at most {format_size(self.most)}"
        return most + ("" if self.free is None else f", where {format_size(self.free)} are free")


def need_of(source: Source, wanted: NewImage) -> Need:
    """What a new image of the disk takes.  Reads no data."""
    free = free_for(wanted.path)
    module: object = None if wanted.format == "ferro" else writer(wanted.format)
    if not isinstance(module, Roomy):
        return Need(0, None, free)
    size = source.size
    room = module.room(Spec(size, source.traits.sector_size, wanted.compress, wanted.options or {}))
    if not room.unit or wanted.backing is not None:
        return Need(room.least, None, free)
    zeros = source.extents(0, size).masked(State.ZERO).cut(max(room.unit, _PIECE))
    return Need(room.least, max(room.least, size - zeros.total(State.ZERO)), free)


def check_room(source: Source, wanted: NewImage, job: Job) -> None:
    """Raise WriteError where a new image of the disk cannot fit; say so where it may not.

    That is a note and no warning: what was read as zeros has taken no room, and an image that is complete is whole.
    """
    free = free_for(wanted.path)
    if free is None or source.size <= free:
        return
    need = need_of(source, wanted)
    need.check(wanted.path)
    if need.most is not None and need.most > free:
        job.note(
            f"{wanted.path} may not fit: up to {format_size(need.most)} are written, less what turns out to be "
            f"zeros, and {format_size(free)} are free there"
        )
