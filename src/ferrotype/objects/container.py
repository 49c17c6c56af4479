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
    encode_catalog,
    padded,
)
from ferrotype.objects.lock import lock_for_writing
from ferrotype.objects.opening import MAX_CHAIN, load
from ferrotype.objects.reading import READ_SIZE, Files, Records
from ferrotype.objects.volumes import Opener, PosixFile, VolumeFile, remove_volume, volume_path
from ferrotype.units import MiB

_LEAST_SPLIT: Final = 64 * MiB  # a pack and its neighbours must fit into a volume


class Container:
    """An ObjectStore in one file, or several where it is split."""

    def __init__(self, path: Path, opener: Opener, *, writable: bool) -> None:
        """Use ``create`` or ``open``."""
        self.path = path
        self.traits = ObjectTraits()
        self.writable = writable
        self.warnings: list[str] = []
        self._opener = opener
        self._records = Records(path)
        self._entries: dict[str, CatalogEntry] = {}
        self._lock = Lock()  # guards the tables; never held over a read or write of data
        self.split = 0  # bytes a volume may grow to; 0: one file
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
        if split and split < _LEAST_SPLIT:
            raise UsageError("volumes of less than 64MiB make no sense; choose a larger split size")
        self = cls(path, opener, writable=True)
        if path.exists():
            raise DeviceError(f"{path} exists already")
        self._records.uuid = os.urandom(16)
        self.split = split
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
        header = self._volume_header(first)
        if header.volume:
            raise UsageError(f"{self.path} is volume {header.volume} of a split image; name the first one")
        self._records.uuid, self.split = header.uuid, header.split
        while self.split and volume_path(self.path, len(self._files)).exists():
            number = len(self._files)
            file = self._opener(volume_path(self.path, number), writable=self.writable)
            self._files.append(file)
            other = self._volume_header(file)
            if other.uuid != header.uuid or other.volume != number:
                raise InvalidImage(f"{volume_path(self.path, number)} belongs to another image")

    def _volume_header(self, file: VolumeFile) -> VolumeHeader:
        block = file.read(0, BLOCK)
        header = VolumeHeader.read(block)
        if any(block[VolumeHeader.SIZE :]):
            self.warnings.append(f"{self.path}: the bytes behind a volume header are damaged; they hold nothing")
        return header

    def _load(self) -> None:
        """Bring the tables to the newest state that can be proven; a writer settles what it took up at once."""
        state = load(self._records, writable=self.writable, warn=self.warnings.append)
        self._entries, self._added = state.entries, state.added
        self._chain, self._chain_entries = state.chain, state.chain_entries
        self._sequence, self._generation = state.sequence, state.generation
        self._tail = state.tail.offset
        if not self.writable:
            return
        torn = self._files[-1].size() > self._tail
        if torn:
            self._files[-1].truncate(self._tail)
        if torn or self._added:
            with contextlib.suppress(WriteError):  # on a full disk the next flush says so
                self._files[-1].sync()
                self._write_catalog()

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
        return self._records.payload(entry, offset, length)

    def size(self, name: str, /) -> int:
        return self._entry(name).length

    def list(self, prefix: str, /) -> Iterator[ObjectInfo]:
        with self._lock:
            names = sorted(name for name in self._entries if name.startswith(prefix))
            found = [ObjectInfo(name, self._entries[name].length) for name in names]
        return iter(found)

    def delete(self, name: str, /) -> None:
        entry = self._entry(name)
        with self._lock:
            del self._entries[name]
            self._added.pop(name, None)
            self._removed[name] = entry  # also where no catalog knows it: a scan would find it

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
        header = self._records.header(entry.place)
        if header is None or not self._records.is_at(entry):
            raise CorruptObject(name, "its record header is wrong")
        if self._records.payload_checksum(entry) != header.payload_check:
            raise CorruptObject(name, "its checksum is wrong")
        if not self._records.padding_is_zero(entry):
            raise CorruptObject(name, "the bytes behind it are not zeros; its own are whole")

    def refresh(self) -> bool:
        return False

    def reclaim(self) -> SpaceReport:
        """Punch a hole into each gap, behind a filler's header that tells a scan where the next record stands."""
        self.flush()
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
        self.settle()  # nothing durable may still lead to the gaps that are filled now
        try:
            compact(self, advance)
        except BaseException:
            with contextlib.suppress(FerrotypeError):
                self.settle()  # what has been moved so far counts
            raise
        return before - self.file_size

    def live(self) -> Sequence[CatalogEntry]:
        return tuple(self._entries.values())

    def catalogs(self) -> Sequence[CatalogEntry]:
        return tuple(self._chain)

    def volume_sizes(self) -> Sequence[int]:
        return tuple(file.size() for file in self._files)

    def move(self, entry: CatalogEntry, place: Place, gap: int, /) -> None:
        """Copy a record to the start of a gap of ``gap`` bytes; it counts there once ``settle`` has returned."""
        source, target = self._files[entry.volume], self._files[place.volume]
        for at in range(0, entry.span, READ_SIZE):
            target.write(place.offset + at, [source.read(entry.offset + at, min(READ_SIZE, entry.span - at))])
        if rest := gap - entry.span:
            self._fill(Place(place.volume, place.offset + entry.span), rest)
        self._entries[entry.name] = CatalogEntry(entry.name, place.volume, place.offset, entry.length, entry.sequence)

    def _fill(self, place: Place, gap: int) -> None:
        filler = RecordHeader.make(Kind.FILLER, self._records.uuid, 0, gap - RecordHeader.SIZE, bytes(16), "")
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
        if len(self._chain) != 1:
            self.settle()
        used = self._chain[0]
        last = max(self._entries.values(), key=lambda e: e.place, default=None)
        volume, end = (last.volume, last.offset + last.span) if last else (0, RECORDS_AT)
        span = padded(RecordHeader.SIZE + len(encode_catalog(Catalog(None, list(self._entries.values()), []))))
        room = used.offset if volume == used.volume else self.split
        if end + span > room:  # it would not get clear of the catalog in use
            return
        dropped = self._bring_down(volume, end, used)
        self._files[-1].truncate(self._tail)
        self._files[-1].sync()
        for number, file in reversed(list(enumerate(dropped, volume + 1))):
            file.close()
            remove_volume(self.path, number)

    def _bring_down(self, volume: int, end: int, used: CatalogEntry) -> Files:
        """Write the catalog to ``end`` of a volume, durably; the volumes that are not needed any more."""
        files, tail = self._files, self._tail
        self._records.files, self._tail = files[: volume + 1], end
        try:
            self.settle()
        except BaseException:
            self._records.files, self._tail, self._chain = files, tail, [used]
            raise
        return files[volume + 1 :]

    # ------------------------------------------------------------------ facts

    @property
    def _files(self) -> Files:
        return self._records.files

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

    # ------------------------------------------------------------------ writing

    def _append(self, kind: Kind, name: str, parts: Sequence[Bytes]) -> CatalogEntry:
        length = sum(map(len, parts))
        span = padded(RecordHeader.SIZE + length)
        if self.split and self._tail + span > self.split:
            if RECORDS_AT + span > self.split:
                raise UsageError(f"an object of {length} bytes does not fit into volumes of {self.split} bytes")
            self._files[-1].sync()
            self._add_volume()
        sequence = self._sequence + 1
        header = RecordHeader.make(kind, self._records.uuid, sequence, length, checksum(*parts), name)
        padding = bytes(span - RecordHeader.SIZE - length)
        offset = self._tail
        at_end = offset >= self._files[-1].size()
        try:
            self._files[-1].write(offset, [header.pack(), *parts, padding])
        except WriteError:
            with contextlib.suppress(WriteError):  # a full disk gets the torn record's space back
                if at_end:
                    self._files[-1].truncate(offset)
            raise
        self._sequence = sequence
        self._tail = offset + span
        return CatalogEntry(name, len(self._files) - 1, offset, length, sequence)

    def _add_volume(self) -> None:
        number = len(self._files)
        path = volume_path(self.path, number)
        if path.exists():
            raise DeviceError(f"{path} exists already and is no part of this image; move it away")
        file = self._opener(path, writable=True, create=True)
        self._files.append(file)
        file.write(0, [VolumeHeader.make(self._records.uuid, number, self.split).pack().ljust(RECORDS_AT, b"\0")])
        file.sync()
        if number == 0:
            self._unpublished = True
        else:
            file.publish(path)
        self._tail = RECORDS_AT

    def _write_catalog(self) -> None:
        """Write down what changed since the last catalog (or everything), durably, and anchor it."""
        changes = len(self._added) + len(self._removed)
        afresh = (
            not self._chain
            or len(self._chain) >= MAX_CHAIN
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
        anchor = Anchor.make(self._records.uuid, self._generation, catalog.sequence, catalog.place)
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
