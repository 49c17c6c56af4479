"""VHDX, the disk of Hyper-V: blocks of 1 to 256 MiB, found through the block allocation table (BAT).

    BAT        | block 0 | block 1 | ... | block n-1 | bitmap | block n | ...      n: the chunk ratio, so that
    entry      | offset in MiB, 44 bits | 17 bits | state, 3 bits |                a bitmap covers n blocks

    payload    nothing: the parent's, or zeros     zero, unmapped, undefined: zeros
               present: all of it here             partially: here where the bitmap has a bit, else the parent's

The heads are in ``records``, the sizes and the parent's name in ``metadata``, changes that were only logged
in ``log``; ``writer`` makes files.  Written from [MS-VHDX]; section numbers are cited where they matter.
"""

from __future__ import annotations

import collections.abc
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, Traits, read, read_exactly, read_exactly_into
from ferrotype.errors import InvalidImage, NotAllowed
from ferrotype.formats import Image, plain_room
from ferrotype.formats.mapped import Kept, Kind, MappedSource, Mapping, cells
from ferrotype.formats.outside import attempt
from ferrotype.formats.related import Related
from ferrotype.formats.vhdx.log import replay
from ferrotype.formats.vhdx.metadata import Metadata, disk_metadata
from ferrotype.formats.vhdx.records import FileIdentifier, Region, current_header, guid_text, regions
from ferrotype.formats.vhdx.writer import OPTIONS, create
from ferrotype.job import Job
from ferrotype.units import KiB, MiB

__all__ = ["OPTIONS", "create", "open", "probe", "room"]

room = plain_room

Entries = NDArray[np.uint64]
LocatorTexts = collections.abc.Mapping[str, str]

_PAGE: Final = 32 * KiB  # payload blocks whose BAT entries are read at a time
_BAT_KEPT: Final = 16 * MiB  # bytes of BAT pages
_BITMAPS_KEPT: Final = 16 * MiB  # bytes of sector bitmap blocks
_OFFSET: Final = np.uint64(~0xFFFFF & (1 << 64) - 1)  # of an entry: FileOffsetMB is in place as bytes already
_SPARE: Final = np.uint64(0xFFFF8)  # of an entry: Reserved

_BITMAP_PRESENT: Final = 6  # section 2.5.1.2
_RESERVED, _PARTIALLY = 255, 254
# Section 2.5.1.1; UNMAPPED was 5 before version 1.00.  Undefined and unmapped ones may be anything but the parent's.
_KINDS: Final = np.array(
    [Kind.HOLE, Kind.ZERO, Kind.ZERO, Kind.ZERO, _RESERVED, Kind.ZERO, Kind.STORED, _PARTIALLY], np.uint8
)


def probe(file: Source) -> bool:
    """Whether the file begins as a VHDX file does."""
    return file.size >= MiB and read(file, 0, 8) == b"vhdxfile"


def open(file: Source, related: Related) -> Image:
    """The disk, over its parents where it has some; changes that are only in the log are replayed in memory.

    ``missing``: the parent.
    """
    identifier = FileIdentifier.unpack(read_exactly(file, 0, FileIdentifier.SIZE, "file identifier"))
    if identifier.Signature != b"vhdxfile":
        raise InvalidImage("this is no VHDX file", offset=0, field="Signature")
    header, remarks = current_header(file)
    dirty = any(header.LogGuid)
    content = file
    if dirty:
        content = replayed = replay(file, header)
        remarks.append(
            f"it was not closed properly: {replayed.changes} changes of its log were made in memory, not in the file"
        )
    places, spoilt = regions(content, header)
    metadata = disk_metadata(content, places["metadata"])
    blocks = Blocks(content, metadata, places)
    with ExitStack() as stack:
        names, linkage = _named(metadata.parent) if metadata.parent is not None else ([], set[str]())
        found, missing = attempt(lambda: _parent(names, linkage, metadata, related)) if names else (None, None)
        name, parent = found or ("".join(names[:1]), None)
        if parent is not None:
            stack.callback(parent.close)
        disk = MappedSource(
            content,
            blocks,
            metadata.size,
            name="VHDX",
            ragged=metadata.block_size - 1,
            parent=parent.source if parent else None,
            traits=Traits(sector_size=metadata.logical_sector, sector_known=True),
        )
        stack.callback(file.close)
        return Image(
            "vhdx",
            disk,
            facts={
                "subformat": "differencing" if names else "fixed" if metadata.fixed else "dynamic",
                "unit": metadata.block_size,
                "backing": {"name": name, "format": "vhdx"} if names else None,
                "dirty": dirty,
                "corrupt": False,
                "logical_sector_size": metadata.logical_sector,
                "physical_sector_size": metadata.physical_sector,
                "disk_id": guid_text(metadata.disk_id),
                "data_write_guid": guid_text(header.DataWriteGuid),
                "creator": identifier.Creator.decode("utf-16-le", "replace").split("\0")[0],
            },
            warnings=(
                *remarks,
                *spoilt,
                *(f"the parent {name!r}: {said}" for said in (parent.warnings if parent else ())),
            ),
            check=lambda job: [*remarks, *spoilt, *blocks.damages(job)],
            close=stack.pop_all().close,
            missing=missing,
        )


