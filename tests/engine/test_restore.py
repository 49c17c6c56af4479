"""Restoring in place: only what differs is written, what is known to be blank is not zeroed, and what would harm is
refused before the first write."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from ferrotype.block.memory import MemoryDisk
from ferrotype.engine.restore import Part, RestoreOptions, check_target, restore
from ferrotype.engine.targets import refuse_harm
from ferrotype.errors import MissingChunk, Refused
from ferrotype.extents import ExtentMap, State
from ferrotype.job import NullJob
from ferrotype.objects.memory import MemoryStore
from ferrotype.repository.store import Repository
from ferrotype.units import GiB, KiB, MiB
from tests import disks
from tests.disks import Disk
from tests.engine.images import CHUNK, back_up, give_back, in_memory, save
from tests.machine import loop, mounted, run

DELTA = RestoreOptions(delta=True)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, gpt512: Disk) -> Path:
    path = tmp_path_factory.mktemp("image") / "a.ferro"
    save(path, gpt512.path)
    return path


# ---------------------------------------------------------------------- in place


@pytest.mark.parametrize("kind", ["file", "device"])
def test_a_delta_writes_the_chunks_that_differ(gpt512: Disk, image: Path, tmp_path: Path, kind: str) -> None:
    wanted = disks.without_free(gpt512)
    out = tmp_path / "out.img"
    data = bytearray(wanted)
    rng = random.Random(1)
    ext4 = gpt512.volume("ext4")
    starts = range(ext4.start, ext4.end - CHUNK, CHUNK)
    damaged = [start for start in starts if any(wanted[start : start + CHUNK])][:2]  # chunks that hold data
    for start in damaged:
        data[start + 1000] ^= 1
        data[start + CHUNK - 1] ^= 0x80
    gap = gpt512.volume("ntfs").start - MiB  # zeros between partitions
    data[gap : gap + 100] = rng.randbytes(100)
    out.write_bytes(data)
    if kind == "file":
        result = give_back(str(image), out, in_place=True, options=DELTA)
    else:
        with loop(out) as device:
            result = give_back(str(image), device, in_place=True, options=DELTA)
    disks.check_same(out.read_bytes(), wanted)
    assert result.written_bytes == len(damaged) * CHUNK
    assert 100 <= result.zeroed_bytes <= MiB
    assert result.written_bytes + result.zeroed_bytes + result.kept_bytes == gpt512.size


def test_a_delta_onto_the_same_writes_nothing(gpt512: Disk, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.img"
    out.write_bytes(disks.without_free(gpt512))
    result = give_back(str(image), out, in_place=True, options=DELTA)
    assert (result.written_bytes, result.zeroed_bytes, result.kept_bytes) == (0, 0, gpt512.size)


def test_a_delta_onto_another_state(gpt512: Disk, tmp_path: Path) -> None:
    """Back and forth between two snapshots."""
    image, disk = tmp_path / "a.ferro", tmp_path / "disk.img"
    shutil.copy(gpt512.path, disk)
    save(image, disk)
    volume = gpt512.volume("ext4")
    with disks.opened(disk, "ext4", tmp_path / "mnt", offset=volume.start, size=volume.size) as root:
        (root / "more").write_bytes(random.Random(2).randbytes(300 * KiB))
        (root / "large").unlink()
    second = save(image, disk)
    out, states = tmp_path / "out.img", []
    for number in (0, 1):
        give_back(f"{image}::latest~{number}", tmp_path / f"{number}.img")
        states.append((tmp_path / f"{number}.img").read_bytes())
    out.write_bytes(states[0])
    for number in (1, 0, 1):
        result = give_back(f"{image}::latest~{number}", out, in_place=True, options=DELTA)
        disks.check_same(out.read_bytes(), states[number])
        assert 0 < result.written_bytes < second.statistics.read_bytes // 3
    out.write_bytes(random.Random(3).randbytes(len(states[0])))  # nothing of it is right
    result = give_back(f"{image}::latest", out, in_place=True, options=DELTA)
    disks.check_same(out.read_bytes(), states[0])
    assert result.kept_bytes == 0


def test_a_delta_of_a_partition(gpt512: Disk, image: Path, tmp_path: Path) -> None:
    volume = gpt512.volume("ntfs")
    wanted = disks.without_free(gpt512)[volume.start : volume.end]
    out = tmp_path / "out.img"
    data = bytearray(wanted)
    data[5] ^= 1
    out.write_bytes(data)
    result = give_back(f"{image}#{volume.index}", out, in_place=True, options=DELTA)
    disks.check_same(out.read_bytes(), wanted)
    assert result.written_bytes == CHUNK


class SparseTarget:
    """A huge target that knows its holes; reading a hole is a waste that would take for ever."""

    def __init__(self, size: int, holes_from: int) -> None:
        self.base = MemoryDisk(holes_from)
        self.size = size
        self.traits = self.base.traits

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        assert offset + len(buf) <= self.base.size
        self.base.read_into(offset, buf)

    def write(self, offset: int, data: memoryview, /) -> None:
        self.base.write(offset, data)

    def write_zeros(self, offset: int, length: int, /) -> None:
        assert offset + length <= self.base.size

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return ExtentMap.from_runs(offset, length, [self.base.size], [self.size], State.ZERO | State.HOLE)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class Sparse(MemoryDisk):
    """A huge source with some bytes at its start."""

    def __init__(self, content: bytes, size: int) -> None:
        super().__init__(content)
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        buf[:] = bytes(len(buf))
        inside = self.data[offset : offset + len(buf)]
        buf[: len(inside)] = inside

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return ExtentMap.from_runs(offset, length, [len(self.data)], [self._size], State.ZERO | State.HOLE)


def test_a_delta_does_not_read_holes() -> None:
    content = random.Random(5).randbytes(3 * MiB)
    repository = in_memory()
    record = back_up(repository, Sparse(content, 50 * GiB)).disks[0]
    target = SparseTarget(50 * GiB, 4 * MiB)
    restore(Part(repository, record, 0, record.size), target, DELTA, NullJob(), target=target)
    disks.check_same(target.base.data, content + bytes(MiB))


def test_no_blank_leaves_zeros_alone(gpt512: Disk, image: Path, tmp_path: Path) -> None:
    """A target that is known to be zero is not zeroed; one that was not zero keeps what it had there."""
    wanted = disks.without_free(gpt512)
    out = tmp_path / "out.img"
    out.write_bytes(b"\xee" * gpt512.size)
    result = give_back(str(image), out, in_place=True, options=RestoreOptions(no_blank=True))
    assert result.zeroed_bytes == 0
    found = out.read_bytes()
    for at in range(0, len(wanted), 4096):
        block = found[at : at + 4096]
        if block != wanted[at : at + 4096]:
            assert block == b"\xee" * 4096
            assert wanted[at : at + 4096].count(0) == 4096
    assert found.count(b"\xee" * 4096) > 1000

    blank = disks.blank_file(tmp_path / "blank.img", gpt512.size)
    give_back(str(image), blank, in_place=True, options=RestoreOptions(no_blank=True))
    disks.check_same(blank.read_bytes(), wanted)


@pytest.mark.parametrize("start", [0, 1, 4095, 65_536, 100_001])
def test_any_stretch_of_a_disk(start: int) -> None:
    """A part that begins and ends inside chunks."""
    content = bytearray(random.Random(6).randbytes(700_001))
    content[200_000:420_000] = bytes(220_000)
    repository = in_memory()
    record = back_up(repository, MemoryDisk(content)).disks[0]
    for length in (0, 1, 512, 65_536, 131_073, len(content) - start):
        for options in (RestoreOptions(), DELTA, RestoreOptions(workers=1)):
            sink = MemoryDisk(b"\x55" * (length + 10))
            result = restore(Part(repository, record, start, length), sink, options, NullJob(), target=sink)
            disks.check_same(sink.data, content[start : start + length] + b"\x55" * 10)
            assert result.disk_bytes == length


def test_progress_comes_to_its_end(gpt512: Disk) -> None:
    class Meter(NullJob):
        total: int | None = None
        done = 0

        def begin(self, phase: str, total: int | None = None, /) -> None:
            if phase == "restoring":
                type(self).total = total

        def advance(self, count: int, /) -> None:
            type(self).done += count

    repository = in_memory()
    record = back_up(repository, MemoryDisk(gpt512.image())).disks[0]
    restore(Part(repository, record, 0, record.size), MemoryDisk(record.size), RestoreOptions(), Meter())
    assert Meter.done == Meter.total == gpt512.size


# ---------------------------------------------------------------------- refusals


def record_of(repository: Repository, size: int, sector_size: int) -> Part:
    record = back_up(repository, MemoryDisk(random.Random(size).randbytes(size), sector_size)).disks[0]
    return Part(repository, record, 0, size)


def test_a_target_too_small_is_refused(gpt512: Disk, image: Path, tmp_path: Path) -> None:
    part = record_of(in_memory(), MiB, 512)
    sink = MemoryDisk(b"\x77" * (MiB - 1))
    with pytest.raises(Refused, match=str(MiB)):
        restore(part, sink, RestoreOptions(), NullJob())
    assert sink.data == b"\x77" * (MiB - 1)
    check_target(part, MemoryDisk(MiB))

    out = tmp_path / "out.img"
    out.write_bytes(b"\x77" * (gpt512.size - 512))
    with pytest.raises(Refused):
        give_back(str(image), out, in_place=True)
    with loop(out) as device, pytest.raises(Refused):
        give_back(str(image), device, in_place=True)
    assert out.read_bytes() == b"\x77" * (gpt512.size - 512)


@pytest.mark.parametrize(("ours", "theirs"), [(512, 4096), (4096, 512)])
def test_other_sectors_are_refused(ours: int, theirs: int) -> None:
    part = record_of(in_memory(), MiB, ours)
    sink = MemoryDisk(MiB, theirs)
    with pytest.raises(Refused, match=str(theirs)):
        restore(part, sink, RestoreOptions(), NullJob())
    assert sink.data == bytes(MiB)


def test_a_device_with_other_sectors_is_refused(gpt4096: Disk, tmp_path: Path) -> None:
    image = tmp_path / "a.ferro"
    save(image, gpt4096.path, 4096)
    out = disks.blank_file(tmp_path / "out.img", gpt4096.size)
    with loop(out, sector_size=512) as device, pytest.raises(Refused, match="sectors of 512"):
        give_back(str(image), device, in_place=True)
    assert out.stat().st_blocks == 0


def test_a_mounted_target_is_refused(bare: Disk, image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    shutil.copy(bare.path, copy)
    with loop(copy) as device:
        refuse_harm(device, [image])
        with mounted(device, "ext4", tmp_path / "mnt"), pytest.raises(Refused, match="nothing was written"):
            refuse_harm(device, [image])
        refuse_harm(device, [image])


def test_the_disk_that_holds_the_image_is_refused(bare: Disk, tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    shutil.copy(bare.path, copy)
    with loop(copy) as device, mounted(device, "ext4", tmp_path / "mnt") as root:
        (root / "image.ferro").write_bytes(b"x")
        with pytest.raises(Refused, match="nothing was written"):
            refuse_harm(device, [root / "image.ferro"])


def test_the_image_itself_is_refused(image: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(image)
    hard = tmp_path / "hard"
    for target in (image, link):
        with pytest.raises(Refused, match="nothing was written"):
            refuse_harm(target, [image])
    hard.hardlink_to(image)
    with pytest.raises(Refused, match="nothing was written"):
        refuse_harm(hard, [image])
    with loop(image, read_only=True) as device, pytest.raises(Refused, match="nothing was written"):
        refuse_harm(device, [image])
    refuse_harm(tmp_path / "elsewhere.img", [image])


def test_a_restore_that_fails_leaves_no_file(gpt512: Disk, image: Path, tmp_path: Path) -> None:
    class Stops(NullJob):
        def advance(self, count: int, /) -> None:
            if count:
                raise MissingChunk(bytes(32))

    before = sorted(tmp_path.iterdir())
    with pytest.raises(MissingChunk):
        give_back(str(image), tmp_path / "out.img", job=Stops())
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "out.img").write_bytes(b"old")
    with pytest.raises(MissingChunk):
        give_back(str(image), tmp_path / "out.img", job=Stops())
    assert (tmp_path / "out.img").read_bytes() == b"old"


def test_a_lost_chunk_is_said_and_nothing_is_made_up() -> None:
    store = MemoryStore()
    repository = Repository.create(store, chunk_size=CHUNK, pack_size=MiB)
    record = record_of(repository, 4 * MiB, 512).disk
    first = next(info.name for info in store.list("pack/"))
    store.delete(first)
    part = Part(repository, record, 0, record.size)
    with pytest.raises(Exception, match=r"missing|not in the store"):
        restore(part, MemoryDisk(record.size), RestoreOptions(), NullJob())


def test_the_old_table_of_a_larger_target_does_not_survive(gpt512: Disk, image: Path, tmp_path: Path) -> None:
    """A larger disk that had a GPT of its own gets the restored one at its end."""
    out = disks.blank_file(tmp_path / "out.img", gpt512.size + 4 * MiB)
    run("sgdisk", "-n", "1:2048:4096", out)
    with loop(out) as device:
        assert give_back(str(image), device, in_place=True).table_moved
        with loop(gpt512.path, read_only=True) as original:
            assert disks.table_of(device) == disks.table_of(original)
        assert "No problems found" in run("sgdisk", "-v", device)


def test_a_disk_of_one_sector() -> None:
    part = record_of(in_memory(), 512, 512)
    sink = MemoryDisk(512)
    restore(part, sink, RestoreOptions(), NullJob())
    assert sink.data == random.Random(512).randbytes(512)


def test_a_stale_table_behind_a_disk_that_has_none_is_removed(tmp_path: Path) -> None:
    """A larger target was a GPT disk; its backup header must not offer that disk to anyone afterwards."""
    plain = tmp_path / "plain.img"
    plain.write_bytes(random.Random(5).randbytes(2 * MiB))
    save(tmp_path / "a.ferro", plain)
    target = tmp_path / "target.img"
    with target.open("wb") as file:
        file.truncate(8 * MiB)
    run("sgdisk", "-n", "1:2048:4096", target)
    assert target.read_bytes()[-512:-504] == b"EFI PART"
    with loop(target) as device:
        give_back(str(tmp_path / "a.ferro"), device)
    after = target.read_bytes()
    assert after[: 2 * MiB] == plain.read_bytes()
    assert after[-512:] == bytes(512)
