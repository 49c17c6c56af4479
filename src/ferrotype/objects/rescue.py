"""Objects of a damaged container, found by looking at every byte of the volumes that are left.

    ... | FERROREC header | payload | ... damage ... | FERROREC header | payload ... cut | FERROREC ...

Nothing leads here but the records themselves.  Their headers are looked for at any byte, since a region may have been
cut out of the file and the rest moved up; they prove themselves, and so does a payload that is whole.  Catalogs that
can be read tell which objects were deleted, and where those stand whose headers are lost.

Files are opened for reading only, and no lock is taken.  Memory grows like a catalog: by each record found.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import xxhash

from ferrotype.errors import (
    CorruptObject,
    DeviceError,
    FormatError,
    InvalidImage,
    ObjectMissing,
    StoreError,
    UsageError,
)
from ferrotype.job import Job
from ferrotype.objects import Bytes, ObjectInfo, ObjectTraits, SpaceReport
from ferrotype.objects.layout import (
    ANCHORS_AT,
    BLOCK,
    RECORD_MAGIC,
    Anchor,
    CatalogEntry,
    Kind,
    RecordHeader,
    VolumeHeader,
    decode_catalog,
    padded,
)
from ferrotype.objects.volumes import Opener, PosixFile, VolumeFile, volume_path
from ferrotype.units import KiB, MiB

_WINDOW: Final = 8 * MiB  # bytes searched at a time; the first look behind a record is a short one
_GLANCE: Final = 8 * KiB
_MAX_CATALOG: Final = 256 * MiB
_MAX_RECORDS: Final = 10_000_000  # 160 TB in packs of the usual size
_DISPROVED: Final = 8  # times the size of the volumes that payloads which are not whole may be read for

_NUMBERED: Final = re.compile(r"(.+)\.(\d{3,})")


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a volume: where a payload is, or should be."""

    volume: int
    start: int
    length: int
    whole: bool = False  # it matches the checksum of a record header


class _Found(NamedTuple):
    """A whole record header."""

    volume: int
    offset: int
    kind: int
    sequence: int
    length: int
    name: str
    uuid: bytes
    whole: bool  # its payload, too

    @property
    def end(self) -> int:
        return self.offset + padded(RecordHeader.SIZE + self.length)


def volumes_of(path: Path) -> tuple[Path, dict[int, Path]]:
    """The name of volume 0, and the files by number: any may be missing, and ``path`` may be any of them.

    Raises UsageError where there is none.
    """
    for base in _bases(path):
        found = {0: base} if base.is_file() else {}
        for other in base.parent.glob(f"{_quoted(base.name)}.*") if base.parent.is_dir() else ():
            match = _NUMBERED.fullmatch(other.name)
            if match and match[1] == base.name and int(match[2]) and other.is_file():
                found[int(match[2])] = other
        if path in found.values() or (found and path == base):
            return base, dict(sorted(found.items()))
    raise UsageError(f"{path} does not exist")


def _bases(path: Path) -> Iterator[Path]:
    """What volume 0 may be called: something else than ``path`` only where that says so, or cannot say anything."""
    match = _NUMBERED.fullmatch(path.name)
    if match and int(match[2]) and path.is_file() and _number(path) not in (0, None):
        yield path.with_name(match[1])
    elif match and int(match[2]) and path.is_file() and _number(path) is None:
        base = path.with_name(match[1])
        if any(volume_path(base, number).exists() for number in range(int(match[2]) + 2) if number != int(match[2])):
            yield base
    yield path


def _number(path: Path) -> int | None:
    """What a volume's own header says; None where it is damaged."""
    try:
        with path.open("rb") as file:
            return VolumeHeader.read(file.read(BLOCK).ljust(BLOCK, b"\0")).volume
    except (OSError, FormatError):
        return None


