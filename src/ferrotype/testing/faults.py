"""Storage that fails on purpose: the Nth operation is refused, done by half, or is where the power goes.

    faults = Faults(at=17, how=Fault.TORN)
    Container.open(path, writable=True, opener=faults.opener)     ... PowerCut
    Container.open(path)                                          what a machine finds after its restart

Operations are creations, writes, syncs, truncations, holes, publications and removals, counted over all files that
one plan opened.  Reads are counted apart from them.  ``recording`` has power cuts by the thousand.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Final

from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import DeviceError, ReadError, WriteError
from ferrotype.objects import Bytes
from ferrotype.objects.volumes import PosixFile

__all__ = ["FailingDisk", "Fault", "Faults", "PowerCut"]

_PAGE: Final = 4096  # bytes: what a kernel writes back on its own, in any order


class FailingDisk(MemoryDisk):
    """A disk with ranges (start, length) that cannot be read; like most, it does not say which of a read it was."""

    def __init__(self, content: bytes | bytearray, bad: Sequence[tuple[int, int]]) -> None:
        super().__init__(content)
        self.bad = bad
        self.reads: list[tuple[int, int]] = []  # all that were asked for, start and length
        self.failures = 0

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        self.reads.append((offset, len(buf)))
        if any(start < offset + len(buf) and start + length > offset for start, length in self.bad):
            self.failures += 1
            buf[:] = b"\xdd" * len(buf)  # what a drive leaves behind when it fails
            raise ReadError("disk", offset, len(buf), "medium error")
        super().read_into(offset, buf)


class PowerCut(Exception):
    """The machine has stopped: no operation after the cut reaches storage."""


class Fault(enum.Enum):
    """What happens at the chosen operation, or read."""

    REFUSED = "refused"  # it raises WriteError, later ones work
    SHORT = "short"  # a write stores its first half and raises WriteError
    FULL = "full"  # it raises, and so does all later writing and creating until ``relieve``
    GONE = "gone"  # it raises, and so does everything after it
    UNSYNCED = "unsynced"  # a sync raises; what it should have covered is seen until memory is dropped, never stored
    LOST = "lost"  # the power goes before it
    TORN = "torn"  # the power goes in the middle of it
    DROPPED = "dropped"  # the power goes, and of what was not synced only some pages were stored
    UNREADABLE = "unreadable"  # the read raises DeviceError, later ones work
    BAD = "bad"  # the read raises DeviceError, and so does every later one of the same bytes
    BLIND = "blind"  # the read raises DeviceError, and so do all later ones; writing works

    @property
    def of_reads(self) -> bool:
        return self in (Fault.UNREADABLE, Fault.BAD, Fault.BLIND)


Change = tuple[int, bytes] | int  # a write, or a truncation as the new size


@dataclass(slots=True)
class _Pages:
    """What storage holds of a file that is seen otherwise."""

    kept: bytearray
    since: list[Change] = field(default_factory=list)  # done since the last sync


class Faults:
    """A plan of one fault; ``operations`` and ``reads`` count what was done.  With ``at`` negative nothing fails."""

    def __init__(self, *, at: int = -1, how: Fault = Fault.LOST, seed: int = 0) -> None:
        self.operations = 0
        self.reads = 0
        self.kinds: list[str] = []  # of the operations
        self.cut = False
        self.struck = False  # the fault has happened
        self._relieved = False
        self._bad: tuple[Path | None, int, int] = None, 0, 0  # file, first byte, end
        self._at = at
        self._how = how
        self._rng = random.Random(seed)  # noqa: S311  repeatable
        self._files: list[FaultyFile] = []
        self._pages: dict[Path, _Pages] = {}
        self._lock = Lock()

    def opener(self, path: Path, /, *, writable: bool, create: bool = False) -> FaultyFile:
        """An ``Opener`` for a container."""
        opened: list[FaultyFile] = []
        if create:
            self.step("create", lambda: opened.append(FaultyFile(self, path, writable=writable, create=True)))
        else:
            opened.append(FaultyFile(self, path, writable=writable, create=False))
        self._files += opened
        return opened[0]

    def close(self) -> None:
        """Close what the process that was cut has left open, as its end does."""
        for file in self._files:
            file.close()

    def power_off(self) -> None:
        """Files are what storage holds of them, where a sync had failed."""
        for path, pages in self._pages.items():
            if self.struck and path.exists():
                path.write_bytes(pages.kept)

    def relieve(self) -> None:
        """A full disk has room again."""
        self._relieved = True

    @property
    def follows_pages(self) -> bool:
        return self._how in (Fault.DROPPED, Fault.UNSYNCED)

    def step(self, kind: str, whole: Callable[[], None], half: Callable[[], None] | None = None) -> None:
        """One operation, or the fault in its place."""
        with self._lock:
            if self.cut:
                raise PowerCut
            number, self.operations = self.operations, self.operations + 1
            self.kinds.append(kind)
            if self._how is Fault.GONE and self.struck:
                raise WriteError("the device is gone on purpose")
            if self._how is Fault.FULL and self.struck and not self._relieved and kind in ("write", "create"):
                raise WriteError("the disk is full on purpose")
            if number != self._at or self._how.of_reads or (self._how is Fault.UNSYNCED and kind != "sync"):
                whole()
                return
            self.struck = True
            if half is not None and self._how in (Fault.SHORT, Fault.TORN):
                half()
            if self._how in (Fault.REFUSED, Fault.SHORT, Fault.FULL, Fault.GONE, Fault.UNSYNCED):
                raise WriteError(f"operation {number} was refused on purpose")
            self.cut = True
            if self._how is Fault.DROPPED:
                for file in self._files:
                    file.forget(self._rng)
            raise PowerCut

    def look(self, path: Path, start: int, end: int) -> None:
        """One read of some bytes, or the fault in its place."""
        with self._lock:
            number, self.reads = self.reads, self.reads + 1
            if self._how.of_reads and number == self._at:
                self.struck = True
                self._bad = path, start, end
                raise DeviceError(f"read {number} failed on purpose")
            where, low, high = self._bad
            if self._how is Fault.BAD and where == path and start < high and end > low:
                raise DeviceError(f"bytes from {low} on cannot be read, on purpose")
            if self.struck and self._how in (Fault.BLIND, Fault.GONE):
                raise DeviceError("the device is gone on purpose")

    def pages(self, file: FaultyFile) -> _Pages:
        """What storage holds of a file."""
        if file.path not in self._pages:
            self._pages[file.path] = _Pages(bytearray(file.content()))
        return self._pages[file.path]


class FaultyFile(PosixFile):
    """A plain file whose operations go through a plan."""

    def __init__(self, plan: Faults, path: Path, *, writable: bool, create: bool) -> None:
        super().__init__(path, writable=writable, create=create)
        self._plan = plan
        self._unsynced = False  # a sync has failed, which is final for whoever has the file open
        if plan.follows_pages:
            plan.pages(self)

    def content(self) -> bytes:
        return super().read(0, self.size())

    def read(self, offset: int, length: int, /) -> bytes:
        self._plan.look(self.path, offset, offset + length)
        return super().read(offset, length)

    def write(self, offset: int, parts: Sequence[Bytes], /) -> None:
        data = b"".join(parts)

        def whole() -> None:
            self._note((offset, data))
            super(FaultyFile, self).write(offset, [data])

        def half() -> None:
            self._note((offset, data[: len(data) // 2]))
            super(FaultyFile, self).write(offset, [data[: len(data) // 2]])

        self._plan.step("write", whole, half)

    def sync(self) -> None:
        def whole() -> None:
            if self._plan.follows_pages:
                pages = self._plan.pages(self)
                for change in pages.since:
                    _carry_out(pages.kept, change)
                pages.since = []

        if self._unsynced:
            raise WriteError("earlier writes could not be stored, on purpose")
        try:
            self._plan.step("sync", whole)
        except WriteError:
            if self._plan.follows_pages:
                self._plan.pages(self).since = []  # the kernel takes them for stored from now on
                self._unsynced = True
            raise

    def distrust(self) -> None:
        """A kernel drops what it takes for stored, and keeps what it has still to write."""
        if self._plan.follows_pages:
            pages = self._plan.pages(self)
            content = bytearray(pages.kept)
            for change in pages.since:
                _carry_out(content, change)
            super().truncate(0)
            super().write(0, [content])

    def truncate(self, size: int, /) -> None:
        def whole() -> None:
            self._note(size)
            super(FaultyFile, self).truncate(size)

        self._plan.step("truncate", whole)

    def punch(self, offset: int, length: int, /) -> bool:
        done: list[bool] = []

        def whole() -> None:
            self._note((offset, bytes(length)))
            done.append(super(FaultyFile, self).punch(offset, length))

        self._plan.step("punch", whole)
        return done[0]

    def publish(self, path: Path, /) -> None:
        self._plan.step("publish", lambda: super(FaultyFile, self).publish(path))

    def remove(self) -> None:
        self._plan.step("remove", super().remove)

    def close(self) -> None:
        if self._plan.cut:
            self._unpublished = None  # nobody is left to delete it
        super().close()

    def forget(self, rng: random.Random) -> None:
        """Go back to what was synced, and keep of the rest what chance keeps, page by page."""
        pages = self._plan.pages(self)
        if self._fd < 0 or not pages.since:
            return
        content = pages.kept
        for change in pages.since:
            if isinstance(change, int):
                if rng.random() < 0.5:
                    _carry_out(content, change)
                continue
            offset, data = change
            for at in range(0, len(data), _PAGE):
                if rng.random() < 0.5:
                    _carry_out(content, (offset + at, data[at : at + _PAGE]))
        super().truncate(0)
        super().write(0, [content])
        pages.since = []

    def _note(self, change: Change) -> None:
        if self._plan.follows_pages:
            self._plan.pages(self).since.append(change)


def _carry_out(content: bytearray, change: Change) -> None:
    if isinstance(change, int):
        content[change:] = bytes(max(0, change - len(content)))
        return
    offset, data = change
    content.extend(bytes(max(0, offset - len(content))))
    content[offset : offset + len(data)] = data
