"""The sections of EWF: what each segment is made of, and what they say together.

    segment 1   | header | header2 ... | volume | sectors | table | table2 | sectors ... | next |
    segment 2   | header | data | sectors | table | table2 | ... | digest | hash | done |

    section     | type, next, size, Adler-32 | content |        76 bytes, then what the type says

EnCase 1, SMART and the original format have no ``sectors``: the chunks stand in the table, behind its entries.
Offsets count from the start of the segment; all numbers are little-endian.

Source: "Expert Witness Compression Format specification" (libyal), Segment file and The sections.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read_exactly
from ferrotype.errors import FerrotypeError, FormatError, InvalidImage, UnsupportedError
from ferrotype.formats.codecs import inflate_sealed
from ferrotype.formats.ewf.counts import Said
from ferrotype.formats.ewf.metadata import MEDIA_TYPES, Case, Media, keep_values
from ferrotype.formats.ewf.records import (
    SIGNATURE,
    Descriptor,
    SegmentHeader,
    SmartVolume,
    TableHeader,
    Volume,
    check_media,
    sealed,
)
from ferrotype.formats.ewf.segments import Segments
from ferrotype.formats.ewf.tables import Table
from ferrotype.formats.outside import attempt
from ferrotype.units import MiB

__all__ = ["Contents", "gather"]

_MOST_SECTIONS: Final = 1 << 18  # of all segments
_MOST_SEGMENTS: Final = 1 << 15
_LARGEST_METADATA: Final = 8 * MiB  # bytes of a header, error or session section
_REPEATED: Final = 4  # sections of a kind that are read; the next ones are copies
_LARGEST_TABLE: Final = 1 << 27  # entries, 512 MiB of them


class Section(NamedTuple):
    """A section: its type, where its content starts and ends in the segment."""

    kind: str
    start: int
    end: int


@dataclass(slots=True)
class Contents:
    """What all segments say together."""

    media: Media
    subformat: str
    tables: list[Table]
    case: Case
    said: list[Said]  # of how large the disk is; the volume section first
    missing: FerrotypeError | None = None  # why there are no further segments


def _check_first(file: Source) -> None:
    """Raise InvalidImage where the file does not begin as the first segment of a set."""
    header = SegmentHeader.unpack(read_exactly(file, 0, 13, "the file header"))
    if header.signature != SIGNATURE:
        raise InvalidImage("this is no EWF segment", offset=0, field="signature")
    if header.number != 1:
        raise InvalidImage(
            f"this is segment {header.number} of its image; open the first one", offset=9, field="segment number"
        )


def gather(file: Source, segments: Segments) -> Contents:
    """Walk through all segments up to one that is ``missing``.

    Raises InvalidImage where one is doubled or of another set, and where those before what is missing do not say
    what disk this is.
    """
    _check_first(file)
    walk = _Walk()
    source, budget = file, _MOST_SECTIONS
    for number in range(_MOST_SEGMENTS):
        name = segments.names[number]
        if number:
            _check_number(source, name, number + 1)
        last = ""
        for section in _sections(source, name):
            budget -= 1
            if not budget:
                raise UnsupportedError(f"the image has more than {_MOST_SECTIONS} sections")
            last = section.kind
            walk.take(section, source, number, name)
        if last == "done":
            return walk.finished(name)
        following, missing = attempt(segments.append)
        if following is None:
            return walk.finished(name, missing)
        source = following
    raise UnsupportedError(f"the image has more than {_MOST_SEGMENTS} segments")


def _check_number(source: Source, name: str, expected: int) -> None:
    header = SegmentHeader.unpack(read_exactly(source, 0, 13, f"the file header of {name}"))
    if header.signature != SIGNATURE:
        raise InvalidImage(f"{name} is no EWF segment", offset=0, field="signature")
    if header.number != expected:
        raise InvalidImage(
            f"{name} says it is segment {header.number} where segment {expected} is needed: files are missing, "
            "doubled or renamed",
            offset=9,
            field="segment number",
        )


def _sections(file: Source, name: str) -> Iterator[Section]:
    """The sections of a segment, the last one ``next`` or ``done``."""
    at = SegmentHeader.SIZE
    while True:
        if at + Descriptor.SIZE > file.size:
            raise InvalidImage(f"{name} is cut short: a section should stand at byte {at}", offset=at)
        data = read_exactly(file, at, Descriptor.SIZE, "a section")
        found = Descriptor.unpack(data)
        kind = found.kind.rstrip(b"\0").decode("latin-1")
        if not sealed(data):
            raise InvalidImage(f"a section descriptor of {name} is damaged", offset=at, field="checksum")
        start = at + Descriptor.SIZE
        if kind in ("next", "done"):
            yield Section(kind, start, start)
            return
        if not start <= found.next <= file.size:
            raise InvalidImage(
                f"the {kind!r} section of {name} is followed by one at byte {found.next}, "
                f"and the file has {file.size}: it is cut short or damaged",
                offset=at,
                field="next",
            )
        size = found.size if Descriptor.SIZE < found.size <= found.next - at else found.next - at
        yield Section(kind, start, at + size)
        at = found.next


class _Walk:
    """Collects what the sections say, in their order."""

    def __init__(self) -> None:
        self._media: Media | None = None
        self._subformat = "EWF-E01"
        self._tables: list[Table | None] = []  # None: damaged, table2 may help
        self._sectors: tuple[int, Section] | None = None
        self._mirrored = True  # the last table has had its table2, or there is none yet
        self._case = Case()
        self._said: list[Said] = []
        self._seen: Counter[str] = Counter()
        self._readers: dict[str, Callable[[bytes, str, Section], None]] = {
            "header": self._header,
            "header2": self._header,
            "xheader": self._header,
            "volume": self._volume,
            "disk": self._volume,
            "data": self._data,
            "error2": self._errors,
            "session": self._sessions,
            "hash": self._hash,
            "digest": self._hash,
            "xhash": self._xhash,
        }

    def take(self, section: Section, file: Source, segment: int, name: str) -> None:
        if section.kind == "sectors":
            self._sectors = (segment, section)
        elif section.kind in ("table", "table2"):
            self._table(section, file, segment, name)
        elif section.kind in ("ltree", "ltypes"):
            raise UnsupportedError("a logical evidence file holds files, no disk")
        elif section.kind in self._readers:
            length = section.end - section.start
            self._seen[section.kind] += 1
            if self._seen[section.kind] > _REPEATED and section.kind != "data":  # one in each segment
                return
            if length > _LARGEST_METADATA:
                self._case.warnings.append(f"a {section.kind!r} section of {length} bytes was not read")
                return
            data = read_exactly(file, section.start, length, f"the {section.kind} section")
            self._readers[section.kind](data, name, section)

    def finished(self, name: str, missing: FerrotypeError | None = None) -> Contents:
        if self._media is None:
            raise missing or InvalidImage(f"{name} has no volume section: what disk this is cannot be known")
        tables = [table for table in self._tables if table is not None]
        if len(tables) < len(self._tables):
            raise InvalidImage("a table is damaged, and so is its mirror or there is none", field="table header")
        return Contents(self._media, self._subformat, tables, self._case, self._said, missing)

    # ------------------------------------------------------------------ the disk

    def _volume(self, data: bytes, name: str, section: Section) -> None:
        if self._media is not None:
            return
        if len(data) >= Volume.SIZE:
            volume, found = data[: Volume.SIZE], Volume.unpack(data)
            if found.media_type == 0x0E:
                raise UnsupportedError("a logical evidence file holds files, no disk")
            self._media = Media(
                found.sectors,
                found.sector_size,
                found.chunk_sectors,
                MEDIA_TYPES.get(found.media_type, f"0x{found.media_type:02x}"),
                bool(found.media_flags & 2),
                "FastBloc" if found.media_flags & 4 else "Tableau" if found.media_flags & 8 else "",
                {0: "none", 1: "fast", 2: "best"}.get(found.level, ""),
                found.error_granularity,
                found.set_identifier,
            )
            chunks = found.chunks
        else:
            volume, smart = data[: SmartVolume.SIZE], SmartVolume.unpack(data)
            self._subformat = "EWF-S01" if smart.signature == b"SMART" else "EWF"
            self._media = Media(smart.sectors, smart.sector_size, smart.chunk_sectors, "fixed")
            chunks = smart.chunks
        if not sealed(volume):
            raise InvalidImage(f"the volume section of {name} is damaged", offset=section.start, field="checksum")
        check_media(self._media)
        self._said.append(Said(f"the {section.kind} section of {name}", self._media.sectors, chunks))

    def _data(self, data: bytes, name: str, section: Section) -> None:
        if self._media is None or len(data) < Volume.SIZE:
            return
        found = Volume.unpack(data)
        if found.checksum and not sealed(data[: Volume.SIZE]):  # Logicube's firmware leaves it 0
            self._case.warnings.append(f"the data section of {name}, a copy of the volume section, is damaged")
            return
        if found.set_identifier != self._media.set_identifier and any(found.set_identifier):
            raise InvalidImage(
                f"{name} belongs to another image: its set identifier is not that of the first segment",
                offset=section.start + 64,
                field="set identifier",
            )
        # Where identifiers are 0, and they are with most programs, nothing but the disk tells images apart.
        here, there = (self._media.chunk_sectors, self._media.sector_size), (found.chunk_sectors, found.sector_size)
        if any(there) and here != there:
            raise InvalidImage(
                f"{name} belongs to another image: it has chunks of {there[0]} sectors of {there[1]} bytes, and the "
                f"first segment {here[0]} of {here[1]}",
                offset=section.start,
                field="sectors per chunk",
            )
        self._said.append(Said(f"the data section of {name}", found.sectors, found.chunks))

    def _table(self, section: Section, file: Source, segment: int, name: str) -> None:
        table = self._read_table(section, file, segment)
        mirror = section.kind == "table2"
        if not mirror or self._mirrored:
            self._tables.append(table)
            self._mirrored = mirror
            if mirror:
                self._case.warnings.append(f"{name}: a table is missing; its mirror, table2, is used instead")
            return
        self._mirrored = True
        last = self._tables[-1]
        if table is None:
            self._case.warnings.append(f"{name}: a table2, the mirror of a table, is damaged")
        elif last is None:
            self._case.warnings.append(f"{name}: a table is damaged; its mirror, table2, is used instead")
            self._tables[-1] = table
        elif (table.count, table.base) != (last.count, last.base):
            self._case.warnings.append(f"{name}: a table and its mirror, table2, differ; the table is used")
        else:
            self._tables[-1] = replace(last, mirror=table.at)

    def _read_table(self, section: Section, file: Source, segment: int) -> Table | None:
        if section.end - section.start < TableHeader.SIZE:
            return None
        data = read_exactly(file, section.start, TableHeader.SIZE, "a table")
        header = TableHeader.unpack(data)
        footed = self._subformat == "EWF-E01"  # the others have no checksum behind the entries
        at = section.start + TableHeader.SIZE
        end = at + 4 * header.count + (4 if footed else 0)
        if not sealed(data) or end > section.end:
            return None
        if header.count > _LARGEST_TABLE:
            raise UnsupportedError(f"a table with {header.count} entries is not read", offset=section.start)
        low, high = end, section.end
        if self._sectors is not None and self._sectors[0] == segment:
            low, high = self._sectors[1].start, self._sectors[1].end
        base = header.base if header.base < file.size else 0
        return Table(segment, at, header.count, base, low, high, footed)

    # ------------------------------------------------------------------ the case

    def _header(self, data: bytes, name: str, section: Section) -> None:  # noqa: ARG002
        kind = "xheader" if section.kind == "xheader" else "header"
        keep_values(self._case, data, kind, wide=section.kind == "header2")

    def _errors(self, data: bytes, name: str, section: Section) -> None:  # noqa: ARG002
        self._case.unreadable = self._entries(data, 520, 8, name, "error2")[:, :2]

    def _sessions(self, data: bytes, name: str, section: Section) -> None:  # noqa: ARG002
        entries = self._entries(data, 36, 32, name, "session")
        self._case.sessions = [(start, bool(flags & 1)) for flags, start in entries[:1000, :2].tolist()]

    def _entries(self, data: bytes, head: int, width: int, name: str, what: str) -> NDArray[np.int64]:
        """The entries of a section as rows of 32-bit numbers; none, and a warning, where it is damaged."""
        count = int.from_bytes(data[:4], "little")
        end = head + count * width
        whole = len(data) >= end + 4 and sealed(data[:head]) and sealed(data[head : end + 4])
        if not whole:
            self._case.warnings.append(f"the {what} section of {name} is damaged and was not used")
        numbers = np.frombuffer(data[head:end] if whole else b"", "<u4").astype(np.int64)
        return numbers.reshape(-1, width // 4)

    def _hash(self, data: bytes, name: str, section: Section) -> None:
        size = 36 if section.kind == "hash" else 80
        if len(data) < size or not sealed(data[:size]):
            self._case.warnings.append(f"the {section.kind} section of {name} is damaged and was not used")
            return
        if any(data[:16]):
            self._case.hashes["md5"] = data[:16].hex()
        if section.kind == "digest" and any(data[16:36]):
            self._case.hashes["sha1"] = data[16:36].hex()

    def _xhash(self, data: bytes, name: str, section: Section) -> None:  # noqa: ARG002
        try:
            text = inflate_sealed(data, _LARGEST_METADATA).decode("utf-8", "replace")
        except FormatError as error:
            self._case.warnings.append(f"the xhash section of {name} is damaged: {error}")
            return
        for key, digits in re.findall(r"<(md5|sha1)>([0-9a-f]+)<", text.lower()):
            if len(digits) == {"md5": 32, "sha1": 40}[key]:
                self._case.hashes.setdefault(key, digits)
