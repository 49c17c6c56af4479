"""Calls on storage that may never return: a server that is gone, a hung device, a mount whose process sleeps.

Such a call blocks in the kernel, where nothing reaches it.  So a thread of its own makes it, and the caller waits:

    caller    --- call --->   hand (a daemon thread): pwrite, fdatasync ...
              <-- result --   it went well, or failed
              gives up        no progress for 15 s, or the user stopped: from now on every call fails at once

Slow is not stalled: work in several steps tells of each, and a block device that still reads or writes counts too.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, Generic, TypeVar

from ferrotype.errors import DeviceError
from ferrotype.job import leave_signals

__all__ = ["LIMIT", "Beat", "Patience", "Storage"]

LIMIT: Final = 15.0  # seconds: a disk that spins up takes ten, and one that tries hard to read a sector seven
_FIRST: Final = 1.0  # seconds until a call is looked after
_TICK: Final = 0.25  # seconds between two looks

T = TypeVar("T")
Beat = Callable[[], None]


class Patience:
    """How long to wait for storage, and what to do meanwhile; shared by the files of one image.

    ``waiting`` is told the file and the seconds without progress, a few times a second.  An error that it raises
    (Cancelled) ends the waiting.
    """

    def __init__(
        self, limit: float = LIMIT, waiting: Callable[[Path, float], None] = lambda _path, _seconds: None
    ) -> None:
        self.limit = limit  # seconds; 0: for ever
        self.waiting = waiting
        self.given_up: set[int] = set()  # devices (st_dev) that did not answer
        self.heard = time.monotonic()  # when storage last got on with anything

    def reach(self, path: Path) -> None:
        """Raise DeviceError where the storage of ``path`` does not answer; an error is an answer, too."""
        storage = Storage(path, self)

        def look(_: Beat) -> None:
            with contextlib.suppress(OSError):
                path.stat()

        try:
            storage.call(look)
        finally:
            storage.release()


class _Call(Generic[T]):
    """One call: made by a hand, awaited by its caller."""

    def __init__(self, work: Callable[[Beat], T], late: Callable[[T], None] | None) -> None:
        self._work = work
        self._late = late
        self._lock = threading.Lock()
        self.done = threading.Lock()  # held until the call has returned
        self.done.acquire()
        self.last = time.monotonic()  # when it last got on
        self.abandoned = False
        self.error: BaseException | None = None
        self.results: list[T] = []

    def make(self) -> None:
        self.last = time.monotonic()  # it may have waited for its turn
        try:
            self.results.append(self._work(self._beat))
        except BaseException as error:  # noqa: BLE001  it is the caller's
            self.error = error
        with self._lock:
            self.done.release()
            if self.abandoned and self.results and self._late is not None:
                with contextlib.suppress(OSError):  # nobody is left to be told
                    self._late(self.results[0])

    def abandon(self) -> bool:
        """Nobody waits any more; False where it has returned by now."""
        with self._lock:
            self.abandoned = self.done.locked()
            return self.abandoned

    def _beat(self) -> None:
        self.last = time.monotonic()


class _Hand(threading.Thread):
    """Makes one call after the other."""

    def __init__(self) -> None:
        super().__init__(name="ferrotype-storage", daemon=True)
        self.calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self.start()

    def run(self) -> None:
        leave_signals()
        while (call := self.calls.get()) is not None:
            call.make()
            if call.abandoned:
                return
            del call  # and with it the buffers


class Storage:
    """The storage of one open file or device, and the hands that make calls on it.  Safe from any thread."""

    def __init__(self, path: Path, patience: Patience, promise: str = "the image is consistent") -> None:
        """``promise`` is what a user is told who wonders what has become of the bytes."""
        self._path = path
        self._patience = patience
        self._promise = promise
        self._idle: list[_Hand] = []
        self._stuck: list[_Call[Any]] = []
        self._line: _Hand | None = None  # makes the calls of ``behind``
        self._pending: deque[tuple[_Call[Any], type[DeviceError]]] = deque()  # that were given to it
        self._device = 0  # st_dev of the file system, or the device itself
        self._block: int | None = None  # the block device below, once it was looked for; 0: there is none

    def on(self, device: int) -> None:
        """From now on calls are known to concern this device."""
        self._device = device

    @property
    def lost(self) -> bool:
        """Whether it was given up: then every call fails at once."""
        return bool(self._stuck) or (self._device != 0 and self._device in self._patience.given_up)

    def call(
        self,
        work: Callable[[Beat], T],
        error: type[DeviceError] = DeviceError,
        late: Callable[[T], None] | None = None,
    ) -> T:
        """What ``work`` returns; it is given a function to call whenever it got on.

        Raises ``error`` once it has not got on for the limit.  ``work`` may return after that: then ``late`` gets its
        result.
        """
        if self._pending:
            self.settle()
        if self.lost:
            raise error(self._sentence("does not answer"))
        call = _Call(work, late)
        hand = self._hand()
        hand.calls.put(call)
        try:
            self._await(call, error)
        finally:
            if not call.abandoned:
                self._idle.append(hand)
        if call.error is not None:
            raise call.error
        return call.results[0]

    def behind(self, work: Callable[[Beat], None], error: type[DeviceError] = DeviceError) -> None:
        """Have ``work`` done next, after what was given before; on return all but this one is done.

        So the storage has something to do while its user makes the next call.  What goes wrong, and what ``call``
        raises besides, is raised by the next call of any kind.  For one thread.
        """
        if self.lost:
            raise error(self._sentence("does not answer"))
        call = _Call(work, None)
        if self._line is None:
            self._line = self._hand()
        self._line.calls.put(call)
        self._pending.append((call, error))
        if len(self._pending) > 1:
            self._finish_oldest()

    def settle(self) -> None:
        """All that was given to ``behind`` is done.  Raises what went wrong with it."""
        while self._pending:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        call, error = self._pending[0]
        try:
            self._await(call, error)
        except BaseException:
            if call.abandoned:  # and with it what waits behind it
                self._line = None
                self._pending.clear()
            raise
        self._pending.popleft()
        if call.error is not None:
            raise call.error

    def _await(self, call: _Call[Any], error: type[DeviceError]) -> None:
        """The call has returned, or is abandoned and an error raised."""
        try:
            if not call.done.acquire(timeout=min(_FIRST, self._patience.limit or _FIRST)):
                self._wait(call, error)
            self._patience.heard = time.monotonic()
        except BaseException:
            if call.abandon():
                self._stuck.append(call)
                self._patience.given_up.add(self._device)
            raise

    def release(self) -> None:
        """Let the hands go; calls that have not returned are left alone."""
        if self._line is not None:
            self._idle.append(self._line)
            self._line = None
        while self._idle:
            self._idle.pop().calls.put(None)

    def __del__(self) -> None:  # a file that nobody closed
        self.release()

    def afterwards(self, work: Callable[[], None]) -> None:
        """Do something once all calls have returned, if ever; do not wait for it."""
        stuck = list(self._stuck)

        def later() -> None:
            leave_signals()
            for call in stuck:
                call.done.acquire()
            with contextlib.suppress(OSError):  # there is nobody left to tell
                work()

        threading.Thread(target=later, name="ferrotype-storage", daemon=True).start()

    def _hand(self) -> _Hand:
        try:
            return self._idle.pop()
        except IndexError:
            return _Hand()

    def _wait(self, call: _Call[T], error: type[DeviceError]) -> None:
        seen = self._sectors()
        moved = call.last
        while not call.done.acquire(timeout=_TICK):
            now = self._sectors()
            if now != seen:
                seen, moved = now, time.monotonic()
            idle = time.monotonic() - max(moved, call.last)
            self._patience.heard = max(self._patience.heard, moved, call.last)
            if idle >= _FIRST:
                self._patience.waiting(self._path, idle)
            if self._patience.limit and idle > self._patience.limit:
                raise error(self._sentence(f"has not answered for {self._patience.limit:g} s"))

    def _sentence(self, what: str) -> str:
        return f"{self._path}: the storage {what}; {self._promise}, start again when the storage is back"

    def _sectors(self) -> list[str]:
        """What the block device below has done so far (Documentation/block/stat.rst); nothing where there is none."""
        if self._block is None:
            self._block = _block_device(self._device)
        try:
            path = Path(f"/sys/dev/block/{os.major(self._block)}:{os.minor(self._block)}/stat")
            fields = path.read_text(encoding="ascii").split()
        except OSError:
            return []
        return [fields[at] for at in (0, 2, 4, 6, 11, 13, 15) if at < len(fields)]


def _block_device(device: int) -> int:
    """The block device below a file system; 0 where none is known.  Those of btrfs have numbers of their own."""
    if os.major(device):
        return device
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            left, _, right = line.partition(" - ")
            if left.split()[2] == number and (source := right.split()[1]).startswith("/dev/"):
                return os.stat(source).st_rdev
    except (OSError, IndexError):
        pass
    return 0
