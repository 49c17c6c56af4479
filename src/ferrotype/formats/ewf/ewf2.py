"""EWF version 2, Ex01: what EnCase 7 and later write.

    | file header | content, descriptor | content, descriptor | ... | content, descriptor |
                                      <──previous─┘         <──previous─┘        at the end of the file

A section's descriptor stands behind its content, and the sections are found from the last one back.  Chunks may be
patterns of eight bytes that take no space.  All numbers are little-endian.  The file header says how texts are
packed, the case data how chunks are; where that says nothing, those that are packed are so as the texts.

Source: "Expert Witness Compression Format version 2 specification" (libyal).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import md5
from threading import Lock
from typing import Annotated, Final, NamedTuple
from zlib import adler32

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read_exactly
from ferrotype.errors import FerrotypeError, FormatError, InvalidImage, UnsupportedError
from ferrotype.formats.ewf.chunks import Form, Place
from ferrotype.formats.ewf.counts import Said
from ferrotype.formats.ewf.metadata import NAMED, Case, Media, drive_type, header_values, text_of
from ferrotype.formats.ewf.records import check_media, sealed
from ferrotype.formats.ewf.segments import Segments
from ferrotype.formats.mapped import Kept
from ferrotype.formats.outside import attempt
from ferrotype.records import Record, b16, record, u8, u16, u32, u64
from ferrotype.units import MiB

__all__ = ["LOGICAL", "SIGNATURE", "Contents", "SectorTables", "gather"]

SIGNATURE: Final = b"EVF2\x0d\x0a\x81\x00"
LOGICAL: Final = b"LEF2\x0d\x0a\x81\x00"
_MOST_SECTIONS: Final = 1 << 18
_MOST_SEGMENTS: Final = 1 << 15
_LARGEST_METADATA: Final = 8 * MiB  # bytes
_LARGEST_TABLE: Final = 1 << 25  # entries, 512 MiB of them
_PAGE: Final = 1 << 18  # entries held together: 4 MiB
_KEPT: Final = 16 * MiB
_PIECE: Final = 4 * MiB
_MOST_DIFFERING: Final = 1000  # copies of texts that are not the same, and so are unpacked
_LONGEST: Final = 20  # digits of a number

_DEVICE, _CASE, _TABLE, _ERRORS, _SESSIONS, _MD5, _SHA1, _NEXT, _DONE = 1, 2, 4, 5, 6, 8, 9, 0xD, 0xF
_METADATA: Final = (_DEVICE, _CASE, _ERRORS, _SESSIONS, _MD5, _SHA1)
_METHODS: Final = ("none", "zlib", "bzip2")
_LOGICAL_SECTIONS: Final = (0x20, 0x21, 0x22, 0x23)
_HASHED, _ENCRYPTED = 1, 2  # data flags
_COMPRESSED, _CHECKED, _PATTERN = 1, 2, 4  # chunk data flags
_BZIP2: Final = 2  # compression method
_ENTRY: Final = np.dtype([("offset", "<u8"), ("size", "<u4"), ("flags", "<u4")])


@record(endian="<", size=32)
class FileHeader(Record):
    """File header."""

    signature: Annotated[bytes, "8s"]
    major: u8
    minor: u8
    compression: u16
    number: u32  # of the segment, from 1
    set_identifier: b16


@record(endian="<", size=64)
class Descriptor(Record):
    """Section descriptor."""

    kind: u32
    flags: u32
    previous: u64  # offset of the descriptor before; 0: there is none
    size: u64  # of the content
    descriptor_size: u32
    padding_size: u32
    integrity: b16  # MD5 of the content
    padding: Annotated[bytes, "12s"]
    checksum: u32


class _Section(NamedTuple):
    kind: int
    start: int
    size: int


class _Table(NamedTuple):
    """A sector table section: chunks from ``first`` on, whose entries stand at ``at``."""

    segment: int
    first: int
    at: int
    chunks: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What all segments say together."""

    media: Media
    compression: str
    packed: Form  # of chunks with the flag
    tables: list[_Table]
    case: Case
    said: list[Said]  # of how large the disk is; what the first segment says first
    missing: FerrotypeError | None = None  # why there are no further segments


