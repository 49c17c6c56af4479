"""A checksum reads each byte once; opening, listing and looking at a disk read next to nothing."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from ferrotype.block.device import open_source
from ferrotype.engine.checksum import LEAF, checksum
from ferrotype.engine.survey import survey
from ferrotype.job import NullJob
from ferrotype.objects.layout import BLOCK, RecordHeader
from ferrotype.repository.chunkmap import PAGE_SIZE
from ferrotype.repository.source import SnapshotSource
from ferrotype.units import KiB
from tests.engine.images import CHUNK, opened
from tests.work.counting import WORKER, counting, joined, ranges
from tests.work.runs import PACK, counted_on, make, part_of
from tests.work.sources import Numbered
from tests.work.truth import Truth


def leaves(truth: Truth, ranges_: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, end) of the leaves of the hash that some range touches."""
    numbers = sorted({n for start, end in ranges_ for n in range(start // LEAF, -(-end // LEAF))})
    return [(n * LEAF, min((n + 1) * LEAF, truth.disk.size)) for n in numbers]


def test_the_checksum_of_a_file_reads_and_hashes_each_leaf_once(first_day: Truth) -> None:
    stored = leaves(first_day, first_day.stored)
    with closing(open_source(first_day.path)) as source, counting() as work:
        checksum(source, NullJob(), workers=2)
    assert joined(ranges(work.of("read", first_day.path, by=WORKER))) == joined(stored)
    assert work.size("hash", b"", by=WORKER) == sum(end - start for start, end in stored)
    assert work.count("read", first_day.path) == work.count("read", first_day.path, by=WORKER) == len(stored)


def test_the_checksum_of_a_snapshot_opens_each_chunk_once(first_day: Truth, ram: Path) -> None:
    image = make(ram / "a.ferro", first_day.path)
    with part_of(image) as part, counted_on(part.repository) as work:
        checksum(SnapshotSource(part.repository, part.disk), NullJob(), workers=2)
    cells = first_day.cells
    wanted = leaves(first_day, [(at, at + length) for at, _, length in cells])
    assert work.size("hash", b"", by=WORKER) == sum(end - start for start, end in wanted)
    opened = work.count("hash", work.ids, by=WORKER)
    assert len(first_day.different) <= opened <= len(cells)  # one that stands twice may be kept in memory meanwhile
    assert work.size("get", "pack/", by=WORKER) <= sum(length for _, _, length in cells)
    assert work.count("decompress", by=WORKER) <= opened


@pytest.mark.parametrize("cells", [20, 200])
def test_opening_and_listing_read_no_pack_and_no_index(ram: Path, cells: int) -> None:
    image = make(ram / "a.ferro", *(Numbered(cells) for _ in range(3)))
    with counting() as work, opened(image) as repository:
        assert len(repository.snapshots()) == 3
        stored = list(repository.store.list(""))
    others = [info for info in stored if not info.name.startswith(("pack/", "index/"))]
    assert len(stored) - len(others) >= cells * CHUNK // PACK
    assert work.count("get", "pack/") == work.count("get", "index/") == work.count("ask") == 0
    # the volume's header and the anchors; of each other object header, content and the zeros behind it; catalogs
    heads, catalogs, entry = 16, 16, 128
    assert work.count("read", image) <= heads + 4 * (len(others) + catalogs)
    assert (
        work.size("read", image)
        <= heads * BLOCK
        + sum(info.size + 4 * RecordHeader.SIZE + BLOCK for info in others)
        + catalogs * (BLOCK + RecordHeader.SIZE)
        + len(stored) * entry
    )
    assert work.count("write") == work.count("sync") == 0


def test_looking_at_a_disk_of_a_snapshot_decodes_what_a_survey_reads(first_day: Truth, ram: Path) -> None:
    with closing(open_source(first_day.path)) as source, counting() as on_disk:
        survey(source)
    touched = {call.at // CHUNK + n for call in on_disk.of("read") for n in range(call.size // CHUNK + 2)}
    image = make(ram / "a.ferro", first_day.path)
    with part_of(image) as part, counted_on(part.repository) as work:
        survey(SnapshotSource(part.repository, part.disk))
    # a chunk is decoded once however often it is asked for, and so is a page of the map
    assert work.count("hash", work.ids) <= len(touched) + first_day.pages
    assert work.size("get", "pack/") <= len(touched) * (CHUNK + KiB) + first_day.pages * PAGE_SIZE
