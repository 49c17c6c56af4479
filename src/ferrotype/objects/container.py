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
    Locked,
    ObjectExists,
    ObjectMissing,
    UsageError,
    WriteError,
)
from ferrotype.objects import Bytes, ObjectInfo, ObjectTraits, SpaceReport
from ferrotype.objects.compaction import compact, gaps_between
from ferrotype.objects.heads import open_volumes
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
from ferrotype.objects.lock import WriterLock
from ferrotype.objects.machine import THIS_MACHINE, Machine
from ferrotype.objects.opening import MAX_CHAIN, MAX_ENTRIES, anchor_blocks, load
from ferrotype.objects.readback import ReadBack, check_catalog
from ferrotype.objects.readers import READERS_TRIES, join_readers, no_readers
from ferrotype.objects.reading import READ_SIZE, Files, Records
from ferrotype.objects.volumes import Opener, PatientOpener, PosixFile, VolumeFile, patience_of, volume_path
from ferrotype.stall import Patience
from ferrotype.units import KiB, MiB

_SMALL_GAP: Final = 64 * KiB  # bytes of dead space that are overwritten where no hole can be punched
_LEAST_SPLIT: Final = 64 * MiB  # a pack and its neighbours must fit into a volume
_LOADS: Final = 10  # newer states that an opening for reading goes on to while it looks at one