def parents_named(file: Source) -> list[str]:
    """The names that the parent of a differencing disk may have.  Raises InvalidImage and UnsupportedError."""
    places, _ = regions(file, current_header(file)[0])
    locator = disk_metadata(file, places["metadata"]).parent
    return _named(locator)[0] if locator is not None else []


# ---------------------------------------------------------------------- the parent


def _named(locator: LocatorTexts) -> tuple[list[str], set[str]]:
    """The names that the parent may have, the likeliest first, and the ids that its data may: section 2.6.2.6.3."""
    if "parent_linkage" not in locator:
        raise InvalidImage("the parent locator names no parent", field="parent_linkage")
    linkage = {_guid_of(locator, key) for key in ("parent_linkage", "parent_linkage2") if key in locator}
    paths = [locator.get(key, "") for key in ("relative_path", "volume_path", "absolute_win32_path")]  # in this order
    names = [_folders(paths[0])]
    names += [paths[2]] if paths[2].startswith("/") else []  # of a maker that is no Windows
    names += [_folders(path).rsplit("/", 1)[-1] for path in paths]
    names = [name for name in dict.fromkeys(names) if name not in ("", ".", "..")]
    if not names:
        raise InvalidImage("the parent locator names no file", field="relative_path")
    return names, linkage


def _parent(names: Sequence[str], linkage: set[str], child: Metadata, related: Related) -> tuple[str, Image]:
    """The name that leads to the parent, and the parent: sections 2.6.2.4 and 2.6.2.6.3."""
    name = _name_there(names, related)
    parent = related.image(name, "parent", "vhdx")
    found, sector = parent.facts["data_write_guid"], parent.facts["logical_sector_size"]
    if found not in linkage:
        parent.close()
        raise InvalidImage(
            f"the parent {name!r} is not what it was when this image was made on it: its data has the id {found}",
            field="parent_linkage",
        )
    if sector != child.logical_sector:
        parent.close()
        raise InvalidImage(
            f"the parent {name!r} has sectors of {sector} bytes, and this image of {child.logical_sector}",
            field="LogicalSectorSize",
        )
    return name, parent


def _guid_of(locator: LocatorTexts, key: str) -> str:
    text = locator[key].strip("{}").lower()
    if len(text) != 36 or text.count("-") != 4:
        raise InvalidImage(f"{key} of the parent locator is no GUID", field=key)
    return text


def _name_there(names: Sequence[str], related: Related) -> str:
    """The name by which the parent is there: by its path from here, by its absolute path, or beside this image."""
    refused: NotAllowed | None = None
    for name in names:
        try:
            if related.exists(name, "parent"):
                return name
        except NotAllowed as error:
            refused = refused or error
    if refused is not None:
        raise refused
    return names[0]  # opening it will say that it is not there


def _folders(path: str) -> str:
    """A path of Windows with folders separated as here.  A drive goes with what stands before the last separator."""
    return path.replace("\\", "/").removeprefix("./")


# ---------------------------------------------------------------------- the blocks


