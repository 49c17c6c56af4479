"""What stands on a disk: partition tables, read from any Source.

Each table kind is one module with one function, ``read(source, sector_size) -> Table | None``: None where there is no
such table, InvalidImage where there is one that cannot be believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Partition", "Table"]


@dataclass(frozen=True, slots=True)
class Partition:
    """One entry of a partition table; ``start`` and ``size`` in bytes of the disk."""

    index: int  # the number users know it by: 1 for sda1; logical MBR partitions count from 5
    start: int
    size: int
    type: str  # GPT: upper-case GUID; MBR: two hex digits in lower case ("07", "83")
    label: str | None = None  # GPT partition name
    uuid: str | None = None  # GPT: unique GUID, upper case; MBR: "<disk id>-<index>"

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class Table:
    """A partition table as read, its damage included."""

    kind: Literal["gpt", "mbr", "apm"]
    sector_size: int
    disk_id: str  # GPT: disk GUID, upper case; MBR: eight hex digits
    partitions: tuple[Partition, ...]  # ascending by start; never overlapping, always inside the disk
    metadata: tuple[tuple[int, int], ...]  # (start, length) in bytes of what the table itself occupies
    warnings: tuple[str, ...] = ()
    rivals: tuple[tuple[int, int], ...] = ()  # (start, length) that another table gives to partitions of its own
