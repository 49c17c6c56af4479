"""$MFT of NTFS: the way from the boot sector to any attribute of any file.

    boot sector ──> record 0 of $MFT ──> runs of $MFT ──> record n ──> attribute: value, or runs
               └──> its copy in $MFTMirr (records 0 to 3)        │
                                                                 └──> $ATTRIBUTE_LIST ──> record m: further runs

Whatever is damaged on that way is InvalidImage, unless the mirror still has it: then ``MasterFileTable.damaged`` says
so.  Work is bounded by budgets, since every length and reference comes from the disk.

R. Russon, Y. Fledel, "NTFS Documentation" (Linux-NTFS project: Files, $Boot, $MFT, $MFTMirr; Attributes,
$ATTRIBUTE_LIST).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ferrotype.block import Source, read_exactly
from ferrotype.errors import DeviceError, InvalidImage, UnsupportedError
from ferrotype.filesystems.ntfs_records import (
    ATTRIBUTE_LIST,
    DATA,
    SEGMENT,
    Attribute,
    AttributeListEntry,
    BootSector,
    FileRecord,
    mapping_pairs,
    utf16,
)
from ferrotype.units import KiB, MiB

_MIRRORED: Final = 4  # records that $MFTMirr holds at least
_MAX_VCN: Final = 1 << 62  # so that sums fit 64 bits
OEM_ID: Final = b"NTFS    "
_MAX_CLUSTER: Final = 2 * MiB  # bytes
_MAX_CLUSTERS: Final = 1 << 32  # what Windows can address; it bounds $Bitmap to 512 MiB
MAX_RECORD: Final = 64 * KiB  # bytes; offsets inside a record have 16 bits
_MAX_LIST: Final = 256 * KiB  # bytes of an attribute list, as Windows limits it
_RECORD_BUDGET: Final = 16 * MiB  # bytes of file records parsed for one question: a thousand times the usual
_RUN_BUDGET: Final = 1 << 20  # runs decoded for one question


@dataclass(frozen=True, slots=True)
class Geometry:
    """The boot sector in bytes and clusters, all of it inside the disk."""

    cluster_size: int
    clusters: int
    record_size: int
    mft_lcn: int
    mirror_lcn: int
    serial_number: int
    size: int  # bytes, the backup boot sector included
    index_size: int = 4096  # bytes of an index node

    @classmethod
    def of(cls, boot: BootSector, disk_size: int) -> Geometry:
        sector, per_cluster, per_record = (
            boot.bytes_per_sector,
            boot.sectors_per_cluster,
            boot.clusters_per_file_record_segment,
        )
        if boot.oem_id != OEM_ID:
            raise InvalidImage("the boot sector is not that of an NTFS volume", offset=3, field="oem_id")
        if not 256 <= sector <= 4096 or sector & (sector - 1):
            raise InvalidImage("impossible sector size", offset=11, field="bytes_per_sector")
        if per_cluster > 128:
            per_cluster = 1 << (256 - per_cluster)
        cluster = sector * per_cluster
        if not per_cluster or per_cluster & (per_cluster - 1) or cluster > _MAX_CLUSTER:
            raise InvalidImage("impossible cluster size", offset=13, field="sectors_per_cluster")
        record_size = per_record * cluster if per_record > 0 else 1 << -per_record
        if not 512 <= record_size <= MAX_RECORD or record_size & (record_size - 1):
            raise InvalidImage("impossible record size", offset=64, field="clusters_per_file_record_segment")
        clusters = boot.total_sectors * sector // cluster
        if not clusters or boot.total_sectors * sector > disk_size:
            raise InvalidImage(
                f"the volume has {boot.total_sectors} sectors, the disk only {disk_size} bytes",
                offset=40,
                field="total_sectors",
            )
        if clusters >= _MAX_CLUSTERS:
            raise UnsupportedError(
                f"{clusters} clusters are more than NTFS can have", offset=40, field="total_sectors"
            )
        if boot.mft_lcn >= clusters:
            raise InvalidImage("$MFT lies outside the volume", offset=48, field="mft_lcn")
        size = min((boot.total_sectors + 1) * sector, disk_size)
        per_index = boot.clusters_per_index_buffer
        index_size = per_index * cluster if per_index > 0 else 1 << min(-per_index, 20)
        if not 512 <= index_size <= MAX_RECORD or index_size & (index_size - 1):
            index_size = 4096  # no map needs it, so this is no reason to refuse the volume
        return cls(cluster, clusters, record_size, boot.mft_lcn, boot.mft2_lcn, boot.serial_number, size, index_size)


class Content:
    """The bytes of an attribute, resident or in clusters; a non-resident one grows by the pieces that describe it."""

    def __init__(self, source: Source, cluster_size: int, first: Attribute) -> None:
        self._source, self._cluster_size, self._value = source, cluster_size, first.value
        self.flags = first.flags
        self.vcns, self.lcns = [0], list[int]()  # run i holds the clusters vcns[i] .. vcns[i + 1] at lcns[i]
        form = first.form
        self.size = form.file_size if form else len(first.value or b"")
        self.valid = form.valid_data_length if form else self.size
        if not 0 <= self.valid <= self.size:
            raise InvalidImage("an attribute has impossible sizes", field="valid_data_length")

    def extend(self, piece: Attribute, clusters: int, limit: int, what: str) -> None:
        """Append the runs of the next piece, at most ``limit`` of them."""
        form = piece.form
        if form is None or form.lowest_vcn != self.vcns[-1] or form.highest_vcn >= _MAX_VCN:
            raise InvalidImage(f"{what}: the pieces of its run list do not join", field="lowest_vcn")
        for length, lcn in mapping_pairs(piece.pairs, clusters, what):
            limit -= 1
            if limit < 0:
                raise InvalidImage(f"{what}: it has more runs than can be believed")
            self.vcns.append(self.vcns[-1] + length)
            self.lcns.append(lcn)
        if self.vcns[-1] != form.highest_vcn + 1:
            raise InvalidImage(f"{what}: its run list does not have the length it states", field="highest_vcn")

    def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes at ``offset``, fewer only at the end.  What was never written reads as zeros."""
        end = max(offset, min(offset + length, self.size))
        if self._value is not None:
            return self._value[offset:end]
        out = memoryview(bytearray(end - offset))
        at, stop = offset, min(end, self.valid)
        run = bisect_right(self.vcns, at // self._cluster_size) - 1
        while at < stop:
            if run >= len(self.lcns):
                raise InvalidImage("a run list ends before its data does")
            first = self.vcns[run] * self._cluster_size
            take = min(stop, self.vcns[run + 1] * self._cluster_size) - at
            if self.lcns[run] >= 0:
                where = self.lcns[run] * self._cluster_size + at - first
                self._source.read_into(where, out[at - offset : at - offset + take])
            at += take
            run += 1
        return bytes(out)


class MasterFileTable:
    """$MFT: file records by number, and the contents of their attributes by type and name."""

    def __init__(self, source: Source, geometry: Geometry) -> None:
        self._source, self._geometry = source, geometry
        self.renew()
        self.damaged: str | None = None  # why the mirror had to be asked
        base = self._first_record()
        # Records that describe later parts of $MFT lie in earlier ones: it is usable while it grows.
        first = base.find(DATA, "")
        if first is None or first.form is None:
            raise InvalidImage("record 0 of $MFT does not say where $MFT lies")
        self.data = Content(source, geometry.cluster_size, first)
        self._extend(self.data, first, base)
        pieces = self._pieces(base, DATA, "")
        if next(pieces, None) is not first:
            raise InvalidImage("the attribute list of record 0 does not begin with what record 0 holds")
        try:
            for piece in pieces:
                self._extend(self.data, piece, base)
        except DeviceError as error:  # what was found up to there can still be used, and the volume is not trusted
            self.damaged = str(error)
        if self.data.lcns[:1] != [geometry.mft_lcn] and self.damaged is None:
            raise InvalidImage("boot sector and $MFT disagree on where $MFT begins", offset=48, field="mft_lcn")

    def renew(self) -> None:
        """Start the budgets of work anew, for a piece of work that may be asked for many times."""
        self._record_budget, self._run_budget = _RECORD_BUDGET, _RUN_BUDGET

    def record(self, number: int) -> FileRecord:
        """A file record in use; one of the first four comes from the mirror where $MFT's own is damaged."""
        size = self._geometry.record_size
        try:
            raw = self.data.read(number * size, size)
            if len(raw) < size:
                raise InvalidImage(f"$MFT ends before record {number}")
            return self._parse(raw, number)
        except (InvalidImage, DeviceError) as error:
            if number >= _MIRRORED:
                raise
            found = self._parse(self._at(self._geometry.mirror_lcn, number), number)
            self.damaged = str(error)
            return found

    def content(self, record: FileRecord, type_code: int, name: str = "") -> Content | None:
        """The content of an attribute, however many extension records describe it; None where there is none."""
        pieces = self._pieces(record, type_code, name)
        first = next(pieces, None)
        if first is None:
            return None
        found = Content(self._source, self._geometry.cluster_size, first)
        if first.form is not None:
            self._extend(found, first, record)
        for piece in pieces:
            self._extend(found, piece, record)
        return found

    def _first_record(self) -> FileRecord:
        """Record 0, from where the boot sector says or else from the mirror; both readable must say the same."""
        found: list[FileRecord] = []
        for lcn in (self._geometry.mft_lcn, self._geometry.mirror_lcn):
            try:
                found.append(self._parse(self._at(lcn, 0), 0))
            except (InvalidImage, DeviceError) as error:
                self.damaged = self.damaged or str(error)
        if not found:
            raise InvalidImage(f"neither $MFT nor its mirror can be read: {self.damaged}")
        told = [[(a.type_code, a.value, a.pairs) for a in f.attributes if _locates(a)] for f in found]
        if told[0] != told[-1]:
            raise InvalidImage("$MFT and its mirror disagree on where $MFT lies")
        return found[0]

    def _at(self, lcn: int, number: int) -> bytes:
        start = lcn * self._geometry.cluster_size + number * self._geometry.record_size
        return read_exactly(self._source, start, self._geometry.record_size, f"record {number} of $MFT")

    def _parse(self, raw: bytes, number: int) -> FileRecord:
        self._record_budget -= len(raw)
        if self._record_budget < 0:
            raise InvalidImage("the volume needs more file records than can be believed")
        return FileRecord.parse(raw, number)

    def _extend(self, content: Content, piece: Attribute, record: FileRecord) -> None:
        had = len(content.lcns)
        content.extend(piece, self._geometry.clusters, self._run_budget, f"record {record.number} of $MFT")
        self._run_budget -= len(content.lcns) - had

    def _pieces(self, base: FileRecord, type_code: int, name: str) -> Iterator[Attribute]:
        """The attributes that make up one, in ascending order: one, or one in each record the list names."""
        listing = base.find(ATTRIBUTE_LIST, "")
        if listing is None:
            yield from (a for a in base.attributes if a.type_code == type_code and a.name == name)
            return
        for entry in self._listed(base, listing, type_code, name):
            number = entry.segment_reference & SEGMENT
            record = base if number == base.number else self.record(number)
            if record is not base and record.header.base_file_record_segment & SEGMENT != base.number:
                raise InvalidImage(f"record {number} of $MFT does not extend record {base.number}")
            same = (a for a in record.attributes if (a.type_code, a.instance) == (type_code, entry.instance))
            piece = next(same, None)
            if piece is None or piece.name != name:
                raise InvalidImage(f"record {number} of $MFT lacks what record {base.number} looks for in it")
            yield piece

    def _listed(
        self, base: FileRecord, listing: Attribute, type_code: int, name: str
    ) -> Iterator[AttributeListEntry]:
        content = Content(self._source, self._geometry.cluster_size, listing)
        if listing.form is not None:
            self._extend(content, listing, base)
        if content.size > _MAX_LIST:
            raise InvalidImage(f"the attribute list of record {base.number} has {content.size} bytes")
        data = content.read(0, content.size)
        at = 0
        while at + AttributeListEntry.SIZE <= len(data):
            entry = AttributeListEntry.unpack(data, at)
            if entry.record_length < AttributeListEntry.SIZE or entry.record_length % 8:
                raise InvalidImage(f"the attribute list of record {base.number} is damaged", field="record_length")
            start = at + entry.name_offset
            if entry.type_code == type_code and utf16(data[start : start + 2 * entry.name_length]) == name:
                yield entry
            at += entry.record_length


def _locates(attribute: Attribute) -> bool:
    return attribute.type_code == ATTRIBUTE_LIST or (attribute.type_code == DATA and not attribute.name)
