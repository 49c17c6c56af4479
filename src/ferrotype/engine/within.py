"""Volumes that begin inside space that a file system calls free.

Most are remains of an earlier partitioning.  One that was written after the file system around it is alive, and the
file system around it is the leftover; one of which that cannot be told may be alive.  So they are looked for where
partitions and volumes begin, cheaply:

    1 MiB | 2 MiB | ...            multiples of 1 MiB, or of a larger power of two on large volumes
    63 sectors, cylinders          as partitions were aligned once
    behind one that was found      where its neighbour may begin

A place counts where it is free and not known to be zeros, has the sign of a volume, and opens as a file system that
proves itself: by its checksums and by the structures its first sector leads to.  Of containers and file systems that
have no map the sign alone counts, where it is long enough; they tell no time, so they are kept: as far as they say
that they reach, else up to the end of the volume around them.  Swap space is told only: nothing in it is missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from ferrotype.block import Source, read
from ferrotype.block.views import Slice
from ferrotype.errors import DeviceError
from ferrotype.extents import ExtentMap, State
from ferrotype.filesystems import Facts
from ferrotype.filesystems.registry import identify
from ferrotype.filesystems.spans import HEAD, begins, span
from ferrotype.units import MiB, format_size
from ferrotype.volumes.scan import is_signed

__all__ = ["Inner", "inner_volumes"]

_PLACES: Final = 512  # multiples of the step that are looked at, at most
_CYLINDER: Final = 255 * 63 * 512  # bytes
_CYLINDERS: Final = 64
_FOUND: Final = 16  # volumes that are told one by one; from the next one on all is kept
_MORE: Final = "more than can be told"
_PLAUSIBLE: Final = 1_000_000_000  # seconds since 1970, in 2001: clocks that were never set stand before


@dataclass(frozen=True, slots=True)
class Inner:
    """A volume inside the free space of another."""

    start: int  # byte of the outer volume
    size: int  # bytes that are its own
    kind: str  # blkid's name
    label: str | None
    written: int | None  # seconds since 1970, where it tells

    def order(self, outer: Facts) -> str | None:
        """How the two follow each other, in words, where it may be alive; None where it is the older one for sure."""
        if self.kind == "swap":
            return None
        if outer.kind == "swap":
            return "was written later"
        if self.written is None or outer.written is None:
            return "may have been written later"
        if min(self.written, outer.written) < _PLAUSIBLE or self.written == outer.written:
            return "may have been written later"  # a machine without a clock, or a build with a fixed time
        return "was written later" if self.written > outer.written else None

    @property
    def words(self) -> str:
        label = f" ({self.label})" if self.label else ""
        return f"{self.kind}{label} of {format_size(self.size)} at byte {self.start}"


def inner_volumes(view: Source, start: int, free: ExtentMap, known: ExtentMap) -> list[Inner]:
    """Volumes in the FREE space of ``view``, which begins at byte ``start`` of its disk; ascending.

    ``free`` and ``known`` are maps of the whole view.  Reads 68 KiB at each of at most some 600 places, and opens at
    most 17 file systems.  Never raises on content.
    """
    found: dict[int, Inner] = {}
    tried: set[int] = set()
    waiting = list(_places(view.size, start))[::-1]
    while waiting:
        at = waiting.pop()
        if at in tried or not 0 < at < view.size or not _is_open(at, free, known):
            continue
        tried.add(at)
        inner = _look(view, at)
        if inner is not None:
            if len(found) == _FOUND:  # nobody knows how many there are: what begins later is not looked at
                found[at] = Inner(at, view.size - at, _MORE, None, None)
                break
            found[at] = inner
            waiting.append(at + inner.size)
    return [found[at] for at in sorted(found)]


def _places(size: int, start: int) -> Iterator[int]:
    """Where volumes begin, in bytes of the view: aligned on the disk, and on the view itself."""
    step = MiB
    while size // step > _PLACES:
        step *= 2
    for origin in {-start % step, 0}:
        yield from range(origin, size, step)
    yield 63 * 512
    yield from range(_CYLINDER - start % _CYLINDER, min(size, _CYLINDERS * _CYLINDER), _CYLINDER)


def _is_open(at: int, free: ExtentMap, known: ExtentMap) -> bool:
    """Whether it is free, and not all that a sign may stand in is known to be zeros: not every sign is at 0."""
    state = int(free.states[int(np.searchsorted(free.starts, at, "right")) - 1])
    if not state & State.FREE:
        return False
    length = min(HEAD, known.start + known.length - at)
    return known.clip(at, length).total(State.ZERO) < length


def _is_copy(head: bytes) -> bool:
    """Whether an ext superblock there is a copy inside its file system: it says of which group (s_block_group_nr)."""
    return head[1080:1082] == b"\x53\xef" and any(head[1024 + 90 : 1024 + 92])


def _look(view: Source, at: int) -> Inner | None:
    rest = Slice(view, at, view.size - at)
    try:
        head = read(rest, 0, min(HEAD, rest.size))
        if _is_copy(head) or not (is_signed(head) or begins(head)):
            return None
        found = identify(rest)
    except DeviceError:
        return None
    if found is None:
        return None
    if found.filesystem is not None:
        facts = found.filesystem.facts  # one that reaches further than the volume around it is no less alive
        return Inner(at, min(facts.size, rest.size), facts.kind, facts.label, facts.written)
    if not begins(head):  # a boot sector that leads nowhere
        return None
    return Inner(at, span(found.kind, head, rest.size) or rest.size, found.kind, found.label, None)