class Blocks:
    """Where the blocks stand, by the BAT, which is read in pages."""

    def __init__(self, file: Source, metadata: Metadata, places: dict[str, Region]) -> None:
        bat = places["BAT"]
        if metadata.bat_entries * 8 > bat.length:
            raise InvalidImage(
                f"the BAT has room for {bat.length // 8} entries, the disk needs {metadata.bat_entries}",
                offset=bat.start,
                field="BAT",
            )
        self._file, self._metadata, self._bat = file, metadata, bat
        self._used = sorted((region for region in places.values() if region.length), key=lambda region: region.start)
        self._starts, self._ends = [region.start for region in self._used], [region.end for region in self._used]
        self._ratio = metadata.chunk_ratio
        self._distinct = False  # known of partially present blocks
        self._pages: Kept[int, Entries] = Kept(_BAT_KEPT, lambda page: page.nbytes)
        self._bitmaps: Kept[int, NDArray[np.uint8]] = Kept(_BITMAPS_KEPT, lambda bitmap: bitmap.nbytes)

    def mapping(self, offset: int, length: int, /) -> Mapping:
        size = self._metadata.block_size
        first = offset // size
        last = min((offset + length - 1) // size, first // _PAGE * _PAGE + _PAGE - 1)
        entries = self._entries(first, last + 1)
        if first == last and (one := self._one(int(entries[0]), offset, length)):
            return one
        if not entries.any():
            return Mapping.uniform(offset, min(offset + length, (last + 1) * size) - offset, Kind.HOLE)
        kinds = _KINDS[(entries & 7).astype(np.intp)]
        partial = kinds == _PARTIALLY
        if partial.any():
            inside = self._ratio - first % self._ratio  # blocks up to the end of the chunk
            entries, kinds, partial = entries[:inside], kinds[:inside], partial[:inside]
        places = self._places(first, entries, kinds)
        whole = self._partial(first, kinds, places) if partial.any() else cells(first * size, size, kinds, places)
        return whole.clip(offset, min(offset + length, whole.end) - offset)

    def _one(self, entry: int, offset: int, length: int) -> Mapping | None:
        """The same for a range within one block, as most reads are; None where it takes a closer look."""
        kind, place = int(_KINDS[entry & 7]), entry & int(_OFFSET)
        if kind in (Kind.HOLE, Kind.ZERO):
            return Mapping.uniform(offset, length, Kind(kind))
        size = self._metadata.block_size
        if kind != Kind.STORED or place + size > self._file.size or self._under(place, size):
            return None
        return Mapping.uniform(offset, length, Kind.STORED, place + offset % size)

    def unpack(self, place: int, /) -> bytes:
        """Never: no block is packed."""
        raise InvalidImage("a VHDX block is never packed", offset=place)

    def _entries(self, first: int, end: int) -> Entries:
        """The BAT entries of payload blocks of one page."""
        page = first // _PAGE
        entries = self._pages.of(page, self._page)
        return entries[first - page * _PAGE : end - page * _PAGE]

    def _page(self, page: int) -> Entries:
        first, ratio = page * _PAGE, self._ratio  # a page begins with a chunk: no ratio is above 32768
        count = min(_PAGE, self._metadata.blocks - first)
        chunks = np.zeros((-(-count // ratio), ratio + 1), "<u8")  # the last of each is that of the sector bitmap
        table = chunks.reshape(-1)[: count + (count - 1) // ratio]
        start = self._bat.start + first // ratio * (ratio + 1) * 8
        read_exactly_into(self._file, start, table.view(np.uint8).data, "BAT")
        return chunks[:, :ratio].reshape(-1)[:count]

    def _places(self, first: int, entries: Entries, kinds: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Offsets in the file, checked where there is something."""
        size, parent = self._metadata.block_size, self._metadata.parent
        bad = kinds == _RESERVED
        if parent is None:
            bad |= kinds == _PARTIALLY
        self._refuse(first, bad, "is in a state that is none")
        stored = (kinds == Kind.STORED) | (kinds == _PARTIALLY)
        starts = np.where(stored, entries & _OFFSET, np.uint64(0))
        self._refuse(first, stored & (starts >= self._file.size), "lies behind the end of the file")
        places = starts.astype(np.int64)
        following = np.searchsorted(self._ends, places, "right")  # the first region that ends behind a block's start
        overlaps = stored & (following < np.searchsorted(self._starts, places + size, "left"))
        if overlaps.any():
            region = self._used[int(following[overlaps.argmax()])]
            self._refuse(first, overlaps, f"overlaps the {region.name}")
        return places

    def _under(self, place: int, length: int) -> Region | None:
        """The region that a range of the file overlaps."""
        following = bisect_right(self._ends, place)
        return self._used[following] if following < bisect_left(self._starts, place + length) else None

    def _refuse(self, first: int, bad: NDArray[np.bool_], what: str) -> None:
        if bad.any():
            block = first + int(bad.argmax())
            at = self._bat.start + (block + block // self._ratio) * 8
            raise InvalidImage(f"block {block} of the disk {what}", offset=at, field="BAT entry")

    def _partial(self, first: int, kinds: NDArray[np.uint8], places: NDArray[np.int64]) -> Mapping:
        """The mapping of blocks of one chunk, some of which are partially present."""
        self._refuse_shared()
        size, sector = self._metadata.block_size, self._metadata.logical_sector
        per_block = size // sector
        chunk, ahead = divmod(first, self._ratio)
        bitmap = self._bitmaps.of(chunk, self._bitmap)
        octets = bitmap[ahead * per_block // 8 : (ahead + len(kinds)) * per_block // 8]
        bits = np.unpackbits(octets, bitorder="little").reshape(len(kinds), per_block)
        bits[kinds != _PARTIALLY] = 0
        flat = bits.reshape(-1)
        fresh = np.ones(len(flat), bool)
        np.not_equal(flat[1:], flat[:-1], out=fresh[1:])
        fresh[::per_block] = True
        heads = np.flatnonzero(fresh)
        block, inside = np.divmod(heads, per_block)
        own = np.where(flat[heads] == 1, np.uint8(Kind.STORED), np.uint8(Kind.HOLE))
        return Mapping(
            first * size + np.append(heads, len(flat)) * sector,
            np.where(kinds[block] == _PARTIALLY, own, kinds[block]),
            places[block] + inside * sector,
            np.zeros(len(heads), np.int64),
        )

    def _refuse_shared(self) -> None:
        """Raise where partially present blocks must share room in the file.  Each may be thousands of runs: blocks
        that need no room of their own would let a small file become a map of any length.
        """
        if self._distinct:
            return
        blocks, count = self._metadata.blocks, 0
        for first in range(0, blocks, _PAGE):
            entries = self._entries(first, min(first + _PAGE, blocks))
            count += int(((entries & 7) == 7).sum())
        if count * self._metadata.block_size > self._file.size:
            raise InvalidImage(
                f"{count} blocks are partially present, more than the file has room for",
                offset=self._bat.start,
                field="BAT",
            )
        self._distinct = True

    def _bitmap(self, chunk: int) -> NDArray[np.uint8]:
        """A sector bitmap block: section 2.5."""
        at = self._bat.start + ((chunk + 1) * (self._ratio + 1) - 1) * 8
        entry = int.from_bytes(read_exactly(self._file, at, 8, "BAT"), "little")
        place = entry & int(_OFFSET)
        if entry & 7 != _BITMAP_PRESENT:
            raise InvalidImage("blocks are partially present and have no sector bitmap", offset=at, field="BAT entry")
        region = self._under(place, MiB)
        if region is not None:
            raise InvalidImage(f"a sector bitmap overlaps the {region.name}", offset=at, field="BAT entry")
        return np.frombuffer(read_exactly(self._file, place, MiB, "sector bitmap"), np.uint8)

    # ------------------------------------------------------------------ proving

    def damages(self, job: Job) -> list[str]:
        """What contradicts itself in the BAT: a sentence each, at most one a page."""
        found = []
        blocks, size = self._metadata.blocks, self._metadata.block_size
        job.begin("checking", blocks * size)
        for first in range(0, blocks, _PAGE):
            count = min(_PAGE, blocks - first)
            entries = self._entries(first, first + count)
            kinds = _KINDS[(entries & 7).astype(np.intp)]
            if (entries & _SPARE).any():
                found.append(f"entries of blocks between {first} and {first + count - 1} have bits that mean nothing")
            try:
                places = np.sort(self._places(first, entries, kinds)[(kinds == Kind.STORED) | (kinds == _PARTIALLY)])
                if (np.diff(places) < size).any():
                    found.append(f"blocks between {first} and {first + count - 1} overlap each other in the file")
            except InvalidImage as error:
                found.append(str(error))
            job.advance(count * size)
        return found
