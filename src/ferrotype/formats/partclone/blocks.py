"""Where the blocks of a partclone image stand: the n-th block in use is the n-th in the file.

    bitmap   1 1 0 1 0 0 1 ...           page by page: bits counted once, in order, and kept as one number a page
    used     0 1   2     3               number of a used block: the bits before it
    file     | 0 | 1 | sum | 2 | 3 | sum | ...

``Bitmap`` counts, ``Strips`` takes the checksums out from between the blocks, ``Blocks`` maps the disk onto that.
"""

from __future__ import annotations

from threading import Lock
from typing import Final

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from ferrotype.block import Source, Traits, read
from ferrotype.block.file import check_read
from ferrotype.errors import InvalidImage, ReadError
from ferrotype.extents import ExtentMap
from ferrotype.formats.mapped import Kept, Kind, Mapping
from ferrotype.units import KiB, MiB

__all__ = ["Bitmap", "Blocks", "Strips"]

PAGE: Final = 64 * KiB  # bytes of a bitmap of bits that are looked at together; 2 GiB of disk at 4 KiB a block
PAGE_BLOCKS: Final = 8 * PAGE
_KEPT: Final = 8 * MiB  # bytes of pages
_TOGETHER: Final = 64  # pages that are counted together
_LOOK: Final = 4096  # pages that are looked over for others like the first
_BITS: Final = np.array([n.bit_count() for n in range(256)], np.uint8)
_BOUNCE: Final = 64 * KiB  # bytes of a strip from which on it is read straight to its place
_WINDOW: Final = 2 * MiB  # bytes of blocks and checksums read together


