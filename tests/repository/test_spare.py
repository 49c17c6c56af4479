"""Spare copies of what opens an image: where they stand, when they are used, and what a removed key leaves behind."""

from __future__ import annotations

import os
from base64 import b64encode
from pathlib import Path
from typing import cast

import pytest

from ferrotype.engine.compact import compact
from ferrotype.engine.prune import prune
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.errors import InvalidImage, KeyRefused
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.objects.layout import BLOCK, CatalogEntry
from ferrotype.objects.memory import MemoryStore
from ferrotype.repository import keys, spare
from ferrotype.repository.keys import Secret
from ferrotype.repository.slots import read_slots
from ferrotype.repository.store import Repository
from tests.repository.small import CHUNK, QUICK, SECRET, back_up, contents, create, open_at, tiny

OTHER = Secret(b"another horse")
CONTENT = os.urandom(20 * CHUNK)


@pytest.fixture(params=[None, SECRET], ids=["plain", "encrypted"])
def secret(request: pytest.FixtureRequest) -> Secret | None:
    found: Secret | None = request.param
    return found


def make(path: Path, secret: Secret | None) -> Repository:
    repository = create(Container.create(path), secret)
    back_up(repository, CONTENT, "first")
    return repository


def places(repository: Repository, prefix: str) -> list[CatalogEntry]:
    store = repository.store
    assert isinstance(store, Container)
    return sorted((e for e in store.live() if e.name.startswith(prefix)), key=lambda e: e.offset)


def spares(repository: Repository) -> list[str]:
    return [info.name for info in repository.store.list(spare.PREFIX)]


def wipe(path: Path, entries: list[CatalogEntry]) -> None:
    with path.open("r+b") as file:
        for entry in entries:
            file.seek(entry.offset)
            file.write(b"\xa5" * entry.span)


def test_there_is_one_from_the_first_backup_on(tmp_path: Path, secret: Secret | None) -> None:
    repository = create(Container.create(tmp_path / "a.ferro"), secret)
    assert spares(repository) == []
    back_up(repository, CONTENT, "first")
    assert len(spares(repository)) == 1
    held = spare.opened(spare.decode(repository.store.get(spares(repository)[0])))
    names = ["config", *(info.name for info in repository.store.list("key/"))]
    assert held == {name: repository.store.get(name) for name in names}


def test_the_newest_is_in_the_second_half(tmp_path: Path) -> None:
    repository = make(tmp_path / "a.ferro", None)
    seen = 1
    for number in range(12):
        back_up(repository, os.urandom((3 + 5 * number) * CHUNK), f"more {number}")
        packs = places(repository, "pack/")
        newest = places(repository, spare.PREFIX)[-1]
        before = sum(pack.length for pack in packs if pack.offset < newest.offset)
        assert before >= sum(pack.length for pack in packs) / 2
        seen = max(seen, len(spares(repository)))
    assert 2 <= seen <= 6


def test_a_backup_that_stores_nothing_puts_none(tmp_path: Path, secret: Secret | None) -> None:
    repository = make(tmp_path / "a.ferro", secret)
    before = spares(repository)
    for number in range(5):
        back_up(repository, CONTENT, f"again {number}")
    assert spares(repository) == before


def test_an_image_opens_without_its_head(tmp_path: Path, secret: Secret | None) -> None:
    path = tmp_path / "a.ferro"
    repository = make(path, secret)
    lost = [*places(repository, "config"), *places(repository, "key/")]
    repository.close()
    wipe(path, lost)
    with open_at(path, secret) as repository:
        assert sum("spare copy of it is used" in warning for warning in repository.warnings) == len(lost)
        assert contents(repository) == {"first": CONTENT}
        result = verify(repository, VerifyOptions(workers=1), NullJob())
        assert not result.ok
        assert sum("spare copy" in problem for problem in result.problems) == len(lost)
    if secret:
        with pytest.raises(KeyRefused):
            open_at(path, OTHER)


def test_the_next_writer_puts_the_originals_again(tmp_path: Path, secret: Secret | None) -> None:
    path = tmp_path / "a.ferro"
    repository = make(path, secret)
    lost = [*places(repository, "config"), *places(repository, "key/")]
    repository.close()
    wipe(path, lost)
    with open_at(path, secret, writable=True) as repository:
        back_up(repository, CONTENT[:CHUNK] + os.urandom(CHUNK), "second")
    with open_at(path, secret) as repository:
        assert repository.warnings == []
        assert verify(repository, VerifyOptions(workers=1), NullJob()).ok
        wipe(path, places(repository, spare.PREFIX))
    with open_at(path, secret) as repository:
        assert repository.warnings == []
        assert contents(repository)["first"] == CONTENT


