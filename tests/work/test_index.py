"""A sweep over many ids proves each page of the index once, and looking for one id proves one page a segment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ferrotype.objects.container import Container
from ferrotype.repository.sealing import ID_SIZE
from ferrotype.repository.segments import ENTRY, PAGE_ENTRIES, PageCache
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import open_writer
from tests.engine.images import opened
from tests.repository import small
from tests.repository.small import CHUNK as SMALL
from tests.work.counting import Work
from tests.work.runs import counted_on

CHUNKS = 5 * PAGE_ENTRIES + 100
LOOKUP = 1 << 18  # ids that are looked up together


@pytest.fixture
def stocked(ram: Path) -> tuple[Path, list[bytes]]:
    """An image with thousands of tiny chunks, and their ids."""
    path = ram / "a.ferro"
    with Repository.create(Container.create(path), chunk_size=SMALL) as repository, open_writer(repository) as writer:
        ids: list[bytes] = [writer.add_plain(number.to_bytes(4, "little")) for number in range(CHUNKS)]
        disk = small.add_disk(writer, repository, bytes(SMALL))
        writer.commit(small.snapshot_of(disk, name="many"))
    return path, ids


def pages(work: Work) -> int:
    """How many pages of the index were proven: each whole one, and what is hashed around it, has such a size."""
    least = (CHUNKS % PAGE_ENTRIES) * ENTRY.itemsize
    return len([call for call in work.of("hash", work.objects) if call.size >= least])


def test_a_sweep_proves_each_page_once(stocked: tuple[Path, list[bytes]]) -> None:
    path, ids = stocked
    order = np.random.default_rng(1).permutation(len(ids) * 3) % len(ids)
    wanted = np.frombuffer(b"".join(ids), f"V{ID_SIZE}")[order]
    with opened(path) as repository:
        segments = len(repository.index.segments)
        for segment in repository.index.segments:  # that a page was seen before is no help: there is room for one
            segment._cache = PageCache(PAGE_ENTRIES * ENTRY.itemsize)
        with counted_on(repository) as work:
            number, *_ = repository.locate_many(wanted)
    assert (number >= 0).all()
    sweeps = -(-len(wanted) // LOOKUP)
    assert pages(work) <= sweeps * -(-CHUNKS // PAGE_ENTRIES) + segments
    assert work.size("ask") <= len(wanted) * segments


def test_one_id_proves_one_page(stocked: tuple[Path, list[bytes]]) -> None:
    path, ids = stocked
    for wanted in (ids[0], ids[-1], bytes(range(ID_SIZE))):
        with opened(path) as repository:
            segments = len(repository.index.segments)
            with counted_on(repository) as work:
                repository.index.find(wanted)
                repository.index.find(wanted)
        assert pages(work) <= segments
        assert work.size("get", "index/") <= segments * (PAGE_ENTRIES * ENTRY.itemsize + 64)
