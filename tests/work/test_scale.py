"""How work grows: with the snapshots, the objects and the chunks that a question is about, and with nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from ferrotype.engine.forget import forget
from ferrotype.engine.prune import prune
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.objects.layout import BLOCK
from ferrotype.objects.opening import MAX_CHAIN
from ferrotype.objects.volumes import PosixFile
from ferrotype.repository.chunkmap import PAGE_IDS
from ferrotype.repository.segments import ENTRY, PAGE_ENTRIES, PageCache
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import open_writer
from tests.engine.images import opened
from tests.repository import small
from tests.work.counting import counting
from tests.work.runs import PACK, counted_on

CHUNK = small.CHUNK
CATALOG = 3  # reads of a catalog: its header, its payload, and the zeros behind it


@contextmanager
def calls_of(owner: type, name: str) -> Iterator[list[None]]:
    """One item for each call of a method."""
    calls: list[None] = []
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, counted):
        yield calls


def create(path: Path) -> Repository:
    return Repository.create(Container.create(path), chunk_size=CHUNK, pack_size=PACK)


# ---------------------------------------------------------------------- opening and listing


def with_snapshots(path: Path, count: int) -> Path:
    with create(path) as repository, open_writer(repository) as writer:
        disk = small.add_disk(writer, repository, small.disk_content(8, seed=1))
        for number in range(count):
            writer.commit(small.snapshot_of(disk, name=f"day {number}", day=number))
    return path


def test_a_list_reads_one_object_for_each_snapshot(ram: Path) -> None:
    constant = set()
    for count in (5, 60):
        image = with_snapshots(ram / f"{count}.ferro", count)
        with counting() as work, opened(image) as repository:
            assert len(repository.snapshots()) == count
        assert work.count("get", "snapshot/") == count
        constant.add(work.count("get") - count)
        assert work.count("read", image) <= count + CATALOG * MAX_CHAIN + 16
        assert work.count("get", "index/") == work.count("get", "pack/") == 0
    assert len(constant) == 1


def with_objects(path: Path, count: int) -> Path:
    store = Container.create(path)
    for number in range(count):
        store.put(f"thing/{number:08x}", [b"x"])
    store.flush()
    store.close()
    return path


def test_opening_asks_for_the_files_size_no_more_often_for_more_objects(ram: Path) -> None:
    asked = []
    for count in (20, 2000):
        image = with_objects(ram / f"{count}.ferro", count)
        with calls_of(PosixFile, "size") as calls, counting() as work:
            Container.open(image).close()
        asked.append((len(calls), work.count("read", image)))
    assert asked[0] == asked[1]


def test_catalogs_name_what_changed(ram: Path) -> None:
    many, rounds, entry = 2000, 72, 80  # bytes of an entry, at most
    store = Container.open(with_objects(ram / "a.ferro", many), writable=True)
    with counting() as work:
        for number in range(rounds):
            store.put(f"more/{number:08x}", [b"x"])
            store.flush()
    store.close()
    afresh = 4
    blocks = rounds * 3 * BLOCK  # of each round: the object, its catalog, the anchor
    assert work.size("write", ram / "a.ferro") <= blocks + afresh * (many + rounds) * entry


# ---------------------------------------------------------------------- verify


@pytest.fixture
def stocked(ram: Path) -> Path:
    """An image with one disk of eight full map pages, whose chunks are in as many pages of the index."""
    path = ram / "a.ferro"
    content = b"".join(number.to_bytes(4, "big") * (CHUNK // 4) for number in range(1, 8 * PAGE_IDS + 1))
    with create(path) as repository:
        small.back_up(repository, content, "first")
    return path


def test_verify_looks_chunks_up_in_one_sweep_over_the_index(stocked: Path) -> None:
    with opened(stocked) as repository:
        chunks = repository.index.count
        index_pages, map_pages = -(-chunks // PAGE_ENTRIES), 8 + 1
        with calls_of(PageCache, "get") as visits, counted_on(repository) as work:
            assert verify(repository, VerifyOptions(workers=1), NullJob()).ok
    # each map page is looked up by itself; their chunks together, not page by page: 64 visits more
    assert len(visits) <= index_pages + map_pages * 2
    assert work.size("ask") <= chunks + map_pages


def test_where_chunks_are_lost_the_pages_that_are_whole_are_not_looked_up_again(stocked: Path) -> None:
    with opened(stocked) as repository:
        chunks = repository.index.count
        victim = repository.snapshot().disk()
        wanted = repository.map(victim, victim.regions[0]).ids(3 * PAGE_IDS + 7, 1)[0].tobytes()
        find = Repository.locate_many

        def without(self: Repository, ids: Any) -> Any:
            number, *rest = find(self, ids)
            number[ids == np.void(wanted)] = -1
            return number, *rest

        with mock.patch.object(Repository, "locate_many", without), counted_on(repository) as work:
            result = verify(repository, VerifyOptions(workers=1), NullJob())
    assert [(damage.start, damage.length) for damage in result.damaged] == [((3 * PAGE_IDS + 7) * CHUNK, CHUNK)]
    assert work.size("ask") <= chunks + PAGE_IDS + 200  # one map page again, and what tells files by name


# ---------------------------------------------------------------------- forget and prune


@pytest.mark.parametrize("forgotten", [1, 10])
def test_dropping_whole_packs_writes_the_index_and_moves_nothing(ram: Path, forgotten: int) -> None:
    path = ram / "a.ferro"
    with create(path) as repository:
        for number in range(20):
            small.back_up(repository, small.disk_content(64, seed=number), f"day {number}", day=number)
    with opened(path, writable=True) as repository:
        prune(repository, NullJob())  # gives back what the backups left: indexes and catalogs that were replaced
        chunks = repository.index.count
        forget(repository, repository.snapshots()[:forgotten])
        with counting() as work:
            result = prune(repository, NullJob())
        assert (result.deleted_packs, result.rewritten_packs) == (forgotten, 0)
        assert work.count("put", "pack/") == 0
        # the index with its directory, catalogs, anchors and a spare; the first block of each new gap
        assert work.size("write", path) <= chunks * ENTRY.itemsize + (2 * forgotten + 12) * BLOCK
        with counting() as work:
            prune(repository, NullJob())
        assert work.size("write", path) == 0
