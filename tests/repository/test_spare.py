"""Spare copies of what opens an image: where they stand, when they are used, and what a removed key leaves behind."""

from __future__ import annotations

import os
from base64 import b64encode
from pathlib import Path

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
from tests.repository.small import CHUNK, QUICK, SECRET, back_up, contents, create, open_at

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
        gone = repository.add_key(OTHER, cost=QUICK)
        repository.remove_key(gone.id)
        assert places(repository, spare.PREFIX)[-1].span > BLOCK
    with pytest.raises(KeyRefused):
        open_at(path, OTHER)
    data = path.read_bytes()
    held = spare.Spare(stored=0, objects={"x": b64encode(keys.encode_slot(gone)).decode()})
    for secret in (gone.locked.encode(), gone.salt.encode(), held.objects["x"][40:200].encode()):
        assert secret not in data


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
