"""Proving an EWF image: every table, every chunk's Adler-32, and MD5 and SHA-1 of the whole disk.

chunks ──> workers open them ──> in order ──> MD5, SHA-1 ──> compared with what the image states
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Final, NamedTuple

from ferrotype.errors import FormatError, ReadError
from ferrotype.formats.ewf.chunks import ChunkLayout, Chunks
from ferrotype.formats.ewf.hashes import DiskHashes
from ferrotype.job import Job
from ferrotype.pipeline import map_ordered
from ferrotype.units import MiB

__all__ = ["check_image"]

_BATCH: Final = 2 * MiB  # bytes of the disk opened at a time
_SAID: Final = 1000  # sentences; what is damaged beyond is counted


class _Opened(NamedTuple):
    length: int  # bytes of the disk
    parts: list[bytes]
    damage: list[str]


def check_image(
    layout: ChunkLayout, chunks: Chunks, hashes: Mapping[str, str], known: Sequence[str], job: Job
) -> list[str]:
    """A sentence for each damage, ``known`` ones first; none where the image is whole.  Reads all of it once."""
    job.begin("checking", layout.size)
    found, more = [*known, *chunks.check()], 0
    each = max(1, _BATCH // layout.chunk_size)
    total = -(-layout.size // layout.chunk_size)

    def opened(first: int) -> _Opened:
        parts, damage = [], []
        numbers = range(first, min(first + each, total))
        for number in numbers:
            length = layout.length(number)
            try:
                parts.append(layout.unpack(number)[:length])
            except (FormatError, ReadError) as error:
                damage.append(str(error))
        return _Opened(sum(layout.length(number) for number in numbers), parts, damage)

    unread = 0
    workers = len(os.sched_getaffinity(0))
    with closing(DiskHashes(list(hashes))) as digests:
        for batch in map_ordered(opened, range(0, total, each), workers=workers, depth=3 * workers):
            digests.feed(batch.parts)
            unread += len(batch.damage)
            room = max(0, _SAID - len(found))
            found += batch.damage[:room]
            more += len(batch.damage[room:])
            job.advance(batch.length)
        digits = digests.finish()
    if more:
        found.append(f"{more} more chunks are damaged")
    if not unread:  # else they cannot be equal, which was said already
        found += [
            f"the {name.upper()} of the disk is {digits[name]}, and the image states {stated}"
            for name, stated in hashes.items()
            if digits[name] != stated
        ]
    return found
