"""Verifying in turns: ten runs of a tenth check everything once, whatever comes, goes or breaks meanwhile."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import pytest

from ferrotype.engine import turns as turns_module
from ferrotype.engine.forget import forget
from ferrotype.engine.prune import prune
from ferrotype.engine.turns import state_file
from ferrotype.engine.verify import VerifyOptions, VerifyResult, verify
from ferrotype.errors import Cancelled
from ferrotype.job import NullJob
from ferrotype.objects import container as container_module
from ferrotype.objects.container import Container
from ferrotype.repository.store import Repository
from tests.repository.small import back_up, changed, create, open_at


class Checked:
    """A repository whose store counts what was checked."""

    def __init__(self, path: Path, cells: int = 90) -> None:
        self.repository: Repository = create(Container.create(path))
        self.content = os.urandom(cells * 4096)
        back_up(self.repository, self.content, "first")
        self.file = path.with_name("state") / "turns.json"
        self.seen: list[str] = []

    @property
    def packs(self) -> list[str]:
        return list(self.repository.packs())

    def run(self, share: float = 0.1, job: NullJob | None = None, *, deep: bool = False) -> VerifyResult:
        """One run; ``seen`` has the packs it checked."""
        self.seen = []
        check = self.repository.store.check

        def counted(name: str, /) -> None:
            if name.startswith("pack/"):
                self.seen.append(name)
            check(name)

        with mock.patch.object(self.repository.store, "check", counted):
            options = VerifyOptions(deep, share, 1, turns=self.file)
            return verify(self.repository, options, job or NullJob())


@pytest.fixture
def image(tmp_path: Path) -> Checked:
    return Checked(tmp_path / "laptop.ferro")


def test_ten_tenths_check_every_pack_once(image: Checked) -> None:
    packs = image.packs
    assert len(packs) % 10
    for _ in range(2):
        seen: list[str] = []
        since = None
        for number in range(10):
            result = image.run()
            assert image.seen, number
            assert image.seen == sorted(image.seen)
            seen += image.seen
            progress = result.progress
            assert progress is not None
            assert since in (None, progress.since)
            since = progress.since
            assert progress.proven_packs == len(seen)
            assert progress.complete == (number == 9)
            assert (progress.share == 1) == progress.complete
        assert seen == sorted(packs)
    assert image.run(1.0).progress is not None
    assert image.seen == sorted(packs)


def test_new_packs_come_in_the_same_or_the_next_round(image: Checked) -> None:
    before = set(image.packs)
    seen: list[str] = []
    for number in range(20):
        if number == 4:
            back_up(image.repository, changed(image.content, 1), "second", day=1)
        if (result := image.run()).progress is not None and not result.progress.complete:
            assert result.progress.share < 1
        seen += image.seen
    assert set(seen) == set(image.packs) | before
    assert all(seen.count(name) in (1, 2) for name in image.packs)


def test_alone_it_checks_what_the_round_has_left(image: Checked) -> None:
    image.run(0.3)
    first = image.seen
    result = image.run(1.0)
    assert result.progress is not None
    assert result.progress.complete
    assert sorted(first + image.seen) == sorted(image.packs)


def test_a_damaged_pack_is_told_in_every_run_until_it_is_gone(image: Checked, tmp_path: Path) -> None:
    store = image.repository.store
    assert isinstance(store, Container)
    name = min(image.packs)
    (entry,) = [e for e in store.live() if e.name == name]
    with (tmp_path / "laptop.ferro").open("r+b") as file:
        file.seek(entry.offset + 2000)
        old = file.read(1)
        file.seek(entry.offset + 2000)
        file.write(bytes([old[0] ^ 1]))
    for number in range(12):
        result = image.run()
        assert not result.ok, number
        assert result.progress is not None
        assert result.progress.share < 1
    with (tmp_path / "laptop.ferro").open("r+b") as file:
        file.seek(entry.offset + 2000)
        file.write(old)
    assert image.run().ok
    image.run()
    assert name not in image.seen


def test_a_run_that_is_stopped_keeps_what_it_proved(image: Checked) -> None:
    class Stopping(NullJob):
        left = 3

        def advance(self, count: int, /) -> None:
            super().advance(count)
            self.left -= count > 0
            if not self.left:
                raise Cancelled

    with pytest.raises(Cancelled):
        image.run(1.0, Stopping())
    first = image.seen[:3]
    image.run(1.0)
    assert not set(first) & set(image.seen)
    assert set(first) | set(image.seen) == set(image.packs)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"\xff" * 100,
        b"[" * 100_000,
        b'{"version": 1, "image": "ID", "since": "2020-01-01T00:00:00Z", "share": 7, "checked": ""}',
        b'{"version": 1, "image": "ID", "since": "2020-01-01T00:00:00Z", "share": 0.1, "checked": "AAAA"}',
        b'{"version": 1, "image": "ID", "since": "2020-01-01T00:00:00Z", "share": 0.1, "checked": "?"}',
        b'{"version": 1, "image": "ID", "since": "9020-01-01T00:00:00Z", "share": 0.1, "checked": ""}',
        b'{"version": 1, "image": "other", "since": "2020-01-01T00:00:00Z", "share": 0.1, "checked": ""}',
        b'{"version": 2, "image": "ID", "since": "2020-01-01T00:00:00Z", "share": 0.1, "checked": ""}',
    ],
)
def test_a_state_that_makes_no_sense_begins_a_new_round(image: Checked, content: bytes) -> None:
    image.run(0.5)
    image.file.write_bytes(content.replace(b"ID", image.repository.config.id.encode()))
    job = NullJob()
    assert image.run(1.0, job).ok
    assert image.seen == sorted(image.packs)
    assert job.notes
    assert not job.warnings


def test_a_state_that_is_too_large_is_not_read(image: Checked) -> None:
    image.run(0.5)
    with mock.patch.object(turns_module, "_MAX_FILE", 100):
        image.run(1.0)
    assert image.seen == sorted(image.packs)


def test_a_state_that_cannot_be_written_is_warned_about(image: Checked) -> None:
    image.file.parent.write_bytes(b"a file where the folder should be")
    job = NullJob()
    assert image.run(1.0, job).ok
    assert job.warnings


def test_the_state_is_replaced_in_one_step(image: Checked) -> None:
    image.run()
    old = image.file.read_bytes()
    with mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device")):
        job = NullJob()
        image.run(0.1, job)
    assert job.warnings
    assert image.file.read_bytes() == old
    assert list(image.file.parent.iterdir()) == [image.file]
    assert json.loads(old)["image"] == image.repository.config.id


def test_each_copy_of_an_image_has_its_own_round(tmp_path: Path) -> None:
    files = {
        state_file(tmp_path, image_id, tmp_path / name, deep=deep)
        for image_id in ("a", "../../b")
        for name in ("one", "two")
        for deep in (False, True)
    }
    assert len(files) == 8
    assert {file.parent for file in files} == {tmp_path / "verify"}
    (tmp_path / "link").symlink_to(tmp_path / "one")
    assert state_file(tmp_path, "a", tmp_path / "link", deep=False) in files


def test_an_image_without_packs_is_always_complete(tmp_path: Path) -> None:
    repository = create(Container.create(tmp_path / "empty.ferro"))
    options = VerifyOptions(turns=tmp_path / "state.json", sample=0.1)
    for _ in range(3):
        result = verify(repository, options, NullJob())
        assert result.ok
        assert result.progress is not None
        assert result.progress.complete
        assert result.progress.share == 1
    repository.close()


def test_what_a_writer_deletes_meanwhile_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader is not seen, as on file systems without such locks, and packs are gone before it comes to them."""
    monkeypatch.setattr(container_module, "join_readers", lambda *_, **__: False)
    path = tmp_path / "laptop.ferro"
    repository = create(Container.create(path))
    content = os.urandom(60 * 4096)
    for day, name in enumerate(("first", "second")):
        back_up(repository, changed(content, day, 0.7), name, day=day)
    repository.close()
    with open_at(path) as reader:
        packs = set(reader.packs())
        with open_at(path, writable=True) as writing:
            forget(writing, [writing.snapshot("first")])
            prune(writing, NullJob())
            assert packs - set(writing.packs())
        options = VerifyOptions(workers=1, turns=tmp_path / "state.json")
        result = verify(reader, options, NullJob())
        assert result.ok, result
        assert result.damaged == []
        assert result.progress is not None
        assert result.progress.packs < len(packs) + 1
