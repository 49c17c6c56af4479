"""Who writes to an image: as its lock file says, and as the kernel knows.

    laptop.ferro.lock    JSON: host, process, since when; its time is when it was last touched
    /proc/locks          the process that has the flock on the image's first volume

A lock file is anybody's bytes: it is looked at without following a link or waiting, and names a holder or nobody.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from ferrotype import linux
from ferrotype.objects.machine import Machine
from ferrotype.version import PROGRAM

_MAX_FILE: Final = 4096  # bytes a lock file may have


class Holder(msgspec.Struct, frozen=True):
    """A process that writes to an image, as its lock file names it."""

    host: str
    machine: str
    boot: str
    processes: str
    pid: int
    started: int
    program: str
    since: str  # RFC 3339
    token: str  # random: no two locks are the same

    @classmethod
    def here(cls, machine: Machine) -> Holder:
        """This process, from now on."""
        since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        pid, program = os.getpid(), PROGRAM
        started = machine.started(pid) or 0
        token = os.urandom(8).hex()
        return cls(machine.host, machine.id, machine.boot, machine.processes, pid, started, program, since, token)

    def is_here(self, machine: Machine) -> bool:
        """Whether it is, or was, a process of this machine."""
        if self.boot and self.boot == machine.boot:
            return True
        return bool(self.machine) and (self.machine, self.host) == (machine.id, machine.host)

    def runs(self, machine: Machine) -> bool | None:
        """Whether a process of this machine is still there; None where that cannot be seen from here."""
        if self.boot != machine.boot:
            return False
        if self.processes != machine.processes:
            return None
        return machine.started(self.pid) == self.started

    @property
    def words(self) -> str:
        return f"process {self.pid} ({_plain(self.program)}, on {_plain(self.host)}) since {_plain(self.since)}"


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:64])


def lock_path(image: Path) -> Path:
    """Where an image's lock file stands: beside the file itself, whatever links led to it."""
    real = Path(os.path.realpath(image))
    return real.with_name(f"{real.name}.lock")


@dataclass(frozen=True, slots=True)
class LockFile:
    """A lock file: who made it, if it says so, and when it was last touched by the clock of its file system."""

    holder: Holder | None
    touched: float
    inode: int

    @property
    def token(self) -> str | None:
        return self.holder.token if self.holder is not None else None


def look(path: Path) -> LockFile | None:
    """What stands at the path of a lock file; None for nothing.  Follows no link, waits for nothing."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    holder = None
    with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError, RecursionError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            data = os.read(fd, _MAX_FILE + 1) if stat.S_ISREG(status.st_mode) else b""
        finally:
            os.close(fd)
        if len(data) <= _MAX_FILE:
            holder = msgspec.json.decode(data, type=Holder)
    return LockFile(holder, status.st_mtime, status.st_ino)


# ---------------------------------------------------------------------- what the kernel knows of a holder


def kernel_holder(fd: int) -> str:
    """The process that /proc/locks names for this file, and since when it runs."""
    with contextlib.suppress(OSError, ValueError):
        for pid in linux.flock_holders(fd):
            name = linux.process_name(pid)
            return f"process {pid} ({'name unknown' if name is None else name}, running since {_since(pid)})"
    return "another process"


def _since(pid: int) -> str:
    with contextlib.suppress(OSError):
        started = Path(f"/proc/{pid}").stat().st_ctime
        return datetime.fromtimestamp(started, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return "an unknown time"
