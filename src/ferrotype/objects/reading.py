"""Reading a container's records: where they stand in its volumes, whether they are whole, what they hold.

    | RecordHeader 128 | payload ...... | zeros to the next multiple of 4 KiB | RecordHeader ...

Nothing here trusts an offset or a length: both are held against the size of the volume before anything is read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import xxhash

from ferrotype.errors import CorruptObject, DeviceError
from ferrotype.objects.layout import BLOCK, RECORD_MAGIC, RECORDS_AT, CatalogEntry, Kind, Place, RecordHeader
from ferrotype.objects.volumes import VolumeFile, volume_path
from ferrotype.units import MiB

READ_SIZE: Final = MiB  # bytes a checksum is computed over at a time
Files = list[VolumeFile]

_WINDOW: Final = MiB  # bytes searched for a record at a time; whole blocks
_DOUBT: Final = 4  # times the size of an image that damaged payloads are read
_MAGIC: Final = int.from_bytes(RECORD_MAGIC, sys.byteorder)

_SMALL: Final = 8 * MiB  # larger payloads are not proven at an opening for reading: their own layer proves them


class VolumeMissing(DeviceError):
    """A record stands in a volume that is not there; unlike damage, that is put right by finding the file."""


@dataclass(slots=True)
class Records:
    """The open volumes of a container, read record by record."""

    path: Path
    uuid: bytes = b""
    files: Files = field(default_factory=list)

    def header(self, place: Place) -> RecordHeader | None:
        """None where no whole record header of this container stands."""
        if (
            not 0 <= place.volume < len(self.files)
            or not RECORDS_AT <= place.offset < self.files[place.volume].size()
        ):
            return None
        return RecordHeader.read(self.files[place.volume].read(place.offset, RecordHeader.SIZE), self.uuid)

    def sizes(self) -> list[int]:
        """Bytes of each volume now: for questions about many entries, since each asks the system."""
        return [file.size() for file in self.files]

    def inside(self, entry: CatalogEntry, sizes: Sequence[int]) -> bool:
        """Whether the volume, of ``sizes``, is long enough for the record.  Raises VolumeMissing."""
        if not 0 <= entry.volume < len(sizes):
            where = volume_path(self.path, entry.volume)
            raise VolumeMissing(f"volume {where} of the image is missing; put all volumes into one folder")
        end = entry.offset + RecordHeader.SIZE + entry.length
        return entry.offset >= RECORDS_AT and entry.length >= 0 and end <= sizes[entry.volume]

    def payload(self, entry: CatalogEntry, offset: int, length: int) -> bytes:
        if entry.volume >= len(self.files):  # of a state that another thread has gone on from
            raise CorruptObject(entry.name or "catalog", "its volume is not there any more")
        data = self.files[entry.volume].read(entry.offset + RecordHeader.SIZE + offset, length)
        if len(data) != length:
            raise CorruptObject(entry.name or "catalog", "the image file ends before it does")
        return data

    def payload_checksum(self, entry: CatalogEntry) -> bytes:
        """XXH3-128 of the stored payload, with no more than a few MiB of it in memory."""
        digest = xxhash.xxh3_128()
        for at in range(0, entry.length, READ_SIZE):
            digest.update(self.payload(entry, at, min(READ_SIZE, entry.length - at)))
        return digest.digest()

    def padding_is_zero(self, entry: CatalogEntry) -> bool:
        """Whether the bytes between the payload and the next block are the zeros they were written as."""
        used = RecordHeader.SIZE + entry.length
        padding = self.files[entry.volume].read(entry.offset + used, entry.span - used)
        return padding.count(0) == len(padding) == entry.span - used

    def is_at(self, entry: CatalogEntry) -> bool:
        """Whether the record header at the entry's place is that of the entry."""
        header = self.header(entry.place)
        return header is not None and (header.text, header.length, header.sequence) == (
            entry.name,
            entry.length,
            entry.sequence,
        )

    def scan(self, start: Place, *, prove: bool) -> Iterator[tuple[CatalogEntry, RecordHeader]]:
        """Whole records from ``start`` to the end of the last volume; what is damaged is stepped over.

        With ``prove`` every payload is read and compared with its checksum, otherwise only the small ones are.
        Damaged payloads are read up to a few times the bytes there are: more are in an image that was made for harm.
        """
        doubt = _DOUBT * sum(file.size() for file in self.files) + MiB
        for volume in range(start.volume, len(self.files)):
            offset = start.offset if volume == start.volume else RECORDS_AT
            size = self.files[volume].size()
            while offset < size:
                header = self.header(Place(volume, offset))
                if header is None:
                    offset = next_magic(self.files[volume], offset + BLOCK, size) or size
                    continue
                entry = CatalogEntry(header.text, volume, offset, header.length, header.sequence)
                if self.inside(entry, self.sizes()) and (doubt > 0 or header.kind == Kind.FILLER):
                    if self._proven(entry, header, prove):
                        yield entry, header
                        offset += entry.span
                        continue
                    doubt -= entry.length
                if self.header(Place(volume, offset + entry.span)):  # only this one is damaged, or was deleted
                    offset += entry.span
                else:
                    offset += BLOCK

    def _proven(self, entry: CatalogEntry, header: RecordHeader, prove: bool) -> bool:
        if header.kind == Kind.FILLER or (not prove and header.length > _SMALL):
            return True
        return self.payload_checksum(entry) == header.payload_check


def next_magic(file: VolumeFile, start: int, end: int) -> int | None:
    """Where the next block that begins like a record does stands in [start, end); holes are stepped over."""
    at = start
    while at < end:
        at = max(at, file.data_from(at) // BLOCK * BLOCK)
        data = file.read(at, min(_WINDOW, max(end - at, 0)))
        heads = memoryview(data)[: len(data) // 8 * 8].cast("Q")[:: BLOCK // 8].tolist()
        if _MAGIC in heads:
            return at + heads.index(_MAGIC) * BLOCK
        at += _WINDOW
    return None
