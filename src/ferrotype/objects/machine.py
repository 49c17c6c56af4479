"""What a lock asks of the machine: which one this is, which processes run, what the file system is like.

Sources: machine-id(5), proc(5), pid_namespaces(7), linux/magic.h (file systems).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from functools import cached_property
from pathlib import Path
from typing import Final, Protocol

from ferrotype.linux import file_system_type

# File systems that one machine at a time can mount: its own kernel knows all who have a file of them open.
_LOCAL: Final = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # XFS
        0x9123683E,  # Btrfs
        0x01021994,  # tmpfs
        0x858458F6,  # ramfs
        0xF2F52010,  # F2FS
        0xCA451A4E,  # bcachefs
        0x2FC12FC1,  # ZFS
        0x3153464A,  # JFS
        0x52654973,  # ReiserFS
        0x3434,  # NILFS
        0x4D44,  # FAT
        0x2011BAB0,  # exFAT
        0x5346544E,  # NTFS
        0x7366746E,  # NTFS3
        0x4244,  # HFS
        0x482B,  # HFS+
        0x15013346,  # UDF
        0x794C7630,  # overlayfs
    }
)
# Where the kernel turns flock into a lock on a range of bytes, and a reader's byte would shut the writer out.
_ONE_KIND_OF_LOCK: Final = frozenset(
    {
        0x6969,  # NFS
        0x517B,  # SMB
        0xFF534D42,  # CIFS
        0xFE534D42,  # SMB2
        0x01021997,  # 9P
    }
)


class Machine(Protocol):
    """A machine, as one of its processes sees it."""

    @property
    def host(self) -> str: ...

    @property
    def id(self) -> str:
        """The same after a restart; empty where there is none."""

    @property
    def boot(self) -> str:
        """Another one after each restart, and on each machine; empty where it is not known."""

    @property
    def processes(self) -> str:
        """Which process ids mean the same: those of one namespace."""

    def started(self, pid: int, /) -> int | None:
        """When a process began, in ticks since the machine did; None where there is no such process.

        One that was killed, and whose parent has not asked how it ended, is none: it holds nothing.
        """

    def flock(self, fd: int, /) -> bool:
        """Take the exclusive lock of an open file; False where its file system has none.

        Raises BlockingIOError where another open file has it.
        """

    def is_local(self, where: int | Path, /) -> bool:
        """Whether no other machine can use the file system of an open file, or of a path, at the same time."""

    def has_byte_locks(self, where: int, /) -> bool:
        """Whether locks on bytes of an open file are something else than its ``flock``."""


class ThisMachine:
    """The machine this process runs on."""

    @cached_property
    def host(self) -> str:
        return os.uname().nodename

    @cached_property
    def id(self) -> str:
        return _line(Path("/etc/machine-id")) or _line(Path("/var/lib/dbus/machine-id"))

    @cached_property
    def boot(self) -> str:
        return _line(Path("/proc/sys/kernel/random/boot_id"))

    @cached_property
    def processes(self) -> str:
        with contextlib.suppress(OSError):
            return str(Path("/proc/self/ns/pid").readlink())
        return ""

    def started(self, pid: int, /) -> int | None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            fields = stat[stat.rindex(")") + 1 :].split()  # from field 3 on; the name in brackets may hold spaces
            return None if fields[0] in ("Z", "X") else int(fields[19])
        return None

    def flock(self, fd: int, /) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # ENOLCK, EOPNOTSUPP, ENOSYS ...: whatever it is, there is no lock
            return False
        return True

    def is_local(self, where: int | Path, /) -> bool:
        try:
            return file_system_type(where) in _LOCAL
        except OSError:
            return False

    def has_byte_locks(self, where: int, /) -> bool:
        try:
            return file_system_type(where) not in _ONE_KIND_OF_LOCK
        except OSError:
            return False


def _line(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="ascii", errors="replace").strip()[:100]
    return ""


THIS_MACHINE: Final[Machine] = ThisMachine()
