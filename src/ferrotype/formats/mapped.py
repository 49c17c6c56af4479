"""A disk whose bytes stand scattered over a file: what nearly every container's reader comes down to.

    disk   |  0 .. 64K  | 64K .. 192K | 192K .. 256K | 256K .. 320K |
             STORED       HOLE          PACKED         ZERO
             at 5 MiB     lower layer,  unpack(place)
                          or zeros

A format says where a range stands (``Layout.mapping``, vectorised) and how a packed unit is opened (``unpack``);
everything else is here once: cutting reads at the boundaries, lower layers, zeros, the end of the file, extents.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from threading import Lock
from typing import Final, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, Traits
from ferrotype.block.file import FileSource, check_read
from ferrotype.block.views import Concat, Slice, padded_extents, read_padded
from ferrotype.errors import DamagedRange, InvalidImage, ReadError
from ferrotype.extents import ExtentMap, Offsets, State, merge, overlay
from ferrotype.formats.collisions import Collisions
from ferrotype.formats.numbered import NumberedSource
from ferrotype.formats.split import SplitFile
from ferrotype.units import MiB

__all__ = ["Kept", "Kind", "Layout", "MappedSource", "Mapping", "Run", "cells", "collisions", "runs_of", "shortfalls"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_UNITS_KEPT: Final = 8 * MiB  # bytes of unpacked units kept for small reads that follow each other
_WORTH_ASKING: Final = MiB  # bytes of a stored run from which on the file is asked for its holes
_MOST_HOLES: Final = 1 << 20  # of a file told in one map of extents: runs of a hostile image may all be the same


class Kind(IntEnum):
    """Where a run of bytes stands."""

    HOLE = 0  # nowhere in this layer: the lower one's, or zeros where there is none
    ZERO = 1  # nowhere, and zeros whatever a lower layer has
    STORED = 2  # in the file as it is; the place is an offset in bytes
    PACKED = 3  # in the file, compressed or the like; the place means something to ``unpack`` alone


@dataclass(frozen=True, slots=True, eq=False)
class Mapping:
    """Runs of a disk, ascending without gaps: run i covers ``bounds[i]`` to ``bounds[i + 1]``.

    ``skips`` says how many bytes of a PACKED unit lie before the run, which is not all of the unit where the range
    asked for cuts it.  Places and skips of other kinds mean nothing, except that of a STORED run, its offset.
    """

    bounds: Offsets
    kinds: NDArray[np.uint8]
    places: NDArray[np.int64]
    skips: NDArray[np.int64]

    @classmethod
    def uniform(cls, start: int, length: int, kind: Kind, place: int = 0, skip: int = 0) -> Mapping:
        """One run."""
        one = np.ones(1, np.int64)
        return cls(np.array([start, start + length], np.int64), one.astype(np.uint8) * kind, one * place, one * skip)

    @property
    def start(self) -> int:
        return int(self.bounds[0])

    @property
    def end(self) -> int:
        return int(self.bounds[-1])

    def clip(self, start: int, length: int) -> Mapping:
        """The runs of a range inside the mapping; ``length`` is at least 1."""
        end = start + length
        first = int(np.searchsorted(self.bounds, start, "right")) - 1
        last = int(np.searchsorted(self.bounds, end, "left"))
        if start < self.start or end > self.end or length < 1:
            raise ValueError(f"range {start}..{end} is outside the mapping {self.start}..{self.end}")
        bounds = self.bounds[first : last + 1].copy()
        places, skips = self.places[first:last].copy(), self.skips[first:last].copy()
        ahead = start - int(bounds[0])
        places[0] += ahead if self.kinds[first] == Kind.STORED else 0
        skips[0] += ahead if self.kinds[first] == Kind.PACKED else 0
        bounds[0], bounds[-1] = start, end
        return Mapping(bounds, self.kinds[first:last], places, skips)


def cells(start: int, size: int, kinds: NDArray[np.uint8], places: NDArray[np.int64]) -> Mapping:
    """The mapping of cells of ``size`` bytes from ``start`` on; what is equal, or adjacent in the file, is joined.

    The last cell may reach beyond the disk: clip the mapping.
    """
    count = len(kinds)
    bounds = start + np.arange(count + 1, dtype=np.int64) * size
    fresh = np.ones(count, bool)
    same = kinds[1:] == kinds[:-1]
    follows = (kinds[1:] != Kind.STORED) | (places[1:] == places[:-1] + size)
    fresh[1:] = ~(same & follows) | (kinds[1:] == Kind.PACKED)
    heads = np.flatnonzero(fresh)
    return Mapping(
        np.append(bounds[heads], bounds[-1]),
        kinds[heads].astype(np.uint8),
        places[heads].astype(np.int64),
        np.zeros(len(heads), np.int64),
    )


class Layout(Protocol):
    """What a format knows: where the disk's bytes stand.  Called from many threads."""

    def mapping(self, offset: int, length: int, /) -> Mapping:
        """The runs from ``offset`` on.  May end earlier than the range does, such as at the end of one table.

        Reads only tables.  A run that would lie outside the file, overlap a header or contradict the specification
        raises InvalidImage.
        """

    def unpack(self, place: int, /) -> bytes:
        """The whole content of a PACKED unit.  Raises InvalidImage where it cannot be opened."""