def gather(file: Source, segments: Segments) -> Contents:
    """Walk through all segments up to one that is ``missing``.

    Raises InvalidImage where one is doubled or of another set, and where those before what is missing do not say
    what disk this is.
    """
    first = FileHeader.unpack(read_exactly(file, 0, 32, "the file header"))
    if first.number != 1:
        raise InvalidImage(f"this is segment {first.number} of its image; open the first one", offset=12)
    if first.major != 2:
        raise UnsupportedError(f"EWF version {first.major}.{first.minor} is not read", offset=8, field="version")
    if first.compression >= len(_METHODS):
        raise UnsupportedError(f"compression method {first.compression} is not read", offset=10, field="compression")
    walk = _Walk(first)
    source, budget = file, _MOST_SECTIONS
    for number in range(_MOST_SEGMENTS):
        name = segments.names[number]
        _check_header(
            first, FileHeader.unpack(read_exactly(source, 0, 32, f"the header of {name}")), number + 1, name
        )
        found = list(_sections(source, name, budget))[::-1]
        budget -= len(found)
        for section in found:
            walk.take(section, source, number, name)
        if found[-1].kind == _DONE:
            return walk.finished(name)
        if found[-1].kind != _NEXT:
            raise InvalidImage(f"{name} ends with neither a next nor a done section: it is cut short or damaged")
        following, missing = attempt(segments.append)
        if following is None:
            return walk.finished(name, missing)
        source = following
    raise UnsupportedError(f"the image has more than {_MOST_SEGMENTS} segments")


def _check_header(first: FileHeader, header: FileHeader, expected: int, name: str) -> None:
    if header.signature != SIGNATURE:
        raise InvalidImage(f"{name} is no segment of an Ex01 image", offset=0, field="signature")
    if header.set_identifier != first.set_identifier:
        raise InvalidImage(f"{name} belongs to another image", offset=16, field="segment file set identifier")
    if header.number != expected:
        raise InvalidImage(
            f"{name} says it is segment {header.number} where segment {expected} is needed: files are missing, "
            "doubled or renamed",
            offset=12,
            field="segment file number",
        )


def _sections(file: Source, name: str, budget: int) -> Iterator[_Section]:
    """The sections of a segment, the last one first.  Metadata is proven by its MD5 where it has one."""
    at = file.size - Descriptor.SIZE
    for _ in range(budget):
        data = read_exactly(file, at, Descriptor.SIZE, f"a section of {name}")
        found = Descriptor.unpack(data)
        if not sealed(data):
            raise InvalidImage(
                f"a section descriptor of {name} is damaged, or the file is cut short", offset=at, field="checksum"
            )
        if found.flags & _ENCRYPTED:
            raise UnsupportedError("the image is encrypted, in a way that was never published", offset=at + 4)
        start = at - found.size
        if start < FileHeader.SIZE or (found.previous and found.previous + Descriptor.SIZE > start):
            raise InvalidImage(f"a section of {name} overlaps another one", offset=at, field="data size")
        if found.kind in _METADATA and found.flags & _HASHED and found.size <= _LARGEST_METADATA:
            content = read_exactly(file, start, found.size, "a section")
            if md5(content, usedforsecurity=False).digest() != found.integrity:
                raise InvalidImage(f"a section of {name} is damaged", offset=start, field="data integrity hash")
        yield _Section(found.kind, start, found.size)
        if not found.previous:
            return
        at = found.previous
    raise UnsupportedError(f"the image has more than {_MOST_SECTIONS} sections")


