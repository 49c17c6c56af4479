"""Copying snapshots: byte for byte under the same keys, sealed anew under others, and never damage."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ferrotype import api
from ferrotype.engine.copy import chosen, copy
from ferrotype.engine.prune import prune
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.errors import Cancelled, IntegrityError, KeyRefused, Refused, UsageError
from ferrotype.job import NullJob
from ferrotype.objects import Parts
from ferrotype.objects.container import Container
from ferrotype.objects.memory import MemoryStore
from ferrotype.repository.keys import Secret
from ferrotype.repository.snapshots import Snapshot
from ferrotype.repository.store import Repository
from tests.repository.small import CHUNK, SECRET, back_up, changed, contents, create, disk_content, open_at, tiny

DEEPLY = VerifyOptions(deep=True, workers=1)
OTHER = Secret(b"another horse")
NAMES = ("one", "two", "three")


@pytest.fixture(params=[None, SECRET], ids=["plain", "encrypted"])
def source(request: pytest.FixtureRequest) -> Repository:
    """Three snapshots of a disk whose map has two levels."""
    repository = create(MemoryStore(), request.param)
    content = disk_content(12, 1) + bytes(1030 * CHUNK) + disk_content(12, 2)
    for day, name in enumerate(NAMES):
        back_up(repository, content, name, day=day)
        content = changed(content[: 12 * CHUNK], day, 0.5) + content[12 * CHUNK :]
    return repository


def twin(source: Repository, store: MemoryStore | None = None) -> Repository:
    return tiny(source.twin(store or MemoryStore()))


def frames(repository: Repository) -> dict[bytes, bytes]:
    """Every stored frame, by chunk id."""
    out = {}
    for pack in repository.packs():
        table = repository.pack_table(pack)
        for number in range(len(table)):
            place = int(table.offsets[number]), int(table.lengths[number])
            out[bytes(table.id(number))] = repository.store.get(pack, *place)
    return out


def is_sound(repository: Repository, expected: dict[str, bytes]) -> None:
    assert contents(repository) == expected
    result = verify(repository, DEEPLY, NullJob())
    assert result.ok, result.problems


def test_under_the_same_keys_nothing_changes(source: Repository) -> None:
    target = twin(source)
    result = copy(source, source.snapshots(), target, NullJob())
    assert not result.sealed_anew
    assert [s.id for s in result.copied] == result.originals == [s.id for s in source.snapshots()]
    assert result.skipped == []
    assert frames(target) == frames(source)
    assert result.chunks == len(frames(source))
    for snapshot in source.snapshots():
        name = f"snapshot/{snapshot.id}"
        assert target.store.get(name) == source.store.get(name)
    is_sound(target, contents(source))
    assert {i.name for i in target.store.list("key/")} == {i.name for i in source.store.list("key/")}


def test_one_snapshot_takes_what_it_needs_and_no_more(source: Repository) -> None:
    target = twin(source)
    copy(source, [source.snapshot("two")], target, NullJob())
    is_sound(target, {"two": contents(source)["two"]})
    assert frames(target).keys() < frames(source).keys()
    before = len(frames(target))
    assert prune(target, NullJob(), dry_run=True).dead_bytes == 0
    result = copy(source, source.snapshots(), target, NullJob())
    assert [s.name for s in result.skipped] == ["two"]
    assert [s.name for s in result.copied] == ["one", "three"]
    assert result.chunks == len(frames(target)) - before == len(frames(source)) - before
    is_sound(target, contents(source))


def test_what_is_there_is_not_copied_again(source: Repository) -> None:
    target = twin(source)
    copy(source, source.snapshots(), target, NullJob())
    names = {info.name for info in target.store.list("")}
    result = copy(source, source.snapshots(), target, NullJob())
    assert (result.copied, result.chunks, result.stored_bytes) == ([], 0, 0)
    assert len(result.skipped) == 3
    assert {info.name for info in target.store.list("")} == names


@pytest.mark.parametrize("secret", [None, OTHER], ids=["into plain", "into encrypted"])
def test_under_other_keys_everything_is_sealed_anew(source: Repository, secret: Secret | None) -> None:
    target = create(MemoryStore(), secret)
    back_up(target, contents(source)["two"], "mine", day=9)
    known = len(frames(target))
    expected = contents(source) | contents(target)
    planned = copy(source, source.snapshots(), target, NullJob(), dry_run=True)
    assert contents(target).keys() == {"mine"}
    result = copy(source, source.snapshots(), target, NullJob())
    assert result.sealed_anew
    is_sound(target, expected)
    assert frames(target).keys().isdisjoint(frames(source))
    assert result.chunks == len(frames(target)) - known <= planned.chunks
    assert {s.id for s in result.copied}.isdisjoint(result.originals)
    again = copy(source, source.snapshots(), target, NullJob())
    assert (len(again.skipped), again.copied, again.stored_bytes) == (3, [], 0)


def test_unchanged_cells_are_not_opened_again(source: Repository) -> None:
    target = create(MemoryStore(), OTHER)
    opened: list[bytes] = []
    plain_unseal = source.sealer.unseal

    def unseal(chunk_id: bytes, frame: bytes | memoryview, /) -> bytes:
        opened.append(chunk_id)
        return plain_unseal(chunk_id, frame)

    source.sealer.unseal = unseal  # type: ignore[method-assign]
    copy(source, [source.snapshot("one")], target, NullJob())
    first = len(opened)
    copy(source, [source.snapshot("two")], target, NullJob())
    assert len(opened) - first < first
    is_sound(target, {name: data for name, data in contents(source).items() if name != "three"})


def test_a_dry_run_says_what_would_be_stored(source: Repository) -> None:
    target = twin(source)
    before = {info.name for info in target.store.list("")}
    planned = copy(source, source.snapshots(), target, NullJob(), dry_run=True)
    assert {info.name for info in target.store.list("")} == before
    done = copy(source, source.snapshots(), target, NullJob())
    assert (planned.chunks, [s.id for s in planned.copied]) == (done.chunks, [s.id for s in done.copied])
    assert planned.stored_bytes == sum(map(len, frames(target).values()))


@pytest.mark.parametrize("secret", [None, OTHER], ids=["same keys", "other keys"])
def test_a_damaged_chunk_is_an_error_that_names_it(source: Repository, secret: Secret | None) -> None:
    store = source.store
    assert isinstance(store, MemoryStore)
    whole = dict(store.objects)
    needed = frames(source)
    for pack in list(source.packs()):
        table = source.pack_table(pack)
        for number in range(len(table)):
            at = int(table.offsets[number]) + int(table.lengths[number]) - 3
            data = bytearray(whole[pack])
            data[at] ^= 1
            store.objects[pack] = bytes(data)
            source.forget_index()
            target = create(MemoryStore(), secret) if secret else twin(source)
            with pytest.raises(IntegrityError, match=bytes(table.id(number)).hex()[:16]):
                copy(source, source.snapshots(), target, NullJob(), workers=1)
            assert verify(target, DEEPLY, NullJob()).ok
            for snapshot in target.snapshots():
                assert contents(target)[snapshot.name] == contents_of(whole, source, snapshot)
            store.objects[pack] = whole[pack]
    assert len(needed) > 20


def contents_of(objects: dict[str, bytes], source: Repository, snapshot: Snapshot) -> bytes:
    store = source.store
    assert isinstance(store, MemoryStore)
    damaged, store.objects = store.objects, dict(objects)
    try:
        source.forget_index()
        return contents(source)[snapshot.name]
    finally:
        store.objects = damaged
        source.forget_index()


def test_a_chunk_that_is_missing_is_an_error(source: Repository) -> None:
    pack = next(iter(source.packs()))
    source.store.delete(pack)
    source.forget_index()
    for target in (twin(source), create(MemoryStore(), OTHER)):
        with pytest.raises(IntegrityError, match="missing"):
            copy(source, source.snapshots(), target, NullJob())


class Stopping(NullJob):
    """Stops at the n-th sign of life."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def advance(self, count: int, /) -> None:  # noqa: ARG002  the protocol's signature
        self.left -= 1
        if self.left < 0:
            raise Cancelled


