"""Random-access bytes: what can be read at offsets (Source) and what can be written at offsets (Sink).

There is no cursor anywhere: every call names its offset, so a source is shared by any number of threads.  Ask for
extents first and move bytes only where they are not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ferrotype.errors import InvalidImage
from ferrotype.units import MiB

if TYPE_CHECKING:
    from ferrotype.extents import ExtentMap

__all__ = ["Sink", "Source", "Traits", "read", "read_exactly", "read_exactly_into"]


@dataclass(frozen=True, slots=True)
class Traits:
    """What a source or sink is like.  Every default is the safe answer."""

    sector_size: int = 512  # bytes; logical geometry, recorded in a snapshot
    align: int = 1  # bytes; offsets, lengths and buffers must be multiples of it
    preferred_size: int = MiB  # bytes; requests of about this size go fastest
    parallel: int = 1 << 16  # calls that may be in flight at once
    ordered: bool = False  # sinks: offsets must ascend
    concurrent: bool = False  # sinks: several writes get on at once; where not, they only wait for each other
    unit: int = 1  # bytes; sinks: writes start and end at multiples of it, or at the end of the disk
    blank: bool = False  # sinks: everything not yet written is known to read as zeros
    sector_known: bool = False  # the sector size is the device's own, not a guess for a plain file


@runtime_checkable
class Source(Protocol):
    """Bytes that can be read at offsets."""

    @property
    def size(self) -> int: ...

    @property
    def traits(self) -> Traits: ...

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        """Fill all of ``buf`` from ``offset``.  Raises ReadError where that cannot be done."""

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        """What is known of the range without reading it; the map covers exactly the range."""

    def close(self) -> None: ...


@runtime_checkable
class Sink(Protocol):
    """Bytes that can be written at offsets."""

    @property
    def size(self) -> int: ...

    @property
    def traits(self) -> Traits: ...

    def write(self, offset: int, data: memoryview, /) -> None:
        """Write all of ``data``.  Raises WriteError where that cannot be done."""

    def write_zeros(self, offset: int, length: int, /) -> None:
        """Make the range read as zeros; its storage may be given back."""

    def flush(self) -> None:
        """On return everything written is durable."""

    def close(self) -> None: ...


def read(source: Source, offset: int, length: int) -> bytes:
    """``length`` bytes at ``offset``, which must lie inside the source.  Meant for metadata, not for bulk."""
    buf = bytearray(length)
    source.read_into(offset, memoryview(buf))
    return bytes(buf)


def read_exactly(source: Source, offset: int, length: int, what: str) -> bytes:
    """Like ``read``, for offsets that came from disk: raises InvalidImage naming ``what`` if it lies outside."""
    _check_on_disk(source, offset, length, what)
    return read(source, offset, length)


def read_exactly_into(source: Source, offset: int, buf: memoryview, what: str) -> None:
    """Like ``read_exactly``, into memory that is there already: for tables of many MiB."""
    _check_on_disk(source, offset, len(buf), what)
    source.read_into(offset, buf)


def _check_on_disk(source: Source, offset: int, length: int, what: str) -> None:
    if offset < 0 or length < 0 or offset + length > source.size:
        raise InvalidImage(
            f"{what} lies outside the disk ({length} bytes at {offset}, the disk has {source.size})", offset=offset
        )