def _quoted(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


class _Volume:
    """One file, in which what cannot be read is zeros."""

    def __init__(self, path: Path, opener: Opener) -> None:
        self.path = path
        self.file: VolumeFile = opener(path, writable=False)
        self.size = self.file.size()
        self.bad: list[tuple[int, int]] = []  # start, end; ascending

    def read(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.size)
        if offset < 0 or end <= offset:
            return b""
        if not self.bad:
            try:
                return self.file.read(offset, end - offset)
            except DeviceError:
                pass
        out = bytearray(end - offset)
        pieces = [(offset, end)]
        while pieces:
            low, high = pieces.pop()
            if bad := self._known_bad(low, high):
                pieces += [(a, b) for a, b in ((bad[1], high), (low, bad[0])) if a < b]
                continue
            try:
                data = self.file.read(low, high - low)
                out[low - offset : low - offset + len(data)] = data
            except DeviceError:
                if high - low <= BLOCK:
                    bisect.insort(self.bad, (low, high))
                    continue
                middle = max((low + high) // 2 // BLOCK * BLOCK, low + 1)
                pieces += [(middle, high), (low, middle)]
        return bytes(out)

    def _known_bad(self, low: int, high: int) -> tuple[int, int] | None:
        at = max(bisect.bisect_right(self.bad, (low, low)) - 1, 0)
        return next(((a, b) for a, b in self.bad[at : at + 2] if a < high and b > low), None)


@dataclass(slots=True)
class _Told:
    """What the catalogs that can be read say."""

    state: dict[str, CatalogEntry] = field(default_factory=dict)  # the newest one they lead to
    places: dict[str, CatalogEntry] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)  # name -> sequence number of the catalog that says so
    complete: int = -1  # sequence number of the newest that stands alone
    listed: set[str] = field(default_factory=set)  # names in that
    newest: int = -1

    def deleted(self, name: str, sequence: int) -> bool:
        return self.removed.get(name, -1) > sequence or (sequence < self.complete and name not in self.listed)


class RescueStore:
    """A read-only ObjectStore over what is left of a container."""

    def __init__(self, path: Path, volumes: dict[int, Path]) -> None:
        """Use ``open``."""
        self.path = path
        self.traits = ObjectTraits()
        self.paths = volumes
        self.problems: list[str] = []  # what is wrong, in words
        self.uuid = b""
        self.pieces: dict[str, list[Piece]] = {}  # where each object stands or may stand, the best first
        self.deleted: dict[str, list[Piece]] = {}  # the same of objects that a catalog says are deleted
        self.damaged: list[str] = []  # objects that are not whole
        self.extra: dict[str, bytes] = {}  # objects that stand in memory
        self._volumes: dict[int, _Volume] = {}
        self._found: list[_Found] = []
        self._told = _Told()
        self._anchored = -1  # the newest catalog that an anchor knows of

    @classmethod
    def open(cls, path: Path, job: Job, opener: Opener = PosixFile) -> RescueStore:
        """Search all volumes.  Raises InvalidImage where no record is in them, UsageError where there is no file."""
        self = cls(*volumes_of(path))
        try:
            for number, volume in self.paths.items():
                self._volumes[number] = _Volume(volume, opener)
            self._search(job)
            self._choose()
            self._judge_heads()
            self._read_catalogs()
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

    # ------------------------------------------------------------------ searching

    def _search(self, job: Job) -> None:
        total = sum(volume.size for volume in self._volumes.values())
        job.begin("searching", total)
        budget = _DISPROVED * total
        for number, volume in self._volumes.items():
            at = told = 0
            while (at := _next_magic(volume, at)) >= 0:
                head = volume.read(at, RecordHeader.SIZE)
                header = RecordHeader.read(head, head[16:32])
                if header is None:
                    at += len(RECORD_MAGIC)
                    continue
                end = at + RecordHeader.SIZE + header.length
                whole = False
                if header.kind != Kind.FILLER and end <= volume.size and budget > 0:
                    whole = _checksum(volume, at + RecordHeader.SIZE, header.length) == header.payload_check
                    budget -= 0 if whole else header.length
                self._found.append(
                    _Found(number, at, header.kind, header.sequence, header.length, header.text, header.uuid, whole)
                )
                if len(self._found) > _MAX_RECORDS:
                    raise InvalidImage(f"{volume.path} has more records than any image")
                at = end if whole else at + RecordHeader.SIZE
                job.advance(at - told)
                told = at
            job.advance(max(0, volume.size - told))

    def _choose(self) -> None:
        """Which container it is: that to which most bytes belong."""
        weight: Counter[bytes] = Counter()
        for found in self._found:
            weight[found.uuid] += BLOCK + (found.length if found.whole else 0)
        if not weight:
            raise InvalidImage(f"nothing of a ferrotype image was found in {self.path}")
        self.uuid = weight.most_common(1)[0][0]
        others = [found for found in self._found if found.uuid != self.uuid]
        if others:
            self.problems.append(
                f"{len(others)} records of another image stand in {self.path}; they are left alone "
                f"(the first at byte {others[0].offset} of volume {others[0].volume})"
            )
        self._found = sorted(
            (found for found in self._found if found.uuid == self.uuid), key=lambda f: (f.volume, f.offset)
        )

    def _judge_heads(self) -> None:
        """Say what is wrong with the structures that lead to the others; none of them is used here."""
        for number, volume in self._volumes.items():
            try:
                header = VolumeHeader.read(volume.read(0, BLOCK).ljust(BLOCK, b"\0"))
                if header.uuid != self.uuid or header.volume != number:
                    self.problems.append(f"the volume header of {volume.path} is that of another volume")
            except FormatError:
                self.problems.append(f"the volume header of {volume.path} is damaged")
        if first := self._volumes.get(0):
            anchors = [Anchor.read(first.read(at, BLOCK), self.uuid) for at in ANCHORS_AT]
            catalogs = {(f.volume, f.offset, f.sequence) for f in self._found if f.kind == Kind.CATALOG and f.whole}
            self._anchored = max((anchor.sequence for anchor in anchors if anchor), default=-1)
            leads = [a for a in anchors if a and (a.volume, a.offset, a.sequence) in catalogs]
            if not any(anchors):
                self.problems.append(f"both anchors of {first.path} are damaged")
            elif not leads:
                self.problems.append(f"no anchor of {first.path} leads to a catalog")
        for volume in self._volumes.values():
            if volume.bad:
                size = sum(end - start for start, end in volume.bad)
                self.problems.append(f"{size} bytes of {volume.path} cannot be read, the first at {volume.bad[0][0]}")

    # ------------------------------------------------------------------ catalogs

    def _read_catalogs(self) -> None:
        told = self._told
        broken = False
        records = [f for f in self._found if f.kind == Kind.CATALOG and f.whole and f.length <= _MAX_CATALOG]
        for record in sorted(records, key=lambda f: f.sequence):
            try:
                catalog = decode_catalog(self._volumes[record.volume].read(record.offset + 128, record.length))
            except InvalidImage as error:
                self.problems.append(str(error))
                continue
            added = {entry.name: entry for entry in catalog.added}
            broken |= catalog.previous is not None and catalog.previous[2] != told.newest
            if catalog.previous is None:
                broken = False
                told.state, told.complete, told.listed = {}, record.sequence, set(added)
            for name in catalog.removed:
                told.state.pop(name, None)
                told.removed[name] = record.sequence
            told.state |= added
            told.places |= added
            told.newest = record.sequence
        if told.newest < 0:
            self.problems.append("no catalog can be read; every record that was found counts")
        elif broken:
            self.problems.append(
                "only parts of the catalog can be read; what was deleted may be back, "
                "and what is lost may be more than can be named"
            )
        if self._anchored > told.newest >= 0:
            self.problems.append("the newest catalog cannot be read; what is lost may be more than can be named")

    def _settle(self) -> None:
        """Where each object stands or may stand."""
        records = [f for f in self._found if f.kind == Kind.OBJECT]
        behind = {(f.volume, f.offset): n.offset for f, n in zip(self._found, self._found[1:], strict=False)}
        for record in records:
            gone = self._told.deleted(record.name, record.sequence)
            places = (self.deleted if gone else self.pieces).setdefault(record.name, [])
            volume = self._volumes[record.volume]
            start = record.offset + RecordHeader.SIZE
            places.append(Piece(record.volume, start, record.length, record.whole))
            following = behind.get((record.volume, record.offset), -1)
            following = volume.size if following < record.offset else following
            if not record.whole and following < record.end:  # something was cut out: what is behind has moved up
                moved = following - record.end
                places.append(Piece(record.volume, start + moved, record.length))
        for name in list(self.deleted):
            if name in self.pieces:
                self.pieces[name] += self.deleted.pop(name)
        self._places_told(records)
        for places in self.pieces.values():
            places.sort(key=lambda piece: not piece.whole)
        self.damaged = sorted(name for name, places in self.pieces.items() if not places[0].whole)
        if self.damaged:
            self.problems.append(f"{len(self.damaged)} objects are not whole, {self.damaged[0]} among them")
        away = {entry.volume for entry in self._told.state.values()} - self._volumes.keys()
        away |= set(range(max(self._volumes))) - self._volumes.keys()
        for number in sorted(away)[:10]:
            self.problems.append(f"volume {volume_path(self.path, number).name} is missing")

    def _places_told(self, records: Sequence[_Found]) -> None:
        """Objects that are in the catalog: where it says, moved like the records before and behind them."""
        moved: dict[int, list[tuple[int, int]]] = {}
        numbered = {(f.volume, f.sequence): f for f in self._found if f.kind != Kind.FILLER}
        for record in records:
            entry = self._told.places.get(record.name)
            if entry and (entry.volume, entry.sequence, entry.length) == (
                record.volume,
                record.sequence,
                record.length,
            ):
                moved.setdefault(record.volume, []).append((entry.offset, record.offset - entry.offset))
        for shifts in moved.values():
            shifts.sort()
        for name, entry in self._told.state.items():
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
            for start in dict.fromkeys(starts):
                piece = Piece(entry.volume, start + RecordHeader.SIZE, entry.length)
                if piece not in places and piece.start + piece.length >= RecordHeader.SIZE and piece.start < size:
                    places.append(piece)
            if not places:  # of a volume that is missing, or behind the end
                places.append(Piece(entry.volume, entry.offset + RecordHeader.SIZE, entry.length))

    # ------------------------------------------------------------------ what no record explains

    def dark(self) -> Iterator[Piece]:
        """The ranges of the volumes in which no whole record stands.

        They begin where a payload ends: the zeros behind it may have been cut out, and the rest moved up.
        """
        for number, volume in self._volumes.items():
            at = end = 0
            for record in self._found:
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
        before = {
            (record.end - dark.start) % BLOCK
            for record in self._found
            if (record.volume, record.offset + RecordHeader.SIZE + record.length) == (dark.volume, dark.start)
        }
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

    def put(self, name: str, parts: Sequence[Bytes], /) -> None:  # noqa: ARG002  the protocol's signature
        raise StoreError("a damaged image is never written into")

    def delete(self, name: str, /) -> None:  # noqa: ARG002  the protocol's signature
        raise StoreError("a damaged image is never written into")

    def flush(self) -> None:
        """Nothing: there is nothing to write."""

    def reclaim(self) -> SpaceReport:
        return SpaceReport(0, 0)

    def close(self) -> None:
        for volume in self._volumes.values():
            volume.file.close()

    def _best(self, name: str) -> Piece:
        try:
            return self.pieces[name][0]
        except KeyError:
            raise ObjectMissing(name) from None


def _next_magic(volume: _Volume, at: int) -> int:
    """Where the next record header may begin, at any byte; -1 where there is none."""
    size = _GLANCE
    while at < volume.size:
        at = max(at, min(volume.file.data_from(at), volume.size))
        data = volume.read(at, size)
        if (found := data.find(RECORD_MAGIC)) >= 0:
            return at + found
        if at + len(data) >= volume.size or not data:
            return -1
        at += len(data) - len(RECORD_MAGIC) + 1
        size = min(size * 8, _WINDOW)
    return -1


def _checksum(volume: _Volume, start: int, length: int) -> bytes:
    digest = xxhash.xxh3_128()
    for at in range(start, start + length, _WINDOW):
        digest.update(volume.read(at, min(_WINDOW, start + length - at)))
    return digest.digest()