@pytest.mark.parametrize("secret", [None, OTHER], ids=["same keys", "other keys"])
def test_a_copy_that_was_stopped_goes_on_where_it_was(
    tmp_path: Path, source: Repository, secret: Secret | None
) -> None:
    path = tmp_path / "target.ferro"
    if secret:
        create(Container.create(path), secret).close()
    else:
        source.twin(Container.create(path)).close()
    key = secret or (SECRET if source.config.encrypted else None)
    stored = stops = 0
    while True:
        with open_at(path, key, writable=True) as target:
            before = len(frames(target))
            try:
                result = copy(source, source.snapshots(), target, Stopping(3 + 2 * stops), workers=1)
            except Cancelled:
                stops += 1
                continue
            stored = before
            break
    assert stops > 2
    assert stored > 0
    assert len(result.copied) + len(result.skipped) == 3
    with open_at(path, key) as target:
        is_sound(target, contents(source))


class Refusing(MemoryStore):
    """Fails at the n-th put."""

    left = 1 << 30

    def put(self, name: str, parts: Parts, /) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyRefused("no more")
        super().put(name, parts)


def test_a_copy_that_fails_at_any_put_leaves_whole_snapshots(source: Repository) -> None:
    expected = contents(source)
    for number in range(1, 60):
        store = Refusing()
        target = twin(source, store)
        store.left = number
        try:
            copy(source, source.snapshots(), target, NullJob(), workers=1)
        except KeyRefused:
            store.left = 1 << 30
        else:
            break
        for name, content in contents(target).items():
            assert content == expected[name]
        assert verify(target, DEEPLY, NullJob()).ok
    assert number > 10
    is_sound(target, expected)