class Bitmap:
    """Which blocks are in the image.  Pages are counted in order, each once; that proves the bitmap as well."""

    def __init__(
        self, file: Source, at: int, size: int, blocks: int, end: int, crc: int | None = None, *, octets: bool = False
    ) -> None:
        """``size`` bytes at ``at``: a bit, or with ``octets`` a byte, for each block; 0 where all are in the image.

        ``end`` is where the blocks begin, ``crc`` what the file says of a bitmap of bits.
        """
        self._file, self._at = file, at
        self.size, self.blocks, self.end = size, blocks, end
        self.every = size == 0  # no bitmap: every block is in the image
        self._per_block = octets
        self._pages: Kept[int, bytes] = Kept(_KEPT, len)
        self._ranks = np.zeros(1, np.int64)  # used blocks before each page, as far as they are counted
        self._counted = 0  # pages
        self._crc_wanted, self._crc = crc, 0
        self._lock = Lock()

    @property
    def pages(self) -> int:
        return -(-self.blocks // PAGE_BLOCKS)

    def page(self, number: int) -> bytes:
        """The bits of a page, the first block's lowest; bits behind the last block are 0."""
        return self._pages.of(number, self._load)

    def _load(self, number: int) -> bytes:
        bits, _ = self._read(number)
        return bits

    def _read(self, number: int) -> tuple[bytes, bytes]:
        """The bits of a page, and the bytes that the file has for it."""
        count = min(PAGE_BLOCKS, self.blocks - number * PAGE_BLOCKS)
        if self._per_block:
            octets = np.frombuffer(read(self._file, self._at + number * PAGE_BLOCKS, count), np.uint8)
            # some old images hold other values than 0 and 1; the program that wrote them takes 1 alone for used
            return np.packbits(octets == 1, bitorder="little").tobytes(), b""
        raw = read(self._file, self._at + number * PAGE, -(-count // 8))
        spare = -count % 8
        return (raw[:-1] + bytes([raw[-1] & 0xFF >> spare]) if spare else raw), raw

    def rank(self, page: int) -> int:
        """Used blocks before a page.  Raises InvalidImage where the bitmap is damaged, once all of it was read."""
        if self.every:
            return min(page * PAGE_BLOCKS, self.blocks)
        if page > self._counted:
            with self._lock:
                self._count(page)
        return int(self._ranks[page])

    def total(self) -> int:
        """Used blocks."""
        return self.rank(self.pages)

    def _count(self, page: int) -> None:
        """Count the pages before ``page``, and perhaps some more."""
        ranks = np.zeros(self.pages + 1, np.int64) if self._counted == 0 else self._ranks
        while self._counted < page:
            first = self._counted
            raw, counts = self._counts(first, min(self.pages, first + _TOGETHER))
            last = first + len(counts)
            ranks[first + 1 : last + 1] = ranks[first] + np.cumsum(counts)
            self._crc = isal_zlib.crc32(raw, self._crc)
            self._ranks, self._counted = ranks, last
        done = self._counted == self.pages
        if done and self._crc_wanted is not None and ~self._crc & 0xFFFFFFFF != self._crc_wanted:
            self._counted, self._crc, self._ranks = 0, 0, np.zeros(1, np.int64)
            raise InvalidImage("the bitmap of used blocks does not match its checksum", offset=self._at)

    def _counts(self, first: int, last: int) -> tuple[bytes, NDArray[np.int64]]:
        """The bytes that the file has for some pages, and the used blocks of each page."""
        if self._per_block or last == self.pages:
            last = first + 1
            bits, raw = self._read(first)
            return raw, np.array([count_bits(bits)], np.int64)
        raw = read(self._file, self._at + first * PAGE, (last - first) * PAGE)
        words = np.frombuffer(raw, np.uint64).reshape(last - first, PAGE // 8)
        counts = np.zeros(last - first, np.int64)
        for number in np.flatnonzero(words.any(axis=1)).tolist():
            counts[number] = count_bits(raw[number * PAGE : (number + 1) * PAGE])
        return raw, counts

    def alike(self, page: int, last: int) -> tuple[bool, int] | None:
        """Where no block of a page is used, or each: which of the two, and the first page that is otherwise.

        Looks as far as ``last``.
        """
        self.rank(last + 1)
        counts = np.diff(self._ranks[page : min(last, page + _LOOK) + 2])
        used = int(counts[0])
        if used not in (0, PAGE_BLOCKS):
            return None
        other = np.flatnonzero(counts != used)
        return used > 0, page + (int(other[0]) if len(other) else len(counts))

    def block(self, rank: int) -> int:
        """The block that is the used one number ``rank``; ``rank`` is less than the total."""
        if self.every:
            return rank
        self.total()
        page = int(np.searchsorted(self._ranks, rank, "right")) - 1
        bits = np.unpackbits(np.frombuffer(self.page(page), np.uint8), bitorder="little")
        return page * PAGE_BLOCKS + int(np.flatnonzero(bits)[rank - int(self._ranks[page])])


def count_bits(data: bytes) -> int:
    """Bits that are set."""
    return int(_BITS[np.frombuffer(data, np.uint8)].sum(dtype=np.int64))


class Blocks:
    """The layout over ``Strips``: used blocks stand there, the rest is not in the image."""

    def __init__(self, bitmap: Bitmap, block_size: int, size: int) -> None:
        self._bitmap, self._block, self._size = bitmap, block_size, size

    def mapping(self, offset: int, length: int, /) -> Mapping:
        bitmap, size = self._bitmap, self._block
        covered = bitmap.blocks * size
        if offset >= covered:
            return Mapping.uniform(offset, length, Kind.ZERO)
        if bitmap.every:
            return Mapping.uniform(offset, min(length, covered - offset), Kind.STORED, offset)
        first = offset // size
        page, inside = divmod(first, PAGE_BLOCKS)
        alike = bitmap.alike(page, min(offset + length - 1, covered - 1) // size // PAGE_BLOCKS)
        if alike is not None:
            used_all, other = alike
            stop = min(other * PAGE_BLOCKS * size, covered, offset + length)
            place = (bitmap.rank(page) + inside) * size + offset % size if used_all else 0
            return Mapping.uniform(offset, stop - offset, Kind.STORED if used_all else Kind.ZERO, place)
        last = min(-(-(offset + length) // size), (page + 1) * PAGE_BLOCKS, bitmap.blocks)
        data = bitmap.page(page)
        head = inside // 8
        lead = first % 8
        bits = np.unpackbits(
            np.frombuffer(data, np.uint8)[head : -(-(inside + last - first) // 8)], bitorder="little"
        )
        rank = bitmap.rank(page) + count_bits(data[:head]) + int(bits[:lead].sum())
        bits = bits[lead : lead + last - first]
        edges = np.concatenate(([0], np.flatnonzero(bits[1:] != bits[:-1]) + 1, [len(bits)])).astype(np.int64)
        used = bits[edges[:-1]] != 0
        before = np.cumsum(np.where(used, np.diff(edges), 0)) - np.where(used, np.diff(edges), 0)
        mapping = Mapping(
            (first + edges) * size,
            np.where(used, Kind.STORED, Kind.ZERO).astype(np.uint8),
            np.where(used, (rank + before) * size, 0),
            np.zeros(len(used), np.int64),
        )
        return mapping.clip(offset, min(length, mapping.end - offset))

    def unpack(self, place: int, /) -> bytes:
        raise InvalidImage(f"nothing in a partclone image is compressed ({place})")


class Strips:
    """The blocks of an image one behind the other, without the checksums between, as far as the file goes."""

    def __init__(self, file: Source, at: int, block_size: int, per_sum: int, sum_size: int, limit: int) -> None:
        self.file, self.at, self.block_size, self.sum_size = file, at, block_size, sum_size
        self.strip = block_size * per_sum if sum_size and per_sum else max(limit, block_size, 1)
        self.traits = Traits(parallel=file.traits.parallel)
        whole, rest = divmod(max(file.size - at, 0), self.strip + sum_size)
        self._size = whole * self.strip + min(rest, self.strip)
        if not sum_size:
            self._size = max(file.size - at, 0)

    @property
    def size(self) -> int:
        return self._size

    def place(self, offset: int) -> int:
        """Where a byte of the blocks stands in the file."""
        return self.at + offset + offset // self.strip * self.sum_size

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        check_read("partclone image", self._size, offset, len(buf))
        end = offset + len(buf)
        at = offset
        while at < end:
            number, inside = divmod(at, self.strip)
            if self.sum_size and self.strip < _BOUNCE and not inside and end - at >= 2 * self.strip:
                count = min((end - at) // self.strip, max(_WINDOW // (self.strip + self.sum_size), 1))
                self._read_many(number, count, buf[at - offset : at - offset + count * self.strip])
                at += count * self.strip
                continue
            stop = min(end, at - inside + self.strip) if self.sum_size else end
            try:
                self.file.read_into(self.place(at), buf[at - offset : stop - offset])
            except ReadError as error:
                error.start += at - self.place(at)
                raise
            at = stop

    def _read_many(self, number: int, count: int, out: memoryview) -> None:
        """Whole strips, read together with the checksums between them."""
        step = self.strip + self.sum_size
        raw = np.empty(count * step - self.sum_size, np.uint8)
        start = self.at + number * step
        try:
            self.file.read_into(start, raw.data)
        except ReadError as error:  # its place among the blocks, never behind the damage
            error.start = number * self.strip + (error.start - start) // step * self.strip
            raise
        rows: NDArray[np.uint8] = np.lib.stride_tricks.as_strided(raw, (count, self.strip), (step, 1))
        np.frombuffer(out, np.uint8).reshape(count, self.strip)[:] = rows

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return ExtentMap.uniform(offset, length)

    def close(self) -> None:
        """Nothing: the image owns the file."""
