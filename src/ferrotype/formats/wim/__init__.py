"""Windows imaging files (WIM): folders and files, each content once, in one file; no disk.

    | header, 208 bytes | resources ... | lookup table: where the resource of each SHA-1 is | XML data |

A resource is stored as it is, or as chunks with a table of where they begin.  An image is a metadata resource: access
control lists and the entries of its folders; what an entry holds is named by its SHA-1, and proven by it when read.

Source: Microsoft, "Windows Imaging File Format (WIM)"; where it is silent (sizes of chunks, alternate streams), what
wimlib and 7-Zip agree on.  Solid resources and LZMS (.esd) are not read, nor resources in the other parts of a split
WIM (.swm).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import unescape
from itertools import pairwise
from typing import Annotated, Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read, read_exactly
from ferrotype.errors import InvalidImage, UnsupportedError, UsageError
from ferrotype.formats import Image, TreeEntry
from ferrotype.formats.related import Related
from ferrotype.formats.wim.chunks import unlzx, unxpress
from ferrotype.formats.wim.folders import Folders
from ferrotype.records import Record, b8, b16, record, u8, u16, u32, u64
from ferrotype.units import GiB, KiB, MiB

__all__ = ["Wim", "open", "open_tree", "probe"]

MAGIC: Final = b"MSWIM\0\0\0"
PIPABLE: Final = b"WLPWM\0\0\0"
_SPANNED, _XPRESS, _LZX, _LZMS, _XPRESS2 = 0x8, 0x20000, 0x40000, 0x80000, 0x200000  # flags of the header
_METADATA, _COMPRESSED, _SOLID = 0x02, 0x04, 0x10  # flags of a resource
MAX_TABLE: Final = 128 * MiB  # bytes of the lookup table: two million files
MAX_METADATA: Final = 192 * MiB  # bytes of one image's folders
MAX_XML: Final = 8 * MiB
MAX_IMAGES: Final = 1000
_CHUNKS_READ: Final = 1 << 16  # entries of a chunk table read together
_CHUNK: Final = 32 * KiB  # bytes of a chunk where the header gives none

Packed7 = Annotated[bytes, "7s"]
Reference = Annotated[bytes, "24s"]
Digest = Annotated[bytes, "20s"]
Rest = Annotated[bytes, "60s"]


@record(endian="<", size=208)
class Header(Record):
    """WIM header; WIM paper, "WIM Header Format"."""

    magic: b8
    size: u32
    version: u32
    flags: u32
    chunk_size: u32
    guid: b16
    part: u16
    parts: u16
    images: u32
    table: Reference
    xml: Reference
    boot_metadata: Reference
    boot_index: u32
    integrity: Reference
    unused: Rest


@record(endian="<", size=24)
class Place(Record):
    """Where a resource is; WIM paper, RESHDR_DISK_SHORT."""

    packed_size: Packed7
    flags: u8
    offset: u64
    size: u64

    @property
    def stored(self) -> int:
        """Bytes in the file."""
        return int.from_bytes(self.packed_size, "little")


# WIM paper, "Lookup Table": a Place, the part it is in, how often it is used, and the SHA-1 of the content.  Bytes at
# the end of a digest that are 0 take no part in comparing, on either side.
_LOOKUP: Final = np.dtype(
    [
        ("packed_size", "u1", 7),
        ("flags", "u1"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("part", "<u2"),
        ("references", "<u4"),
        ("digest", "S20"),
    ]
)


def probe(file: Source) -> bool:
    """Whether the file begins as a WIM."""
    return read(file, 0, 8) in (MAGIC, PIPABLE)


def open(file: Source, related: Related) -> Image:  # noqa: ARG001
    """Never: raises UnsupportedError."""
    raise UnsupportedError("a WIM holds files and no disk; info lists its images")


def open_tree(file: Source, related: Related) -> Wim:  # noqa: ARG001
    """The images of a WIM.  It owns ``file`` from then on; reads the header, the lookup table and the XML data."""
    return Wim(file)


@dataclass(frozen=True, slots=True)
class Chunks:
    """How resources are compressed: the flag of the header, and bytes of a full chunk."""

    flag: int
    size: int

    def open(self, data: bytes, size: int) -> bytes:
        if len(data) == size:
            return data  # it would not have become smaller
        if self.flag == _XPRESS:
            return unxpress(data, size)
        return unlzx(data, size, self.size.bit_length() - 1)


class Wim:
    """The tree: a folder for each image, called by its number from 1 on, and in it the image's folders and files."""

    format = "wim"

    def __init__(self, file: Source) -> None:
        header = Header.unpack(read_exactly(file, 0, Header.SIZE, "the header of the WIM"))
        self._chunks = _check(header)
        self._file = file
        table = self._load(Place.unpack(header.table), MAX_TABLE, "lookup table")
        if len(table) % _LOOKUP.itemsize:
            raise InvalidImage("the lookup table has no whole entries", field="lookup table")
        found = np.frombuffer(table, _LOOKUP)
        flags = found["flags"]
        if (flags & _SOLID).any():
            raise UnsupportedError("solid WIM files (.esd) are not read; wimlib-imagex export makes a plain one")
        self._part, self._parts = header.part, header.parts
        self._metadata = [(Place.unpack(row.tobytes()), row.tobytes()[-20:]) for row in found[flags & _METADATA != 0]]
        contents = found[flags & _METADATA == 0]
        self._contents = contents[np.argsort(contents["digest"], kind="stable")]
        self._folders: dict[int, Folders] = {}
        images = len(self._metadata)
        self.warnings: tuple[str, ...] = ()
        if images != header.images and header.part == 1:
            self.warnings = (f"the header counts {header.images} images, the lookup table {images}",)
        if images > MAX_IMAGES:
            raise UnsupportedError(f"{images} images in one WIM are too many")
        names = {_XPRESS: "XPRESS", _LZX: "LZX", 0: "none"}
        self.facts: dict[str, object] = {
            "compression": names[self._chunks.flag],
            "unit": self._chunks.size if self._chunks.flag else None,
            "guid": header.guid.hex(),
            "part": header.part,
            "parts": header.parts,
            "contents": len(contents),
            "content_bytes": sum(contents["size"].tolist()),
            "boot_image": header.boot_index or None,
            "images": _described(self._load(Place.unpack(header.xml), MAX_XML, "XML data"), images),
        }

    # ------------------------------------------------------------------ the tree

    def list(self, path: str = "", /) -> Iterator[TreeEntry]:
        """What lies in a folder, by name.  Raises UsageError where there is no such folder."""
        number, inner = self._split(path)
        if number is None:
            yield from (TreeEntry(str(n + 1), "folder") for n in range(len(self._metadata)))
            return
        for entry in self._image(number).list(inner):
            yield self._sized(entry)

    def walk(self, path: str = "", /) -> Iterator[tuple[str, TreeEntry]]:
        """Everything below a folder, each with its path.  Raises InvalidImage where folders lie in each other."""
        number, inner = self._split(path)
        for image in range(1, len(self._metadata) + 1) if number is None else (number,):
            if number is None:
                yield str(image), TreeEntry(str(image), "folder")
            for below, entry in self._image(image).walk(inner):
                yield f"{image}/{below}", self._sized(entry)

    def read(self, path: str, /) -> Iterator[bytes]:
        """The content of a file, a piece at a time.

        The last piece comes when all was proven by its SHA-1; InvalidImage is raised where it was not.
        ``path:stream`` is an alternate stream.
        """
        number, inner = self._split(path)
        if number is None or not inner:
            raise UsageError(f"{path!r} is no file")
        digest = self._image(number).digest(inner)
        yield from self._proven(digest) if digest.strip(b"\0") else ()

    def close(self) -> None:
        self._file.close()

    def _split(self, path: str) -> tuple[int | None, str]:
        first, _, rest = path.strip("/").partition("/")
        if not first:
            return None, ""
        if not first.isascii() or not first.isdigit() or not 0 < int(first[:6]) <= len(self._metadata):
            raise UsageError(f"the WIM holds no image {first!r}; it has {len(self._metadata)}")
        return int(first[:6]), rest

    def _sized(self, entry: TreeEntry) -> TreeEntry:
        place = self._find(bytes.fromhex(entry.digest)) if entry.digest else None
        return entry if place is None else replace(entry, size=place.size)

    def _image(self, number: int) -> Folders:
        if number not in self._folders:
            place, digest = self._metadata[number - 1]
            data = self._load(place, MAX_METADATA, f"folders of image {number}")
            if hashlib.sha1(data, usedforsecurity=False).digest() != digest:
                raise InvalidImage(f"the folders of image {number} do not match their SHA-1", offset=place.offset)
            self._folders.clear()  # one image's at a time are in memory
            self._folders[number] = Folders(data)
        return self._folders[number]

    # ------------------------------------------------------------------ resources

    def _find(self, digest: bytes) -> Place | None:
        key = np.array(digest, "S20")
        at = int(np.searchsorted(self._contents["digest"], key))
        if at == len(self._contents) or self._contents["digest"][at] != key:
            return None
        if self._parts > 1 and int(self._contents["part"][at]) != self._part:
            return None
        return Place.unpack(self._contents[at].tobytes())

    def _proven(self, digest: bytes) -> Iterator[bytes]:
        place = self._find(digest)
        if place is None:
            if self._parts > 1:
                raise UnsupportedError(
                    "the content stands in another part of a split WIM; wimlib-imagex join joins it"
                )
            raise InvalidImage(f"no content has the SHA-1 {digest.hex()}", field="lookup table")
        hashed, held = hashlib.sha1(usedforsecurity=False), b""
        for piece in self._pieces(place, f"content {digest.hex()}"):
            hashed.update(piece)
            if held:
                yield held
            held = piece
        if hashed.digest() != digest:
            raise InvalidImage(f"a content does not match its SHA-1 {digest.hex()}", offset=place.offset)
        if held:
            yield held

    def _load(self, place: Place, limit: int, what: str) -> bytes:
        """A resource that must be in memory.  Raises InvalidImage where it would take more than ``limit`` bytes."""
        if place.size > limit:
            raise UnsupportedError(f"the {what} has {place.size} bytes, and at most {limit} are read")
        return b"".join(self._pieces(place, what))

    def _pieces(self, place: Place, what: str) -> Iterator[bytes]:
        stored = place.stored
        if place.offset + stored > self._file.size:
            raise InvalidImage(f"the {what} lies outside the file", offset=place.offset)
        if not place.flags & _COMPRESSED:
            if stored != place.size:
                raise InvalidImage(f"the {what} has {stored} bytes instead of {place.size}", offset=place.offset)
            for at in range(0, stored, MiB):
                yield read(self._file, place.offset + at, min(MiB, stored - at))
            return
        if not self._chunks.flag:
            raise InvalidImage(f"the {what} is compressed, and the WIM says that nothing is", offset=place.offset)
        count = -(-place.size // self._chunks.size)
        width = 4 if place.size <= 4 * GiB - 1 else 8
        head = max(count - 1, 0) * width  # the first chunk begins behind the table
        if head > stored:
            raise InvalidImage(f"the chunk table of the {what} does not fit it", offset=place.offset)
        for first in range(0, count, _CHUNKS_READ):
            bounds = self._bounds(place, first, min(_CHUNKS_READ, count - first), count, width)
            if (np.diff(bounds) < 1).any() or int(bounds[-1]) > stored - head:
                raise InvalidImage(f"the chunk table of the {what} does not ascend", offset=place.offset)
            limits = bounds.tolist()
            for number, (start, end) in enumerate(pairwise(limits), first):
                size = min(self._chunks.size, place.size - number * self._chunks.size)
                if end - start > size:
                    raise InvalidImage(f"a chunk of the {what} is larger than its content", offset=place.offset)
                try:
                    yield self._chunks.open(read(self._file, place.offset + head + start, end - start), size)
                except InvalidImage as error:
                    raise InvalidImage(f"{what}: {error}", offset=place.offset + head + start) from None

    def _bounds(self, place: Place, first: int, some: int, count: int, width: int) -> NDArray[np.int64]:
        """Where some chunks begin, behind the table, and where the last of them ends."""
        low, high = max(first, 1), min(first + some, count - 1)
        table = read(self._file, place.offset + (low - 1) * width, max(high - low + 1, 0) * width)
        bounds = np.frombuffer(table, f"<u{width}").astype(np.int64)
        if first == 0:
            bounds = np.concatenate((np.zeros(1, np.int64), bounds))
        if first + some == count:
            bounds = np.append(bounds, place.stored - (count - 1) * width)
        return bounds


def _check(header: Header) -> Chunks:
    """Raises InvalidImage or UnsupportedError where the header says what cannot be read."""
    if header.magic == PIPABLE:
        raise UnsupportedError("pipable WIM files are not read; wimlib-imagex export makes it a plain one")
    if header.magic != MAGIC:
        raise InvalidImage("this is no WIM file", offset=0, field="magic")
    if header.size < Header.SIZE:
        raise InvalidImage(f"a header of {header.size} bytes", offset=8, field="size")
    if header.flags & (_LZMS | _XPRESS2):
        raise UnsupportedError("LZMS (.esd) is not read; wimlib-imagex export --compress=LZX opens one", offset=16)
    flag = header.flags & (_XPRESS | _LZX)
    if flag == _XPRESS | _LZX:
        raise InvalidImage("two compressions at once", offset=16, field="flags")
    if header.version not in (0x10D00, 0x00E00):
        raise UnsupportedError(f"version {header.version:#x} is not read", offset=12, field="version")
    size = header.chunk_size or _CHUNK
    low, high = (4 * KiB, 64 * KiB) if flag == _XPRESS else (_CHUNK, 2 * MiB)
    if flag and (size & (size - 1) or not low <= size <= high):
        raise InvalidImage(f"chunks of {size} bytes", offset=20, field="chunk_size")
    if not 0 < header.part <= header.parts:
        raise InvalidImage(f"part {header.part} of {header.parts}", offset=40, field="part")
    return Chunks(flag, size)


def _described(data: bytes, images: int) -> list[dict[str, object]]:
    """What the XML data says of each image; it is for people, so what cannot be understood is left out."""
    text = data.decode("utf-16-le", "replace")
    described: list[dict[str, object]] = [{"index": n + 1} for n in range(images)]
    for match in re.finditer(r'<IMAGE INDEX="(\d{1,4})">(.*?)</IMAGE>', text, re.DOTALL):
        index, inner = int(match[1]), match[2]
        if not 0 < index <= images:
            continue
        for tag, key in (("NAME", "name"), ("DESCRIPTION", "description")):
            found = re.search(rf"<{tag}>([^<]{{0,4096}})</{tag}>", inner)
            if found:
                described[index - 1][key] = unescape(found[1])
        for tag, key in (("DIRCOUNT", "folders"), ("FILECOUNT", "files"), ("TOTALBYTES", "bytes")):
            found = re.search(rf"<{tag}>(\d{{1,19}})</{tag}>", inner)
            if found:
                described[index - 1][key] = int(found[1])
    return described
