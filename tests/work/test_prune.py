"""Prune moves live frames as they are, and does not touch packs in which nothing died."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferrotype.engine.forget import forget
from ferrotype.engine.prune import prune
from ferrotype.job import NullJob
from ferrotype.repository.chunkmap import PAGE_SIZE
from ferrotype.repository.keys import Secret
from ferrotype.repository.packs import TABLE, PackHeader
from ferrotype.units import KiB
from tests.engine.images import CHUNK, opened
from tests.repository.small import SECRET
from tests.work.counting import joined, ranges
from tests.work.runs import PACK, counted_on, make
from tests.work.sources import Numbered

A_PACK = PACK // CHUNK  # cells


@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "encrypted"])
def test_live_frames_move_as_they_are(ram: Path, secret: Secret | None) -> None:
    half_dead = range(0, 6 * A_PACK, 2)  # each second chunk of the first packs is only in the first snapshot
    days = [Numbered(12 * A_PACK, day=day, changed=half_dead) for day in range(2)]
    image = make(ram / "a.ferro", *days, secret=secret)
    with opened(image, writable=True, secret=secret) as repository:
        forget(repository, [repository.snapshot("latest~1")])
        tables = {name: repository.pack_table(name) for name in repository.packs()}
        with counted_on(repository) as work:
            result = prune(repository, NullJob())
        gone = tables.keys() - set(repository.packs())
    assert len(gone) == result.rewritten_packs + result.deleted_packs
    assert 6 <= len(gone) <= 7 < len(tables)
    # each live frame of a pack that goes is read once; of the others only the map of the snapshot that stays
    moved = {name: joined(ranges(work.of("get", name))) for name in gone}
    assert sum(end - start for read in moved.values() for start, end in read) == result.rewritten_bytes
    assert work.size("get", "pack/") <= result.rewritten_bytes + PAGE_SIZE
    frames = len(half_dead)  # those between
    overhead = PackHeader.SIZE + repository.sealer.overhead
    added = (frames + 1) * TABLE.itemsize + work.count("put", "pack/") * overhead
    assert result.rewritten_bytes <= work.size("put", "pack/") <= result.rewritten_bytes + added
    # as they are: none is hashed, decoded, encrypted or compressed again
    assert work.size("hash", work.ids) == PAGE_SIZE
    small = 256 * KiB  # records, tables, directories and pages of the index: nothing of this size holds the chunks
    for what in ("decompress", "decrypt", "compress", "encrypt"):
        assert work.size(what) <= small < result.rewritten_bytes / 10, what
    # a page of the index is proven once to weigh the packs, and once more to write the new one
    assert work.size("hash", work.objects) <= 2 * small
    assert work.count("get", "pack/") <= frames + 2
    assert work.count("sync", image) <= 2 * work.count("flush")


def test_where_nothing_is_dead_nothing_moves(ram: Path) -> None:
    image = make(ram / "a.ferro", Numbered(4 * A_PACK))
    with opened(image, writable=True) as repository, counted_on(repository) as work:
        assert prune(repository, NullJob()).rewritten_packs == 0
    assert work.count("put") == 0
    assert work.size("get", "pack/") <= PAGE_SIZE
    assert work.size("read", image) <= 256 * KiB
