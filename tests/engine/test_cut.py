"""Backups that are cut: by the user, by errors, by SIGKILL.  What was stored is used by the next one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ferrotype.block.device import open_source
from ferrotype.block.memory import MemoryDisk
from ferrotype.engine.backup import BackupOptions
from ferrotype.errors import Cancelled
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.objects.memory import MemoryStore
from ferrotype.repository.source import SnapshotSource
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import open_writer
from ferrotype.units import KiB, MiB
from tests import disks
from tests.disks import Disk
from tests.engine.images import CHUNK, Watched, back_up, bytes_of, create, in_memory, is_sound, opened, save

ONE = BackupOptions(workers=1)


class StopsAfter(NullJob):
    """Asks to stop once so many bytes are done."""

    limit = 0
    done = 0

    @classmethod
    def at(cls, limit: int) -> StopsAfter:
        cls.limit, cls.done = limit, 0
        return cls()

    def advance(self, count: int, /) -> None:
        type(self).done += count
        self.stop = self.stop or self.done > self.limit
        super().advance(count)


def test_what_a_stopped_backup_stored_is_used(gpt512: Disk, tmp_path: Path) -> None:
    image, whole = tmp_path / "a.ferro", tmp_path / "whole.ferro"
    create(image, pack_size=MiB)
    full = save(whole, gpt512.path).statistics
    stopping = StopsAfter.at(full.read_bytes // 2)
    with pytest.raises(Cancelled):
        save(image, gpt512.path, job=stopping, options=ONE)
    with opened(image) as repository:
        assert repository.snapshots() == []
    is_sound(image)
    done = save(image, gpt512.path, options=ONE).statistics
    assert done.deduplicated_bytes > full.new_bytes // 3
    assert done.new_bytes < full.new_bytes * 2 // 3
    disks.check_same(bytes_of(f"{image}::latest"), disks.without_free(gpt512))
    is_sound(image)
    assert image.stat().st_size < whole.stat().st_size * 1.05 + 256 * KiB


@pytest.mark.parametrize("limit", [0, MiB, 5 * MiB])
def test_stopping_at_any_moment_leaves_older_snapshots_alone(tmp_path: Path, limit: int) -> None:
    disk, image = tmp_path / "disk.img", tmp_path / "a.ferro"
    content = random.Random(1).randbytes(6 * MiB)
    disk.write_bytes(content)
    create(image, pack_size=MiB)
    first = save(image, disk)
    disk.write_bytes(content[::-1])
    with pytest.raises(Cancelled):
        save(image, disk, job=StopsAfter.at(limit), options=ONE)
    is_sound(image)
    with opened(image) as repository:
        assert [snapshot.id for snapshot in repository.snapshots()] == [first.id]
    disks.check_same(bytes_of(f"{image}::latest"), content)
    save(image, disk)
    disks.check_same(bytes_of(f"{image}::latest"), content[::-1])
    disks.check_same(bytes_of(f"{image}::latest~1"), content)


def test_stopped_before_it_began(gpt512: Disk, tmp_path: Path) -> None:
    job = NullJob(stop=True)
    with pytest.raises(Cancelled):
        save(tmp_path / "a.ferro", gpt512.path, job=job)
    is_sound(tmp_path / "a.ferro")


def test_a_source_that_goes_away() -> None:
    """Unreadable sectors are kept as zeros; any other error of a source ends the backup and commits nothing."""

    class Gone(Watched):
        def read_into(self, offset: int, buf: memoryview, /) -> None:
            if offset >= 3 * MiB and len(buf) >= MiB:  # the bulk, not what is looked at first
                raise OSError(5, "gone")
            super().read_into(offset, buf)

    repository = in_memory()
    content = random.Random(2).randbytes(6 * MiB)
    with pytest.raises(OSError, match="gone"):
        back_up(repository, Gone(MemoryDisk(content)), options=ONE)
    assert repository.snapshots() == []
    snapshot = back_up(repository, MemoryDisk(content))
    assert snapshot.statistics.deduplicated_bytes >= 2 * MiB


def test_the_repository_stays_usable_after_a_stop(tmp_path: Path) -> None:
    """One open repository, as a program embedding ferrotype has it."""
    create(tmp_path / "a.ferro", pack_size=MiB)
    content = random.Random(3).randbytes(4 * MiB)
    with opened(tmp_path / "a.ferro", writable=True) as repository:
        for limit in (0, MiB, 2 * MiB):
            with pytest.raises(Cancelled):
                back_up(repository, MemoryDisk(content), job=StopsAfter.at(limit), options=ONE)
        snapshot = back_up(repository, MemoryDisk(content))
        assert snapshot.statistics.deduplicated_bytes >= MiB
        again = back_up(repository, MemoryDisk(content))
        assert again.statistics.new_bytes == 0
    disks.check_same(bytes_of(f"{tmp_path / 'a.ferro'}::latest"), content)


# ---------------------------------------------------------------------- SIGKILL

CHILD = """
import sys, time
from pathlib import Path
from ferrotype.block.device import open_source
from ferrotype.engine.backup import BackupOptions
from tests.engine.images import Watched, back_up, opened