class Run(NamedTuple):
    """A run of a disk and where it stands, for people: ``depth`` 0 is the image itself, 1 its parent ..."""

    start: int
    length: int
    kind: Kind
    depth: int
    place: int | None  # of STORED: offset in the layer's file


class MappedSource:
    """A disk through its layout.  It owns none of what it reads; its image closes that."""

    def __init__(
        self,
        file: Source,
        layout: Layout,
        size: int,
        *,
        name: str,
        parent: Source | None = None,
        traits: Traits | None = None,
        ragged: int = 0,
        row: int = 0,
        placed: bool = True,
        unreadable: Sequence[tuple[int, int]] = (),
    ) -> None:
        """``file`` is what STORED places are offsets in.

        The last ``ragged`` bytes of a STORED run may lie behind the end of the file, where they read as zeros, and
        ``shortfalls`` tells of them: programs write their clusters whole, so that such a file was cut.  A layout that
        allows it sees to it that the cluster starts inside.  Behind the end of a shorter ``parent`` holes read as
        zeros.

        Where ``row`` is given, a PACKED run may cover many units of that many bytes: their places follow each other,
        and the run's is that of the first.  Not ``placed``: STORED places are in a view of the image's file, and so
        none that people can look at.  ``unreadable`` are the (start, length) that the image says could not be read
        when it was made.
        """
        self.unreadable = unreadable
        self._file, self._layout, self._size, self._parent = file, layout, size, parent
        self._name = name
        self._ragged = ragged
        self._row = row
        self._placed = placed
        self._units: Kept[int, bytes] = Kept(_UNITS_KEPT, len)
        self._short = (0, 0)  # bytes behind the end of the file that were read so far, and where on the disk
        self._lock = Lock()
        self.traits = replace(traits or Traits(), align=1, parallel=file.traits.parallel)

    @property
    def size(self) -> int:
        return self._size

    def _mappings(self, offset: int, length: int) -> Iterator[Mapping]:
        end = offset + length
        while offset < end:
            try:
                part = self._layout.mapping(offset, end - offset)
            except ReadError as error:  # of a table: its place in the file is none on the disk
                error.start, error.length = offset, end - offset
                raise
            if part.start != offset or not offset < part.end <= end:
                raise ValueError(f"{self._name}: asked for {offset}..{end}, mapped {part.start}..{part.end}")
            yield part
            offset = part.end

    # ------------------------------------------------------------------ reading

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        check_read(self._name, self._size, offset, len(buf))
        for part in self._mappings(offset, len(buf)):
            bounds = part.bounds.tolist()
            columns = (bounds, bounds[1:], part.kinds.tolist(), part.places.tolist(), part.skips.tolist())
            for start, end, kind, place, skip in zip(*columns, strict=False):
                piece = buf[start - offset : end - offset]
                if kind == Kind.STORED:
                    self._read_stored(start, place, piece)
                elif kind == Kind.PACKED:
                    self._read_row(start, place, skip, piece)
                elif kind == Kind.HOLE and self._parent is not None:
                    read_padded(self._parent, start, piece)
                else:
                    piece[:] = bytes(len(piece))

    def _read_stored(self, start: int, place: int, piece: memoryview) -> None:
        inside = max(min(len(piece), self._file.size - place), 0)
        if inside < len(piece):
            if place < 0 or place + len(piece) - self._file.size > self._ragged:
                raise InvalidImage(
                    f"{self._name}: the file ends before the data of byte {start} of the disk", offset=place
                )
            piece[inside:] = bytes(len(piece) - inside)
            with self._lock:
                lacking = place + len(piece) - self._file.size
                self._short = max(self._short, (lacking, start + len(piece) - lacking))
            if not inside:
                return
        try:
            self._file.read_into(place, piece[:inside])
        except ReadError as error:
            error.start += start - place
            raise

    def _read_row(self, start: int, place: int, skip: int, piece: memoryview) -> None:
        """A PACKED run: one unit, or a row of them."""
        at, row = 0, self._row or skip + len(piece)
        while at < len(piece):
            number, inside = divmod(skip + at, row)
            end = min(at + row - inside, len(piece))
            self._read_packed(start + at, place + number, inside, piece[at:end])
            at = end

    def _read_packed(self, start: int, place: int, skip: int, piece: memoryview) -> None:
        unit = self._units.get(place)
        if unit is None:
            try:
                unit = self._layout.unpack(place)
            except DamagedRange:
                raise
            except InvalidImage as error:
                raise DamagedRange(str(error), start, len(piece), offset=error.offset) from error
            except ReadError as error:  # its place in the file is none on the disk
                error.start, error.length = start, len(piece)
                raise
            if skip or len(unit) > len(piece):  # its rest may be asked for next
                self._units.keep(place, unit)
        if len(unit) < skip + len(piece):
            raise DamagedRange(
                f"{self._name}: the data of byte {start} of the disk is shorter than its place", start, len(piece)
            )
        piece[:] = memoryview(unit)[skip : skip + len(piece)]

    # ------------------------------------------------------------------ what is known without reading

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        check_read(self._name, self._size, offset, length)
        if length == 0:
            return ExtentMap.uniform(offset, 0)
        maps, stored = [], []
        for part in self._mappings(offset, length):  # none is kept: they may be many times larger than their extents
            maps.append(ExtentMap.joined(part.bounds, _STATES[part.kinds]))
            stored.append(self._long_stored(part))
        own = ExtentMap.concat(maps)
        starts, ends = self._zeros_stored(stored)
        if len(starts):
            own = merge(own, ExtentMap.from_runs(offset, length, starts, ends, State.ZERO))
        if self._parent is None:
            return overlay(own, ExtentMap.uniform(offset, length, State.ZERO | State.HOLE))
        return overlay(own, padded_extents(self._parent, offset, length))

    def _long_stored(self, part: Mapping) -> Offsets:
        """Three rows: starts of the long STORED runs, and where they start and end in the file."""
        lengths = np.minimum(np.diff(part.bounds), self._file.size - part.places)
        long = (part.kinds == Kind.STORED) & (part.places >= 0) & (lengths >= _WORTH_ASKING)
        return np.stack([part.bounds[:-1][long], part.places[long], part.places[long] + lengths[long]])

    def _zeros_stored(self, stored: Sequence[Offsets]) -> tuple[Offsets, Offsets]:
        """Starts and ends of what the file has holes for, in its long STORED runs.

        So a fixed or preallocated image in a sparse file is as quick to go through as a raw one.  The file is asked
        once for all of them: where a hole ends, tmpfs finds out by a walk over all pages up to there.
        """
        at, low, high = np.concatenate(stored, axis=1)
        if not len(at):
            return at, at
        start = int(low.min())
        starts, ends = self._file.extents(start, int(high.max()) - start).runs(State.ZERO)
        first = np.searchsorted(ends, low, "right")
        count = np.maximum(np.searchsorted(starts, high) - first, 0)
        count[np.cumsum(count) > _MOST_HOLES] = 0
        run = np.repeat(np.arange(len(at)), count)
        hole = first[run] + np.arange(len(run)) - np.repeat(np.cumsum(count) - count, count)
        shift = (at - low)[run]
        return np.maximum(starts[hole], low[run]) + shift, np.minimum(ends[hole], high[run]) + shift

    def shortfalls(self) -> Iterator[str]:
        """What ``shortfalls`` tells of this source and what is below it."""
        lacking, start = self._short
        if lacking:
            yield (
                f"{self._name}: the file ends too early, by {lacking} bytes of what was read: "
                f"those from byte {start} of the disk on are missing and read as zeros"
            )
        if self._parent is not None:
            yield from shortfalls(self._parent)

    def collisions(self) -> Iterator[str]:
        """What ``collisions`` tells of this source and what is below it."""
        if self._ragged:  # its clusters are its own: other formats may name the same bytes twice
            found = Collisions()
            try:
                for part in self._mappings(0, self._size):
                    stored = part.kinds == Kind.STORED
                    found.add(part.bounds[:-1][stored], part.places[stored], np.diff(part.bounds)[stored])
                    if found.full:
                        break
            except (InvalidImage, ReadError):  # whoever reads the disk is told
                return
            yield from (f"{self._name}: {sentence}" for sentence in found.told(own_places(self._layout)))
        if self._parent is not None:
            yield from collisions(self._parent)

    def runs(self, offset: int, length: int, depth: int = 0) -> Iterator[Run]:
        """The range, run by run, down to the layer that holds each."""
        for part in self._mappings(offset, length):
            bounds = part.bounds.tolist()
            columns = (bounds, bounds[1:], part.kinds.tolist(), part.places.tolist())
            for start, end, kind, place in zip(*columns, strict=False):
                if kind == Kind.HOLE and self._parent is not None and start < self._parent.size:
                    inside = min(end, self._parent.size) - start
                    yield from runs_of(self._parent, start, inside, depth + 1)
                    start += inside
                if start < end:
                    known = kind == Kind.STORED and self._placed
                    yield Run(start, end - start, Kind(kind), depth, place if known else None)

    def close(self) -> None:
        """Nothing: the image closes what it opened."""


