"""A restore opens each frame once and writes each byte of data once; with --delta it reads the target instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferrotype.engine.restore import _BATCH as BATCH
from ferrotype.repository.chunkmap import PAGE_SIZE
from ferrotype.repository.keys import Secret
from ferrotype.repository.sealing import ChunkId
from ferrotype.units import KiB
from tests.repository.small import SECRET
from tests.work.counting import OWNER, WORKER, Call, Work, joined, ranges
from tests.work.runs import counted_backup, counted_restore, make, part_of
from tests.work.truth import Truth

GAP = 128 * KiB  # bytes of a pack that are read through rather than asking twice


@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "encrypted"])
def test_to_a_new_file(first_day: Truth, ram: Path, secret: Secret | None) -> None:
    image = make(ram / "a.ferro", first_day.path, secret=secret)
    work = counted_restore(image, ram / "out.img", secret)
    cells, pages = first_day.cells, first_day.pages
    assert joined(ranges(written(work))) == joined([(at, at + length) for at, _, length in cells])
    assert len(written(work)) <= batches(cells)
    assert work.count("zero") == 0  # a new file is blank
    assert work.count("hash", work.ids, by=WORKER) == len(cells)
    assert work.size("hash", work.ids, by=WORKER) == first_day.cell_bytes
    assert work.count("decompress", by=WORKER) <= len(cells)
    assert work.count("decrypt", by=WORKER) == (len(cells) if secret else 0)
    assert work.size("hash", work.ids, by=OWNER) == pages * PAGE_SIZE
    reads, stored, between = places(image, first_day, secret)
    assert work.count("read", image, by=WORKER) <= reads < len(cells)
    assert stored <= work.size("read", image, by=WORKER) <= stored + between
    assert work.count("sync") <= 2 + 1  # the file by the restore and when it takes its name, and its folder


def test_what_the_target_has_is_not_opened(first_day: Truth, second_day: Truth, ram: Path) -> None:
    image, out = make(ram / "a.ferro", first_day.path), ram / "out.img"
    counted_restore(image, out)
    counted_backup(image, second_day.path)
    work = counted_restore(image, out, delta=True)
    differing = set(second_day.cells) - set(first_day.cells)
    assert 0 < len(differing) < len(second_day.cells) / 4
    # every byte of it that the file system has stored is read once
    read = joined(ranges(work.of("read", out)))
    assert sum(end - start for start, end in read) <= first_day.cell_bytes + second_day.cell_bytes
    assert work.count("hash", work.ids, by=WORKER) == len(second_day.cells) + len(differing)
    assert joined(ranges(work.of("write", out))) == joined(sorted((at, at + length) for at, _, length in differing))
    assert work.count("decompress", by=WORKER) <= len(differing)
    assert work.count("read", image, by=WORKER) <= len(differing)


def test_with_the_same_on_the_target_no_frame_is_read(first_day: Truth, ram: Path) -> None:
    image, out = make(ram / "a.ferro", first_day.path), ram / "out.img"
    counted_restore(image, out)
    work = counted_restore(image, out, delta=True)
    assert work.count("read", image, by=WORKER) == work.count("write", out) == 0
    assert work.size("hash", work.ids, by=WORKER) == first_day.cell_bytes
    assert sum(end - start for start, end in joined(ranges(work.of("read", out)))) <= first_day.cell_bytes


def written(work: Work) -> list[Call]:
    """What went to the new file, which has no name of its own yet."""
    return [call for call in work.of("write") if str(call.about).endswith(".part")]


def batches(cells: list[tuple[int, bytes, int]]) -> int:
    """How many stretches of cells are restored together: neighbours, up to the size of a batch."""
    count = size = end = 0
    for at, _, length in cells:
        if count == 0 or at != end or size >= BATCH:
            count, size = count + 1, 0
        end, size = at + length, size + length
    return count


def places(image: Path, truth: Truth, secret: Secret | None) -> tuple[int, int, int]:
    """How often, going through the cells, the next frame does not follow or a batch is full; and bytes of packs: of
    the frames, and between frames that are read together.
    """
    reads = stored = between = size = at_end = pack_end = 0
    pack = ""
    with part_of(image, secret) as part:
        maps = {region.start: part.repository.map(part.disk, region) for region in part.disk.regions}
        for region in part.disk.regions:
            ids = maps[region.start].ids(0, part.disk.cells(region))
            for at, _, length in (c for c in truth.cells if region.start <= c[0] < region.start + region.length):
                cell = (at - region.start) // part.disk.chunk_size
                place = part.repository.locate(ChunkId(ids[cell].tobytes()))
                together = at == at_end and size < BATCH
                gap = place.offset - pack_end
                if not (reads and together and place.pack == pack and 0 <= gap <= GAP):
                    reads += 1
                else:
                    between += gap
                size = size + length if together else length
                stored += place.length
                at_end, pack, pack_end = at + length, place.pack, place.offset + place.length
    return reads, stored, between
