"""Writing a segment of the index: from entries in memory, or from any number of segments, page by page.

    older segment   |....|....|....|....|....|....|        windows: a range of keys at a time of all of them,
    newer segment   |....|....|....|                       sorted, cut into pages
    new entries     |....|
                         ^-- window --^

A segment's directory holds the hashes of its pages and stands before them, so the pages are made twice: once to be
hashed, once to be stored.  Memory is that of a window, whatever the size of the segments; the time is twice that of
reading, proving and sorting the entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from ferrotype.objects import Streamed
from ferrotype.repository.sealing import Sealer
from ferrotype.repository.segments import (
    ENTRY,
    KIND,
    MAGIC,
    PAGE_ENTRIES,
    PREFIX,
    Directory,
    Entries,
    Keys,
    Segment,
    SegmentHeader,
    keys_of,
    seal_long,
    sorted_entries,
)

_WINDOW: Final = 64  # pages, of all runs together, that are merged at a time
_LAST: Final = 1 << 64


class Run(Protocol):
    """Entries in the order of their keys."""

    @property
    def fences(self) -> Keys:
        """Keys in ascending order, one for each page or so."""

    def between(self, low: int, high: int) -> Entries:
        """Entries with low <= key < high; their ``pack`` numbers are those of the segment that is made."""


@dataclass(frozen=True, slots=True)
class EntryRun:
    """Entries in memory."""

    entries: Entries  # sorted
    keys: Keys

    @classmethod
    def of(cls, entries: Entries) -> EntryRun:
        entries = sorted_entries(entries)
        return cls(entries, keys_of(entries["id"]))

    @property
    def fences(self) -> Keys:
        return self.keys[::PAGE_ENTRIES]

    def between(self, low: int, high: int) -> Entries:
        first, end = _range(self.keys, low, high)
        return self.entries[first:end]


@dataclass(frozen=True, slots=True)
class SegmentRun:
    """A stored segment, or those of its entries that are ``kept``."""

    segment: Segment
    packs: NDArray[np.uint32]  # new numbers of its packs
    kept: NDArray[np.uint8] | None = None  # one bit an entry (numpy.packbits); None: all

    @property
    def fences(self) -> Keys:
        return self.segment.firsts

    def between(self, low: int, high: int) -> Entries:
        firsts = self.segment.firsts
        start = max(0, int(np.searchsorted(firsts, np.uint64(low), "left")) - 1)
        end = len(firsts) if high == _LAST else int(np.searchsorted(firsts, np.uint64(high), "left"))
        entries = self.segment.pages(start, end)
        first, stop = _range(keys_of(entries["id"]), low, high)
        entries = entries[first:stop]
        if self.kept is not None:
            at = start * PAGE_ENTRIES + first
            bits = np.unpackbits(self.kept[at // 8 : (at + len(entries)) // 8 + 1])
            entries = entries[bits[at % 8 : at % 8 + len(entries)].astype(bool)]
        entries = entries.copy()
        entries["pack"] = self.packs[entries["pack"]]
        return entries


def _range(keys: Keys, low: int, high: int) -> tuple[int, int]:
    end = len(keys) if high == _LAST else int(np.searchsorted(keys, np.uint64(high), "left"))
    return int(np.searchsorted(keys, np.uint64(low), "left")), end


class MergedSegment:
    """A segment of all entries of its runs, made while it is stored."""

    def __init__(self, runs: Sequence[Run], packs: Sequence[str], sealer: Sealer, salt: bytes) -> None:
        """Goes through the runs once.  Raises CorruptObject where one of them is damaged."""
        self._runs = runs
        self._sealer = sealer
        self._hashes: list[bytes] = []
        self.count = 0
        lengths: list[int] = []
        firsts = bytearray()
        for page in _pages(runs):
            plain = page.tobytes()
            self._hashes.append(sealer.object_id(KIND, plain))
            firsts += plain[:8]
            lengths.append(sealer.overhead + len(plain))
            self.count += len(page)
        directory = msgspec.msgpack.encode(Directory(list(packs), bytes(firsts), b"".join(self._hashes), lengths))
        segment_id = sealer.object_id(KIND, SegmentHeader(MAGIC, 1, self.count, 0, salt, 0).pack() + directory)
        sealed = seal_long(sealer, segment_id, directory)
        header = SegmentHeader(MAGIC, 1, self.count, len(sealed), salt, 0).pack()
        self.name = PREFIX + segment_id.hex()
        self._head = header + sealed
        self.length = len(self._head) + sum(lengths)

    def parts(self) -> Streamed:
        """What is to be stored; the runs must not have changed since."""
        return Streamed(self.length, self.frames)

    def frames(self) -> Iterator[bytes]:
        """The same, one after the other."""
        yield self._head
        for page_hash, page in zip(self._hashes, _pages(self._runs), strict=True):
            yield self._sealer.seal(page_hash, page.tobytes(), compress=False)


def build_segment(entries: Entries, packs: Sequence[str], sealer: Sealer, salt: bytes) -> tuple[str, list[bytes]]:
    """Name and parts of a segment holding ``entries``, whose ``pack`` numbers index ``packs``."""
    merged = MergedSegment([EntryRun.of(entries)], packs, sealer, salt)
    return merged.name, list(merged.frames())


def renumbered(segments: Sequence[Segment]) -> tuple[list[NDArray[np.uint32]], list[str]]:
    """One list of the packs of several segments, and for each segment the numbers of its packs in it."""
    packs: dict[str, int] = {}
    numbers = [np.array([packs.setdefault(n, len(packs)) for n in segment.packs], np.uint32) for segment in segments]
    return numbers, list(packs)


def _pages(runs: Sequence[Run]) -> Iterator[Entries]:
    """The pages of the segment, all full but the last."""
    rest = np.zeros(0, ENTRY)
    for low, high in _windows(runs):
        window = np.concatenate([run.between(low, high) for run in runs])
        rest = np.concatenate([rest, sorted_entries(window) if len(runs) > 1 else window])
        whole = len(rest) // PAGE_ENTRIES * PAGE_ENTRIES
        for at in range(0, whole, PAGE_ENTRIES):
            yield rest[at : at + PAGE_ENTRIES]
        rest = rest[whole:]
    if len(rest):
        yield rest


def _windows(runs: Sequence[Run]) -> Iterator[tuple[int, int]]:
    fences = np.sort(np.concatenate([np.zeros(0, np.uint64), *(run.fences for run in runs)]))
    edges = [0, *np.unique(fences[_WINDOW::_WINDOW]).tolist(), _LAST]
    for low, high in pairwise(edges):
        if low < high:
            yield low, high
