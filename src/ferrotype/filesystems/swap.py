"""Linux swap space: everything but its header is free.

    page 0                                              page 1 .. last_page             behind
    +--------+-------------+-----------------+--------+------------------------- - -+- - - - -
    | 1024   | header      | bad pages ...   | magic  | pages that may be swapped to | not ours
    +--------+-------------+-----------------+--------+------------------------- - -+- - - - -
    0        1024                            page-10  page

    magic   "SWAPSPACE2"   version 1: the header below, in the byte order of the machine that made it
            "SWAP-SPACE"   version 0: page 0 is a bitmap of the usable pages, up to the magic
            "S1SUSPEND" .. the machine hibernated into it, nothing of it may be left out

Layout as in mkswap(8) and ``union swap_header`` of the Linux kernel's <linux/swap.h>; the signatures of hibernation
as in kernel/power/swap.c.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Annotated, Final

import numpy as np

from ferrotype.block import Source, read, read_exactly
from ferrotype.errors import DeviceError, FormatError, InvalidImage
from ferrotype.extents import BitmapRuns, ExtentMap, Offsets, State
from ferrotype.filesystems import Claims, Facts
from ferrotype.records import Record, b16, record, u32
from ferrotype.units import KiB

__all__ = ["Swap", "open", "probe"]


@record(endian="<", size=44)
class HeaderLittle(Record):
    """``union swap_header``, member ``info``, from byte 1024 on, up to the label."""

    version: u32
    last_page: u32  # counted from 0, so also the number of pages that may be used
    nr_badpages: u32
    sws_uuid: b16
    sws_volume: b16


@record(endian=">", size=44)
class HeaderBig(Record):
    """The same, made on a big-endian machine."""

    version: u32
    last_page: u32
    nr_badpages: u32
    sws_uuid: Annotated[bytes, "16s"]
    sws_volume: Annotated[bytes, "16s"]


_PAGE_SIZES: Final = (4 * KiB, 8 * KiB, 16 * KiB, 32 * KiB, 64 * KiB)
_MAGIC_SIZE: Final = 10
_VERSION_0: Final = b"SWAP-SPACE"
_VERSION_1: Final = b"SWAPSPACE2"
_SUSPENDED: Final = (b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001")
_TUX_ON_ICE: Final = bytes.fromhex("edc302e99856e50c")  # at byte 0; it moves the swap magic away
_HIBERNATED: Final = "a computer hibernated into it, and resumes from it"


def _find(source: Source) -> tuple[int, bytes] | None:
    """Page size and magic, or None."""
    head = read(source, 0, min(source.size, _PAGE_SIZES[-1]))
    if head.startswith(_TUX_ON_ICE):
        return _PAGE_SIZES[0], _TUX_ON_ICE
    for page_size in _PAGE_SIZES:
        magic = head[page_size - _MAGIC_SIZE : page_size]
        if magic in (_VERSION_0, _VERSION_1):
            return page_size, magic
        for suspended in _SUSPENDED:
            if magic.startswith(suspended):
                return page_size, suspended
    return None


class Swap:
    """An opened swap space."""

    def __init__(self, source: Source) -> None:
        self._source = source
        found = _find(source)
        if found is None:
            raise InvalidImage("not a swap space", offset=0)
        self._page_size, magic = found
        self._first, self._end = np.zeros(0, np.int64), np.zeros(0, np.int64)
        label: str | None = None
        name: str | None = None
        unclean: str | None = None
        if magic == _VERSION_0:
            pages = self._read_bitmap()
        elif magic == _VERSION_1:
            header = self._header()
            if header is None:
                raise InvalidImage("a swap header of unknown version", offset=KiB, field="version")
            label, name, pages = _text(header.sws_volume), _uuid(header.sws_uuid), header.last_page + 1
            self._first, self._end = np.array([1], np.int64), np.array([pages], np.int64)
        else:
            unclean = _HIBERNATED
            pages = source.size // self._page_size
            if magic != _TUX_ON_ICE and (header := self._header()) is not None:
                label, name, pages = _text(header.sws_volume), _uuid(header.sws_uuid), header.last_page + 1
        size = pages * self._page_size
        if unclean is None and size > source.size:
            unclean = f"the swap space is {size - source.size} bytes longer than its volume"
        self.facts = Facts(
            kind="swsuspend" if unclean is _HIBERNATED else "swap",
            label=label,
            uuid=name,
            block_size=self._page_size,
            size=size,
            unclean=unclean,
        )

    def _header(self) -> HeaderLittle | HeaderBig | None:
        """The version 1 header in whichever byte order makes sense, None where neither does."""
        raw = read_exactly(self._source, KiB, HeaderLittle.SIZE, "the swap header")
        for kind in (HeaderLittle, HeaderBig):
            header = kind.unpack(raw)
            if header.version == 1 and header.last_page > 0:
                return header
        return None

    def _read_bitmap(self) -> int:
        """Take the usable pages from the version 0 bitmap; the number of pages up to the last usable one.

        The bitmap is made of machine words.  Page 0, the bitmap itself, is the one that is never usable, and page 1
        is: the byte that ends in those two bits tells their width and order.
        """
        packed = np.frombuffer(read(self._source, 0, self._page_size), np.uint8)[: self._page_size - 16]
        for width in (1, 4, 8):
            if packed[width - 1] & 3 == 2:
                ordered = packed[: len(packed) // width * width].reshape(-1, width)[:, ::-1].reshape(-1)
                break
        else:
            raise InvalidImage("the bitmap of the swap space offers its own page, or not the next", offset=0)
        runs = BitmapRuns()
        runs.add(np.ascontiguousarray(ordered), len(ordered) * 8)
        self._first, self._end = runs.finish()
        if not len(self._end):
            raise InvalidImage("the swap space has no pages", offset=0)
        return int(self._end[-1])

    def allocation(self) -> ExtentMap:
        """FREE but for the header's page; after hibernation nothing is."""
        starts: Offsets = self._first * self._page_size
        return ExtentMap.from_runs(0, self._source.size, starts, self._end * self._page_size, State.FREE)

    def swap_files(self) -> ExtentMap:
        """All DATA: there are no files."""
        return ExtentMap.uniform(0, self._source.size)

    def files_at(self, starts: Offsets, ends: Offsets, /) -> tuple[str, ...]:  # noqa: ARG002
        return ()

    def claims(self) -> Iterator[Claims]:
        """See FileSystem.  The header's page: what was swapped out is worth nothing once the machine is off."""
        yield Claims(np.zeros(1, np.int64), np.array([self._page_size], np.int64))


def _text(raw: bytes) -> str | None:
    return raw.split(b"\0")[0].decode("utf-8", "replace") or None


def _uuid(raw: bytes) -> str | None:
    return str(uuid.UUID(bytes=raw)) if any(raw) else None


def probe(source: Source, /) -> bool:
    """Whether one of swap's signatures stands at the end of a page."""
    try:
        return _find(source) is not None
    except (FormatError, DeviceError):
        return False


def open(source: Source, /) -> Swap:
    """Open the swap space on ``source``.  Raises InvalidImage."""
    return Swap(source)
