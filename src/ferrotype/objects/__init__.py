"""Named, immutable byte strings: what a repository is kept in, be it one file, a folder or a bucket.

An object is written once under a name that nothing else will ever have, read in ranges, and deleted whole.  Order is
the commit protocol: what an object refers to is put and flushed before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Bytes", "ObjectInfo", "ObjectStore", "ObjectTraits", "Parts", "SpaceReport", "Streamed", "length_of"]

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Streamed:
    """The parts of an object that are made while they are stored; only their length is known before."""

    length: int
    make: Callable[[], Iterator[Bytes]]

    def __iter__(self) -> Iterator[Bytes]:
        return self.make()


Parts = Sequence[Bytes] | Streamed


def length_of(parts: Parts) -> int:
    """Bytes that the parts have together."""
    return parts.length if isinstance(parts, Streamed) else sum(map(len, parts))


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object: name and length in bytes."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class ObjectTraits:
    """What a store is like."""

    max_object: int = 1 << 40  # bytes
    parallel: int = 16  # reads that may be in flight at once


@dataclass(frozen=True, slots=True)
class SpaceReport:
    """What ``reclaim`` did: bytes given back to the file system, bytes that only compacting would give back."""

    freed: int
    dead: int
    readers: bool = False  # nothing was given back, since others read the store: a later call makes up for it


class ObjectStore(Protocol):
    """A flat store.  Names are ``kind`` or ``kind/id`` in lower-case ASCII, at most 48 characters."""

    @property
    def traits(self) -> ObjectTraits: ...

    def put(self, name: str, parts: Parts, /) -> None:
        """Store the parts, one after the other, as one object.

        Atomic: after a crash it is there whole or not at all.  Durable once ``flush`` has returned.  Raises
        ObjectExists for a known name, WriteError where the storage fails.
        """

    def get(self, name: str, /, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of the range (to the end where ``length`` is None).  Not proven: their reader does that."""

    def size(self, name: str, /) -> int:
        """Length of an object in bytes.  Raises ObjectMissing."""

    def list(self, prefix: str, /) -> Iterator[ObjectInfo]:
        """Objects whose name starts with ``prefix``, by name."""

    def delete(self, name: str, /) -> None:
        """Forget an object; final once ``flush`` has returned.  Raises ObjectMissing."""

    def flush(self) -> None:
        """A barrier: on return everything put or deleted before is durable and will be found by the next opening."""

    def check(self, name: str, /, *, from_medium: bool = False) -> None:
        """Read an object whole and compare it with its stored checksum.  Raises CorruptObject.

        With ``from_medium`` it is made durable first, and read from the storage rather than from memory, as far as
        the system can do that.
        """

    def refresh(self) -> bool:
        """Of a store open for reading: go on to the newest state; False where it is the one in use.

        What was deleted meanwhile is missing afterwards, what was moved is found in its new place.
        """

    def reclaim(self) -> SpaceReport:
        """Give the space of deleted objects back where that can be done in place."""

    def bring_forward(self, names: Collection[str], others: str, /) -> bool:
        """Have named objects stand before all whose names start with ``others``, so that no lost region takes both
        ends.

        It is durable on return.  False where it cannot be done now: others read the store, or there is no room.
        """

    def close(self) -> None: ...
