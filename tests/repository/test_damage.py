"""Damage and going on: what is left can be read, backed up into, and mended.  ``tests/rot`` has every byte."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ferrotype.engine.opening import open_image
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.errors import FerrotypeError
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.objects.layout import ANCHORS_AT, BLOCK, Anchor, RecordHeader, VolumeHeader
from ferrotype.repository.keys import Secret
from ferrotype.repository.store import Repository
from tests.repository.small import CHUNK, SECRET, back_up, create, open_at, restored

FIRST = b"".join(os.urandom(100) * 40 + bytes(96) for _ in range(7))
SECOND = FIRST[: 4 * CHUNK] + os.urandom(CHUNK) + FIRST[5 * CHUNK :]
DISKS = {"first": FIRST, "second": SECOND}
QUICKLY = VerifyOptions(workers=1)
DEEPLY = VerifyOptions(workers=1, deep=True)


@dataclass(frozen=True)
class Image:
    """A small image and where its live structures stand: (what, offset, used bytes, bytes with padding)."""

    path: Path
    secret: Secret | None
    live: tuple[tuple[str, int, int, int], ...]
    whole: bytes

    def open(self, *, writable: bool = False) -> Repository:
        return open_image(self.path, lambda _: self.secret, writable=writable)

    def write(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)


@pytest.fixture(params=[None, SECRET], ids=["plain", "encrypted"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    path = tmp_path / "laptop.ferro"
    secret: Secret | None = request.param
    store = Container.create(path)
    repository = create(store, secret)
    for day, (name, content) in enumerate(DISKS.items()):
        back_up(repository, content, name, day=day)
    live = [("volume header", 0, VolumeHeader.SIZE, BLOCK)]
    live += [("anchor", at, Anchor.SIZE, BLOCK) for at in ANCHORS_AT]
    live += [("catalog", e.offset, RecordHeader.SIZE + e.length, e.span) for e in store.catalogs()]
    live += [(e.name.split("/")[0], e.offset, RecordHeader.SIZE + e.length, e.span) for e in store.live()]
    repository.close()
    return Image(path, secret, tuple(sorted(live, key=lambda item: item[1])), path.read_bytes())


def read_all(repository: Repository) -> int:
    """Whatever can be read must be right; the number of disks that could."""
    good = 0
    for snapshot in repository.snapshots():
        try:
            content = restored(repository, snapshot)
        except FerrotypeError:
            continue
        assert content == DISKS[snapshot.name], "wrong bytes came out"
        good += 1
    return good


def outcome(image: Image, options: VerifyOptions) -> str:
    """What a damaged image does: it is refused, or verify says it is damaged and what comes out is right."""
    try:
        repository = image.open()
    except FerrotypeError:
        return "refused"
    with repository:
        read_all(repository)
        try:
            result = verify(repository, options, NullJob())
        except FerrotypeError:
            return "refused"
        return "ok" if result.ok else "told"


def test_an_undamaged_image_is_ok(image: Image) -> None:
    for options in (QUICKLY, DEEPLY):
        assert outcome(image, options) == "ok"


def test_a_lost_block_hits_only_what_stood_in_it(image: Image) -> None:
    for what, offset, _, _ in image.live:
        image.write(offset, b"\xa5" * BLOCK)
        told = outcome(image, QUICKLY)
        assert told in ("told", "refused"), what
        if what in ("anchor", "catalog", "index", "snapshot", "key", "pack"):
            try:
                with image.open() as repository:
                    good = read_all(repository)
            except FerrotypeError:
                assert what == "key", f"a lost {what} closes the whole image"
            else:
                assert good >= {"snapshot": 1, "pack": 0}.get(what, 2), what
        image.write(offset, image.whole[offset : offset + BLOCK])


def test_a_backup_into_a_damaged_image_is_whole_or_refused(image: Image) -> None:
    for what, offset, used, _ in image.live:
        for at in (3, 40, used - 1, used // 2):
            image.path.write_bytes(image.whole)
            image.write(offset + at, bytes([image.whole[offset + at] ^ 0x5A]))
            fresh = os.urandom(3 * CHUNK) + FIRST
            try:
                with image.open(writable=True) as repository:
                    back_up(repository, fresh, "fresh", day=5)
            except FerrotypeError:
                continue
            with image.open() as repository:
                snapshot = repository.snapshot("fresh")
                try:
                    assert restored(repository, snapshot) == fresh
                except FerrotypeError:
                    assert what == "pack", f"byte {at} of {what}: a new snapshot cannot be read"


def test_an_image_cut_short_gives_what_is_left(image: Image) -> None:
    most = 0
    for size in [*range(0, len(image.whole), 1021), *range(BLOCK, len(image.whole), BLOCK)]:
        image.path.write_bytes(image.whole[:size])
        assert outcome(image, QUICKLY) in ("told", "refused"), size
        try:
            with image.open() as repository:
                most = max(most, read_all(repository))
        except FerrotypeError:
            continue
        if image.secret is None:
            with image.open(writable=True) as repository:
                back_up(repository, FIRST, "first", day=9)
                assert restored(repository, repository.snapshot("first")) == FIRST
    assert most == 2  # only the last catalog was lost


def test_an_image_with_more_behind_it_is_read(image: Image) -> None:
    for tail in (b"x", os.urandom(10_000), image.whole[BLOCK * 3 :]):
        image.path.write_bytes(image.whole + bytes(-len(image.whole) % BLOCK) + tail)
        with image.open() as repository:
            assert read_all(repository) == 2
        with image.open(writable=True) as repository:
            back_up(repository, FIRST, "first", day=3)
            assert read_all(repository) == 3


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 0xFF]))


@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "encrypted"])
def test_a_damaged_index_is_made_up_for_by_the_packs(tmp_path: Path, secret: Secret | None) -> None:
    """In its directory, which shows at once, or in a page, which shows when a chunk is looked up."""
    content = os.urandom(50 * CHUNK)
    places: list[Callable[[int], int]] = [lambda _: 60, lambda size: size - 20, lambda size: size - 2000]
    for number, place in enumerate(places):
        path = tmp_path / f"{number}.ferro"
        repository = create(Container.create(path), secret)
        snapshot = back_up(repository, content, "first")
        repository.close()
        store = Container.open(path)
        (entry,) = [e for e in store.live() if e.name.startswith("index/")]
        store.close()
        flip(path, entry.offset + RecordHeader.SIZE + place(entry.length))
        with open_at(path, secret) as repository:
            assert restored(repository, snapshot) == content
            assert repository.warnings
            assert not verify(repository, QUICKLY, NullJob()).ok
        with open_at(path, secret, writable=True) as repository:
            packs = set(repository.packs())
            back_up(repository, content[: 20 * CHUNK] + os.urandom(CHUNK), "second", day=1)
            assert len(set(repository.packs()) - packs) <= 2, "chunks that are there were stored again"
        with open_at(path, secret) as repository:
            assert restored(repository, snapshot) == content
            assert verify(repository, DEEPLY, NullJob()).ok, "the next backup mends the index"


def test_a_damaged_snapshot_leaves_the_others(image: Image) -> None:
    offset = next(offset for what, offset, _, _ in image.live if what == "snapshot")
    flip(image.path, offset + RecordHeader.SIZE + 50)
    with image.open() as repository:
        assert read_all(repository) == 1
        assert repository.warnings
