"""Knowing what is used costs what the file system's own map costs, and never what the volume would."""

from __future__ import annotations

import re
import sys
from contextlib import closing
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from ferrotype.block import Traits
from ferrotype.block.file import FileSource
from ferrotype.engine.plan import plan
from ferrotype.engine.survey import survey
from ferrotype.extents import BitmapRuns, ExtentMap, State
from ferrotype.filesystems.registry import identify
from ferrotype.units import GiB, KiB, MiB, TiB
from tests.filesystems.test_ext import by_dumpe2fs, free
from tests.machine import run

SIGNATURES = MiB  # bytes looked at to know what a volume is: its ends, and three labels of ZFS inside


class Watched(FileSource):
    """A file that knows how often it was asked for what."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: list[int] = []
        self.asked = 0

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        self.reads.append(len(buf))
        super().read_into(offset, buf)

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        self.asked += 1
        return super().extents(offset, length)


def mapped(path: Path) -> tuple[Watched, ExtentMap]:
    """The map of a volume, and what was read from its opening on."""
    with Watched(path) as source:
        found = identify(source)
        assert found is not None
        assert found.filesystem is not None
        return source, found.filesystem.allocation()


def sparse(path: Path, size: int, *command: str) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    run(*command, path)
    return path


MAPS: dict[str, tuple[tuple[str, ...], int, int]] = {  # how it is made, bytes of the volume for a bit, copies
    "ntfs": (("mkfs.ntfs", "-f", "-F", "-q", "-c", "4096", "-s", "512", "-p", "0", "-H", "0", "-S", "0"), 4 * KiB, 1),
    "exfat": (("mkfs.exfat", "-c", "32K"), 32 * KiB, 1),
    "vfat": (("mkfs.vfat", "-F", "32", "-s", "128"), 2 * KiB, 2),  # 32 bits for a cluster of 64 KiB
}


@pytest.mark.parametrize("size", [16 * GiB, 128 * GiB])
@pytest.mark.parametrize("kind", MAPS)
def test_a_map_is_read_once_and_in_large_pieces(kind: str, size: int, tmp_path: Path) -> None:
    command, for_a_bit, copies = MAPS[kind]
    source, allocation = mapped(sparse(tmp_path / "v", size, *command))
    table = size // for_a_bit // 8
    assert allocation.total(State.FREE) > size // 2
    assert sum(source.reads) <= copies * table + SIGNATURES + MiB
    assert len(source.reads) <= copies * table // (128 * KiB) + 64


@pytest.mark.parametrize("size", [128 * GiB, 512 * GiB])
def test_of_ext4_groups_that_were_never_written_only_descriptors_are_read(size: int, tmp_path: Path) -> None:
    path = sparse(tmp_path / "v", size, "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,nodiscard")
    groups = size // (128 * MiB)
    listed = re.findall(r"^Group \d+:.*$", run("dumpe2fs", path), re.MULTILINE)
    written = sum("BLOCK_UNINIT" not in line for line in listed)
    assert len(listed) == groups
    assert 8 * written < groups
    bits = 0
    add = BitmapRuns.add

    def counted(self: BitmapRuns, bitmap: np.ndarray[tuple[int], np.dtype[np.uint8]], count: int) -> None:
        nonlocal bits
        bits += count
        add(self, bitmap, count)

    with mock.patch.object(BitmapRuns, "add", counted):
        source, allocation = mapped(path)
    assert free(allocation) == by_dumpe2fs(path)
    assert sum(source.reads) <= written * 4 * KiB + groups * 64 + SIGNATURES
    assert len(source.reads) <= written + 64
    # of the groups that were never written, those beside one that was, or that hold metadata
    assert bits <= (2 * written + 64) * 8 * 4 * KiB


@pytest.mark.parametrize("partitions", [0, 1, 7])
def test_a_survey_asks_once_what_the_disk_stores(partitions: int, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(64 * GiB)
        for at in range(8):
            file.seek(at * 8 * GiB + 8 * MiB)
            file.write(b"nothing known" * 1000)
    if partitions:
        table = "label: gpt\n" + f"size={64 // (partitions + 1)}GiB\n" * partitions
        run("sfdisk", "-q", path, text_in=table)
    with Watched(path) as source:
        found = survey(source)
        assert len(found.told.notes) == (partitions or 1), "each of them is told to hold data"
        assert source.asked == 1
    with Watched(path) as source:
        survey(source, allocation=False)
        assert source.asked == 0


class Scattered:
    """A disk of zeros with a number of pieces of data."""

    def __init__(self, size: int, pieces: int) -> None:
        self.size = size
        self.traits = Traits(sector_known=True)
        starts = np.arange(pieces, dtype=np.int64) * (size // pieces // MiB * MiB) + 64 * KiB
        self._map = ExtentMap.from_runs(0, size, starts, starts + MiB, State.DATA, State.ZERO | State.HOLE)

    def read_into(self, offset: int, buf: memoryview, /) -> None:  # noqa: ARG002
        buf[:] = bytes(len(buf))

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return self._map.clip(offset, length)

    def close(self) -> None:
        pass


def calls_of_planning(pieces: int) -> int:
    """Python functions called to survey and plan a disk of 64 TiB."""
    calls = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    with closing(Scattered(64 * TiB, pieces)) as source:
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            planned = plan(survey(source), 128 * KiB, all_sectors=False)
            first, last = planned.cell_runs(0)
        finally:
            sys.setprofile(before)
    assert planned.data_bytes == pieces * MiB
    assert len(first) == pieces
    assert int((last - first).sum()) == pieces * 9  # 64 KiB off the grid
    return calls


def test_planning_takes_no_step_for_each_extent() -> None:
    calls_of_planning(10)  # modules are imported
    assert calls_of_planning(300_000) <= calls_of_planning(10) + 100
