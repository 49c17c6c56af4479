"""What calls that returned have promised about an image, and whether the image keeps it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ferrotype.engine.prune import prune
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.errors import KeyRefused
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.objects.volumes import PosixFile
from ferrotype.repository.keys import Secret
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import open_writer
from tests.repository.small import (
    CHUNK,
    SECRET,
    add_disk,
    back_up,
    changed,
    create,
    disk_content,
    open_at,
    restored,
)

FIRST = random.Random(1).randbytes(6 * CHUNK) + disk_content(4, 1)
SECOND = changed(FIRST, 2, 0.5)
THIRD = changed(SECOND, 3, 0.5)
FOURTH = changed(THIRD, 4, 0.5)
FRESH = changed(THIRD, 9, 0.3)
DISKS = {"first": FIRST, "second": SECOND, "third": THIRD, "fourth": FOURTH, "fresh": FRESH}
OTHER = Secret(b"another one")
SECRETS = {"first key": SECRET, "other key": OTHER}

_HARMLESS = (
    "the other one is used where it is not enough",  # a torn anchor
    "they hold nothing",  # a catalog that no flush had made durable, torn behind its payload
)


@dataclass(frozen=True, slots=True)
class Promise:
    """What must be true of an image whatever has happened since."""

    created: bool = False
    committed: frozenset[str] = frozenset()  # snapshots
    going: frozenset[str] = frozenset()  # snapshots that may be gone
    forgotten: frozenset[str] = frozenset()
    stored: frozenset[tuple[str, int]] = frozenset()  # disks, and how many of their first cells are durable
    keys: frozenset[str] = frozenset()
    keys_going: frozenset[str] = frozenset()
    keys_gone: frozenset[str] = frozenset()


@dataclass(slots=True)
class Told:
    """Promises in the order in which they were made, each with the number of operations done by then."""

    now: Callable[[], int]
    start: Promise = field(default_factory=Promise)
    events: list[tuple[int, str, object]] = field(default_factory=list)

    def say(self, what: str, which: object = None) -> None:
        self.events.append((self.now(), what, which))

    def until(self, number: int) -> Promise:
        """What had been promised when ``number`` operations were done."""
        made: dict[str, set[object]] = {
            name: set(getattr(self.start, name)) for name in Promise.__slots__ if name != "created"
        }
        created = self.start.created
        for at, what, which in self.events:
            if at > number:
                break
            if what == "created":
                created = True
            elif what == "pruned":  # what only gone snapshots used may be stored no more
                kept = made["committed"] - made["going"]
                made["stored"] = {pair for pair in made["stored"] if isinstance(pair, tuple) and pair[0] in kept}
            else:
                made[what].add(which)
        return Promise(created, **{name: frozenset(which) for name, which in made.items()})  # type: ignore[arg-type]


class Hasty(PosixFile):
    """A file whose syncs do nothing: what is checked is never cut."""

    def sync(self) -> None:
        return

    def publish(self, path: Path, /) -> None:
        if self._unpublished is not None:
            self._unpublished.publish()
            assert self._unpublished.final == path
            self._unpublished = None


def check(path: Path, secret: Secret | None, promise: Promise, *, thorough: bool = True) -> None:
    """Raises AssertionError where the image at ``path`` does not keep the promise, or cannot be worked on."""
    if not path.exists():
        assert not promise.created, "the image is gone"
        create(Container.create(path, opener=Hasty), secret).close()
    secret = _working_secret(path, secret, promise)
    with open_at(path, secret, opener=Hasty) as repository:
        check_snapshots(repository, promise)
        _check_warnings(repository)
        packs = set(repository.packs())
    with open_at(path, secret, writable=True, opener=Hasty) as repository:
        assert packs <= set(repository.packs()), "a writer's opening lost packs"
        _check_warnings(repository)
        check_snapshots(repository, promise, whole=False)
        _is_sound(repository)
        if thorough:
            repository.store.reclaim()
            _is_still_led_to(path, secret, promise)
        _check_reuse(repository, promise)
        back_up(repository, FRESH, "fresh", day=90)
        if thorough:
            prune(repository, NullJob())
    with open_at(path, secret, opener=Hasty) as repository:
        listed = check_snapshots(repository, promise)
        assert "fresh" in listed, "the next backup is not there"
        _check_warnings(repository)


def _is_still_led_to(path: Path, secret: Secret | None, promise: Promise) -> None:
    """What was destroyed is nothing that an anchor led to."""
    with open_at(path, secret, opener=Hasty) as repository:
        check_snapshots(repository, promise, whole=False)
        _check_warnings(repository)


def check_snapshots(repository: Repository, promise: Promise, *, whole: bool = True) -> set[str]:
    """Everything promised is there, nothing forgotten is, and nothing by half: with ``whole``, byte for byte."""
    listed = {snapshot.name: snapshot for snapshot in repository.snapshots()}
    assert repository.warnings == []
    missing = promise.committed - promise.going - promise.forgotten - set(listed)
    assert not missing, f"committed snapshots are lost: {missing}"
    back = promise.forgotten & set(listed)
    assert not back, f"forgotten snapshots are back: {back}"
    for name, snapshot in listed.items() if whole else ():
        assert restored(repository, snapshot) == DISKS[name], f"{name} has other bytes"
    return set(listed)


def _check_warnings(repository: Repository) -> None:
    store = repository.store
    assert isinstance(store, Container)
    for warning in store.warnings:
        assert warning.endswith(_HARMLESS), warning


def _is_sound(repository: Repository) -> None:
    result = verify(repository, VerifyOptions(deep=True, workers=1), NullJob())
    assert result.ok, result


def _check_reuse(repository: Repository, promise: Promise) -> None:
    """What a checkpoint or a commit made durable is not stored again."""
    for name, cells in sorted(promise.stored):
        with open_writer(repository) as writer:
            content = DISKS[name]
            before = writer.stored
            if cells * CHUNK >= len(content):
                add_disk(writer, repository, content)
            else:
                for at in range(0, cells * CHUNK, CHUNK):
                    plain = content[at : at + CHUNK]
                    assert not any(plain) or repository.sealer.id_of(plain) in writer, f"{name}: {at} is stored again"
            assert writer.stored == before, f"chunks of {name} were stored again"
            assert not writer._pack.ids, f"chunks of {name} would be stored again"


def _working_secret(path: Path, secret: Secret | None, promise: Promise) -> Secret | None:
    """Every promised key opens the image, every removed one does not; one that opens it."""
    if secret is None:
        return None
    works = []
    for name in ("first key", "other key"):
        try:
            open_at(path, SECRETS[name], opener=Hasty).close()
        except KeyRefused:
            assert name not in promise.keys - promise.keys_going, f"the {name} does not open the image any more"
            continue
        assert name not in promise.keys_gone, f"the {name} opens the image again"
        works.append(SECRETS[name])
    assert works or not promise.created
    return works[0]