class Container:
    """An ObjectStore in one file, or several where it is split."""

    def __init__(self, path: Path, opener: Opener, machine: Machine, *, writable: bool) -> None:
        """Use ``create`` or ``open``."""
        self.path = path
        self.traits = ObjectTraits()
        self.writable = writable
        self.warnings: list[str] = []
        self._opener = PatientOpener(Patience()) if opener is PosixFile else opener
        self._machine = machine
        self._patience = patience_of(self._opener)
        self._writing: WriterLock | None = None
        self._reading = False  # holds the readers' lock
        self._refreshing = Lock()
        self._anchors: tuple[bytes, ...] = ()  # as they stood when the state in use was loaded for reading
        self._former: list[VolumeFile] = []  # volumes of older states, which a thread may still be reading
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
        self._vacated: list[tuple[Place, int]] = []  # where records stood that were moved since the last catalog
        self._moved = False  # a catalog must be written afresh: no anchor leads to one that names where all stands
        self._written = ReadBack()  # since the last catalog

    # ------------------------------------------------------------------ opening

    @classmethod
    def create(
        cls, path: Path, *, split: int = 0, opener: Opener = PosixFile, machine: Machine = THIS_MACHINE
    ) -> Container:
        """A new, empty container open for writing.  The file takes its name at the first ``flush``, not before.

        Raises DeviceError where the file exists already, Locked where another process is creating it.
        """
        if split and split < _LEAST_SPLIT:
            raise UsageError("volumes of less than 64MiB make no sense; choose a larger split size")
        self = cls(path, opener, machine, writable=True)
        if path.exists():
            raise DeviceError(f"{path} exists already")
        self._records.uuid = os.urandom(16)
        self.split = split
        try:
            self._writing = WriterLock.take_ahead(path, machine, self._patience)
            self._add_volume()
            if self._writing is None:
                self._writing = WriterLock.take(self._files[0].fileno(), path, machine, self._patience)
        except BaseException:
            self.close()
            raise
        return self

    @classmethod
    def open(
        cls, path: Path, *, writable: bool = False, opener: Opener = PosixFile, machine: Machine = THIS_MACHINE
    ) -> Container:
        """An existing container.

        Raises InvalidImage or UnsupportedError for anything else, Locked where another process is writing and
        ``writable`` was asked for, DeviceError where a volume is missing or cannot be read.
        """
        self = cls(path, opener, machine, writable=writable)
        try:
            self._files.append(self._opener(path, writable=writable))
            if writable:
                self._writing = WriterLock.take(self._files[0].fileno(), path, machine, self._patience)
                self._load()
            else:
                self._load_newest()
        except BaseException:
            self.close()
            raise
        return self

    def _load_newest(self) -> None:
        """For reading: the newest state, be a writer at work meanwhile; loaded again where it became an older one."""
        if not self._reading:  # before anything is looked at: from then on nothing of it is destroyed
            tries = 1 if self._anchors else READERS_TRIES
            self._reading = join_readers(self._files[0].fileno(), self._machine, tries=tries)
        for left in reversed(range(_LOADS)):
            records, warnings = Records(self.path, files=self._files[:1]), list[str]()
            seen = anchor_blocks(records)
            try:
                split = open_volumes(records, self._opener, writable=False, warn=warnings.append, known=self._files)
                state = load(records, writable=False, warn=warnings.append)
            except FerrotypeError:
                self._former += [file for file in records.files if file not in self._files]
                if left and seen != anchor_blocks(records):
                    continue
                raise
            self._former += [file for file in self._files if file not in records.files]
            self._records, self._entries = records, state.entries
            self._chain, self._sequence, self.split = state.chain, state.sequence, split
            if not left or not warnings or seen == anchor_blocks(records):
                break
        self._anchors = seen
        self.warnings += [warning for warning in warnings if warning not in self.warnings]

    def _load(self) -> None:
        """Bring the tables to the newest state that can be proven; what was taken up is settled at once."""
        self.split = open_volumes(self._records, self._opener, writable=True, warn=self.warnings.append)
        state = load(self._records, writable=True, warn=self.warnings.append)
        if state.unanchored:  # a writer was cut: nothing is taken up that stands in the machine's memory alone
            for file in self._files:
                with contextlib.suppress(WriteError):
                    file.sync()
                file.distrust()
            state = load(self._records, writable=True, warn=lambda _: None)
        self._entries, self._added = state.entries, state.added
        self._chain, self._chain_entries = state.chain, state.chain_entries
        self._sequence, self._generation = state.sequence, state.generation
        self._tail = state.tail.offset
        torn = self._files[-1].size() != self._tail
        if torn:
            self._files[-1].truncate(self._tail)
        self._moved = state.unanchored
        if torn or self._added or self._moved:
            with contextlib.suppress(WriteError):  # on a full disk the next flush says so
                self.settle()

    # ------------------------------------------------------------------ ObjectStore

    def put(self, name: str, parts: Sequence[Bytes], /) -> None:
        if name in self._entries:
            raise ObjectExists(name)
        if len(self._entries) >= MAX_ENTRIES:
            raise WriteError(f"{self.path} holds {MAX_ENTRIES} objects, which is all it can; go on in a new image")
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
        if not (self._added or self._removed or self._moved):
            return
        self._claim(now=True)
        if self._moved:
            self.settle()
        else:
            self._files[-1].sync()  # earlier volumes were synced when they were left
            self._write_catalog()
        if self._unpublished:
            self._files[0].sync()
            self._files[0].publish(self.path)
            self._unpublished = False

    def check(self, name: str, /, *, from_medium: bool = False) -> None:
        entry = self._entry(name)
        if from_medium:
            file = self._files[entry.volume]
            file.sync()  # what is not written yet cannot be dropped
            file.distrust()
        header = self._records.header(entry.place)
        if header is None or not self._records.is_at(entry):
            raise CorruptObject(name, "its record header is wrong")
        if self._records.payload_checksum(entry) != header.payload_check:
            raise CorruptObject(name, "its checksum is wrong")
        if not self._records.padding_is_zero(entry):
            raise CorruptObject(name, "the bytes behind it are not zeros; its own are whole")

    def refresh(self) -> bool:
        if self.writable or not self._files:
            return False
        with self._refreshing, contextlib.suppress(FerrotypeError, OSError):  # the state in use stays, whatever it is
            os.close(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))  # a network file system looks at its server now
            if self._anchors != anchor_blocks(self._records):
                self._load_newest()
                return True
        return False

    def reclaim(self) -> SpaceReport:
        """Punch a hole into each gap, behind a filler's header that tells a scan where the next record stands.

        While others read the image nothing is touched: a later call makes up for it.
        """
        self._claim(now=True)
        self.flush()
        for file in self._files:
            file.sync()  # the anchor too: nothing durable may still lead to what is now destroyed
        with no_readers(self._files[0].fileno(), self._machine) as alone:
            return self._punch_gaps() if alone else SpaceReport(0, 0, readers=True)

    def _punch_gaps(self) -> SpaceReport:
        before = sum(file.allocated() for file in self._files)
        dead = 0
        for place, gap in gaps_between([*self.live(), *self._chain], self.volume_sizes()):
            self._fill(place, gap)
            if gap > BLOCK and not self._files[place.volume].punch(place.offset + BLOCK, gap - BLOCK):
                dead += gap
                if gap <= _SMALL_GAP:  # spare copies of a key slot that was removed, perhaps
                    self._files[place.volume].write(place.offset + BLOCK, [bytes(gap - BLOCK)])
        return SpaceReport(max(0, before - sum(file.allocated() for file in self._files)), dead)

    def close(self) -> None:
        if self._writing is not None:
            self._writing.release()  # before the first volume is closed: the next writer makes a lock file of its own
        for file in reversed([*self._files, *self._former]):
            file.close()  # a file that was never published goes with it
        self._files.clear()
        self._former.clear()

    # ------------------------------------------------------------------ compacting

    def compact(self, advance: Callable[[int], None]) -> int:
        """Move records into the gaps that deleted ones left and cut the file; bytes by which it became smaller.

        ``advance`` is told the bytes moved.  Needs at most 256 MiB of extra space, whatever the size of the image.
        Raises Locked, and changes nothing, while others read the image.
        """
        self._claim(now=True)
        with no_readers(self._files[0].fileno(), self._machine) as alone:
            if not alone:
                raise Locked(
                    f"{self.path} is being read, and compacting would move what is read; wait for the restores, "
                    f"mounts and checks of it to end, then start again"
                )
            return self._compact(advance)

    def _compact(self, advance: Callable[[int], None]) -> int:
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
        self._moved = True
        source, target = self._files[entry.volume], self._files[place.volume]
        moved = CatalogEntry(entry.name, place.volume, place.offset, entry.length, entry.sequence)
        for at in range(0, entry.span, READ_SIZE):
            piece = source.read(entry.offset + at, min(READ_SIZE, entry.span - at))
            target.write(place.offset + at, [piece])
            if at == 0:
                self._written.note(moved, [piece])
        if rest := gap - entry.span:
            self._fill(Place(place.volume, place.offset + entry.span), rest)
        self._entries[entry.name] = moved
        self._vacated.append((entry.place, entry.span))

    def _fill(self, place: Place, gap: int) -> None:
        filler = RecordHeader.make(Kind.FILLER, self._records.uuid, 0, gap - RecordHeader.SIZE, bytes(16), "")
        self._files[place.volume].write(place.offset, [filler.pack().ljust(BLOCK, b"\0")])  # a whole key slot goes

    def settle(self) -> None:
        """Make moves durable: the records first, then a catalog that names their new places."""
        self._moved = True
        for file in self._files:
            file.sync()
        self._write_catalog()
        self._files[0].sync()
        self._moved = False
        vacated, self._vacated = self._vacated, []
        for place, span in vacated:  # or each batch would need room of its own until the file is cut
            if span > BLOCK:
                self._fill(place, span)
                self._files[place.volume].punch(place.offset + BLOCK, span - BLOCK)

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
        try:
            self._files[-1].truncate(self._tail)
            self._files[-1].sync()
            while dropped:
                dropped[-1].remove()
                dropped.pop().close()
        except BaseException:
            if dropped:  # they are there, so what is put next goes behind them
                self._records.files = self._files + dropped
                self._tail = padded(dropped[-1].size())
            raise

    def _bring_down(self, volume: int, end: int, used: CatalogEntry) -> Files:
        """Write the catalog to ``end`` of a volume, durably; the volumes that are not needed any more."""
        files, tail = self._files, self._tail
        self._records.files, self._tail = files[: volume + 1], end
        try:
            self.settle()
        except BaseException:
            self._records.files, self._tail = files, tail
            self._chain, self._chain_entries = [used], 0  # an anchor may lead to either
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
    def hole_size(self) -> int:
        """Bytes of all volumes that take up no storage."""
        return max(0, self.file_size - sum(file.allocated() for file in self._files))

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

    def _claim(self, *, now: bool = False) -> None:
        """Raises Locked where another machine may have become the writer."""
        if self._writing is not None:
            self._writing.check(now=now)

    def _append(self, kind: Kind, name: str, parts: Sequence[Bytes]) -> CatalogEntry:
        self._claim()
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
        entry = CatalogEntry(name, len(self._files) - 1, offset, length, sequence)
        if kind == Kind.OBJECT:
            self._written.note(entry, [header.pack(), *parts, padding])
        return entry

    def _add_volume(self) -> None:
        number = len(self._files)
        path = volume_path(self.path, number)
        if path.exists():
            raise DeviceError(f"{path} exists already and is no part of this image; move it away")
        file = self._opener(path, writable=True, create=True)
        header = VolumeHeader.make(self._records.uuid, number, self.split)
        try:
            file.write(0, [header.pack().ljust(RECORDS_AT, b"\0")])
            file.sync()
            if number:
                file.publish(path)
        except BaseException:
            with contextlib.suppress(WriteError):
                if path.exists():  # it has its name, though not durably
                    file.remove()
            file.close()
            raise
        self._unpublished = self._unpublished or number == 0
        self._files.append(file)
        self._tail = RECORDS_AT

    def _write_catalog(self) -> None:
        """Write down what changed since the last catalog (or everything), durably, and anchor it.

        Raises WriteError where what it names, or itself, does not read back as it was written.
        """
        self._written.check(self._records, lambda entry: self._entries.get(entry.name) == entry)
        changes = len(self._added) + len(self._removed)
        afresh = (
            self._moved
            or not self._chain
            or len(self._chain) >= MAX_CHAIN
            or self._chain_entries + changes > max(64, len(self._entries))
        )
        if afresh:
            catalog = Catalog(None, list(self._entries.values()), [])
        else:
            last = self._chain[-1]
            previous = (last.volume, last.offset, last.sequence)
            catalog = Catalog(previous, list(self._added.values()), list(self._removed))
        payload = encode_catalog(catalog)
        entry = self._append(Kind.CATALOG, "", [payload])
        self._files[entry.volume].sync()
        check_catalog(self._records, entry, payload)
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
        generation = self._generation + 1
        anchor = Anchor.make(self._records.uuid, generation, catalog.sequence, catalog.place)
        self._files[0].write(ANCHORS_AT[generation % 2], [anchor.pack().ljust(BLOCK, b"\0")])
        self._generation = generation  # where that failed the same anchor is tried again: the other one is whole


def is_container(head: bytes) -> bool:
    """Whether a file that starts with ``head`` (at least 80 bytes) is meant to be a ferrotype image."""
    try:
        VolumeHeader.read(head.ljust(BLOCK, b"\0"))
    except InvalidImage as error:
        return error.field == "check"
    except FerrotypeError:
        return True
    return True