_STATES: Final = np.array([State.HOLE, State.ZERO, State.DATA, State.DATA], np.uint8)  # by Kind


def runs_of(source: Source, offset: int, length: int, depth: int = 0) -> Iterator[Run]:
    """A range of any source, run by run, as far as it is known where it stands; STORED without a place: it is not."""
    if isinstance(source, MappedSource):
        yield from source.runs(offset, length, depth)
    elif isinstance(source, Slice | Concat | SplitFile):
        for part in source.parts(offset, length):
            for run in runs_of(part.source, part.offset, part.length, depth):
                yield run._replace(start=run.start + part.shift)
    elif length:
        plain = isinstance(source, FileSource | NumberedSource)
        yield Run(offset, length, Kind.STORED, depth, offset if plain else None)


def shortfalls(source: Source) -> Iterator[str]:
    """Sentences on what was read so far and is not there: the end of the last cluster of files that were cut.

    It is known when it is read, and not before: nothing but the tables says what of a file is in use.
    """
    if isinstance(source, MappedSource):
        yield from source.shortfalls()
    elif isinstance(source, Slice | Concat | SplitFile):
        for part in source.parts(0, source.size):
            yield from shortfalls(part.source)


@runtime_checkable
class Owning(Protocol):
    """A layout that knows where its tables stand."""

    def own(self) -> tuple[Offsets, Offsets]:
        """Starts and ends of the bytes of the file that are the image's own, in any order."""