class Slow(Watched):  # about as fast as a disk
    def read_into(self, offset, buf, /):
        super().read_into(offset, buf)
        time.sleep(len(buf) / 100e6)

with opened(Path(sys.argv[1]), writable=True) as repository:
    source = Slow(open_source(sys.argv[2]))
    print("ready", flush=True)
    back_up(repository, source, options=BackupOptions(workers=2))
print("done", flush=True)
"""


def start(image: Path, disk: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(image), str(disk)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def finish(child: subprocess.Popen[str]) -> int:
    """The child's end; its pipes are closed."""
    child.communicate()
    return child.returncode


def test_killed_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(4)
    disk, image, whole = tmp_path / "disk.img", tmp_path / "a.ferro", tmp_path / "whole.ferro"
    content = rng.randbytes(40 * MiB)
    disk.write_bytes(content)
    create(whole, pack_size=MiB)
    began = time.monotonic()
    assert finish(start(whole, disk)) == 0
    duration = time.monotonic() - began - 0.3
    full = whole.stat().st_size

    create(image, pack_size=MiB)
    killed = adopted = 0
    known = 0
    for number in range(60):  # until enough was cut, however busy the machine is
        if number >= 8 and killed >= 4 and adopted:
            break
        child = start(image, disk)
        time.sleep(rng.uniform(0.02, 0.15 + duration * (number % 8) / 14))
        child.send_signal(signal.SIGKILL)
        killed += finish(child) == -signal.SIGKILL
        with Repository.open(Container.open(image, writable=True)) as repository:
            stored = sum(repository.store.size(name) for name in repository.packs())
            assert stored >= known  # nothing that was stored is lost again
            known = stored
            with open_writer(repository) as writer:
                adopted += writer.adopted
        is_sound(image)
    assert killed >= 4
    assert adopted > 0
    snapshot = save(image, disk, job=NullJob())
    disks.check_same(bytes_of(f"{image}::{snapshot.id}"), content)
    is_sound(image)
    with opened(image) as repository:
        store = repository.store
        assert isinstance(store, Container)
        assert sum(store.size(name) for name in repository.packs()) < full * 1.02 + MiB
        assert store.file_size < full * 1.05 + 4 * MiB


def test_a_cut_backup_is_taken_up_again(gpt512: Disk, tmp_path: Path) -> None:
    """Packs that were durable and listed nowhere are found, proven, and said."""
    image = tmp_path / "a.ferro"
    create(image, pack_size=MiB)
    content = random.Random(5).randbytes(8 * MiB)
    disk = tmp_path / "disk.img"
    disk.write_bytes(content)
    child = start(image, disk)
    time.sleep(0.05)
    deadline = time.monotonic() + 10
    while image.stat().st_size < 3 * MiB and time.monotonic() < deadline:
        time.sleep(0.002)
    child.kill()
    finish(child)
    job = NullJob()
    snapshot = save(image, disk, job=job)
    if snapshot.parent is None:
        assert any("taken up again" in note for note in job.notes)
        assert snapshot.statistics.deduplicated_bytes >= MiB
    assert snapshot.statistics.new_bytes + snapshot.statistics.deduplicated_bytes == 8 * MiB
    disks.check_same(bytes_of(f"{image}::latest"), content)


def test_a_damaged_parent_does_not_stop_a_backup() -> None:
    """The last snapshot's map is gone: the next backup is made all the same, and is whole."""
    store = MemoryStore()
    content = random.Random(6).randbytes(4 * MiB)
    repository = Repository.create(store, chunk_size=CHUNK, pack_size=MiB)
    back_up(repository, MemoryDisk(content))
    repository = Repository.open(store)
    for name in list(repository.packs()):
        store.delete(name)
    for info in list(store.list("index/")):
        store.delete(info.name)
    repository = Repository.open(store)
    snapshot = back_up(repository, MemoryDisk(content))
    found = bytearray(len(content))
    SnapshotSource(Repository.open(store), snapshot.disks[0]).read_into(0, memoryview(found))
    disks.check_same(found, content)


def test_a_source_is_closed_by_whoever_opened_it(tmp_path: Path) -> None:
    disk = disks.blank_file(tmp_path / "disk.img", MiB)
    source = open_source(disk)
    create(tmp_path / "a.ferro")
    with opened(tmp_path / "a.ferro", writable=True) as repository:
        back_up(repository, source)
    source.read_into(0, memoryview(bytearray(512)))
    source.close()