def test_a_damaged_snapshot_of_the_target_is_put_again(source: Repository) -> None:
    target = twin(source)
    copy(source, source.snapshots(), target, NullJob())
    store = target.store
    assert isinstance(store, MemoryStore)
    name = f"snapshot/{source.snapshot('two').id}"
    store.objects[name] = bytes(100)
    assert [s.name for s in copy(source, source.snapshots(), target, NullJob()).copied] == ["two"]
    is_sound(Repository.open(store, SECRET if source.config.encrypted else None), contents(source))


def test_references(tmp_path: Path) -> None:
    assert chosen("a.ferro") == (Path("a.ferro"), [])
    assert chosen("a.ferro::latest~2", ["x", "latest~2"]) == (Path("a.ferro"), ["latest~2", "x"])
    for text in ("a.ferro::x/sda", "a.ferro::x#1", "a.ferro#1"):
        with pytest.raises(UsageError):
            chosen(text)


def test_from_python(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    one, two, three = (tmp_path / f"{name}.ferro" for name in NAMES)
    for seed in (1, 2):
        disk.write_bytes(random.Random(seed).randbytes(300_000))
        api.backup(disk, one, name=f"day {seed}")
    with pytest.raises(KeyRefused):
        api.copy(one, two, password="horse")
    assert not two.exists()
    assert len(api.copy(one, two).copied) == 2
    assert api.verify(two, deep=True).ok
    with pytest.raises(Refused):
        api.copy(one, one)
    api.backup(disk, three, password="other", name="mine")
    result = api.copy(f"{one}::day 1", three, target_password="other")
    assert (result.sealed_anew, [s.name for s in result.copied]) == (True, ["day 1"])
    names = [s.name for s in api.list_snapshots(three, password="other")]
    assert sorted(names) == ["day 1", "mine"]
    saved = api.salvage(two, tmp_path / "saved.ferro")
    assert saved.complete
    assert api.checksum(f"{tmp_path / 'saved.ferro'}::day 2") == api.checksum(disk)