def own_places(layout: Layout) -> tuple[Offsets, Offsets]:
    """Where a layout's tables stand, as far as it knows."""
    nowhere = np.zeros(0, np.int64)
    return layout.own() if isinstance(layout, Owning) else (nowhere, nowhere)


def collisions(source: Source) -> Iterator[str]:
    """Sentences on tables that say two things of the same bytes.  Goes through all tables once."""
    if isinstance(source, MappedSource):
        yield from source.collisions()
    elif isinstance(source, Slice | Concat | SplitFile):
        for part in source.parts(0, source.size):
            yield from collisions(part.source)


class Kept(Generic[K, V]):
    """The values used last, up to a number of bytes in all: tables and units read from a file.  For many threads."""

    def __init__(self, room: int, weigh: Callable[[V], int]) -> None:
        """``room`` in bytes, ``weigh`` gives those of a value."""
        self._room = room
        self._weigh = weigh
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = Lock()

    def get(self, key: K) -> V | None:
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def keep(self, key: K, value: V) -> None:
        """Remember a value; those not asked for longest go."""
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self._room -= self._weigh(value)
            while self._room < 0 and len(self._values) > 1:
                self._room += self._weigh(self._values.popitem(last=False)[1])

    def of(self, key: K, make: Callable[[K], V]) -> V:
        """The value, made where it is not kept; two threads may make it at once."""
        value = self.get(key)
        if value is None:
            value = make(key)
            self.keep(key, value)
        return value
