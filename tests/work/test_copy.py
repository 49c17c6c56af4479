"""A copy reads and proves each frame once and never compresses; what the target has is not read."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferrotype.engine.copy import CopyResult, copy
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.repository.chunkmap import PAGE_SIZE
from ferrotype.repository.keys import Secret
from ferrotype.repository.store import Repository
from tests.engine.images import opened
from tests.repository.small import SECRET
from tests.work.counting import OWNER, WORKER, Work, id_key, joined, ranges
from tests.work.runs import counted_backup, counted_on, make
from tests.work.sources import Numbered
from tests.work.truth import Truth

BATCH = 1 << 20  # bytes of frames that are read in one call


def counted_copy(source: Repository, target: Repository) -> tuple[CopyResult, Work]:
    with counted_on(source) as work:
        result = copy(source, source.snapshots(), target, NullJob(), workers=2)
    return result, work


@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "encrypted"])
def test_frames_are_taken_over_as_they_are(
    first_day: Truth, second_day: Truth, ram: Path, secret: Secret | None
) -> None:
    image = make(ram / "a.ferro", first_day.path, second_day.path, secret=secret)
    with opened(image, secret=secret) as source:
        tables = [source.pack_table(name) for name in source.packs()]
        frames, stored = sum(map(len, tables)), sum(int(table.lengths.sum()) for table in tables)
        with source.twin(Container.create(ram / "b.ferro")) as target:
            result, work = counted_copy(source, target)
            again, nothing = counted_copy(source, target)
    assert result.chunks == work.count("add") == frames
    assert work.size("add") == stored
    for name in {str(call.about) for call in work.of("get", "pack/", by=WORKER)}:
        joined(ranges(work.of("get", name, by=WORKER)))  # no frame is read twice
    assert stored <= work.size("get", "pack/", by=WORKER) <= stored + BATCH
    assert work.count("get", "pack/", by=WORKER) < frames / 2
    # a plain frame is decoded once, for its proof; an encrypted one is proven by its tag
    assert work.count("hash", work.ids, by=WORKER) == (frames if secret is None else 0)
    assert work.count("decrypt", by=WORKER) == (frames if secret else 0)
    assert work.count("compress", by=WORKER) == work.count("encrypt", by=WORKER) == 0
    assert again.skipped
    assert again.chunks == nothing.count("add") == nothing.count("get", "pack/") == nothing.count("put") == 0


@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "encrypted"])
def test_a_later_snapshot_brings_only_what_is_new(
    first_day: Truth, second_day: Truth, ram: Path, secret: Secret | None
) -> None:
    image = make(ram / "a.ferro", first_day.path, secret=secret)
    with opened(image, secret=secret) as source:
        source.twin(Container.create(ram / "b.ferro")).close()
    for day in range(2):
        if day:
            counted_backup(image, second_day.path, secret)
        with opened(image, secret=secret) as source, opened(ram / "b.ferro", writable=True, secret=secret) as target:
            result, work = counted_copy(source, target)
    new = second_day.different.keys() - first_day.different.keys()
    assert len(new) <= result.chunks <= len(new) + second_day.pages
    assert work.count("hash", work.ids, by=WORKER) == (result.chunks if secret is None else 0)
    assert work.count("add") == result.chunks
    assert work.size("hash", work.ids, by=OWNER) <= 4 * 2 * second_day.pages * PAGE_SIZE


def test_under_other_keys_each_chunk_is_opened_and_sealed_once(ram: Path) -> None:
    cells = 40
    image, other = make(ram / "a.ferro", Numbered(cells)), make(ram / "b.ferro", secret=SECRET)
    with opened(image) as source, opened(other, writable=True, secret=SECRET) as target:
        result, work = counted_copy(source, target)
        again, nothing = counted_copy(source, target)
        new_ids = id_key(target.sealer)
    assert result.chunks == work.count("add") == cells + 1  # and a page of the map
    assert work.count("hash", work.ids, by=WORKER) == work.count("hash", new_ids, by=WORKER) == cells
    assert work.count("compress", by=WORKER) == work.count("encrypt", by=WORKER) == cells
    assert again.skipped
    assert nothing.count("add") == nothing.count("compress") == nothing.count("put") == 0