class _Walk:
    """Collects what the sections say, in their order."""

    def __init__(self, first: FileHeader) -> None:
        self._header = first
        self._values: dict[str, str] = {}
        self._texts: dict[int, bytes] = {}  # by kind, the first of each
        self._differing = _MOST_DIFFERING
        self._said: list[Said] = []
        self._tables: list[_Table] = []
        self._chunks = 0
        self._case = Case()

    def take(self, section: _Section, file: Source, segment: int, name: str) -> None:
        if section.kind in _LOGICAL_SECTIONS:
            raise UnsupportedError("a logical evidence file holds files, no disk")
        if section.kind == _TABLE:
            self._table(section, file, segment, name)
        elif section.kind in _METADATA:
            if section.size > _LARGEST_METADATA:
                self._case.warnings.append(f"a section of {section.size} bytes in {name} was not read")
                return
            data = read_exactly(file, section.start, section.size, "a section")
            if section.kind in self._texts:
                self._repeated(data, section, name)
            elif section.kind in (_DEVICE, _CASE):
                self._texts[section.kind] = data
                self._text(data, section, name)
            elif section.kind in (_MD5, _SHA1):
                self._hash(data, section, name)
            else:
                self._entries(data, section, name)

    def finished(self, name: str, missing: FerrotypeError | None = None) -> Contents:
        values = self._values
        said = [Said("the device information", _number(values, "ts"), _number(values, "tb")), *self._said]
        try:
            media = Media(
                int(values.pop("ts", "")),
                int(values.pop("bp", "")),
                int(values.pop("sb", "")),
                drive_type(values.pop("dt", "")),
                values.pop("ph", "") == "1",  # an empty one is false
                {"1": "FastBloc", "2": "Tableau"}.get(values.pop("wb", ""), ""),
                "",
                int(values.pop("gr", "") or 0),
                self._header.set_identifier,
            )
        except ValueError:
            raise missing or InvalidImage(
                f"{name}: the device information lacks the size of the disk or of its chunks"
            ) from None
        if media.sectors < 0 or media.sector_size < 0 or media.chunk_sectors < 0:
            raise InvalidImage(f"{name}: the device information says there are fewer than no sectors")
        check_media(media)
        stated = values.pop("cp", "0")
        if stated not in ("0", "1", "2"):
            raise UnsupportedError(f"compression method {stated[:20]} is not read", field="cp")
        method = int(stated) or self._header.compression  # libewf never states one
        packed = Form.BZIP2 if method == _BZIP2 else Form.ZLIB
        self._case.values = {key: value for key, value in values.items() if key in NAMED}
        return Contents(media, _METHODS[method], packed, self._tables, self._case, said, missing)

    def _text(self, data: bytes, section: _Section, name: str) -> None:
        try:
            text = text_of(data, wide=True, packed=_METHODS[self._header.compression])
            for key, value in header_values(text, "main").items():
                self._values.setdefault(key, value)
        except FormatError as error:
            what = "device information" if section.kind == _DEVICE else "case data"
            raise InvalidImage(f"the {what} of {name} is damaged: {error}", offset=section.start) from None

    def _repeated(self, data: bytes, section: _Section, name: str) -> None:
        """Every segment repeats what the first one says of the disk and the case."""
        if data == self._texts[section.kind]:
            return
        self._differing -= 1
        if not self._differing:
            raise UnsupportedError(f"more than {_MOST_DIFFERING} segments say something else of the disk or the case")
        try:
            text = text_of(data, wide=True, packed=_METHODS[self._header.compression])
        except FormatError as error:
            self._case.warnings.append(f"the device information or case data of {name} is damaged: {error}")
            return
        found = header_values(text, "main")
        for key, what in (("bp", "bytes per sector"), ("sb", "sectors per chunk")):
            if found.get(key, self._values.get(key)) != self._values.get(key):
                raise InvalidImage(
                    f"{name} belongs to another image: it has {found[key][:20]} {what}",
                    offset=section.start,
                    field=what,
                )
        self._said.append(Said(f"the copy of it in {name}", _number(found, "ts"), _number(found, "tb")))

    def _table(self, section: _Section, file: Source, segment: int, name: str) -> None:
        header = read_exactly(file, section.start, 20, f"a sector table of {name}") if section.size >= 32 else b""
        if not header or not sealed(header):
            raise InvalidImage(f"a sector table of {name} is damaged", offset=section.start, field="checksum")
        first, count = int.from_bytes(header[:8], "little"), int.from_bytes(header[8:12], "little")
        if count > _LARGEST_TABLE:
            raise UnsupportedError(f"a sector table with {count} entries is not read", offset=section.start + 8)
        if 32 + count * _ENTRY.itemsize + 4 > section.size:
            raise InvalidImage(f"a sector table of {name} is longer than its section", offset=section.start + 8)
        if first != self._chunks:
            raise InvalidImage(
                f"a sector table of {name} begins with chunk {first} where chunk {self._chunks} is next",
                offset=section.start,
                field="first chunk number",
            )
        if count:
            self._tables.append(_Table(segment, first, section.start + 32, count))
        self._chunks += count

    def _hash(self, data: bytes, section: _Section, name: str) -> None:
        key, length = ("md5", 16) if section.kind == _MD5 else ("sha1", 20)
        if len(data) < length + 4 or not sealed(data[: length + 4]):
            self._case.warnings.append(f"the {key} section of {name} is damaged and was not used")
        elif any(data[:length]):
            self._case.hashes[key] = data[:length].hex()

    def _entries(self, data: bytes, section: _Section, name: str) -> None:
        """The error table and the session table: a header of 20 bytes and 12 of padding, entries, a checksum."""
        errors = section.kind == _ERRORS
        width = 16 if errors else 32
        count = int.from_bytes(data[:4], "little")
        end = 32 + count * width
        if len(data) < end + 4 or not sealed(data[:20]) or not sealed(data[32 : end + 4]):
            self._case.warnings.append(f"the table of {'errors' if errors else 'sessions'} of {name} is damaged")
            return
        numbers = np.frombuffer(data[32:end], "<u4").astype(np.int64).reshape(-1, width // 4)
        starts = numbers[:, 0] | (numbers[:, 1] & 0x7FFF_FFFF) << 32
        if errors:
            self._case.unreadable = np.stack([starts, numbers[:, 2]], axis=1)
        else:
            flags = numbers[:1000, 2].tolist()
            self._case.sessions = [(at, bool(flag & 1)) for at, flag in zip(starts.tolist(), flags, strict=False)]


def _number(values: Mapping[str, str], key: str) -> int:
    """A number of the texts; 0 where there is none."""
    text = values.get(key, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < _LONGEST else 0


class SectorTables:
    """All sector tables of an image, in order; their entries are read a page at a time."""

    def __init__(self, tables: list[_Table], segments: Segments, packed: Form) -> None:
        """``packed`` is the form of the chunks that are compressed."""
        self._segments, self._packed = segments, packed
        self._tables = tables
        self._pages = [
            _Table(t.segment, t.first + skip, t.at + skip * _ENTRY.itemsize, min(_PAGE, t.chunks - skip))
            for t in tables
            for skip in range(0, t.chunks, _PAGE)
        ]
        self._owners = [t for t in tables for _ in range(0, t.chunks, _PAGE)]
        self.count = sum(table.chunks for table in tables)
        self._firsts = [page.first for page in self._pages]
        self._kept: Kept[int, NDArray[np.void]] = Kept(_KEPT, lambda entries: entries.nbytes)
        self._sound: dict[int, bool] = {}  # by the table's first chunk
        self._lock = Lock()

    def check(self) -> list[str]:
        return [self._damage(table) for table in self._tables if not self._is_sound(table)]

    def _damage(self, table: _Table) -> str:
        name = self._segments.names[table.segment]
        return f"the sector table with {table.chunks} entries at byte {table.at} of {name} is damaged"

    def _is_sound(self, table: _Table) -> bool:
        with self._lock:
            known = self._sound.get(table.first)
        if known is None:
            total, end = 1, table.at + table.chunks * _ENTRY.itemsize
            for start in range(table.at, end, _PIECE):
                total = adler32(self._segments.read(table.segment, start, min(_PIECE, end - start)), total)
            known = total == int.from_bytes(self._segments.read(table.segment, end, 4), "little")
            with self._lock:
                self._sound[table.first] = known
        return known

    def _load(self, number: int) -> NDArray[np.void]:
        page, owner = self._pages[number], self._owners[number]
        if not self._is_sound(owner):
            raise InvalidImage(self._damage(owner), offset=owner.at, field="checksum")
        data = self._segments.read(page.segment, page.at, page.chunks * _ENTRY.itemsize)
        return np.frombuffer(data, _ENTRY)

    def _page(self, number: int) -> tuple[_Table, NDArray[np.void]]:
        which = bisect_right(self._firsts, number) - 1
        if which < 0 or number >= self._pages[which].first + self._pages[which].chunks:
            raise InvalidImage(f"no sector table has chunk {number}")
        return self._pages[which], self._kept.of(which, self._load)

    def find(self, number: int) -> Place:
        page, entries = self._page(number)
        offset, size, flags = entries[number - page.first].item()
        if flags & ~7:
            raise UnsupportedError(
                f"chunk {number} has flags {flags:#x} that are not known", field="chunk data flags"
            )
        if flags & _COMPRESSED and flags & _PATTERN:
            return Place(page.segment, offset, 0, Form.PATTERN)
        form = self._packed if flags & _COMPRESSED else Form.PLAIN if flags & _CHECKED else Form.BARE
        if offset < FileHeader.SIZE or offset + size > self._segments.size(page.segment):
            raise InvalidImage(
                f"chunk {number} should stand at byte {offset} of {self._segments.names[page.segment]}, outside it",
                field="chunk data offset",
            )
        if not size:
            raise InvalidImage(f"chunk {number} has no bytes", field="chunk data size")
        return Place(page.segment, offset, size, form)

    def zeros(self, first: int, last: int) -> NDArray[np.bool_]:
        page, entries = self._page(first)
        part = entries[first - page.first : last - page.first]
        filled = _COMPRESSED | _PATTERN
        found: NDArray[np.bool_] = ((part["flags"] & filled) == filled) & (part["offset"] == 0)
        return found
