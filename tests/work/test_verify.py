"""Verify reads each stored byte once; only --deep decodes, each frame once."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.job import NullJob
from ferrotype.objects.layout import BLOCK, RecordHeader
from ferrotype.objects.reading import READ_SIZE
from ferrotype.repository.chunkmap import PAGE_SIZE
from ferrotype.repository.keys import Secret
from ferrotype.repository.sealing import ZERO_ID
from ferrotype.units import MiB
from tests.engine.images import opened
from tests.repository.small import SECRET
from tests.work.counting import OWNER, WORKER, Work
from tests.work.runs import counted_on, make
from tests.work.truth import Truth

WINDOW = max(MiB, READ_SIZE)  # bytes of a pack that are read in one call; less would be a step back
AROUND = 2 * RecordHeader.SIZE + BLOCK  # bytes of a record besides what is stored in it: its header, and zeros
ENDS = [pytest.param(None, id="plain"), pytest.param(SECRET, id="encrypted")]


class Verified:
    """An image that was verified, and what is in it."""

    def __init__(self, image: Path, secret: Secret | None, *, deep: bool) -> None:
        with opened(image, secret=secret) as repository:
            self.packs = [info.size for info in repository.store.list("pack/")]
            self.others = [info.size for info in repository.store.list("") if not info.name.startswith("pack/")]
            tables = [repository.pack_table(name) for name in repository.packs()]
            self.frames = sum(len(table) for table in tables)
            roots = {region.root for s in repository.snapshots() for d in s.disks for region in d.regions}
            self.pages = len(roots - {ZERO_ID})
            with counted_on(repository) as work:
                assert verify(repository, VerifyOptions(deep=deep, workers=2), NullJob()).ok
        self.work: Work = work

    def check_reading(self, image: Path, *, frames: bool) -> None:
        """Each pack is read once in few calls for its checksum; where ``frames`` are proven, each of them once more.

        What was just read comes from memory, and in the size of a frame it stays in the processor's caches: holding
        whole packs instead costs more.
        """
        read = self.work.of("read", image, by=WORKER)
        stored, times = sum(self.packs), 2 if frames else 1
        assert stored <= sum(call.size for call in read) <= times * (stored + len(self.packs) * AROUND)
        calls = 5  # for a pack: the header of its record twice, the zeros behind it, its own header, its table
        assert len(read) <= sum(calls + -(-size // WINDOW) for size in self.packs) + (self.frames if frames else 0)


@pytest.mark.parametrize("secret", ENDS)
def test_stored_bytes_are_proven_and_nothing_is_decoded(
    first_day: Truth, second_day: Truth, ram: Path, secret: Secret | None
) -> None:
    image = make(ram / "a.ferro", first_day.path, second_day.path, secret=secret)
    done = Verified(image, secret, deep=False)
    work = done.work
    done.check_reading(image, frames=secret is not None)
    assert sum(done.packs) <= work.size("check", by=WORKER) <= sum(done.packs) + len(done.packs) * AROUND
    assert work.count("decompress", by=WORKER) == work.size("hash", work.ids, by=WORKER) == 0
    assert work.count("decrypt", by=WORKER) == (done.frames + len(done.packs) if secret else 0)
    # of what is no pack the owner proves each byte once, and then every page of the maps that snapshots share once
    assert work.size("check", by=OWNER) <= sum(done.others) + len(done.others) * AROUND
    assert work.size("hash", work.ids, by=OWNER) == done.pages * PAGE_SIZE


@pytest.mark.parametrize("secret", ENDS)
def test_deep_opens_each_frame_once(first_day: Truth, second_day: Truth, ram: Path, secret: Secret | None) -> None:
    image = make(ram / "a.ferro", first_day.path, second_day.path, secret=secret)
    done = Verified(image, secret, deep=True)
    work = done.work
    assert work.count("hash", work.ids, by=WORKER) == done.frames
    assert work.count("decompress", by=WORKER) <= done.frames
    assert work.count("decrypt", by=WORKER) == (done.frames + len(done.packs) if secret else 0)
    assert work.size("hash", work.ids, by=OWNER) == done.pages * PAGE_SIZE
    done.check_reading(image, frames=True)
