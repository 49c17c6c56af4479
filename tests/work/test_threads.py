"""All workers are at work at the same time, in every verb that has workers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ferrotype.block.device import open_source
from ferrotype.block.memory import MemoryDisk
from ferrotype.engine import plan as plan_module
from ferrotype.engine import restore as restore_module
from ferrotype.engine.checksum import checksum
from ferrotype.engine.copy import copy
from ferrotype.engine.restore import RestoreOptions, restore
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.repository.source import SnapshotSource
from ferrotype.units import MiB
from tests.engine.images import CHUNK
from tests.work.counting import WORKER
from tests.work.runs import counted_backup, make, part_of
from tests.work.sources import Blank, Numbered

WORKERS = 3
CELLS = 160
BATCH = MiB  # bytes that a worker takes at a time, here: there are ten batches, and as many packs


class Meeting:
    """A place that so many workers must have reached before the first may go on; for all others it is no stop."""

    def __init__(self, workers: int) -> None:
        self._barrier = threading.Barrier(workers)
        self._seen = threading.local()
        self.held = False

    def come(self) -> None:
        if threading.current_thread().name.startswith(WORKER) and not hasattr(self._seen, "came"):
            self._seen.came = True
            if not self.held:
                self._barrier.wait(30)  # seconds until a verb that has fewer workers is told so
                self.held = True


@contextmanager
def meeting() -> Iterator[Meeting]:
    """In the block, workers wait for each other at what each of them reads first."""
    place = Meeting(WORKERS)

    def stopping(read: Callable[..., Any]) -> Callable[..., Any]:
        def stop(*args: Any) -> Any:
            place.come()
            return read(*args)

        return stop

    with (
        mock.patch.object(os, "pread", stopping(os.pread)),
        mock.patch.object(os, "preadv", stopping(os.preadv)),
    ):
        yield place


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "BATCH", BATCH)
    monkeypatch.setattr(restore_module, "_BATCH", BATCH)


@pytest.fixture
def disk(ram: Path) -> Path:
    source, content = Numbered(CELLS), bytearray(CELLS * CHUNK)
    source.read_into(0, memoryview(content))
    (ram / "disk.img").write_bytes(content)
    return ram / "disk.img"


def test_in_a_backup(disk: Path, ram: Path) -> None:
    image = make(ram / "a.ferro")
    with meeting() as place:
        counted_backup(image, disk, workers=WORKERS)
    assert place.held


def test_in_a_checksum(disk: Path) -> None:
    with closing(open_source(disk)) as source, meeting() as place:
        checksum(source, NullJob(), workers=WORKERS)
    assert place.held


@pytest.mark.parametrize("verb", ["restore", "delta", "verify", "deep", "checksum", "copy"])
def test_where_an_image_is_read(disk: Path, ram: Path, verb: str) -> None:
    image, job = make(ram / "a.ferro", disk), NullJob()
    with part_of(image) as part:
        repository = part.repository
        repository.index  # noqa: B018  it is opened by whoever comes first
        with meeting() as place:
            if verb == "restore":
                restore(part, Blank(part.length), RestoreOptions(workers=WORKERS), job)
            elif verb == "delta":
                target = MemoryDisk(part.length)
                restore(part, target, RestoreOptions(workers=WORKERS, delta=True), job, target=target)
            elif verb == "checksum":
                checksum(SnapshotSource(repository, part.disk), job, workers=WORKERS)
            elif verb == "copy":
                with repository.twin(Container.create(ram / "b.ferro")) as other:
                    copy(repository, repository.snapshots(), other, job, workers=WORKERS)
            else:
                verify(repository, VerifyOptions(workers=WORKERS, deep=verb == "deep"), job)
    assert place.held
