"""One writer at a time: an advisory lock on the image's first volume, and a sentence about who holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path

from ferrotype.errors import Locked


def lock_for_writing(fd: int, what: str) -> None:
    """Take the writer's lock on an open file; it is released when the file is closed or the process ends.

    Raises Locked, naming the holder where the kernel tells.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Locked(f"{what} is being written by {_holder(fd)}; wait for it to end, or stop it") from None


def _holder(fd: int) -> str:
    """The process that /proc/locks names for this file, and since when it runs."""
    status = os.fstat(fd)
    inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if "->" not in fields and "FLOCK" in fields and inode in fields:
                pid = int(fields[4])
                return f"process {pid} ({_name(pid)}, running since {_since(pid)})"
    return "another process"


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    return "name unknown"


def _since(pid: int) -> str:
    with contextlib.suppress(OSError):
        started = Path(f"/proc/{pid}").stat().st_ctime
        return datetime.fromtimestamp(started, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return "an unknown time"
