"""Machines that a test plays: another host, one that was restarted, a file system that is shared."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ferrotype.objects.machine import THIS_MACHINE


@dataclass
class Played:
    """A machine whose file system other machines can use too, and where flock reaches nobody."""

    host: str = "here"
    id: str = "1" * 32
    boot: str = "first"
    processes: str = "pid:[1]"
    local: bool = False
    flocks: bool = False
    byte_locks: bool = False
    running: dict[int, int] = field(default_factory=dict)  # beside the processes that there are

    def started(self, pid: int, /) -> int | None:
        return self.running.get(pid, THIS_MACHINE.started(pid))

    def flock(self, fd: int, /) -> bool:
        return THIS_MACHINE.flock(fd) if self.flocks else False

    def is_local(self, _where: int | Path, /) -> bool:
        return self.local

    def has_byte_locks(self, _where: int, /) -> bool:
        return self.byte_locks


OTHER = Played(host="nas2", id="2" * 32, boot="second")
