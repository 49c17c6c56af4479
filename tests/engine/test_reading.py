"""Sources of every shape: unreadable, sparse, odd, empty and huge ones; and snapshots read back at random."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ferrotype.block import Source, read
from ferrotype.block.device import open_source
from ferrotype.block.memory import MemoryDisk
from ferrotype.engine.backup import BackupOptions
from ferrotype.engine.restore import Part, RestoreOptions, restore
from ferrotype.engine.survey import survey
from ferrotype.errors import ReadError
from ferrotype.extents import ExtentMap, State
from ferrotype.job import NullJob
from ferrotype.repository.snapshots import DiskRecord
from ferrotype.repository.source import SnapshotSource
from ferrotype.repository.store import Repository
from ferrotype.testing.sources import check_source
from ferrotype.units import KiB, MiB, TiB
from tests import disks
from tests.disks import Disk
from tests.engine.images import CHUNK, back_up, bytes_of, give_back, in_memory, save

Ranges = list[tuple[int, int]]  # (start, end)


def content_of(repository: Repository, record: DiskRecord) -> bytes:
    return read(SnapshotSource(repository, record), 0, record.size)


# ---------------------------------------------------------------------- unreadable sectors


class Failing(MemoryDisk):
    """A disk with ranges that cannot be read; an error names the first one in the way, up to ``step`` bytes of it."""

    def __init__(self, content: bytes | bytearray, bad: Ranges, step: int = 1 << 40) -> None:
        super().__init__(content)
        self.bad = bad
        self.step = step
        self.failed = 0

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        for start, end in self.bad:
            first, last = max(start, offset), min(end, offset + len(buf))
            if first < last:
                self.failed += 1
                buf[:] = b"\xdd" * len(buf)  # what a drive leaves behind when it fails
                raise ReadError("disk", first, min(last - first, self.step), "medium error")
        super().read_into(offset, buf)


BAD: list[tuple[str, Ranges]] = [
    ("one-sector", [(5 * MiB + 512, 5 * MiB + 1024)]),
    ("first", [(1 * MiB, 1 * MiB + 512)]),
    ("last", [(12 * MiB - 512, 12 * MiB)]),
    ("across-batches", [(3 * MiB - 4096, 3 * MiB + 8192)]),
    ("many", [(6 * MiB + at, 6 * MiB + at + 512) for at in range(0, 100 * 1024, 1024)]),
    ("touching", [(2 * MiB + at, 2 * MiB + at + 512) for at in range(0, 16 * 512, 512)]),
    ("megabytes", [(7 * MiB, 10 * MiB)]),
]


@pytest.mark.parametrize("step", [512, 1 << 40], ids=["by-sector", "whole"])
@pytest.mark.parametrize("bad", [bad for _, bad in BAD], ids=[name for name, _ in BAD])
def test_unreadable_sectors_are_zeros_and_are_recorded(bad: Ranges, step: int) -> None:
    content = random.Random(1).randbytes(12 * MiB)
    job = NullJob()
    repository = in_memory()
    source = Failing(content, bad, step)
    snapshot = back_up(repository, source, job=job, name="old disk")
    wanted = bytearray(content)
    for start, end in bad:
        wanted[start:end] = bytes(end - start)
    disks.check_same(content_of(repository, snapshot.disks[0]), wanted)

    joined: Ranges = []
    for start, end in bad:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    recorded = snapshot.disks[0].unreadable
    assert recorded == tuple((start, end - start) for start, end in joined)
    warnings = [warning for warning in job.warnings if "could not be read" in warning]
    assert len(warnings) == min(len(joined), 20)
    for warning, (start, end) in zip(warnings, joined[:20], strict=True):
        assert "old disk" in warning
        assert f"{end - start} bytes at {start}" in warning
    assert source.failed <= 3 * min(sum(end - start for start, end in bad) // 512, 256) + 60

    told, target = NullJob(), MemoryDisk(len(content))
    restore(Part(repository, snapshot.disks[0], 0, len(content)), target, RestoreOptions(), told)
    assert target.data == wanted
    assert len(told.warnings) == min(len(joined), 21)
    assert f"{joined[0][1] - joined[0][0]} bytes at {joined[0][0]} (sector" in told.warnings[0]
    assert "are zeros" in told.warnings[0]
    told = NullJob()
    restore(Part(repository, snapshot.disks[0], 0, MiB), MemoryDisk(MiB), RestoreOptions(), told)
    assert not told.warnings  # nothing is lost in that part


def test_an_unreadable_sector_that_no_file_system_uses_is_no_loss(bare: Disk) -> None:
    """Free space is not read where whole chunks of it are free, and not missed where it shares one with data."""
    content = bare.image()
    surveyed = survey(MemoryDisk(content))
    starts, ends = surveyed.extents.runs(State.FREE)
    # the first sector of every stretch of free space, most of them in a chunk with data, and the last sector of one
    bad = [(start, start + 512) for start in starts.tolist()] + [(int(ends[-1]) - 512, int(ends[-1]))]
    used = next(start for start in surveyed.extents.runs(State.FREE, present=False)[0].tolist() if start)
    source = Failing(content, [*bad, (used, used + 512)])
    job, repository = NullJob(), in_memory()
    snapshot = back_up(repository, source, job=job)
    assert source.failed > 1
    assert snapshot.disks[0].unreadable == ((used, 512),)
    assert len(job.warnings) == 1
    wanted = bytearray(disks.without_free(bare))
    wanted[used : used + 512] = bytes(512)
    disks.check_same(content_of(repository, snapshot.disks[0]), wanted)


def test_an_unreadable_table_keeps_the_whole_disk(mbr512: Disk) -> None:
    source = Failing(mbr512.image(), [(0, 512)])
    job, repository = NullJob(), in_memory()
    snapshot = back_up(repository, source, job=job)
    assert any("the whole disk is kept" in warning for warning in job.warnings)
    assert snapshot.disks[0].unreadable == ((0, 512),)
    disks.check_same(content_of(repository, snapshot.disks[0]), bytes(512) + mbr512.image()[512:])


def test_one_unreadable_copy_of_a_gpt_is_not_needed(gpt512: Disk) -> None:
    job, repository = NullJob(), in_memory()
    snapshot = back_up(repository, Failing(gpt512.image(), [(512, 1024)]), job=job)
    assert snapshot.disks[0].table == "gpt"
    assert snapshot.disks[0].unreadable == ((512, 512),)
    wanted = bytearray(disks.without_free(gpt512))
    wanted[512:1024] = bytes(512)
    disks.check_same(content_of(repository, snapshot.disks[0]), wanted)


@pytest.mark.parametrize("at", [0, 1024, 2048], ids=["boot block", "superblock", "descriptors"])
def test_a_file_system_that_cannot_be_read_is_kept_whole(bare: Disk, at: int) -> None:
    content = bytearray(bare.image())
    content[0:1024] = b"\1" * 1024
    job, repository = NullJob(), in_memory()
    snapshot = back_up(repository, Failing(content, [(at, at + 512)]), job=job)
    wanted = bytearray(content)
    wanted[at : at + 512] = bytes(512)
    found = content_of(repository, snapshot.disks[0])
    assert any("kept" in told and "zeros" not in told for told in job.warnings + job.notes)
    disks.check_same(found, wanted)
    assert snapshot.disks[0].unreadable == ((at, 512),)


def test_a_mended_disk_gives_its_sectors_back() -> None:
    content = random.Random(2).randbytes(2 * MiB)
    repository = in_memory()
    back_up(repository, Failing(content, [(MiB, MiB + 4096)]))
    snapshot = back_up(repository, MemoryDisk(content))
    assert snapshot.disks[0].unreadable == ()
    assert snapshot.statistics.new_chunks == 1
    disks.check_same(content_of(repository, snapshot.disks[0]), content)


# ---------------------------------------------------------------------- sparse, odd, empty


def test_holes_of_a_file_are_not_read(tmp_path: Path) -> None:
    disk = disks.blank_file(tmp_path / "sparse.img", 500 * MiB)
    blocks = [(64 * KiB * i * i, random.Random(i).randbytes(5000 * i)) for i in range(1, 20)]
    with disk.open("r+b") as file:
        for at, data in blocks:
            file.seek(at)
            file.write(data)
    image, out = tmp_path / "a.ferro", tmp_path / "out.img"
    snapshot = save(image, disk)
    assert snapshot.statistics.read_bytes < 30 * CHUNK + sum(len(data) for _, data in blocks) + 20 * 4096
    give_back(str(image), out)
    assert out.stat().st_size == 500 * MiB
    assert out.stat().st_blocks * 512 <= snapshot.statistics.read_bytes + MiB
    source = open_source(out)
    for at, data in blocks:
        assert read(source, at, len(data)) == data
    total = sum(int(n) for n in source.extents(0, source.size).lengths[source.extents(0, source.size).states == 0])
    assert total <= snapshot.statistics.read_bytes
    source.close()


SIZES = [
    1,
    511,
    512,
    4095,
    4096,
    4097,
    CHUNK - 1,
    CHUNK,
    CHUNK + 1,
    MiB - 1,
    MiB + 3,
    3 * MiB + 65_537,
    5 * MiB - 513,
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunk_size", [4 * KiB, CHUNK, 4 * MiB])
def test_disks_of_any_size(size: int, chunk_size: int) -> None:
    content = random.Random(size).randbytes(size)
    repository = in_memory(chunk_size)
    for variant in (content, content[: size // 2] + bytes(size - size // 2), bytes(size), content):
        snapshot = back_up(repository, MemoryDisk(variant))
        record = snapshot.disks[0]
        assert record.size == size
        disks.check_same(content_of(repository, record), variant)
        assert snapshot.statistics.zero_bytes + snapshot.statistics.chunks * chunk_size >= size
    assert snapshot.statistics.stored_bytes == 0


def test_odd_sizes_through_files(tmp_path: Path) -> None:
    content = random.Random(9).randbytes(3 * MiB + 777)
    disk, image, out = tmp_path / "disk.img", tmp_path / "a.ferro", tmp_path / "out.img"
    disk.write_bytes(content)
    save(image, disk)
    give_back(str(image), out)
    disks.check_same(out.read_bytes(), content)
    give_back(str(image), out, in_place=True)
    disks.check_same(out.read_bytes(), content)


def test_an_empty_disk(tmp_path: Path) -> None:
    disk, image, out = tmp_path / "disk.img", tmp_path / "a.ferro", tmp_path / "out.img"
    disk.touch()
    snapshot = save(image, disk)
    assert snapshot.disks[0].size == 0
    assert save(image, disk).parent == snapshot.id
    give_back(str(image), out)
    assert out.stat().st_size == 0
    assert bytes_of(f"{image}::latest") == b""


def test_a_blank_disk_stores_nothing(tmp_path: Path) -> None:
    job = NullJob()
    snapshot = save(tmp_path / "a.ferro", disks.blank_file(tmp_path / "blank.img", 300 * MiB), job=job)
    assert snapshot.statistics.read_bytes == snapshot.statistics.stored_bytes == 0
    assert job.warnings == []
    assert all(not any(region.root) for region in snapshot.disks[0].regions)


HUGE = r"""
import json, re, sys, time
from pathlib import Path
from tests.engine.images import give_back, hash_of, save
disk, image, out = map(Path, sys.argv[1:4])
began = time.process_time()
snapshot = save(image, disk)
again = save(image, disk)
give_back(str(image), out)
same = hash_of(str(image)) == hash_of(str(out))
# not ru_maxrss, which a child takes over from the process that started it
peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"read": snapshot.statistics.read_bytes, "again": again.statistics.stored_bytes, "peak": peak,
                  "seconds": time.process_time() - began, "image": image.stat().st_size,
                  "same": same}))
