"""Memory follows the workers and the packs, and hardly the size of the disk: nothing is copied that need not be.

What is counted are the bytes that Python and numpy hold at the same time at most.  Buffers that sources are read into
stand outside of that: one a worker.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from ferrotype.engine import plan as plan_module
from ferrotype.engine import restore as restore_module
from ferrotype.engine.backup import BackupOptions
from ferrotype.engine.restore import RestoreOptions, restore
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.job import NullJob
from ferrotype.repository import writer as writer_module
from ferrotype.units import MiB
from tests.engine.images import CHUNK, back_up, opened
from tests.work.runs import PACK, make, part_of
from tests.work.sources import Blank, Numbered

WORKERS = 2
BATCH = MiB  # bytes that a worker takes at a time, here
WAITING = 3 * PACK  # bytes of packs that may wait for storage, here
BASE = MiB  # bytes: pages of maps and of the index, results, threads
A_CHUNK = 256  # bytes: an entry of the new index in a dict, sorted, and written: 44 bytes each, and ids
A_PLACE = 512  # bytes: where a chunk comes from and goes to in a restore, of 262,144 at most
SIZES = pytest.mark.parametrize("cells", [512, 1024])  # 32 and 64 MiB


def peak(work: Callable[[], object]) -> int:
    """The most bytes that were in use at any moment beyond those before."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """All that is loaded at first use is loaded."""
    image = make(tmp_path_factory.mktemp("imported") / "a.ferro", Numbered(4))
    with part_of(image) as part:
        verify(part.repository, VerifyOptions(deep=True), NullJob())
        restore(part, Blank(part.length), RestoreOptions(), NullJob())


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small disks show how memory grows only where what is on its way at the same time is far smaller."""
    monkeypatch.setattr(plan_module, "BATCH", BATCH)
    monkeypatch.setattr(restore_module, "_BATCH", BATCH)
    monkeypatch.setattr(writer_module, "_FLYING", WAITING)


def backed_up(image: Path, cells: int) -> int:
    with opened(image, writable=True) as repository:
        options = BackupOptions(workers=WORKERS)
        return peak(lambda: back_up(repository, Numbered(cells), options=options))


@SIZES
def test_of_a_backup(ram: Path, cells: int) -> None:
    image = make(ram / "a.ferro")
    packs = WAITING + 2 * (PACK + CHUNK)  # and one filling, one being put
    in_flight = WORKERS * (3 + 1) * BATCH  # sealed batches, and a chunk before and after it got its head
    first = backed_up(image, cells)
    assert first <= packs + in_flight + cells * A_CHUNK + BASE < cells * CHUNK / 2
    assert backed_up(image, cells) <= cells * A_CHUNK + BASE  # nothing is new: nothing is kept


@SIZES
def test_of_a_restore(ram: Path, cells: int) -> None:
    with part_of(make(ram / "a.ferro", Numbered(cells))) as part:
        options = RestoreOptions(workers=WORKERS)
        used = peak(lambda: restore(part, Blank(part.length), options, NullJob()))
    batches = WORKERS * 3 * BATCH  # as they are stored, as they are written, and a chunk between
    assert used <= batches + cells * A_PLACE + BASE < cells * CHUNK / 3


@SIZES
@pytest.mark.parametrize("deep", [False, True])
def test_of_a_verification(ram: Path, cells: int, deep: bool) -> None:
    with part_of(make(ram / "a.ferro", Numbered(cells))) as part:
        options = VerifyOptions(workers=WORKERS, deep=deep)
        used = peak(lambda: verify(part.repository, options, NullJob()))
    packs = WORKERS * 3 * PACK  # as they are read, and what is decoded of them
    assert used <= packs + cells * A_CHUNK + BASE < cells * CHUNK / 3