def test_without_original_and_spare_it_is_refused(tmp_path: Path, secret: Secret | None) -> None:
    path = tmp_path / "a.ferro"
    repository = make(path, secret)
    lost = [*places(repository, "config"), *places(repository, "key/"), *places(repository, spare.PREFIX)]
    repository.close()
    wipe(path, lost)
    with pytest.raises(InvalidImage):
        open_at(path, secret)


def test_a_key_that_was_added_is_in_the_spare(tmp_path: Path) -> None:
    path = tmp_path / "a.ferro"
    with make(path, SECRET) as repository:
        repository.add_key(OTHER, cost=QUICK)
        assert len(spares(repository)) == 1
        lost = places(repository, "key/")
    wipe(path, lost)
    for secret in (SECRET, OTHER):
        with open_at(path, secret) as repository:
            assert contents(repository) == {"first": CONTENT}


def without(path: Path, start: int, end: int | None, name: str) -> Path:
    """A copy of the image that lost bytes: from the end on it is cut there, elsewhere it holds zeros."""
    data = bytearray(path.read_bytes())
    if end is None:
        del data[start:]
    else:
        data[start:end] = bytes(end - start)
    damaged = path.with_name(name)
    damaged.write_bytes(data)
    return damaged


@pytest.mark.parametrize("removes", [False, True], ids=["added", "first one removed"])
@pytest.mark.parametrize("more", [0, 1, 12])
@pytest.mark.parametrize("packs", ["one pack", "packs"])
def test_keys_that_came_later_are_at_both_ends(tmp_path: Path, removes: bool, more: int, packs: str) -> None:
    """Either half of the image may be lost, whatever is done to its keys."""
    path = tmp_path / "a.ferro"
    with Repository.create(Container.create(path), SECRET, chunk_size=CHUNK, cost=QUICK) as repository:
        if packs == "packs":
            tiny(repository)
        back_up(repository, CONTENT, "first")
        for number in range(more):
            repository.add_key(Secret(b"more %d" % number), cost=QUICK)
        repository.add_key(OTHER, cost=QUICK)
        if removes:
            (slot,) = (slot for slot in read_slots(repository.store) if slot.label == "first")
            repository.remove_key(slot.id)
        assert repository.warnings == []
        assert len(places(repository, "key/")) == 2 + more - removes
        middle = path.stat().st_size // 2 // BLOCK * BLOCK
        heads = [*places(repository, "config"), *places(repository, "key/")]
        first = min(middle, places(repository, "pack/")[0].offset)
        assert all(one.offset + one.span <= first for one in heads)
        assert places(repository, spare.PREFIX)[-1].offset >= middle
        assert verify(repository, VerifyOptions(workers=1, deep=True), NullJob()).ok
        newest = max(entry.offset for entry in cast("Container", repository.store).catalogs())
    lost = (without(path, newest, newest + BLOCK, "no catalog"),)
    for damaged in (*lost, without(path, middle, None, "cut"), without(path, 3 * BLOCK, middle, "beheaded")):
        for number in range(more):
            open_at(damaged, Secret(b"more %d" % number)).close()
        open_at(damaged, OTHER).close()
        if removes:
            with pytest.raises(KeyRefused):
                open_at(damaged, SECRET)


def test_keys_of_older_images_are_set_apart_by_the_next_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ferro"
    with make(path, SECRET) as repository, monkeypatch.context() as before:
        before.setattr(Container, "bring_forward", lambda *_: True)
        repository.add_key(OTHER, cost=QUICK)
        assert places(repository, "key/")[-1].offset > places(repository, "pack/")[-1].offset
    with open_at(path, OTHER, writable=True) as repository:
        back_up(repository, CONTENT, "nothing new")
        assert places(repository, "key/")[-1].offset < places(repository, "pack/")[0].offset
        assert contents(repository) == {"first": CONTENT, "nothing new": CONTENT}


def test_while_others_read_the_keys_stay_together_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.ferro"
    with make(path, SECRET) as repository:
        with open_at(path, SECRET) as reader:
            repository.add_key(OTHER, cost=QUICK)
            assert contents(reader) == {"first": CONTENT}
        assert len(repository.warnings) == 1
        back_up(repository, CONTENT, "again")
        assert places(repository, "key/")[-1].offset < places(repository, "pack/")[0].offset