"""


def test_a_disk_of_many_terabytes(tmp_path: Path) -> None:
    """Time and memory follow the data, not the size: 15 TiB here, which is what the host's file system allows."""
    size = 15 * TiB
    disk, out = disks.blank_file(tmp_path / "huge.img", size), tmp_path / "out.img"
    rng = random.Random(3)
    places = sorted(rng.randrange(size - 5000) for _ in range(200))
    with disk.open("r+b") as file:
        for at in places:
            file.seek(at)
            file.write(rng.randbytes(5000))
    done = subprocess.run(
        [sys.executable, "-c", HUGE, str(disk), str(tmp_path / "a.ferro"), str(out)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["read"] <= 400 * CHUNK
    assert told["again"] < 64 * KiB
    assert told["peak"] < 400 * MiB
    assert told["image"] < 4 * MiB
    assert told["same"]
    assert told["seconds"] < 30
    old, new = open_source(disk), open_source(out)
    for at in places:
        assert read(old, at, 5000) == read(new, at, 5000)
    old.close()
    new.close()


class Vast:
    """64 TiB with a little data far apart, which only its extents make bearable."""

    def __init__(self) -> None:
        self.size = 64 * TiB
        self.traits = MemoryDisk(0).traits
        self.places = [i * 7 * TiB + i * 4096 for i in range(9)]

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        buf[:] = bytes(len(buf))
        for number, at in enumerate(self.places, 1):
            first, last = max(at, offset), min(at + 4096, offset + len(buf))
            if first < last:
                buf[first - offset : last - offset] = bytes([number]) * (last - first)

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        ends = [at + 4096 for at in self.places]
        return ExtentMap.from_runs(offset, length, self.places, ends, State.DATA, State.ZERO | State.HOLE)

    def close(self) -> None:
        pass


def test_64_tebibytes() -> None:
    repository = in_memory()
    source = Vast()
    snapshot = back_up(repository, source, options=BackupOptions(all_sectors=True))
    assert snapshot.statistics.read_bytes == 9 * CHUNK
    restored = SnapshotSource(repository, snapshot.disks[0])
    for number, at in enumerate(source.places):
        assert read(restored, at, 4096) == bytes([number + 1]) * 4096
        assert not any(read(restored, at + 4096, 4096))
    extents = restored.extents(0, restored.size)
    assert extents.length - extents.total(State.ZERO) == 9 * CHUNK


# ---------------------------------------------------------------------- snapshots as sources


def opened(repository: Repository, content: bytes) -> Source:
    return SnapshotSource(repository, back_up(repository, MemoryDisk(content)).disks[0])


@pytest.mark.parametrize("chunk_size", [4 * KiB, CHUNK, 2 * MiB])
def test_any_split_any_thread(chunk_size: int) -> None:
    content = bytearray(random.Random(4).randbytes(3 * MiB + 1234))
    content[MiB : MiB + 400_000] = bytes(400_000)
    repository = in_memory(chunk_size)
    check_source(lambda: opened(repository, bytes(content)), bytes(content))


def test_any_split_of_a_real_disk(mbr512: Disk) -> None:
    repository = in_memory(4 * KiB)
    source = open_source(mbr512.path)
    record = back_up(repository, source).disks[0]
    source.close()
    check_source(lambda: SnapshotSource(repository, record), bytes(disks.without_free(mbr512)), rounds=100)


def test_extents_tell_what_is_stored(gpt512: Disk) -> None:
    """ZERO is said of every chunk that is zero, not merely of some."""
    repository = in_memory(4 * KiB)
    source = open_source(gpt512.path)
    record = back_up(repository, source).disks[0]
    source.close()
    extents = SnapshotSource(repository, record).extents(0, record.size)
    wanted = bytes(disks.without_free(gpt512))
    zero = sum(4096 for at in range(0, len(wanted), 4096) if wanted[at : at + 4096].count(0) == 4096)
    assert extents.total(State.ZERO) == zero
    assert extents.total(State.HOLE) == zero
