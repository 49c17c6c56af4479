"""Small lives of an image: what is there before, and what is done while storage may fail."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from ferrotype.engine.copy import copy
from ferrotype.engine.forget import forget
from ferrotype.engine.prune import prune
from ferrotype.errors import KeyRefused
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.objects.volumes import Opener
from ferrotype.repository.keys import Secret
from ferrotype.repository.slots import read_slots
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import open_writer
from ferrotype.units import KiB
from tests.faults.promises import DISKS, OTHER, SECOND, Hasty, Told
from tests.repository.small import CHUNK, QUICK, add_disk, back_up, create, open_at, snapshot_of

SPLIT = 64 * KiB
IMAGE = "laptop.ferro"
SOURCE = "source.ferro"


@dataclass(slots=True)
class Stage:
    """Where a life takes place."""

    folder: Path
    secret: Secret | None
    opener: Opener
    told: Told
    split: int = 0
    repository: Repository | None = None  # the one that is or was open last

    @property
    def path(self) -> Path:
        return self.folder / IMAGE

    def create(self) -> Repository:
        store = Container.create(self.path, split=self.split, opener=self.opener)
        try:
            self.repository = create(store, self.secret)
        except BaseException:
            store.close()
            raise
        self.told.say("created")
        if self.secret:
            self.told.say("keys", "first key")
        return self.repository

    @contextmanager
    def open(self) -> Iterator[Repository]:
        """Not closed where the life ends in an error: who failed may want to go on."""
        self.repository = None
        try:
            self.repository = open_at(self.path, self.secret, writable=True, opener=self.opener)
        except KeyRefused:  # it was removed
            self.repository = open_at(self.path, OTHER, writable=True, opener=self.opener)
        yield self.repository
        self.repository.close()
        self.repository = None

    def back_up(self, repository: Repository, name: str, *, day: int = 0, checkpoints: int = 0) -> None:
        """Commit a snapshot of the disk of that name, and tell of each checkpoint."""
        content = DISKS[name]
        with open_writer(repository) as writer:
            for cells in range(checkpoints, len(content) // CHUNK if checkpoints else 0, checkpoints or 1):
                add_disk(writer, repository, content[: cells * CHUNK])
                writer.checkpoint()
                self.told.say("stored", (name, cells))
            record = add_disk(writer, repository, content)
            writer.commit(snapshot_of(record, name=name, day=day))
        self.told.say("committed", name)
        self.told.say("stored", (name, len(content) // CHUNK))

    def forget(self, repository: Repository, name: str) -> None:
        known = {snapshot.name: snapshot for snapshot in repository.snapshots()}
        self.told.say("going", name)
        forget(repository, [known[name]])
        self.told.say("forgotten", name)

    def prune(self, repository: Repository) -> None:
        self.told.say("pruned")
        prune(repository, NullJob())

    def compact(self, repository: Repository) -> None:
        assert isinstance(repository.store, Container)
        repository.store.compact(lambda _: None)


Life = Callable[[Stage], None]


@dataclass(frozen=True, slots=True)
class Scenario:
    """``before`` makes what is there when ``life`` begins."""

    name: str
    life: Life
    before: Life = field(default=lambda _: None)
    split: int = 0
    encrypted_only: bool = False

    def __str__(self) -> str:
        return self.name


# ---------------------------------------------------------------------- what is there before


def one_snapshot(stage: Stage) -> None:
    repository = stage.create()
    stage.back_up(repository, "first", day=1)
    repository.close()


def two_snapshots(stage: Stage) -> None:
    one_snapshot(stage)
    with stage.open() as repository:
        stage.back_up(repository, "second", day=2)


def beside_another(stage: Stage) -> None:
    """A second image, with other keys, that snapshots are copied from."""
    one_snapshot(stage)
    with create(Container.create(stage.folder / SOURCE, opener=stage.opener), stage.secret) as source:
        for day, name in enumerate(("second", "third"), 2):
            back_up(source, DISKS[name], name, day=day)


def half_dead(stage: Stage) -> None:
    two_snapshots(stage)
    with stage.open() as repository:
        stage.forget(repository, "first")
        stage.told.say("pruned")


def with_two_keys(stage: Stage) -> None:
    one_snapshot(stage)
    with stage.open() as repository:
        repository.add_key(OTHER, cost=QUICK)
        stage.told.say("keys", "other key")


def cut_in_a_backup(stage: Stage) -> None:
    """Packs that no segment lists and no catalog names."""

    class Cut(Exception):
        pass

    one_snapshot(stage)
    repository = open_at(stage.path, stage.secret, writable=True, opener=stage.opener)
    try:
        with open_writer(repository) as writer, mock.patch.object(writer, "abandon"):
            add_disk(writer, repository, SECOND[: 5 * CHUNK])
            writer.checkpoint()
            stage.told.say("stored", ("second", 5))
            add_disk(writer, repository, SECOND)
            writer._put_pack()
            writer._wait(0)
            raise Cut
    except Cut:
        repository.close()


def gaps(order: str) -> Life:
    """Objects of many sizes, some of them deleted: ``order`` says which."""

    def life(stage: Stage) -> None:
        two_snapshots(stage)
        with stage.open() as repository:
            store = repository.store
            rng = random.Random(order)
            names = [f"spare/{number:02}" for number in range(12)]
            for name in names:
                store.put(name, [rng.randbytes(rng.choice([100, 5000, 9000, 20_000]))])
                if order == "many catalogs":
                    store.flush()
            stage.back_up(repository, "third", day=3)
            chosen = {"front": names[:9], "scattered": names[::2], "many catalogs": names[1::3], "all": names}[order]
            for name in chosen:
                store.delete(name)
            if order != "all":
                stage.forget(repository, "first")
            store.flush()

    return life


# ---------------------------------------------------------------------- what is done


def first_backup(stage: Stage) -> None:
    repository = stage.create()
    stage.back_up(repository, "first", day=1, checkpoints=6)
    repository.close()


def increment(stage: Stage) -> None:
    with stage.open() as repository:
        stage.back_up(repository, "second", day=2, checkpoints=6)


def forget_one(stage: Stage) -> None:
    with stage.open() as repository:
        stage.forget(repository, "first")
        stage.back_up(repository, "third", day=3)


def prune_it(stage: Stage) -> None:
    with stage.open() as repository:
        stage.prune(repository)


def compact_it(stage: Stage) -> None:
    with stage.open() as repository:
        stage.compact(repository)


def add_a_key(stage: Stage) -> None:
    with stage.open() as repository:
        repository.add_key(OTHER, cost=QUICK)
        stage.told.say("keys", "other key")


def with_keys_and_no_gap(stage: Stage) -> None:
    """Whoever adds another key has to move a pack."""
    one_snapshot(stage)
    with stage.open() as repository:
        repository.add_key(Secret(b"another one"), cost=QUICK)


def remove_a_key(stage: Stage) -> None:
    with stage.open() as repository:
        for slot in read_slots(repository.store):  # without those that cannot be read
            if slot.label == "first":
                stage.told.say("keys_going", "first key")
                repository.remove_key(slot.id)
                stage.told.say("keys_gone", "first key")


def roll_over(stage: Stage) -> None:
    """Volumes come, and go again."""
    repository = stage.create()
    stage.back_up(repository, "first", day=1)
    stage.back_up(repository, "second", day=2)
    assert len(list(stage.folder.glob("*.0*"))) >= 2
    stage.forget(repository, "first")
    stage.prune(repository)
    stage.compact(repository)
    repository.close()


def copy_them(stage: Stage) -> None:
    with open_at(stage.folder / SOURCE, stage.secret, opener=Hasty) as source, stage.open() as repository:
        copy(source, source.snapshots(), repository, NullJob(), workers=1)
        for name in ("second", "third"):
            stage.told.say("committed", name)
            stage.told.say("stored", (name, len(DISKS[name]) // CHUNK))


def recover(stage: Stage) -> None:
    if not stage.path.exists():
        stage.create().close()
    with stage.open() as repository:
        stage.back_up(repository, "third", day=50)
        stage.prune(repository)
        stage.compact(repository)


RECOVERY = Scenario("recovery", recover)
SCENARIOS = [
    Scenario("first-backup", first_backup),
    Scenario("increment", increment, one_snapshot),
    Scenario("take-over", increment, cut_in_a_backup),
    Scenario("forget", forget_one, two_snapshots),
    Scenario("prune", prune_it, half_dead),
    Scenario("compact-front", compact_it, gaps("front")),
    Scenario("compact-scattered", compact_it, gaps("scattered")),
    Scenario("compact-many-catalogs", compact_it, gaps("many catalogs")),
    Scenario("compact-volumes", compact_it, gaps("all"), split=SPLIT),
    Scenario("copy", copy_them, beside_another),
    Scenario("key-add", add_a_key, one_snapshot, encrypted_only=True),
    Scenario("key-add-move", add_a_key, with_keys_and_no_gap, encrypted_only=True),
    Scenario("key-add-volumes", add_a_key, with_keys_and_no_gap, split=SPLIT, encrypted_only=True),
    Scenario("key-remove", remove_a_key, with_two_keys, encrypted_only=True),
    Scenario("roll-over", roll_over, split=SPLIT),
]
