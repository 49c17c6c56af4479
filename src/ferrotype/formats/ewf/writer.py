"""Making E01 images as EnCase 6 does: the disk deflated chunk by chunk on all cores, hashed while it is written.

    pack    any thread     chunks of 64 sectors ──> zlib stream, or plain with Adler-32 where that is smaller
    put     in order       segment files; MD5 and SHA-1 in a thread each
    zeros   never put      one packed chunk of zeros, written as often as it is needed

Every chunk has its place in the image, so that zeros cost a few bytes for each, and their time in the hashes.

Segments have 1.4 GiB unless another size is chosen, as those of other programs: 31 bits reach all of it, and any file
system takes it.  Disks that would need more than ``_MOST_FILES`` of them get larger ones, which EnCase 6.7 and later
read, as does everything built on libewf.

Source: "Expert Witness Compression Format specification" (libyal), EnCase 6 (EWF-E01).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple
from uuid import uuid4
from zlib import adler32

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Traits
from ferrotype.block.file import check_write
from ferrotype.block.outputs import Outputs, in_a_row
from ferrotype.block.zeros import zero_cells
from ferrotype.errors import UsageError
from ferrotype.formats import Option, Options, Spec, one_of
from ferrotype.formats.codecs import deflate
from ferrotype.formats.ewf.hashes import DiskHashes
from ferrotype.formats.ewf.records import LARGEST_CHUNK, Volume, with_checksum
from ferrotype.formats.ewf.segment_writer import CLOSING, SegmentWriter
from ferrotype.formats.ewf.segments import segment_name
from ferrotype.units import KiB, MiB, TiB, parse_size

__all__ = ["OPTIONS", "EwfSink", "create"]

_SEGMENT: Final = 1_503_238_553  # bytes: 1.4 GiB
_MOST_FILES: Final = 10_000  # of an image whose segment size nobody chose; there are names for 14,971
_LARGEST_SEGMENT: Final = 8 * TiB
_LEAST: Final = MiB  # bytes of a segment
_GAP: Final = 4096  # chunks of zeros written at a time
_SECTORS_SAID: Final = 1 << 32  # numbers of sectors that an error2 section can say
_MOST_ERRORS: Final = 1 << 19  # rows of an error2 section
_LONGEST_TEXT: Final = 2999  # characters EnCase takes

_LEVELS: Final = {"none": 0, "fast": 1, "best": 9}  # of deflate
_STATED_LEVELS: Final = {"none": 0, "fast": 1, "best": 2}
_MEDIA: Final = {"fixed": 1, "removable": 0, "optical": 3, "memory": 0x10}
_TEXTS: Final = ("description", "case_number", "evidence_number", "examiner_name", "notes")


def _text(text: str) -> str:
    if len(text) > _LONGEST_TEXT or not text.isprintable():
        raise ValueError(f"a line of at most {_LONGEST_TEXT} characters, without tabs")
    return text


def _sectors(text: str) -> int:
    count = int(text) if text.isdecimal() else 0
    if not 16 <= count <= 32768 or count & (count - 1):
        raise ValueError("a power of two from 16 to 32768")
    return count


OPTIONS: Final[Options] = {
    "level": Option("none, fast (default) or best: how hard chunks are deflated", one_of(*_LEVELS)),
    "segment_size": Option("largest size of a segment file; 1.4 GiB, or more for very large disks", parse_size),
    "sectors_per_chunk": Option("16 to 32768, a power of two; 64 unless chosen", _sectors),
    "media_type": Option("what the disk was: fixed (default), removable, optical or memory", one_of(*_MEDIA)),
    "physical": Option("yes (default): a whole device; no: a volume, without a partition table", one_of("yes", "no")),
    **{name: Option(f"{name.replace('_', ' ')}, kept in the image", _text) for name in _TEXTS},
}


def create(outputs: Outputs, spec: Spec) -> EwfSink:
    """An E01 image whose first segment is the file the user named; the others stand beside it."""
    if spec.backing:
        raise UsageError("an E01 image is not made on a backing file")
    if outputs.path.suffix.lower() != ".e01":
        raise UsageError(f"the first segment of an E01 image is called NAME.E01, not {outputs.path.name}")
    if spec.size % spec.sector_size or not spec.size:
        raise UsageError(f"an E01 image holds whole sectors, at least one; a disk of {spec.size} bytes does not fit")
    chunk_size = spec.get("sectors_per_chunk", 64) * spec.sector_size
    if chunk_size > LARGEST_CHUNK:
        raise UsageError(f"chunks of {chunk_size} bytes are larger than {LARGEST_CHUNK}")
    chunks = -(-spec.size // chunk_size)
    if chunks >= 1 << 32:
        raise UsageError(f"an E01 image has at most 2^32 chunks; choose more than {chunk_size} bytes for each")
    limit = spec.get("segment_size", 0) or _segment_size(spec.size + 16 * chunks)
    least = max(_LEAST, 2 * chunk_size + CLOSING + 64 * KiB)
    if not least <= limit <= _LARGEST_SEGMENT:
        raise UsageError(f"segments have {least} to {_LARGEST_SEGMENT} bytes, not {limit}")
    return EwfSink(outputs, spec, chunk_size, limit)


def _segment_size(worst: int) -> int:
    """The segment size for a disk that takes up ``worst`` bytes where nothing of it can be deflated."""
    return max(_SEGMENT, -(-worst // (_MOST_FILES * MiB)) * MiB)


class _Packed(NamedTuple):
    """Chunks as they are stored."""

    length: int  # bytes of the disk
    plain: bytes  # what is hashed; empty: zeros
    parts: list[bytes]
    sizes: NDArray[np.int64]
    packed: NDArray[np.bool_]  # those that are zlib streams


class EwfSink:
    """A disk that is being written into E01 segments."""

    def __init__(self, outputs: Outputs, spec: Spec, chunk_size: int, limit: int) -> None:
        self._outputs, self._spec, self._limit = outputs, spec, limit
        self._size, self._chunk = spec.size, chunk_size
        self._level = _LEVELS[spec.get("level", "fast")]
        self._zeros = deflate(bytes(chunk_size), level=9)
        self._volume = self._make_volume()
        self._number = 1
        self._at = 0  # bytes of the disk that are stored
        self._errors: list[tuple[int, int]] = []  # first sector and count of what could not be read
        self.traits = Traits(sector_size=spec.sector_size, unit=chunk_size, ordered=True, blank=True)
        self._file = outputs.create()
        self._segment = SegmentWriter(self._file, 1, limit)
        outputs.supersede(self._further)
        header2, header = _headers(spec, datetime.now(UTC))
        for kind, content in (
            ("header2", header2),
            ("header2", header2),
            ("header", header),
            ("volume", self._volume),
        ):
            self._segment.section(kind, content)
        self._hashes = DiskHashes()

    @property
    def size(self) -> int:
        return self._size

    def _make_volume(self) -> bytes:
        spec, sectors = self._spec, self._size // self._spec.sector_size
        per_chunk = self._chunk // spec.sector_size
        return with_checksum(
            Volume(
                media_type=_MEDIA[spec.get("media_type", "fixed")],
                unknown1=bytes(3),
                chunks=-(-sectors // per_chunk),
                chunk_sectors=per_chunk,
                sector_size=spec.sector_size,
                sectors=sectors,
                cylinders=0,
                heads=0,
                track_sectors=0,
                media_flags=1 | (2 if spec.get("physical", "yes") == "yes" else 0),  # an image, of a device
                unknown2=bytes(3),
                palm_start=0,
                unknown3=bytes(4),
                smart_logs_start=0,
                level=_STATED_LEVELS[spec.get("level", "fast")],
                unknown4=bytes(3),
                error_granularity=per_chunk,
                unknown5=bytes(4),
                set_identifier=uuid4().bytes_le,
                unknown6=bytes(963),
                signature=bytes(5),
                checksum=0,
            )
        )

    # ------------------------------------------------------------------ chunks

    def pack(self, offset: int, data: memoryview, /) -> object:
        check_write("E01 image", self._size, offset, len(data))
        zero = zero_cells(data, self._chunk)
        plain = b"" if all(zero) else bytes(data)  # the caller uses its buffer again
        view = memoryview(plain or data)
        parts, packed = [], []
        for number, empty in enumerate(zero):
            chunk = view[number * self._chunk : (number + 1) * self._chunk]
            whole = len(chunk) == self._chunk
            part = self._zeros if empty and whole else self._deflated(chunk, empty=empty)
            packed.append(part is not None)
            parts.append(part or b"".join((chunk, adler32(chunk).to_bytes(4, "little"))))
        sizes = np.fromiter(map(len, parts), np.int64, len(parts))
        return _Packed(len(data), plain, parts, sizes, np.array(packed, bool))

    def _deflated(self, chunk: memoryview, *, empty: bool) -> bytes | None:
        """A chunk as a zlib stream; None where it is smaller as it is."""
        if not self._level and not empty:
            return None
        part = deflate(chunk, level=self._level or 9)
        return part if len(part) < len(chunk) + 4 else None

    def put(self, offset: int, packed: object, /) -> None:
        assert isinstance(packed, _Packed)  # noqa: S101  what ``pack`` returned
        if offset < self._at:
            raise ValueError(f"byte {offset} is put when {self._at} are stored")
        self._fill(offset)
        if packed.plain:
            self._hashes.feed([packed.plain])
        else:
            self._hashes.zeros(packed.length)
        self._store(packed.parts, packed.sizes, packed.packed)
        self._at = offset + packed.length

    def _fill(self, end: int) -> None:
        """Store zeros up to ``end``, which is the disk's or that of a chunk."""
        while self._at < end:
            count = min((end - self._at) // self._chunk, _GAP)
            parts = [self._zeros] * count or [deflate(bytes(end - self._at), level=9)]
            length = count * self._chunk or end - self._at
            self._hashes.zeros(length)
            self._store(parts, np.full(len(parts), len(parts[0]), np.int64), np.ones(len(parts), bool))
            self._at += length

    def _store(self, parts: Sequence[bytes], sizes: NDArray[np.int64], packed: NDArray[np.bool_]) -> None:
        at = 0
        while at < len(parts):
            end = at + self._segment.fit(sizes[at:])
            if end > at:
                self._segment.add(parts[at:end], sizes[at:end], packed[at:end])
            elif self._segment.filling:
                self._segment.end_sectors()
            else:
                self._next_segment()
            at = end

    def _next_segment(self) -> None:
        self._segment.end("next")
        self._outputs.done(self._file)
        self._number += 1
        path = self._path(self._number)
        if path is None or self._number >= 1 << 16:
            raise UsageError(f"the disk needs more than {self._number - 1} segments; choose a larger segment_size")
        self._file = self._outputs.create(path)
        self._segment = SegmentWriter(self._file, self._number, self._limit)
        self._segment.section("data", self._volume)

    def _path(self, number: int) -> Path | None:
        name = segment_name(self._outputs.path.name, number)
        return None if name is None else self._outputs.path.with_name(name)

    def _further(self) -> Iterator[Path]:
        """Files that would pass for segments behind the last one, such as those of an older, longer image."""
        return in_a_row(self._path, self._number + 1)

    # ------------------------------------------------------------------ as a sink

    def write(self, offset: int, data: memoryview, /) -> None:
        self.put(offset, self.pack(offset, data))

    def write_zeros(self, offset: int, length: int, /) -> None:
        """Store zeros up to the end of the range; needless, but it lets callers tell how far the hashing has come."""
        check_write("E01 image", self._size, offset, length)
        self._fill(offset + length)

    def mark_unreadable(self, ranges: Sequence[tuple[int, int]], /) -> None:
        sector = self._spec.sector_size
        rows = [(start // sector, -(-(start + length) // sector)) for start, length in ranges]
        if len(rows) > _MOST_ERRORS:  # what is good in between passes for bad
            rows[_MOST_ERRORS - 1 :] = [(rows[_MOST_ERRORS - 1][0], rows[-1][1])]
        self._errors = [
            (first, min(end, _SECTORS_SAID - 1) - first) for first, end in rows if first < _SECTORS_SAID - 1
        ]

    def finish(self) -> None:
        self._fill(self._size)
        self._segment.end_sectors()
        digits = self._hashes.finish()
        md5, sha1 = bytes.fromhex(digits["md5"]), bytes.fromhex(digits["sha1"])
        errors = _error_table(self._errors)
        if not self._segment.has_room(len(errors)):
            self._next_segment()
        elif self._number == 1:
            self._segment.section("data", self._volume)
        if self._errors:
            self._segment.section("error2", errors)
        self._segment.section("digest", _sealed(md5 + sha1 + bytes(40)))
        self._segment.section("hash", _sealed(md5 + bytes(16)))
        self._segment.end("done")

    def flush(self) -> None:
        """Nothing: the outputs flush their files."""

    def close(self) -> None:
        self._hashes.close()


def _error_table(rows: Sequence[tuple[int, int]]) -> bytes:
    """The content of an error2 section: its header, and first sector and count of each range."""
    head = _sealed(len(rows).to_bytes(4, "little") + bytes(512))
    return head + _sealed(np.array(rows, "<u4").tobytes())


def _sealed(data: bytes) -> bytes:
    return data + adler32(data).to_bytes(4, "little")


def _headers(spec: Spec, now: datetime) -> tuple[bytes, bytes]:
    """The contents of header2, which is UTF-16 and has all, and of header, which is ASCII."""
    description, case, evidence, examiner, notes = (spec.get(name, "") for name in _TEXTS)
    stamp, program, system = str(int(now.timestamp())), "ferrotype", "Linux"
    values = [description, case, evidence, examiner, notes, "", "", program, system, stamp, stamp, "0", ""]
    lines = ["3", "main", "a\tc\tn\te\tt\tmd\tsn\tav\tov\tm\tu\tp\tdc", "\t".join(values), ""]
    lines += ["srce", "0\t1", "p\tn\tid\tev\ttb\tlo\tpo\tah\tgu\taq", "0\t0", "\t\t\t\t\t-1\t-1\t\t\t", ""]
    lines += ["sub", "0\t1", "p\tn\tid\tnu\tco\tgu", "0\t0", "\t\t\t\t1\t", "", ""]
    header2 = deflate(b"\xff\xfe" + "\n".join(lines).encode("utf-16-le", "replace"), level=9)
    local = now.astimezone()
    date = f"{local.year} {local.month} {local.day} {local.hour} {local.minute} {local.second}"
    values = [case, evidence, description, examiner, notes, program, system, date, date, "0"]
    lines = ["1", "main", "c\tn\ta\te\tt\tav\tov\tm\tu\tp", "\t".join(values), "", ""]
    return header2, deflate("\r\n".join(lines).encode("ascii", "replace"), level=9)
