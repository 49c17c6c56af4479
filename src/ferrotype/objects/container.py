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
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Final

from ferrotype.errors import (
    CorruptObject,
    FerrotypeError,
    InvalidImage,
    Locked,
    ObjectExists,
    ObjectMissing,
    UsageError,
    WriteError,
)
from ferrotype.objects import ObjectInfo, ObjectTraits, Parts, SpaceReport
from ferrotype.objects.appending import Log
from ferrotype.objects.compaction import compact
from ferrotype.objects.heads import open_volumes
from ferrotype.objects.layout import (
    BLOCK,
    RECORDS_AT,
    CatalogEntry,
    Kind,
    VolumeHeader,
)
from ferrotype.objects.lock import WriterLock
from ferrotype.objects.machine import THIS_MACHINE, Machine
from ferrotype.objects.moving import Moves
from ferrotype.objects.opening import MAX_ENTRIES, anchor_blocks, load
from ferrotype.objects.readers import READERS_TRIES, join_readers, no_readers
from ferrotype.objects.reading import Files, Records
from ferrotype.objects.volumes import Opener, PatientOpener, PosixFile, VolumeFile, patience_of
from ferrotype.stall import Patience
from ferrotype.units import MiB

_LEAST_SPLIT: Final = 64 * MiB  # a pack and its neighbours must fit into a volume
_LOADS: Final = 10  # newer states that an opening for reading goes on to while it looks at one


