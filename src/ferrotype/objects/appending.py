"""Appending to a container: records one behind the other, then a catalog that names them, then an anchor.

    | record | record | catalog | record | catalog | <- tail
                          ^------------------|  ^-- the newest anchor

A catalog adds to the one before it, until writing everything down afresh is cheaper.  What it names is durable before
it is written, and it is before an anchor leads to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from threading import Lock
from typing import Final

import xxhash

from ferrotype.errors import DeviceError, Locked, UsageError, WriteError
from ferrotype.objects import Bytes, Parts, Streamed, length_of
from ferrotype.objects.layout import (
    ANCHORS_AT,
    BLOCK,
    RECORDS_AT,
    Anchor,
    Catalog,
    CatalogEntry,
    Kind,
    RecordHeader,
    VolumeHeader,
    checksum,
    encode_catalog,
    padded,
)
from ferrotype.objects.lock import WriterLock
from ferrotype.objects.opening import MAX_CHAIN
from ferrotype.objects.readback import ReadBack, check_catalog
from ferrotype.objects.reading import Files, Records
from ferrotype.objects.volumes import Opener, volume_path
from ferrotype.units import MiB

_GROUP: Final = 2 * MiB  # bytes of streamed parts that are written at once


class Log:
    """What a container holds, and where its next record goes.  One thread appends; any may look into the tables."""

    def __init__(self, records: Records, opener: Opener) -> None:
        """An empty one, of volumes that ``opener`` makes."""
        self.records = records
        self.lock: WriterLock | None = None
        self.guard = Lock()  # of the tables; never held over a read or write of data
        self.entries: dict[str, CatalogEntry] = {}
        self.added: dict[str, CatalogEntry] = {}  # since the last catalog
        self.removed: dict[str, CatalogEntry] = {}
        self.moved = False  # a catalog must be written afresh: no anchor leads to one that names where all stands
        self.split = 0  # bytes a volume may grow to; 0: one file
        self.unpublished = False  # a new image has no name until it is complete
        self.sequence = 0
        self.generation = 0
        self.tail = RECORDS_AT  # where the next record goes in the last volume
        self.chain: list[CatalogEntry] = []  # catalog records the newest state needs, oldest first
        self.chain_entries = 0  # additions and removals in all of them but the first
        self.written = ReadBack()  # since the last catalog
        self._opener = opener

    @property
    def files(self) -> Files:
        return self.records.files

    @property
    def changed(self) -> bool:
        """Whether there is something that no catalog names."""
        return bool(self.added or self.removed or self.moved)

    def claim(self, *, now: bool = False) -> None:
        """Raises Locked where another machine may have become the writer."""
        if self.lock is not None:
            self.lock.check(now=now)

    @property
    def longest(self) -> int:
        """Bytes of the longest payload that a volume of a split container takes."""
        return (self.split - RECORDS_AT) // BLOCK * BLOCK - RecordHeader.SIZE

    def append(self, kind: Kind, name: str, parts: Parts) -> CatalogEntry:
        """One more record, in a further volume where the last one is full; not durable yet.

        Raises UsageError where it is larger than a volume, Locked, WriteError.
        """
        self.claim()
        length = length_of(parts)
        span = padded(RecordHeader.SIZE + length)
        if self.split and RECORDS_AT + span > self.split:
            raise UsageError(f"an object of {length} bytes does not fit into volumes of {self.split} bytes")
        self.make_room(span)
        sequence = self.sequence + 1
        padding = bytes(span - RecordHeader.SIZE - length)
        offset = self.tail
        at_end = offset >= self.files[-1].size()
        try:
            if isinstance(parts, Streamed):
                check, first = self._stream(offset + RecordHeader.SIZE, parts, padding)
                header = RecordHeader.make(kind, self.records.uuid, sequence, length, check, name).pack()
                self.files[-1].write(offset, [header])
                begin: list[Bytes] = [header, first]
            else:
                header = RecordHeader.make(kind, self.records.uuid, sequence, length, checksum(*parts), name).pack()
                begin = [header, *parts, padding]
                self.files[-1].write(offset, begin)
        except BaseException as error:
            if isinstance(error, WriteError) or isinstance(parts, Streamed):
                with contextlib.suppress(WriteError):  # a full disk gets the torn record's space back
                    if at_end:
                        self.files[-1].truncate(offset)
            raise
        self.sequence = sequence
        self.tail = offset + span
        entry = CatalogEntry(name, len(self.files) - 1, offset, length, sequence)
        if kind == Kind.OBJECT:
            self.written.note(entry, begin)
        return entry

    def make_room(self, span: int) -> None:
        """A further volume, where a record of ``span`` bytes does not fit into the last one."""
        if self.split and self.tail + span > self.split:
            self.files[-1].sync()
            self.add_volume()

    def _stream(self, offset: int, parts: Streamed, padding: bytes) -> tuple[bytes, bytes]:
        """Write a payload that is made meanwhile; its checksum, and what of it stands in the record's first block.

        Until its header is written, a scan sees nothing there.
        """
        digest, first, length = xxhash.xxh3_128(), b"", 0
        for group in _groups(parts):
            for part in group:
                digest.update(part)
                first += bytes(part[: max(0, BLOCK - RecordHeader.SIZE - len(first))])
            self.files[-1].write(offset + length, group)
            length += length_of(group)
        if length != parts.length:
            raise AssertionError(f"{length} bytes were made, and {parts.length} announced")
        self.files[-1].write(offset + length, [padding])
        return digest.digest(), (first + padding)[: BLOCK - RecordHeader.SIZE]

    def add_volume(self) -> None:
        """A further volume, which what comes next goes into.  Raises DeviceError where its file is there.

        Where it is the first, another process has made the image meanwhile: Locked.
        """
        number = len(self.files)
        path = volume_path(self.records.path, number)
        if path.exists():
            if number == 0:
                raise Locked(f"{path} exists already, if only since a moment ago; start again")
            raise DeviceError(f"{path} exists already and is no part of this image; move it away")
        file = self._opener(path, writable=True, create=True)
        header = VolumeHeader.make(self.records.uuid, number, self.split)
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
        self.unpublished = self.unpublished or number == 0
        self.files.append(file)
        self.tail = RECORDS_AT

    def write_catalog(self) -> None:
        """Write down what changed since the last catalog (or everything), durably, and anchor it.

        Raises WriteError where what it names, or itself, does not read back as it was written.
        """
        self.written.check(self.records, lambda entry: self.entries.get(entry.name) == entry)
        changes = len(self.added) + len(self.removed)
        afresh = (
            self.moved
            or not self.chain
            or len(self.chain) >= MAX_CHAIN
            or self.chain_entries + changes > max(64, len(self.entries))
        )
        if afresh:
            catalog = Catalog(None, list(self.entries.values()), [])
        else:
            last = self.chain[-1]
            previous = (last.volume, last.offset, last.sequence)
            catalog = Catalog(previous, list(self.added.values()), list(self.removed))
        payload = encode_catalog(catalog)
        entry = self.append(Kind.CATALOG, "", [payload])
        self.files[entry.volume].sync()
        check_catalog(self.records, entry, payload)
        self._write_anchor(entry)
        if afresh:
            self.chain, self.chain_entries = [entry], 0
        else:
            self.chain.append(entry)
            self.chain_entries += changes
        with self.guard:
            self.added = {}
            self.removed = {}

    def _write_anchor(self, catalog: CatalogEntry) -> None:
        """Needs no sync of its own: until it is durable the other anchor leads to the same records by scanning."""
        generation = self.generation + 1
        anchor = Anchor.make(self.records.uuid, generation, catalog.sequence, catalog.place)
        self.files[0].write(ANCHORS_AT[generation % 2], [anchor.pack().ljust(BLOCK, b"\0")])
        self.generation = generation  # where that failed the same anchor is tried again: the other one is whole

    def publish(self) -> None:
        """Give a new image its name, once what it holds is durable."""
        if self.unpublished:
            self.files[0].sync()
            self.files[0].publish(self.records.path)
            self.unpublished = False


def _groups(parts: Streamed) -> Iterator[list[Bytes]]:
    group: list[Bytes] = []
    for part in parts:
        group.append(part)
        if length_of(group) >= _GROUP:
            yield group
            group = []
    if group:
        yield group
