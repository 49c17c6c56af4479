"""Storage that fails on purpose: the Nth operation is refused, done by half, or is where the power goes.

    faults = Faults(at=17, how=Fault.TORN)
    Container.open(path, writable=True, opener=faults.opener)     ... PowerCut
    Container.open(path)                                          what a machine finds after its restart

Operations are writes, syncs, truncations, holes and publications, counted over all files that one plan opened.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Final

from ferrotype.errors import WriteError
from ferrotype.objects import Bytes
from ferrotype.objects.volumes import PosixFile

__all__ = ["Fault", "Faults", "PowerCut"]

_PAGE: Final = 4096  # bytes: what a kernel writes back on its own, in any order


class PowerCut(Exception):
    """The machine has stopped: no operation after the cut reaches storage."""


class Fault(enum.Enum):
    """What happens at the chosen operation."""

    REFUSED = "refused"  # it raises WriteError, later ones work
    SHORT = "short"  # a write stores its first half and raises WriteError
    LOST = "lost"  # the power goes before it
    TORN = "torn"  # the power goes in the middle of it
    DROPPED = "dropped"  # the power goes, and of what was not synced only some pages were stored


class Faults:
    """A plan of one fault; ``operations`` counts what was done so far.  With ``at`` negative nothing fails."""

    def __init__(self, *, at: int = -1, how: Fault = Fault.LOST, seed: int = 0) -> None:
        self.operations = 0
        self.cut = False
        self._at = at
        self._how = how
        self._rng = random.Random(seed)  # noqa: S311  repeatable
        self._files: list[FaultyFile] = []
        self._lock = Lock()

    def opener(self, path: Path, /, *, writable: bool, create: bool = False) -> FaultyFile:
        """An ``Opener`` for a container."""
        file = FaultyFile(self, path, writable=writable, create=create)
        self._files.append(file)
        return file

    def close(self) -> None:
        """Close what the process that was cut has left open, as its end does."""
        for file in self._files:
            file.close()

    def step(self, whole: Callable[[], None], half: Callable[[], None] | None = None) -> None:
        """One operation, or the fault in its place."""
        with self._lock:
            if self.cut:
                raise PowerCut
            number, self.operations = self.operations, self.operations + 1
            if number != self._at:
                whole()
                return
            if half is not None and self._how in (Fault.SHORT, Fault.TORN):
                half()
            if self._how in (Fault.REFUSED, Fault.SHORT):
                raise WriteError(f"operation {number} was refused on purpose")
            self.cut = True
            if self._how is Fault.DROPPED:
                for file in self._files:
                    file.forget(self._rng)
            raise PowerCut


class FaultyFile(PosixFile):
    """A plain file whose operations go through a plan."""

    def __init__(self, plan: Faults, path: Path, *, writable: bool, create: bool) -> None:
        super().__init__(path, writable=writable, create=create)
        self._plan = plan
        self._durable = b"" if create else None  # content at the last sync; None: as it still is
        self._since: list[tuple[int, bytes] | int] = []  # writes, and truncations as the new size

    def write(self, offset: int, parts: Sequence[Bytes], /) -> None:
        data = b"".join(parts)

        def whole() -> None:
            self._note((offset, data))
            super(FaultyFile, self).write(offset, [data])

        def half() -> None:
            super(FaultyFile, self).write(offset, [data[: len(data) // 2]])

        self._plan.step(whole, half)

    def sync(self) -> None:
        def whole() -> None:
            self._durable, self._since = None, []

        self._plan.step(whole)

    def truncate(self, size: int, /) -> None:
        def whole() -> None:
            self._note(size)
            super(FaultyFile, self).truncate(size)

        self._plan.step(whole)

    def punch(self, offset: int, length: int, /) -> bool:
        done: list[bool] = []

        def whole() -> None:
            self._note((offset, bytes(length)))
            done.append(super(FaultyFile, self).punch(offset, length))

        self._plan.step(whole)
        return done[0]

    def publish(self, path: Path, /) -> None:
        self._plan.step(lambda: super(FaultyFile, self).publish(path))

    def close(self) -> None:
        if self._plan.cut:
            self._unpublished = None  # nobody is left to delete it
        super().close()

    def forget(self, rng: random.Random) -> None:
        """Go back to what was synced, and keep of the rest what chance keeps, page by page."""
        if self._fd < 0 or not self._since:
            return
        content = bytearray(self._durable or b"")
        for change in self._since:
            if isinstance(change, int):
                if rng.random() < 0.5:
                    content[change:] = bytes(max(0, change - len(content)))
                continue
            offset, data = change
            for at in range(0, len(data), _PAGE):
                if rng.random() < 0.5:
                    _lay(content, offset + at, data[at : at + _PAGE])
        super().truncate(0)
        super().write(0, [content])

    def _note(self, change: tuple[int, bytes] | int) -> None:
        if self._durable is None:
            self._durable = self.read(0, self.size())
        self._since.append(change)


def _lay(content: bytearray, offset: int, data: bytes) -> None:
    content.extend(bytes(max(0, offset - len(content))))
    content[offset : offset + len(data)] = data