class Container:
    """An ObjectStore in one file, or several where it is split."""

    def __init__(self, path: Path, opener: Opener, machine: Machine, *, writable: bool) -> None:
        """Use ``create`` or ``open``."""
        self.path = path
        self.writable = writable
        self.warnings: list[str] = []
        self._opener = PatientOpener(Patience()) if opener is PosixFile else opener
        self._machine = machine
        self._patience = patience_of(self._opener)
        self._reading = False  # holds the readers' lock
        self._refreshing = Lock()
        self._anchors: tuple[bytes, ...] = ()  # as they stood when the state in use was loaded for reading
        self._former: list[VolumeFile] = []  # volumes of older states, which a thread may still be reading
        self._log = Log(Records(path), self._opener)
        self._moves = Moves(self._log)

    # ------------------------------------------------------------------ opening

    @classmethod
    def create(
        cls, path: Path, *, split: int = 0, opener: Opener = PosixFile, machine: Machine = THIS_MACHINE
    ) -> Container:
        """A new, empty container open for writing.  The file takes its name at the first ``flush``, not before.

        Raises Locked where the file exists already, or another process is creating it.
        """
        if split and split < _LEAST_SPLIT:
            raise UsageError("volumes of less than 64MiB make no sense; choose a larger split size")
        self = cls(path, opener, machine, writable=True)
        self._log.records.uuid = os.urandom(16)
        self._log.split = split
        try:
            self._log.lock = WriterLock.take_ahead(path, machine, self._patience)
            self._log.add_volume()
            if self._log.lock is None:
                self._log.lock = WriterLock.take(self._files[0].fileno(), path, machine, self._patience)
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
                self._log.lock = WriterLock.take(self._files[0].fileno(), path, machine, self._patience)
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
            self._log.records, self._log.entries = records, state.entries
            self._log.chain, self._log.sequence, self._log.split = state.chain, state.sequence, split
            if not left or not warnings or seen == anchor_blocks(records):
                break
        self._anchors = seen
        self.warnings += [warning for warning in warnings if warning not in self.warnings]

    def _load(self) -> None:
        """Bring the tables to the newest state that can be proven; what was taken up is settled at once."""
        log = self._log
        log.split = open_volumes(log.records, self._opener, writable=True, warn=self.warnings.append)
        state = load(log.records, writable=True, warn=self.warnings.append)
        if state.unanchored:  # a writer was cut: nothing is taken up that stands in the machine's memory alone
            for file in self._files:
                with contextlib.suppress(WriteError):
                    file.sync()
                file.distrust()
            state = load(log.records, writable=True, warn=lambda _: None)
        log.entries, log.added = state.entries, state.added
        log.chain, log.chain_entries = state.chain, state.chain_entries
        log.sequence, log.generation = state.sequence, state.generation
        log.tail = state.tail.offset
        torn = self._files[-1].size() != log.tail
        if torn:
            self._files[-1].truncate(log.tail)
        log.moved = state.unanchored
        if torn or log.added or log.moved:
            with contextlib.suppress(WriteError):  # on a full disk the next flush says so
                self._moves.settle()

    # ------------------------------------------------------------------ ObjectStore

    @property
    def traits(self) -> ObjectTraits:
        return ObjectTraits(max_object=self._log.longest) if self._log.split else ObjectTraits()

    def put(self, name: str, parts: Parts, /) -> None:
        if name in self._log.entries:
            raise ObjectExists(name)
        if len(self._log.entries) >= MAX_ENTRIES:
            raise WriteError(f"{self.path} holds {MAX_ENTRIES} objects, which is all it can; go on in a new image")
        entry = self._log.append(Kind.OBJECT, name, parts)
        with self._log.guard:
            self._log.entries[name] = entry
            self._log.added[name] = entry
            self._log.removed.pop(name, None)

    def get(self, name: str, /, offset: int = 0, length: int | None = None) -> bytes:
        entry = self._entry(name)
        length = entry.length - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > entry.length:
            raise CorruptObject(name, f"it has {entry.length} bytes, {length} at {offset} were asked for")
        return self._log.records.payload(entry, offset, length)

    def size(self, name: str, /) -> int:
        return self._entry(name).length

    def list(self, prefix: str, /) -> Iterator[ObjectInfo]:
        with self._log.guard:
            names = sorted(name for name in self._log.entries if name.startswith(prefix))
            found = [ObjectInfo(name, self._log.entries[name].length) for name in names]
        return iter(found)

    def delete(self, name: str, /) -> None:
        entry = self._entry(name)
        with self._log.guard:
            del self._log.entries[name]
            self._log.added.pop(name, None)
            self._log.removed[name] = entry  # also where no catalog knows it: a scan would find it
        self._moves.drop(entry)

    def flush(self) -> None:
        if not self._log.changed:
            return
        self._log.claim(now=True)
        self._check_names()  # before what a file without a name would take with it is called durable
        if self._log.moved:
            self._moves.settle()
        else:
            self._files[-1].sync()  # earlier volumes were synced when they were left
            self._log.write_catalog()
        self._log.publish()
        self._check_names()

    def _check_names(self) -> None:
        """Raises WriteError where a volume was deleted, or another file put in its place."""
        for file in self._files:
            file.check_name()

    def check(self, name: str, /, *, from_medium: bool = False) -> None:
        entry = self._entry(name)
        if from_medium:
            file = self._files[entry.volume]
            file.sync()  # what is not written yet cannot be dropped
            file.distrust()
        header = self._log.records.header(entry.place)
        if header is None or not self._log.records.is_at(entry):
            raise CorruptObject(name, "its record header is wrong")
        if self._log.records.payload_checksum(entry) != header.payload_check:
            raise CorruptObject(name, "its checksum is wrong")
        if not self._log.records.padding_is_zero(entry):
            raise CorruptObject(name, "the bytes behind it are not zeros; its own are whole")

    def refresh(self) -> bool:
        if self.writable or not self._files:
            return False
        with self._refreshing, contextlib.suppress(FerrotypeError, OSError):  # the state in use stays, whatever it is
            os.close(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))  # a network file system looks at its server now
            if self._anchors != anchor_blocks(self._log.records):
                self._load_newest()
                return True
        return False

    def reclaim(self) -> SpaceReport:
        """Punch a hole into each gap, behind a filler's header that tells a scan where the next record stands.

        While others read the image nothing is touched: a later call makes up for it.
        """
        self._log.claim(now=True)
        self.flush()
        for file in self._files:
            file.sync()  # the anchor too: nothing durable may still lead to what is now destroyed
        with no_readers(self._files[0].fileno(), self._machine) as alone:
            return self._moves.punch() if alone else SpaceReport(0, 0, readers=True)

    def bring_forward(self, names: Collection[str], others: str) -> bool:
        if not self._moves.behind(names, others):
            return True
        self._log.claim(now=True)
        self.flush()
        with no_readers(self._files[0].fileno(), self._machine) as alone:  # gaps may be what an older state holds
            return alone and self._moves.bring_forward(names, others)

    def close(self) -> None:
        lock, self._log.lock = self._log.lock, None
        if lock is not None:
            lock.release()  # before the first volume is closed: the next writer makes a lock file anew
        for file in reversed([*self._files, *self._former]):
            file.close()  # a file that was never published goes with it
        self._files.clear()
        self._former.clear()

    def discard(self) -> None:
        """Close a new container that is not to be, and remove its files: those that it made, and no others."""
        for file in reversed(self._files):
            with contextlib.suppress(FerrotypeError):
                file.check_name()
                file.remove()
        self.close()

    # ------------------------------------------------------------------ compacting

    def compact(self, advance: Callable[[int], None]) -> int:
        """Move records into the gaps that deleted ones left and cut the file; bytes by which it became smaller.

        ``advance`` is told the bytes moved.  Needs at most 256 MiB of extra space, whatever the size of the image.
        Raises Locked, and changes nothing, while others read the image.
        """
        self._log.claim(now=True)
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
        self._moves.settle()  # nothing durable may still lead to the gaps that are filled now
        try:
            compact(self._moves, advance)
        except BaseException:
            with contextlib.suppress(FerrotypeError):
                self._moves.settle()  # what has been moved so far counts
            raise
        return before - self.file_size

    # ------------------------------------------------------------------ facts

    def live(self) -> Sequence[CatalogEntry]:
        """Where the records of objects stand."""
        return self._moves.live()

    def catalogs(self) -> Sequence[CatalogEntry]:
        """Where the catalogs stand that the newest state needs, oldest first."""
        return self._moves.catalogs()

    def volume_sizes(self) -> Sequence[int]:
        """Bytes of each volume, holes included."""
        return self._moves.volume_sizes()

    @property
    def state(self) -> tuple[str, int]:
        """The container's id, and the number of its newest catalog, which ascends with every change."""
        newest = self._log.chain[-1].sequence if self._log.chain else 0
        return self._log.records.uuid.hex(), newest

    @property
    def split(self) -> int:
        """Bytes that a volume may grow to; 0 where there is one file."""
        return self._log.split

    @property
    def _files(self) -> Files:
        return self._log.records.files

    @property
    def file_size(self) -> int:
        """Bytes of all volumes, holes included."""
        return sum(self.volume_sizes())

    @property
    def hole_size(self) -> int:
        """Bytes of all volumes that take up no storage."""
        return max(0, self.file_size - sum(file.allocated() for file in self._files))

    @property
    def live_size(self) -> int:
        """Bytes of the records that are needed."""
        return sum(e.span for e in (*self._log.entries.values(), *self._log.chain)) + RECORDS_AT * len(self._files)

    def _entry(self, name: str) -> CatalogEntry:
        try:
            return self._log.entries[name]
        except KeyError:
            raise ObjectMissing(name) from None


def is_container(head: bytes) -> bool:
    """Whether a file that starts with ``head`` (at least 80 bytes) is meant to be a ferrotype image."""
    try:
        VolumeHeader.read(head.ljust(BLOCK, b"\0"))
    except InvalidImage as error:
        return error.field == "check"
    except FerrotypeError:
        return True
    return True
