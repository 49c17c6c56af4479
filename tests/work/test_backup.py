"""A backup reads and hashes each allocated byte once, and compresses what is new once; the rest costs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferrotype.block.memory import MemoryDisk
from ferrotype.objects.layout import BLOCK, RECORDS_AT, RecordHeader
from ferrotype.repository.chunkmap import PAGE_SIZE
from ferrotype.repository.packs import TABLE, PackHeader
from ferrotype.repository.sealing import FRAME_HEAD
from ferrotype.repository.segments import ENTRY
from ferrotype.units import KiB, MiB
from tests.engine.images import CHUNK
from tests.repository.small import SECRET
from tests.work.counting import OWNER, PACKS, WORKER, Work, joined, ranges
from tests.work.runs import PACK, counted_backup, make
from tests.work.sources import Numbered
from tests.work.truth import Truth

SIGNATURES = MiB  # bytes of a volume that are looked at to know what it is: its ends, and three labels of ZFS inside
CYLINDERS = 80  # places besides multiples of 1 MiB where a volume may begin
METADATA = 1 / 32  # share of a volume that tells what else is used: bitmaps, tables of files, of clusters
DIRECTORY = 2 * BLOCK  # bytes of a small index segment besides its entries, and of a small catalog


@pytest.fixture
def image(ram: Path) -> Path:
    return make(ram / "a.ferro")


def check_reading(work: Work, truth: Truth) -> None:
    """Workers read the cells that hold allocated bytes, each once; the owner looks at what tells which these are."""
    assert joined(ranges(work.of("read", truth.path, by=WORKER))) == joined(truth.to_read)
    surveyed = work.of("read", truth.path, by=OWNER)
    probes = sum(v.size // MiB + CYLINDERS for v in truth.disk.volumes)  # where volumes may begin in free space
    metadata = sum(2 * (SIGNATURES + METADATA * v.size) for v in truth.disk.volumes)  # for the map, and for its proof
    assert sum(call.size for call in surveyed) <= metadata + probes * 4 * KiB
    assert len(surveyed) <= 64 * len(truth.disk.volumes) + probes
    assert len(surveyed) + work.count("read", truth.path, by=WORKER) == work.count("read", truth.path)


def check_writing(work: Work, image: Path, before: int) -> None:
    """The image grew by what was put and a little for each record, and each of its bytes was written once."""
    written = work.of("write", image)
    anchors = [call for call in written if call.at < RECORDS_AT]
    assert len(anchors) <= work.count("flush")
    assert joined(ranges([call for call in written if call.at >= RECORDS_AT])) == [(before, image.stat().st_size)]
    around = RecordHeader.SIZE + BLOCK  # a record's header, and zeros to the next block
    catalogs = work.count("flush") * (around + DIRECTORY)
    assert image.stat().st_size - before <= work.size("put") + work.count("put") * around + catalogs


def check_syncs(work: Work, image: Path) -> None:
    """Each flush makes data durable, and then the catalog that names it."""
    assert work.count("flush") == 2  # what the snapshot needs, and the snapshot
    assert 0 < work.count("sync", image) == work.count("sync") <= 2 * work.count("flush")


def test_a_first_backup(first_day: Truth, image: Path) -> None:
    before = image.stat().st_size
    work = counted_backup(image, first_day.path)
    check_reading(work, first_day)
    check_writing(work, image, before)
    check_syncs(work, image)
    new, pages = len(first_day.different), first_day.pages
    assert work.count("hash", work.ids, by=WORKER) == len(first_day.cells)
    assert work.size("hash", work.ids, by=WORKER) == first_day.cell_bytes
    # the owner hashes a map page to name it, and once more to prove it before the commit
    assert work.size("hash", work.ids, by=OWNER) == 2 * pages * PAGE_SIZE
    assert work.count("compress", by=WORKER) == new
    assert work.size("compress", by=WORKER) == sum(first_day.different.values())
    assert work.count("encrypt") == 0
    assert work.count("add") == new + pages
    tables = work.count("add") * TABLE.itemsize + work.count("put", "pack/") * (PackHeader.SIZE + FRAME_HEAD)
    assert work.size("put", "pack/") == work.size("add") + tables
    assert work.count("put", "index/") == work.count("put", "snapshot/") == 1
    assert work.size("put", "index/") <= work.count("add") * ENTRY.itemsize + DIRECTORY
    # nothing is decoded but the pages that prove the map
    assert work.count("decompress", by=WORKER) == 0
    assert work.size("get", "pack/") <= pages * PAGE_SIZE


def test_an_encrypted_backup_does_the_same_and_encrypts_once(first_day: Truth, ram: Path) -> None:
    image = make(ram / "a.ferro", secret=SECRET)
    before = image.stat().st_size
    work = counted_backup(image, first_day.path, SECRET)
    check_reading(work, first_day)
    check_writing(work, image, before)
    check_syncs(work, image)
    new = len(first_day.different)
    assert work.size("hash", work.ids, by=WORKER) == first_day.cell_bytes
    assert work.count("compress", by=WORKER) == new
    assert work.count("encrypt", by=WORKER) == new
    # what does not compress is encrypted as it is, never both ways
    assert work.size("encrypt", by=WORKER) <= work.size("compress", by=WORKER)
    keys = work.of("hash", by=WORKER)
    assert sum(call.size for call in keys) == first_day.cell_bytes + new * 32  # each id makes a key of its own


def test_with_nothing_changed_only_a_snapshot_is_stored(first_day: Truth, image: Path) -> None:
    counted_backup(image, first_day.path)
    before = image.stat().st_size
    work = counted_backup(image, first_day.path)
    check_reading(work, first_day)
    check_writing(work, image, before)
    check_syncs(work, image)
    assert work.size("hash", work.ids, by=WORKER) == first_day.cell_bytes
    assert work.count("compress", by=WORKER) == work.count("decompress", by=WORKER) == work.count("add") == 0
    assert work.count("ask", by=WORKER) == 0
    assert work.size("ask") <= 2 * first_day.pages  # where the former map's pages stand, and whether they are known
    assert [call.about for call in work.of("put")] == [call.about for call in work.of("put", "snapshot/")]
    assert work.count("put") == 1
    assert image.stat().st_size - before < 64 * KiB + first_day.disk.size / 10_000


def test_a_day_later_only_what_is_new_is_compressed(first_day: Truth, second_day: Truth, image: Path) -> None:
    counted_backup(image, first_day.path)
    before = image.stat().st_size
    changed = set(second_day.cells) - set(first_day.cells)
    new = second_day.different.keys() - first_day.different.keys()
    assert 0 < len(new) < len(second_day.cells) / 4
    work = counted_backup(image, second_day.path)
    check_reading(work, second_day)
    check_writing(work, image, before)
    check_syncs(work, image)
    assert work.size("hash", work.ids, by=WORKER) == second_day.cell_bytes
    assert work.count("compress", by=WORKER) == len(new)
    assert work.size("compress", by=WORKER) == sum(second_day.different[digest] for digest in new)
    assert len(new) <= work.size("ask", by=WORKER) <= len(changed)
    assert len(new) <= work.count("add") <= len(new) + second_day.pages
    assert work.count("put", "pack/") == work.count("put", "index/") == 1


def test_equal_new_chunks_are_compressed_once(image: Path) -> None:
    """Also where the first of them is still on its way."""
    cell = b"erased flash and wiped disks do not hold zeros alone".ljust(CHUNK, b"\xff")
    work = counted_backup(image, MemoryDisk(cell * 100), workers=1)
    assert work.count("hash", work.ids, by=WORKER) == 100
    assert work.count("compress", by=WORKER) == 1


def test_cells_of_zeros_are_read_and_no_more(image: Path) -> None:
    work = counted_backup(image, MemoryDisk(100 * CHUNK))
    assert work.count("hash", work.ids) == work.count("compress", by=WORKER) == work.count("add") == 0


@pytest.mark.parametrize("cells", [64, 192])
def test_no_sync_comes_with_the_bytes(image: Path, cells: int) -> None:
    """However many packs there are, a backup has two flushes; what is put goes on to the image in few calls."""
    work = counted_backup(image, Numbered(cells))
    check_syncs(work, image)
    packs = work.count("put", "pack/")
    assert packs == -(-work.count("add") // -(-PACK // CHUNK)) > 3
    step = 2 * MiB  # bytes that one call moves
    calls = sum(-(-call.size // step) for call in work.of("put", "pack/"))
    others = work.count("put") - packs  # three calls each: what is made while it is written gets its head last
    assert work.count("write", image) <= calls + 3 * others + 2 * work.count("flush")  # catalogs and anchors


def test_one_thread_stores_and_the_workers_do_the_rest(first_day: Truth, image: Path) -> None:
    work = counted_backup(image, first_day.path)
    assert {call.thread for call in work.of("add")} == {OWNER}
    assert {call.thread for call in work.of("put", "pack/")} == {f"{PACKS}_0"}
    assert {call.thread for call in work.of("put")} == {OWNER, f"{PACKS}_0"}
