"""MD5 and SHA-1 of a whole disk, each in a thread of its own beside whatever else is done with the bytes.

feed ──> queue ──> MD5          hashlib releases the interpreter lock, so that the two and the caller's
     └─> queue ──> SHA-1        work run on as many cores
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from queue import Queue
from threading import Thread
from typing import Final

from ferrotype.units import MiB

__all__ = ["DiskHashes"]

_WAITING: Final = 6  # pieces that may wait for each thread; the feeder waits when there are more
_ZEROS: Final = memoryview(bytes(MiB))


class DiskHashes:
    """Takes a disk's bytes in order.  ``close`` ends the threads, whatever happened."""

    def __init__(self, algorithms: Sequence[str] = ("md5", "sha1")) -> None:
        self._lines = [_Line(name) for name in algorithms]
        for line in self._lines:
            line.start()

    def feed(self, parts: Sequence[bytes | memoryview]) -> None:
        """The next bytes of the disk, which nobody may change any more."""
        for line in self._lines:
            line.queue.put(parts)

    def zeros(self, length: int) -> None:
        """The next bytes of the disk are that many zeros."""
        while length:
            count = min(length, 16 * MiB)
            parts = [_ZEROS] * (count // len(_ZEROS)) + [_ZEROS[: count % len(_ZEROS)]]
            self.feed(parts)
            length -= count

    def finish(self) -> dict[str, str]:
        """Hex digits by algorithm, of all that was fed."""
        self.close()
        return {line.algorithm: line.hash.hexdigest() for line in self._lines}

    def close(self) -> None:
        for line in self._lines:
            if line.is_alive():
                line.queue.put(None)
        for line in self._lines:
            line.join()


class _Line(Thread):
    """One algorithm."""

    def __init__(self, algorithm: str) -> None:
        super().__init__(name=f"ferrotype-{algorithm}", daemon=True)
        self.algorithm = algorithm
        self.hash = hashlib.new(algorithm, usedforsecurity=False)
        self.queue: Queue[Sequence[bytes | memoryview] | None] = Queue(_WAITING)

    def run(self) -> None:
        while (parts := self.queue.get()) is not None:
            for part in parts:
                self.hash.update(part)
