"""Objects of a damaged container, wherever a record or a catalog says that they stand.

    record header     its payload, whole or not; where something was cut out of it, also where it would begin then
    catalog           where it says, moved like the records before and behind; next to its neighbours in number
    neither           the ranges that no whole record explains are given to who knows what an object looks like

Files are opened for reading only, and no lock is taken.  Memory grows like a catalog: by each record found.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from ferrotype.errors import CorruptObject, ObjectMissing, StoreError
from ferrotype.job import Job
from ferrotype.objects import ObjectInfo, ObjectTraits, Parts, SpaceReport
from ferrotype.objects.damaged import DamagedVolume, volumes_of
from ferrotype.objects.layout import BLOCK, Kind, RecordHeader
from ferrotype.objects.searching import Finds, Found, search
from ferrotype.objects.volumes import Opener, PosixFile, volume_path

_MOST_PLACES: Final = 16  # of one object: a record that stands a million times would be looked into as often
_LONGEST: Final = 1 << 40  # bytes of a payload that may be one
_NOWHERE: Final = -1  # no volume: it is missing, or what it should hold lies outside of it


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a volume: where a payload is, or should be."""

    volume: int
    start: int
    length: int
    whole: bool = False  # it matches the checksum of a record header


class RescueStore:
    """A read-only ObjectStore over what is left of a container."""

    def __init__(self, path: Path, volumes: dict[int, Path]) -> None:
        """Use ``open``."""
        self.path = path
        self.traits = ObjectTraits()
        self.paths = volumes
        self.problems: list[str] = []  # what is wrong, in words
        self.doubts: list[str] = []  # why more may be lost than can be named
        self.uuid = b""
        self.pieces: dict[str, list[Piece]] = {}  # where each object stands or may stand, the best first
        self.deleted: dict[str, list[Piece]] = {}  # the same of objects that a catalog says are deleted
        self.damaged: list[str] = []  # objects that are not whole
        self.extra: dict[str, bytes] = {}  # objects that stand in memory
        self._volumes: dict[int, DamagedVolume] = {}
        self._finds = Finds()
        self._ends: dict[tuple[int, int], set[int]] = {}  # where payloads of whole records end: where the records do

    @classmethod
    def open(cls, path: Path, job: Job, opener: Opener = PosixFile) -> RescueStore:
        """Search all volumes.  Raises InvalidImage where no record is in them, UsageError where there is no file."""
        self = cls(*volumes_of(path))
        try:
            for number, volume in self.paths.items():
                self._volumes[number] = DamagedVolume(volume, opener)
            self._finds = search(self.path, self._volumes, job)
            self.uuid, self.problems, self.doubts = self._finds.uuid, self._finds.problems, self._finds.doubts
            self._settle()
        except BaseException:
            self.close()
            raise
        return self

    def over(self, pieces: dict[str, list[Piece]], extra: dict[str, bytes] | None = None) -> RescueStore:
        """A store of other objects over the same volumes, which this one closes."""
        other = RescueStore(self.path, self.paths)
        other.uuid, other.pieces, other.extra, other._volumes = self.uuid, pieces, extra or {}, self._volumes
        return other

    # ------------------------------------------------------------------ where objects stand

    def _settle(self) -> None:
        """Where each object stands or may stand."""
        found = self._finds.records
        records = [f for f in found if f.kind == Kind.OBJECT]
        behind = {(f.volume, f.offset): n.offset for f, n in pairwise(found)}
        for record in records:
            gone = self._finds.told.deleted(record.name, record.sequence)
            places = (self.deleted if gone else self.pieces).setdefault(record.name, [])
            volume = self._volumes[record.volume]
            start = record.offset + RecordHeader.SIZE
            if record.length > _LONGEST:
                continue
            places.append(Piece(record.volume, start, record.length, record.whole))
            following = behind.get((record.volume, record.offset), -1)
            following = volume.size if following < record.offset else following
            if not record.whole and following < record.end:  # something was cut out: what is behind has moved up
                moved = following - record.end
                places.append(Piece(record.volume, start + moved, record.length))
        for record in (f for f in found if f.whole):
            payload_end = record.offset + RecordHeader.SIZE + record.length
            self._ends.setdefault((record.volume, payload_end), set()).add(record.end)
        for name in list(self.deleted):
            if name in self.pieces:
                self.pieces[name] += self.deleted.pop(name)
        self._places_told(records)
        for places in (*self.deleted.values(), *self.pieces.values()):
            places.sort(key=lambda piece: not piece.whole)
            del places[_MOST_PLACES:]
            if not places:  # outside of the files, and still an object that is known
                places.append(Piece(_NOWHERE, 0, 1))
        self.damaged = sorted(name for name, places in self.pieces.items() if not places[0].whole)
        away = {entry.volume for entry in self._finds.told.state.values()} - self._volumes.keys()
        away |= set(range(max(self._volumes))) - self._volumes.keys()
        for number in sorted(away)[:10]:
            self.doubts.append(f"volume {volume_path(self.path, number).name} is missing")

    def _places_told(self, records: Sequence[Found]) -> None:
        """Objects that are in the catalog: where it says, moved like the records before and behind them."""
        moved: dict[int, list[tuple[int, int]]] = {}
        numbered = {(f.volume, f.sequence): f for f in self._finds.records if f.kind != Kind.FILLER}
        for record in records:
            entry = self._finds.told.places.get(record.name)
            if entry and (entry.volume, entry.sequence, entry.length) == (
                record.volume,
                record.sequence,
                record.length,
            ):
                moved.setdefault(record.volume, []).append((entry.offset, record.offset - entry.offset))
        for shifts in moved.values():
            shifts.sort()
        for name, entry in self._finds.told.state.items():
            places = self.pieces.setdefault(name, [])
            if any(piece.whole for piece in places):
                continue
            shifts = moved.get(entry.volume, [])
            at = bisect.bisect_left(shifts, (entry.offset, -(1 << 62)))
            nearest = [shift for _, shift in shifts[max(at - 1, 0) : at + 2]]
            starts = [entry.offset + shift for shift in (*nearest, 0)]
            if before := numbered.get((entry.volume, entry.sequence - 1)):  # records are put one behind the other
                starts.append(before.end)
            if after := numbered.get((entry.volume, entry.sequence + 1)):
                starts.append(after.offset - entry.span)
            size = self._volumes[entry.volume].size if entry.volume in self._volumes else 0
            for start in dict.fromkeys(starts) if 0 <= entry.length <= _LONGEST else ():
                piece = Piece(entry.volume, start + RecordHeader.SIZE, entry.length)
                if piece not in places and piece.start + piece.length >= RecordHeader.SIZE and piece.start < size:
                    places.append(piece)

    # ------------------------------------------------------------------ what no record explains

    def dark(self) -> Iterator[Piece]:
        """The ranges of the volumes in which no whole record stands.

        They begin where a payload ends: the zeros behind it may have been cut out, and the rest moved up.
        """
        for number, volume in self._volumes.items():
            at = end = 0
            for record in self._finds.records:
                if record.volume != number or not record.whole:
                    continue
                if at < record.offset != end:
                    yield Piece(number, at, record.offset - at)
                if record.end > end:
                    at, end = record.offset + RecordHeader.SIZE + record.length, record.end
            if at < volume.size != end:
                yield Piece(number, at, volume.size - at)

    def grids(self, dark: Piece) -> set[int]:
        """Where in the first block of a dark range records may begin: as in the file, as behind it, as before it."""
        before = {(end - dark.start) % BLOCK for end in self._ends.get((dark.volume, dark.start), ())}
        return before | {-dark.start % BLOCK, dark.length % BLOCK}

    def read(self, piece: Piece, offset: int, length: int) -> bytes:
        """Bytes of a piece; fewer where its volume ends, or does not have them."""
        volume = self._volumes.get(piece.volume)
        start = piece.start + offset
        if volume is None or offset < 0 or length < 0:
            return b""
        before = min(max(-start, 0), length)  # cut off in front of the volume
        return bytes(before) + volume.read(start + before, length - before)

    def stored_from(self, piece: Piece, offset: int) -> int:
        """Where, behind ``offset``, the piece has something else than a hole."""
        return self._volumes[piece.volume].file.data_from(piece.start + offset) - piece.start

    # ------------------------------------------------------------------ ObjectStore

    def get(self, name: str, /, offset: int = 0, length: int | None = None) -> bytes:
        if name in self.extra:
            data = self.extra[name]
            return data[offset:] if length is None else data[offset : offset + length]
        piece = self._best(name)
        length = piece.length - offset if length is None else length
        data = self.read(piece, offset, length) if 0 <= length <= piece.length - offset else b""
        if len(data) != length:
            raise CorruptObject(name, "what is left of it is shorter")
        return data

    def size(self, name: str, /) -> int:
        return len(self.extra[name]) if name in self.extra else self._best(name).length

    def list(self, prefix: str, /) -> Iterator[ObjectInfo]:
        names = sorted(name for name in {*self.pieces, *self.extra} if name.startswith(prefix))
        return iter([ObjectInfo(name, self.size(name)) for name in names])

    def check(self, name: str, /, *, from_medium: bool = False) -> None:  # noqa: ARG002  the protocol's signature
        if name not in self.extra and not self._best(name).whole:
            raise CorruptObject(name, "its record is not whole")

    def refresh(self) -> bool:
        return False

    def put(self, name: str, parts: Parts, /) -> None:  # noqa: ARG002  the protocol's signature
        raise StoreError("a damaged image is never written into")

    def delete(self, name: str, /) -> None:  # noqa: ARG002  the protocol's signature
        raise StoreError("a damaged image is never written into")

    def flush(self) -> None:
        """Nothing: there is nothing to write."""

    def reclaim(self) -> SpaceReport:
        return SpaceReport(0, 0)

    def bring_forward(self, names: Collection[str], others: str, /) -> bool:  # noqa: ARG002  the protocol's signature
        return True

    def close(self) -> None:
        for volume in self._volumes.values():
            volume.file.close()

    def _best(self, name: str) -> Piece:
        try:
            return self.pieces[name][0]
        except KeyError:
            raise ObjectMissing(name) from None
