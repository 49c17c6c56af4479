"""A whole object store in one portable file (or in split files): append, commit, read back, survive.

    put       appends a record; nothing refers to it yet
    flush     data durable -> catalog record -> durable -> anchor: from here on the next opening finds it
    open      newest whole anchor -> its catalog -> records appended since; without an anchor, a scan of everything

A committed object is never moved or overwritten except by ``compact``, which copies it first.  Whatever the point at
which writing is cut, the last anchored catalog and everything it names stay intact.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Final

from ferrotype.errors import (
    CorruptObject,
    DeviceError,
    FerrotypeError,
    InvalidImage,
    ObjectExists,
    ObjectMissing,
    UnsupportedError,
    UsageError,
    WriteError,
)
from ferrotype.objects import Bytes, ObjectInfo, ObjectTraits, SpaceReport
from ferrotype.objects.compaction import compact, gaps_between
from ferrotype.objects.layout import (
    ANCHORS_AT,
    BLOCK,
    RECORDS_AT,
    Anchor,
    Catalog,
    CatalogEntry,
    Kind,
    Place,
    RecordHeader,
    VolumeHeader,
    checksum,
    decode_catalog,
    encode_catalog,
    padded,
)
from ferrotype.objects.lock import lock_for_writing
from ferrotype.objects.volumes import Opener, PosixFile, VolumeFile, remove_volume, volume_path
from ferrotype.units import MiB

_READ_SIZE: Final = 4 * MiB  # bytes a checksum is computed over at a time
_MAX_CATALOG: Final = 1024 * MiB  # a catalog of ten million objects stays under this
_MAX_CHAIN: Final = 24  # catalogs read at an opening before everything is written down afresh
_SMALL: Final = 8 * MiB  # larger payloads are not proven at an opening for reading: their own layer proves them


class Container:
    """An ObjectStore in one file, or several where it is split."""

    def __init__(self, path: Path, opener: Opener, *, writable: bool) -> None:
        """Use ``create`` or ``open``."""
        self.path = path
        self.traits = ObjectTraits()
        self.writable = writable
        self.warnings: list[str] = []
        self._opener = opener
        self._files: list[VolumeFile] = []
        self._entries: dict[str, CatalogEntry] = {}
        self._lock = Lock()  # guards the tables; never held over a read or write of data
        self._uuid = b""
        self._split = 0
        self._unpublished = False  # a new image has no name until it is complete
        self._sequence = 0
        self._generation = 0
        self._tail = RECORDS_AT  # where the next record goes in the last volume
        self._chain: list[CatalogEntry] = []  # catalog records the newest state needs, oldest first
        self._chain_entries = 0  # additions and removals in all of them but the first
        self._added: dict[str, CatalogEntry] = {}  # since the last flush
        self._removed: dict[str, CatalogEntry] = {}

    # ------------------------------------------------------------------ opening

    @classmethod
    def create(cls, path: Path, *, split: int = 0, opener: Opener = PosixFile) -> Container:
        """A new, empty container open for writing.  The file takes its name at the first ``flush``, not before.

        Raises DeviceError where the file exists already.
        """
        if split and split < 64 * MiB:
            raise UsageError("volumes of less than 64MiB make no sense; choose a larger split size")
        self = cls(path, opener, writable=True)
        if path.exists():
            raise DeviceError(f"{path} exists already")
        self._uuid = os.urandom(16)
        self._split = split
        try:
            self._add_volume()
        except BaseException:
            self.close()
            raise
        return self

    @classmethod
    def open(cls, path: Path, *, writable: bool = False, opener: Opener = PosixFile) -> Container:
        """An existing container.

        Raises InvalidImage or UnsupportedError for anything else, Locked where another process is writing and
        ``writable`` was asked for, DeviceError where a volume is missing or cannot be read.
        """
        self = cls(path, opener, writable=writable)
        try:
            self._open_volumes()
            self._load()
        except BaseException:
            self.close()
            raise
        return self

    def _open_volumes(self) -> None:
        first = self._opener(self.path, writable=self.writable)
        self._files.append(first)
        if self.writable:
            lock_for_writing(first.fileno(), str(self.path))
        header = VolumeHeader.read(first.read(0, BLOCK))
        if header.volume:
            raise UsageError(f"{self.path} is volume {header.volume} of a split image; name the first one")
        self._uuid, self._split = header.uuid, header.split
        while volume_path(self.path, len(self._files)).exists():
            number = len(self._files)
            file = self._opener(volume_path(self.path, number), writable=self.writable)
            self._files.append(file)
            other = VolumeHeader.read(file.read(0, BLOCK))
            if other.uuid != self._uuid or other.volume != number:
                raise InvalidImage(f"{volume_path(self.path, number)} belongs to another image")

    def _load(self) -> None:
        """Bring the tables to the newest state that can be proven."""
        anchors = [Anchor.read(self._files[0].read(at, Anchor.SIZE), self._uuid) for at in ANCHORS_AT]
        whole = sorted((a for a in anchors if a), key=lambda a: a.generation, reverse=True)
        self._generation = whole[0].generation if whole else 0
        for anchor in whole:
            try:
                self._load_chain(Place(anchor.volume, anchor.offset), anchor.sequence)
            except (InvalidImage, CorruptObject, DeviceError) as error:
                self.warnings.append(f"{self.path}: {error}; an older state is used")
                continue
            last = self._chain[-1]
            self._scan(Place(last.volume, last.offset + last.span))
            return
        self.warnings.append(f"{self.path}: no anchor leads to a catalog; the whole image was searched instead")
        self._scan(Place(0, RECORDS_AT))

    def _load_chain(self, place: Place, sequence: int) -> None:
        """Read a catalog and those it builds on; replaces the tables only when all of them are whole."""
        chain: list[tuple[CatalogEntry, Catalog]] = []
        wanted: tuple[int, int, int] | None = (place.volume, place.offset, sequence)
        while wanted is not None:
            header = self._header(Place(wanted[0], wanted[1]))
            if header is None or header.kind != Kind.CATALOG or header.sequence != wanted[2]:
                raise InvalidImage("a catalog record is missing", offset=wanted[1])
            if header.length > _MAX_CATALOG or len(chain) > 4 * _MAX_CHAIN:
                raise InvalidImage("the catalogs are larger than any image needs", offset=wanted[1])
            entry = CatalogEntry("", wanted[0], wanted[1], header.length, header.sequence)
            payload = self._payload(entry, 0, header.length)
            if checksum(payload) != header.payload_check:
                raise CorruptObject("catalog", "its checksum is wrong")
            catalog = decode_catalog(payload)
            chain.append((entry, catalog))
            if catalog.previous is not None and catalog.previous[2] >= header.sequence:
                raise InvalidImage("the catalogs refer to each other in a circle", offset=wanted[1])
            wanted = catalog.previous
        entries: dict[str, CatalogEntry] = {}
        for _, catalog in reversed(chain):
            for name in catalog.removed:
                entries.pop(name, None)
            entries.update((entry.name, entry) for entry in catalog.added)
        for entry in entries.values():
            if not self._inside(entry):
                raise InvalidImage(f"the image is cut short: {entry.name} lies behind its end", offset=entry.offset)
        self._entries = entries
        self._chain = [entry for entry, _ in reversed(chain)]
        self._chain_entries = sum(len(c.added) + len(c.removed) for _, c in chain[:-1])
        self._sequence = sequence

    def _inside(self, entry: CatalogEntry) -> bool:
        if not 0 <= entry.volume < len(self._files):
            where = volume_path(self.path, entry.volume)
            raise DeviceError(f"volume {where} of the image is missing; put all volumes into one folder")
        end = entry.offset + RecordHeader.SIZE + entry.length
        return entry.offset >= RECORDS_AT and entry.length >= 0 and end <= self._files[entry.volume].size()

    def _scan(self, start: Place) -> None:
        """Take up the records from ``start`` on: what was put after the last anchored flush.

        A writer proves every payload, since it will build on them, and cuts off a torn tail.  A reader proves small
        ones only, so that opening stays quick while a backup runs.
        """
        objects: list[CatalogEntry] = []
        catalogs: list[CatalogEntry] = []
        end = start
        for entry, header in self._records(start):
            if header.kind == Kind.OBJECT:
                objects.append(entry)
            elif header.kind == Kind.CATALOG:
                catalogs.append(entry)
            elif Kind.FILLER < header.kind < Kind.PARITY:
                raise UnsupportedError(f"a record of kind {header.kind} is not known; use a newer ferrotype")
            self._sequence = max(self._sequence, entry.sequence)
            end = Place(entry.volume, entry.offset + entry.span)
        newest = self._sequence
        settled = self._adopt_catalog(catalogs)
        for entry in sorted(objects, key=lambda e: e.sequence):
            if entry.sequence > settled:
                self._entries[entry.name] = self._added[entry.name] = entry
        self._sequence = newest
        last = len(self._files) - 1
        self._tail = end.offset if end.volume == last else RECORDS_AT
        if self.writable and self._files[last].size() > self._tail:
            self._files[last].truncate(self._tail)

    def _adopt_catalog(self, found: list[CatalogEntry]) -> int:
        """Load the newest of the catalogs a scan found that is newer than the one in use; its sequence number."""
        for entry in sorted(found, key=lambda e: e.sequence, reverse=True):
            if self._chain and entry.sequence <= self._chain[-1].sequence:
                break
            try:
                self._load_chain(entry.place, entry.sequence)
            except (InvalidImage, CorruptObject, DeviceError) as error:
                self.warnings.append(f"{self.path}: {error}; an older state is used")
            else:
                break
        return self._chain[-1].sequence if self._chain else -1

    def _records(self, start: Place) -> Iterator[tuple[CatalogEntry, RecordHeader]]:
        """Whole records from ``start`` to the end of the last volume; what is damaged is stepped over."""
        for volume in range(start.volume, len(self._files)):
            offset = start.offset if volume == start.volume else RECORDS_AT
            size = self._files[volume].size()
            while offset < size:
                header = self._header(Place(volume, offset))
                if header is None:
                    offset += BLOCK
                    continue
                entry = CatalogEntry(header.text, volume, offset, header.length, header.sequence)
                if self._inside(entry) and self._proven(entry, header):
                    yield entry, header
                    offset += entry.span
                elif self._header(Place(volume, offset + entry.span)):  # only this one is damaged, or was deleted
                    offset += entry.span
                else:
                    offset += BLOCK

    def _proven(self, entry: CatalogEntry, header: RecordHeader) -> bool:
        if header.kind == Kind.FILLER or (not self.writable and header.length > _SMALL):
            return True
        return self._payload_checksum(entry) == header.payload_check

    # ------------------------------------------------------------------ ObjectStore

    def put(self, name: str, parts: Sequence[Bytes], /) -> None:
        if name in self._entries:
            raise ObjectExists(name)
        entry = self._append(Kind.OBJECT, name, parts)
        with self._lock:
            self._entries[name] = entry
            self._added[name] = entry
            self._removed.pop(name, None)

    def get(self, name: str, /, offset: int = 0, length: int | None = None) -> bytes:
        entry = self._entry(name)
        length = entry.length - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > entry.length:
            raise CorruptObject(name, f"it has {entry.length} bytes, {length} at {offset} were asked for")
        return self._payload(entry, offset, length)

    def size(self, name: str, /) -> int:
        return self._entry(name).length

    def list(self, prefix: str, /) -> Iterator[ObjectInfo]:
        with self._lock:
            names = sorted(name for name in self._entries if name.startswith(prefix))
        return (ObjectInfo(name, self._entries[name].length) for name in names)

    def delete(self, name: str, /) -> None:
        entry = self._entry(name)
        with self._lock:
            del self._entries[name]
            if self._added.pop(name, None) is None:
                self._removed[name] = entry

    def flush(self) -> None:
        if not (self._added or self._removed):
            return
        self._files[-1].sync()  # earlier volumes were synced when they were left
        self._write_catalog()
        if self._unpublished:
            self._files[0].sync()
            self._files[0].publish(self.path)
            self._unpublished = False

    def check(self, name: str, /) -> None:
        entry = self._entry(name)
        header = self._header(entry.place)
        if header is None or header.text != name or header.length != entry.length:
            raise CorruptObject(name, "its record header is wrong")
        if self._payload_checksum(entry) != header.payload_check:
            raise CorruptObject(name, "its checksum is wrong")

    def reclaim(self) -> SpaceReport:
        """Punch a hole into each gap, behind a filler's header that tells a scan where the next record stands."""
        for file in self._files:
            file.sync()  # the anchor too: nothing durable may still lead to what is now destroyed
        before = sum(file.allocated() for file in self._files)
        dead = 0
        for place, gap in gaps_between([*self.live(), *self._chain], self.volume_sizes()):
            self._fill(place, gap)
            if gap > BLOCK and not self._files[place.volume].punch(place.offset + BLOCK, gap - BLOCK):
                dead += gap
        return SpaceReport(max(0, before - sum(file.allocated() for file in self._files)), dead)

    def close(self) -> None:
        for file in reversed(self._files):
            file.close()  # a file that was never published goes with it
        self._files.clear()

    # ------------------------------------------------------------------ compacting

    def compact(self, advance: Callable[[int], None]) -> int:
        """Move records into the gaps that deleted ones left and cut the file; bytes by which it became smaller.

        ``advance`` is told the bytes moved.  Needs at most 256 MiB of extra space, whatever the size of the image.
        """
        before = self.file_size
        self.flush()
        compact(self, advance)
        return before - self.file_size

    def live(self) -> Sequence[CatalogEntry]:
        return tuple(self._entries.values())

    def volume_sizes(self) -> Sequence[int]:
        return tuple(file.size() for file in self._files)

    def move(self, entry: CatalogEntry, place: Place, gap: int, /) -> None:
        """Copy a record to the start of a gap of ``gap`` bytes; it counts there once ``settle`` has returned."""
        source, target = self._files[entry.volume], self._files[place.volume]
        for at in range(0, entry.span, _READ_SIZE):
            target.write(place.offset + at, [source.read(entry.offset + at, min(_READ_SIZE, entry.span - at))])
        if rest := gap - entry.span:
            self._fill(Place(place.volume, place.offset + entry.span), rest)
        self._entries[entry.name] = CatalogEntry(entry.name, place.volume, place.offset, entry.length, entry.sequence)

    def _fill(self, place: Place, gap: int) -> None:
        filler = RecordHeader.make(Kind.FILLER, self._uuid, 0, gap - RecordHeader.SIZE, bytes(16), "")
        self._files[place.volume].write(place.offset, [filler.pack()])

    def settle(self) -> None:
        """Make moves durable: the records first, then a catalog that names their new places."""
        for file in self._files:
            file.sync()
        self._chain = []
        self._write_catalog()
        self._files[0].sync()

    def cut(self) -> None:
        """Bring the catalog down behind the last record, drop empty volumes and cut the file."""
        self._chain = []
        last = max(self._entries.values(), key=lambda e: e.place, default=None)
        volume, end = (last.volume, last.offset + last.span) if last else (0, RECORDS_AT)
        old_tail = self._tail
        catalog = encode_catalog(Catalog(None, list(self._entries.values()), []))
        room = old_tail if volume == len(self._files) - 1 else self._split
        span = padded(RecordHeader.SIZE + len(catalog))
        if end + 2 * span > room:  # it would not get clear of the catalog in use
            self.settle()
            return
        dropped, self._files = self._files[volume + 1 :], self._files[: volume + 1]
        self._tail = end
        self.settle()
        self._files[-1].truncate(self._tail)
        self._files[-1].sync()
        for number, file in reversed(list(enumerate(dropped, volume + 1))):
            file.close()
            remove_volume(self.path, number)

    # ------------------------------------------------------------------ facts

    @property
    def file_size(self) -> int:
        """Bytes of all volumes, holes included."""
        return sum(file.size() for file in self._files)

    @property
    def live_size(self) -> int:
        """Bytes of the records that are needed."""
        return sum(e.span for e in (*self._entries.values(), *self._chain)) + RECORDS_AT * len(self._files)

    def _entry(self, name: str) -> CatalogEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise ObjectMissing(name) from None

    # ------------------------------------------------------------------ records

    def _header(self, place: Place) -> RecordHeader | None:
        if not 0 <= place.volume < len(self._files):
            return None
        return RecordHeader.read(self._files[place.volume].read(place.offset, RecordHeader.SIZE), self._uuid)

    def _payload(self, entry: CatalogEntry, offset: int, length: int) -> bytes:
        data = self._files[entry.volume].read(entry.offset + RecordHeader.SIZE + offset, length)
        if len(data) != length:
            raise CorruptObject(entry.name or "catalog", "the image file ends before it does")
        return data

    def _payload_checksum(self, entry: CatalogEntry) -> bytes:
        pieces = range(0, entry.length, _READ_SIZE)
        return checksum(*(self._payload(entry, at, min(_READ_SIZE, entry.length - at)) for at in pieces))

    def _append(self, kind: Kind, name: str, parts: Sequence[Bytes]) -> CatalogEntry:
        length = sum(map(len, parts))
        span = padded(RecordHeader.SIZE + length)
        if self._split and self._tail + span > self._split:
            if RECORDS_AT + span > self._split:
                raise UsageError(f"an object of {length} bytes does not fit into volumes of {self._split} bytes")
            self._files[-1].sync()
            self._add_volume()
        sequence = self._sequence + 1
        header = RecordHeader.make(kind, self._uuid, sequence, length, checksum(*parts), name)
        padding = bytes(span - RecordHeader.SIZE - length)
        offset = self._tail
        try:
            self._files[-1].write(offset, [header.pack(), *parts, padding])
        except WriteError:
            with contextlib.suppress(WriteError):  # a full disk gets the torn record's space back
                self._files[-1].truncate(offset)
            raise
        self._sequence = sequence
        self._tail = offset + span
        return CatalogEntry(name, len(self._files) - 1, offset, length, sequence)

    def _add_volume(self) -> None:
        number = len(self._files)
        path = volume_path(self.path, number)
        file = self._opener(path, writable=True, create=True)
        self._files.append(file)
        file.write(0, [VolumeHeader.make(self._uuid, number, self._split).pack().ljust(RECORDS_AT, b"\0")])
        file.sync()
        if number == 0:
            lock_for_writing(file.fileno(), str(self.path))
            self._unpublished = True
        else:
            file.publish(path)
        self._tail = RECORDS_AT

    def _write_catalog(self) -> None:
        """Write down what changed since the last catalog (or everything), durably, and anchor it."""
        changes = len(self._added) + len(self._removed)
        afresh = (
            not self._chain
            or len(self._chain) >= _MAX_CHAIN
            or self._chain_entries + changes > max(64, len(self._entries))
        )
        if afresh:
            catalog = Catalog(None, list(self._entries.values()), [])
        else:
            last = self._chain[-1]
            previous = (last.volume, last.offset, last.sequence)
            catalog = Catalog(previous, list(self._added.values()), list(self._removed))
        entry = self._append(Kind.CATALOG, "", [encode_catalog(catalog)])
        self._files[entry.volume].sync()
        self._write_anchor(entry)
        if afresh:
            self._chain, self._chain_entries = [entry], 0
        else:
            self._chain.append(entry)
            self._chain_entries += changes
        with self._lock:
            self._added = {}
            self._removed = {}

    def _write_anchor(self, catalog: CatalogEntry) -> None:
        """Needs no sync of its own: until it is durable the other anchor leads to the same records by scanning."""
        self._generation += 1
        anchor = Anchor.make(self._uuid, self._generation, catalog.sequence, catalog.place)
        block = anchor.pack().ljust(BLOCK, b"\0")
        self._files[0].write(ANCHORS_AT[self._generation % 2], [block])


def is_container(head: bytes) -> bool:
    """Whether a file that starts with ``head`` (at least 80 bytes) is meant to be a ferrotype image."""
    try:
        VolumeHeader.read(head.ljust(BLOCK, b"\0"))
    except InvalidImage as error:
        return error.field == "check"
    except FerrotypeError:
        return True
    return True
