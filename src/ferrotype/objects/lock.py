"""One writer at a time: an exclusive lock on the image's first volume, and a file beside it that says who holds it.

    laptop.ferro         flock: decides within a machine, and ends with the process
    laptop.ferro.lock    JSON: host, process, since when; touched every half minute while the lock is held; it has
                         the owner and the permissions of the image, and so tells nothing to who may not read that

Where other machines may use the file system too, flock may not reach them, and the file decides: another machine's
holds while it is younger than three minutes by the file system's own clock.  An older one is taken over in one step.
A holder that lost its lock, because it slept or was cut off, writes no more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from threading import Event, RLock, Thread
from typing import Final, TypeVar

import msgspec

from ferrotype.errors import DeviceError, Locked
from ferrotype.job import leave_signals
from ferrotype.objects.holder import Holder, LockFile, kernel_holder, lock_path, look
from ferrotype.objects.machine import THIS_MACHINE, Machine
from ferrotype.stall import Beat, Patience, Storage
from ferrotype.trouble import why

T = TypeVar("T")

STALE: Final = 180.0  # seconds without a sign of life after which another machine's lock does not hold
_REFRESH: Final = 30.0  # seconds between two signs of life
_UNSURE: Final = 60.0  # seconds after which a shared lock is looked at again before something is written
_SETTLE: Final = 1.0  # seconds for another machine that took the same stale lock to show itself
_TRIES: Final = 20  # lock files that come and go while one is being made


def lock_for_writing(fd: int, image: Path, machine: Machine = THIS_MACHINE) -> bool:
    """Take the writer's lock on an open file; it is released when the file is closed or the process ends.

    False where the file system has no such lock.  Raises Locked, naming the holder where that is known.
    """
    try:
        return machine.flock(fd)
    except BlockingIOError:
        raise locked_by(fd, image, machine=machine) from None


def locked_by(fd: int, image: Path, doing: str = "being written", machine: Machine = THIS_MACHINE) -> Locked:
    """The error for a file whose lock another process has, which it names where that is known."""
    found = look(lock_path(image))
    if found is not None and found.holder is not None and _is_likely(found.holder, fd, machine):
        who = found.holder.words
    else:
        who = kernel_holder(fd)
    return Locked(f"{image} is {doing} by {who}; wait for it to end, or stop it")


def _is_likely(holder: Holder, fd: int, machine: Machine) -> bool:
    """Whether a lock file can be that of the process that has the lock: not one that was left behind."""
    if holder.is_here(machine):
        return holder.runs(machine) is not False
    return not machine.is_local(fd)


# ---------------------------------------------------------------------- the lock that is held


class WriterLock:
    """The right to write to an image, until ``release`` or the end of the process.  Use ``take``."""

    def __init__(
        self, image: Path, machine: Machine, storage: Storage, *, local: bool, like: os.stat_result | None = None
    ) -> None:
        self.path = lock_path(image)
        self._storage = storage
        self.holder = Holder.here(machine)
        self._image = image
        self._machine = machine
        self._local = local
        self._like = like  # whose owner and permissions the lock file gets; None: this user's alone
        self._flocked = local
        self._lost: str | None = None
        self._named = False  # the lock file is this lock's own
        self._seen = _now()  # when it last was
        self._guard = RLock()
        self._ended = Event()

    @classmethod
    def take(
        cls, fd: int, image: Path, machine: Machine = THIS_MACHINE, patience: Patience | None = None
    ) -> WriterLock:
        """Hold the lock of an image whose first volume is open.  Raises Locked, or DeviceError."""
        storage = Storage(image, patience or Patience())

        def take(_: Beat) -> WriterLock:
            status = os.fstat(fd)
            storage.on(status.st_dev)
            flocked = lock_for_writing(fd, image, machine)
            self = cls(image, machine, storage, local=flocked and machine.is_local(fd), like=status)
            self._begin(flocked=flocked)
            return self

        return _first(storage, take)

    @classmethod
    def take_ahead(
        cls, image: Path, machine: Machine = THIS_MACHINE, patience: Patience | None = None
    ) -> WriterLock | None:
        """Hold the lock of an image that is to be created, where its name alone keeps other machines away.

        None on a local file system: there the new file itself is locked.
        """
        storage = Storage(image, patience or Patience())

        def take_ahead(_: Beat) -> WriterLock | None:
            folder = lock_path(image).parent
            if machine.is_local(folder):
                return None
            storage.on(folder.stat().st_dev)
            self = cls(image, machine, storage, local=False)
            self._begin(flocked=False)
            return self

        return _first(storage, take_ahead)

    def check(self, *, now: bool = False) -> None:
        """Raises Locked where somebody else may be writing by now; ``now`` looks into the lock file first."""
        if not self._local and (now or _now() - self._seen > _UNSURE):
            self._storage.call(lambda _: self.refresh())
            if self._lost is None and _now() - self._seen > STALE / 2:
                self._lost = f"{self.path} could not be refreshed, so another machine may have taken it over"
        if self._lost is not None:
            raise Locked(f"{self._lost}; nothing more is written to {self._image}: start again")

    def refresh(self) -> bool:
        """Give a sign of life; whether the lock is still held."""
        with self._guard:
            if self._lost is not None or not self._named or self._ended.is_set():
                return self._lost is None
            try:
                found = look(self.path)
                if found is not None and found.token == self.holder.token:
                    self._touch()
                    self._seen = _now()
                elif found is not None:
                    who = found.holder.words if found.holder else "somebody else"
                    self._lost = f"{self.path} is that of {who} now"
                elif not self._local:
                    self._lost = f"{self.path} is gone"
            except OSError:  # it cannot be told; ``check`` knows for how long
                pass
            return self._lost is None

    def release(self) -> None:
        """Let others write: the lock file goes.  The flock goes with the volume's file, which is closed next."""
        self._ended.set()
        with contextlib.suppress(DeviceError):  # it stays, and is taken over once it is old
            self._storage.call(lambda _: self._remove())
        self._storage.release()

    def _remove(self) -> None:
        with self._guard, contextlib.suppress(OSError):
            if self._named and self._lost is None:
                found = look(self.path)
                if found is not None and found.token == self.holder.token:
                    self.path.unlink()
            self._named = False

    # ------------------------------------------------------------------ becoming the holder

    def _begin(self, *, flocked: bool) -> None:
        self._flocked = flocked
        try:
            self._named = self._make_file()
        except OSError as error:
            full = flocked and error.errno in (errno.ENOSPC, errno.EDQUOT)  # it must be possible to prune then
            if not (self._local or full):
                raise DeviceError(
                    f"{self.path}, which keeps other machines from writing at the same time, cannot be made: "
                    f"{why(error)}"
                ) from error
            self._local = True  # there is nothing but the flock to go by
        if self._named:
            weakref.finalize(self, self._ended.set)
            Thread(target=_keep, args=(weakref.ref(self), self._ended), name="ferrotype-lock", daemon=True).start()

    def _make_file(self) -> bool:
        for _ in range(_TRIES):
            try:
                self._write_new(self.path)
            except FileExistsError:
                if not self._take_over():
                    continue
            if self._is_own():
                return True
        raise OSError(errno.EBUSY, "it comes and goes")

    def _take_over(self) -> bool:
        """Put an own lock file in place of a stale one; False where that is another one by now.  Raises Locked."""
        own = self.path.with_name(f".{self.path.name}.{self.holder.token}")
        touched = self._write_new(own)
        try:
            found = look(self.path)
            if found is None:
                return False
            self._refuse(found, touched - found.touched)
            if look(self.path) != found:
                return False
            own.rename(self.path)
        finally:
            own.unlink(missing_ok=True)
        if not self._local:
            time.sleep(_SETTLE)
        return True

    def _refuse(self, found: LockFile, age: float) -> None:
        """Raises Locked where the lock file that was found holds; its age is by the clock of its file system."""
        if self._local:
            return  # nobody has the flock: whoever made it is gone
        holder = found.holder
        runs = holder.runs(self._machine) if holder is not None and holder.is_here(self._machine) else None
        if runs and holder is not None and holder.pid == os.getpid() and self._flocked:
            return  # this process had it, and has let go of it
        if runs or (runs is None and abs(age) < STALE):
            who = holder.words if holder is not None else "somebody who is not named"
            raise Locked(
                f"{self._image} is being written by {who}, as {self.path.name} says; wait for it to end, or, if that "
                f"process is gone, try again in three minutes"
            )

    def _is_own(self) -> bool:
        """Whether the lock file is this lock's; on a shared file system another may have been quicker."""
        found = look(self.path)
        if found is not None and found.token == self.holder.token:
            self._seen = _now()
            return True
        return False

    def _write_new(self, path: Path) -> float:
        """A new lock file; its time by the clock of its file system.  Raises FileExistsError."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                self._share(fd)
                return self._fill(fd)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        finally:
            os.close(fd)

    def _share(self, fd: int) -> None:
        """Give a lock file, empty yet, to those who may read the image, as far as the file system can."""
        like = self._like
        if like is None:
            return
        with contextlib.suppress(OSError):
            os.fchown(fd, like.st_uid if os.geteuid() == 0 else -1, like.st_gid)
        same_group = os.fstat(fd).st_gid == like.st_gid
        with contextlib.suppress(OSError):
            os.fchmod(fd, stat.S_IMODE(like.st_mode) & (0o666 if same_group else 0o606) | 0o600)

    def _touch(self) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                self._fill(fd)
        finally:
            os.close(fd)

    def _fill(self, fd: int) -> float:
        """Write, rather than set a time: the time is then that of whoever keeps the file."""
        os.pwrite(fd, msgspec.json.encode(self.holder) + b"\n", 0)
        if not self._local:
            os.fsync(fd)
        return os.fstat(fd).st_mtime


def _first(storage: Storage, take: Callable[[Beat], T]) -> T:
    """Take a lock on storage that may not answer."""
    try:
        return storage.call(take)
    except BaseException:
        storage.release()
        raise


def _keep(lock: weakref.ref[WriterLock], ended: Event) -> None:
    """Refresh a lock until it is released, lost or forgotten."""
    leave_signals()
    while not ended.wait(_REFRESH):
        held = lock()
        if held is None or not held.refresh():
            return
        del held


def _now() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
