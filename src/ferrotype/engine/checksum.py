"""One content hash of a disk, the same for the same bytes in whatever they are kept.

    leaves      BLAKE3 of each MiB of the disk (the last one may be shorter)
    nodes       BLAKE3 of up to 256 digests below, level by level, until one is left
    digest      BLAKE3("ferrotype content hash v1" || size as 8 bytes little-endian || the last one)

The tree lets all cores work, and lets a stretch of zeros of any length be stepped over: the digest of a node over
zeros is known beforehand.  ``docs/format.md`` specifies it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from ferrotype.block import Source
from ferrotype.block.device import aligned_buffer
from ferrotype.block.lenient import Lenient
from ferrotype.engine.live import tell_of_use
from ferrotype.engine.reach import tell_of_reach
from ferrotype.engine.unreadable import refuse_nothing, tell_of_disk
from ferrotype.extents import ExtentMap, State
from ferrotype.job import Job
from ferrotype.pipeline import map_ordered
from ferrotype.units import MiB

if TYPE_CHECKING:
    from ferrotype.engine.references import OpenDisk

ALGORITHM: Final = "ferrotype-blake3-tree-v1"
LEAF: Final = MiB
FAN_OUT: Final = 256
_TOGETHER: Final = 4  # leaves that a worker takes at a time
_DOMAIN: Final = b"ferrotype content hash v1"


@dataclass(frozen=True, slots=True)
class Checksum:
    """The content hash of a disk, and (start, length) of what counts as zeros for want of what stands there."""

    digest: str
    size: int
    unreadable: Sequence[tuple[int, int]]


def checksum(source: Source, job: Job, *, workers: int = 0) -> str:
    """The content hash as 64 hex digits.  Reads what the source does not know to be zero."""
    leaves = -(-source.size // LEAF)
    levels = 0
    while FAN_OUT**levels < leaves:
        levels += 1
    extents = source.extents(0, source.size)
    job.begin("hashing", source.size - extents.total(State.ZERO))
    hasher = _Leaves(source, extents)
    tree = _Tree(levels, leaves)
    for hashed in map_ordered(hasher, hasher.wanted(leaves), workers=workers or len(os.sched_getaffinity(0))):
        for number, digest in hashed:
            tree.add(number, digest)
            job.advance(min(LEAF, source.size - number * LEAF))
    last = tree.finish(hasher.last_zero())
    return blake3(_DOMAIN + source.size.to_bytes(8, "little") + last).hexdigest()


def checksum_of(disk: OpenDisk, job: Job) -> Checksum:
    """The content hash of a disk; what cannot be read counts as zeros, as in a backup of it, and the job is told."""
    tell_of_use(disk, job)
    source = Lenient(disk.source, job)
    digest = checksum(source, job)
    if source.found:
        wanted = source.size - source.extents(0, source.size).total(State.ZERO)
        refuse_nothing(disk.reference.text, source.found, wanted, source.reason)
    tell_of_disk(disk, source.found, job, source.reason)
    tell_of_reach(disk, job)
    return Checksum(digest, source.size, source.unreadable)


class _Leaves:
    """Digests of leaves; called from many threads."""

    def __init__(self, source: Source, extents: ExtentMap) -> None:
        self._source = source
        self._extents = extents
        self._local = threading.local()

    def wanted(self, leaves: int) -> Iterator[range]:
        """Numbers of the leaves that are not known to be zero, ascending, a few that follow each other at a time."""
        starts, ends = self._extents.runs(State.ZERO, present=False)
        at = 0
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            last = min(-(-end // LEAF), leaves)
            for first in range(max(start // LEAF, at), last, _TOGETHER):
                yield range(first, min(first + _TOGETHER, last))
            at = max(at, last)

    def __call__(self, numbers: range) -> list[tuple[int, bytes]]:
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = aligned_buffer(LEAF)
        return [(number, self._digest(number, buffer)) for number in numbers]

    def _digest(self, number: int, buffer: memoryview) -> bytes:
        view = buffer[: min(LEAF, self._source.size - number * LEAF)]
        self._source.read_into(number * LEAF, view)
        return blake3(view).digest()

    def last_zero(self) -> bytes:
        """Digest of the last leaf, were it zeros."""
        return blake3(bytes(self._source.size % LEAF or LEAF)).digest()


class _Tree:
    """Folds ascending leaf digests into one; leaves that are not given are zeros."""

    def __init__(self, levels: int, leaves: int) -> None:
        self._levels = levels
        self._leaves = leaves
        self._zero = [blake3(bytes(LEAF)).digest()]
        for _ in range(levels):
            self._zero.append(blake3(self._zero[-1] * FAN_OUT).digest())
        self._open: list[list[bytes]] = [[] for _ in range(levels + 1)]
        self._done = 0

    def add(self, number: int, digest: bytes) -> None:
        self._zeros_to(number)
        self._push(0, digest)
        self._done = number + 1

    def finish(self, last_zero: bytes) -> bytes:
        """The digest over all leaves; ``last_zero`` stands for the last leaf if that was not given."""
        if self._leaves == 0:
            return blake3(b"").digest()
        if self._done < self._leaves:
            self._zeros_to(self._leaves - 1)
            self._push(0, last_zero)
        for level in range(self._levels):
            if self._open[level]:
                self._close(level)
        return self._open[self._levels][0]

    def _zeros_to(self, number: int) -> None:
        """Fill up with zero leaves, in subtrees as large as fit."""
        while self._done < number:
            level = 0
            while (
                level < self._levels
                and self._done % FAN_OUT ** (level + 1) == 0
                and self._done + FAN_OUT ** (level + 1) <= number
            ):
                level += 1
            self._push(level, self._zero[level])
            self._done += FAN_OUT**level

    def _push(self, level: int, digest: bytes) -> None:
        self._open[level].append(digest)
        if level < self._levels and len(self._open[level]) == FAN_OUT:
            self._close(level)

    def _close(self, level: int) -> None:
        digest = blake3(b"".join(self._open[level])).digest()
        self._open[level] = []
        self._push(level + 1, digest)