def test_where_nothing_can_give_way_the_key_is_added_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ferrotype.errors import DeviceError
    from ferrotype.objects.volumes import PosixFile

    path = tmp_path / "a.ferro"
    with make(path, SECRET) as repository:
        repository.add_key(Secret(b"into the gap of the first catalog"), cost=QUICK)
        bad, read = places(repository, "pack/")[0].offset, PosixFile.read

        def failing(self: PosixFile, offset: int, length: int, /) -> bytes:
            if offset <= bad < offset + length:
                raise DeviceError("a bad sector")
            return read(self, offset, length)

        with monkeypatch.context() as broken:
            broken.setattr(PosixFile, "read", failing)
            repository.add_key(OTHER, cost=QUICK)
        assert len(repository.warnings) == 1
    with open_at(path, OTHER) as repository:
        assert contents(repository) == {"first": CONTENT}
        assert verify(repository, VerifyOptions(workers=1, deep=True), NullJob()).ok


@pytest.mark.parametrize("punches", [True, False], ids=["holes", "no holes"])
def test_nothing_of_a_removed_key_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, punches: bool) -> None:
    from ferrotype.objects.volumes import PosixFile

    if not punches:
        monkeypatch.setattr(PosixFile, "punch", lambda *_: False)
    path = tmp_path / "a.ferro"
    with make(path, SECRET) as repository:
        for number in range(20):  # a spare of several blocks
            repository.add_key(Secret(b"more %d" % number), cost=QUICK)
            back_up(repository, os.urandom(10 * CHUNK), f"more {number}")
        kept = repository.add_key(Secret(b"kept"), cost=QUICK)
        gone = repository.add_key(OTHER, cost=QUICK)
        repository.remove_key(kept.id)  # a gap of one block, and then one in front of a large gap
        repository.remove_key(gone.id)
        assert places(repository, spare.PREFIX)[-1].span > BLOCK
    with pytest.raises(KeyRefused):
        open_at(path, OTHER)
    data = path.read_bytes()
    held = spare.Spare(stored=0, objects={"x": b64encode(keys.encode_slot(gone)).decode()})
    for secret in (gone.locked.encode(), gone.salt.encode(), held.objects["x"][40:200].encode()):
        assert secret not in data


def test_nothing_of_keys_stays_in_a_large_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack of more than 64 KiB gave way, no hole can be punched, and such gaps are not overwritten as a whole."""
    from ferrotype.objects.volumes import PosixFile

    monkeypatch.setattr(PosixFile, "punch", lambda *_: False)
    path = tmp_path / "a.ferro"
    with Repository.create(Container.create(path), SECRET, chunk_size=CHUNK, cost=QUICK) as repository:
        back_up(repository, CONTENT, "first")
        added = [repository.add_key(Secret(b"more %d" % number), cost=QUICK) for number in range(4)]
        (pack,) = places(repository, "pack/")
        assert pack.offset > places(repository, "key/")[-1].offset + 2**16
        for slot in added[1:]:
            repository.remove_key(slot.id)
    data = path.read_bytes()
    assert added[0].locked.encode() in data
    for slot in added[1:]:
        assert slot.locked.encode() not in data


def test_pruning_and_compacting_leave_one_at_the_end(tmp_path: Path, secret: Secret | None) -> None:
    path = tmp_path / "a.ferro"
    with make(path, secret) as repository:
        for number in range(4):
            back_up(repository, os.urandom(20 * CHUNK), f"more {number}", day=number)
        for snapshot in repository.snapshots()[1:]:
            repository.store.delete(f"snapshot/{snapshot.id}")
        repository.store.flush()
        prune(repository, NullJob())
        assert len(spares(repository)) == 1
        store = repository.store
        assert isinstance(store, Container)
        for freed in (True, False):
            assert bool(compact(store, NullJob())) == freed
            (newest,) = places(repository, spare.PREFIX)
            assert newest.offset == max(entry.offset for entry in store.live())
            assert places(repository, "config")[0].offset == 3 * BLOCK
        assert verify(repository, VerifyOptions(workers=1, deep=True), NullJob()).ok


def test_hostile_spares_are_no_spares() -> None:
    for data in (b"", b"{}", b"[" * 100_000, b'{"stored": 0, "objects": {"config": "?"}}', b'{"version": 2}'):
        with pytest.raises(InvalidImage):
            spare.decode(data)
    store = MemoryStore()
    create(store, SECRET)
    store.objects["spare/zzzz"] = b"x"
    store.objects["spare/" + "f" * 16] = b'{"stored": 0, "objects": {"pack/1": "", "config": "e30="}}'
    del store.objects["config"]
    with pytest.raises(InvalidImage):
        Repository.open(store, SECRET)
    assert len(read_slots(store)) == 1
