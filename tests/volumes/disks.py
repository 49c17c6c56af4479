"""Disks for the tests of partition tables, and what independent tools say of them in ferrotype's terms."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ferrotype.block import Traits
from ferrotype.errors import ReadError
from ferrotype.extents import ExtentMap
from ferrotype.units import MiB
from ferrotype.volumes import Table
from tests.machine import run

Row = tuple[int, int, int, str, str | None, str | None]  # index, start, size, type, label, uuid
CONTAINERS = {"05", "0f", "85"}


class FileDisk:
    """A file or block device as a Source, open only while it is read; sectors that hold ``bad`` bytes fail."""

    def __init__(
        self, path: Path, *, size: int | None = None, sector_size: int | None = None, bad: tuple[int, ...] = ()
    ):
        self.path = path
        with path.open("rb") as file:
            self._size = file.seek(0, os.SEEK_END) if size is None else size
        self.traits = Traits(sector_size=sector_size or 512, sector_known=sector_size is not None)
        self.bad = bad

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        if offset < 0 or offset + len(buf) > self._size:
            raise ReadError("disk", offset, len(buf), "outside the disk")
        if any(offset <= at < offset + len(buf) for at in self.bad):
            raise ReadError("disk", offset, len(buf), "bad sector")
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            buf[:] = (file.read(len(buf)) or b"").ljust(len(buf), b"\0")

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return ExtentMap.uniform(offset, length)

    def close(self) -> None:
        pass


def blank(path: Path, size: int = 16 * MiB) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def sfdisk(disk: Path, script: str) -> Path:
    """Partition ``disk`` with an sfdisk script."""
    run("sfdisk", "--no-reread", "--no-tell-kernel", disk, text_in=script)
    return disk


def rows(table: Table) -> list[Row]:
    return [(p.index, p.start, p.size, p.type, p.label, p.uuid) for p in table.partitions]


def by_sfdisk(disk: Path) -> list[Row]:
    """What ``sfdisk -J`` lists, ascending by start, containers of logical partitions left out."""
    table: dict[str, Any] = json.loads(run("sfdisk", "-J", disk))["partitiontable"]
    found = []
    for entry in table.get("partitions", []):
        number = re.search(r"(\d+)$", entry["node"].removeprefix(str(disk)))
        assert number is not None
        row = sfdisk_row(entry, int(number[1]), table["sectorsize"], table["id"])
        if row is not None:
            found.append(row)
    return sorted(found, key=lambda row: row[1])


def sfdisk_row(entry: dict[str, Any], index: int, unit: int, disk_id: str) -> Row | None:
    start, size, kind = entry["start"] * unit, entry["size"] * unit, entry["type"]
    if len(kind) > 2:
        return index, start, size, kind, entry.get("name"), entry["uuid"]
    if kind.zfill(2) in CONTAINERS or not entry["size"]:
        return None
    return index, start, size, kind.zfill(2), None, f"{disk_id.removeprefix('0x')}-{index:02x}"


def by_partx(disk: Path, *options: str) -> list[tuple[int, int, int, str]]:
    """Number, start, size and lower-case uuid of every partition, by libblkid."""
    lines = run("partx", "-g", "-b", "-r", "-o", "NR,START,SECTORS,UUID", *options, disk).splitlines()
    split = [line.split() for line in lines if line.strip()]
    return [(int(nr), int(start) * 512, int(count) * 512, "".join(uuid)) for nr, start, count, *uuid in split]
