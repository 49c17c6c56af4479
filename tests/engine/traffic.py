"""A writer and readers of one small image, each in a process of its own: what they do in a loop.

Chunks of 4 KiB, packs of three of them, a disk of some dozens: each state of the image is gone soon.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from ferrotype.block import read
from ferrotype.block.memory import MemoryDisk
from ferrotype.engine.checksum import checksum
from ferrotype.engine.forget import forget
from ferrotype.engine.prune import prune
from ferrotype.engine.restore import Part, RestoreOptions, restore
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.errors import SnapshotForgotten
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.objects.machine import THIS_MACHINE, Machine
from ferrotype.repository.snapshots import Snapshot
from ferrotype.repository.source import SnapshotSource
from ferrotype.repository.store import Repository
from tests.objects.machines import Played
from tests.repository import small

CELLS: Final = 40
KEPT: Final = "kept"  # the snapshot that is never forgotten

UNSEEN: Final[Machine] = Played(local=True, flocks=True)  # readers have no locks: as on a network file system


def content(name: str) -> bytes:
    """The disk that a snapshot is made of."""
    return small.changed(small.disk_content(CELLS, 1), sum(name.encode()), 0.3)


def opened(image: Path, machine: Machine, *, writable: bool = False) -> Repository:
    return small.tiny(Repository.open(Container.open(image, writable=writable, machine=machine), small.SECRET))


def begin(image: Path) -> None:
    """An image with the snapshot that is never forgotten."""
    with small.create(Container.create(image), small.SECRET) as repository:
        small.back_up(repository, content(KEPT), KEPT)


# ---------------------------------------------------------------------- writing


def write(image: Path, machine: Machine, rounds: int, *, seed: int) -> None:
    """Back up, forget, prune, add and remove keys, and compact, in any order."""
    rng = random.Random(seed)
    for number in range(rounds):
        with opened(image, machine, writable=True) as repository:
            small.back_up(repository, content(f"s{number}"), f"s{number}", day=number)
            others = [s for s in repository.snapshots() if s.name != KEPT]
            forget(repository, others[: max(0, len(others) - rng.randrange(3))])
            if rng.random() < 0.8:
                prune(repository, NullJob())
            if machine is UNSEEN and rng.random() < 0.7:
                assert isinstance(repository.store, Container)
                repository.store.compact(lambda _: None)


# ---------------------------------------------------------------------- reading


def by_source(repository: Repository, snapshot: Snapshot) -> bytes:
    """In small and large pieces, some of them out of order."""
    source = SnapshotSource(repository, snapshot.disk())
    half = source.size // 3
    return read(source, 0, half) + read(source, half, source.size - half)


def by_restore(repository: Repository, snapshot: Snapshot) -> bytes:
    disk = snapshot.disk()
    target = MemoryDisk(disk.size)
    restore(Part(repository, disk, 0, disk.size), target, RestoreOptions(workers=2), NullJob())
    return bytes(target.data)


def by_checksum(repository: Repository, snapshot: Snapshot) -> str:
    return checksum(SnapshotSource(repository, snapshot.disk()), NullJob())


WAYS: Final[dict[str, Callable[[Repository, Snapshot], bytes | str]]] = {
    "source": by_source,
    "restore": by_restore,
    "checksum": by_checksum,
}


@dataclass
class Seen:
    """What readers met."""

    right: int = 0  # snapshots read whole
    forgotten: int = 0  # that were forgotten meanwhile, and said to be
    verified: int = 0
    newer: int = 0  # newer states that were gone on to


def look(repository: Repository, way: str, seen: Seen) -> None:
    """Read all snapshots that there are; each is right, or was forgotten."""
    for snapshot in repository.snapshots():
        try:
            found = WAYS[way](repository, snapshot)
        except SnapshotForgotten:
            assert snapshot.name != KEPT
            assert snapshot.id not in {s.id for s in repository.snapshots()}
            seen.forgotten += 1
            continue
        expected = content(snapshot.name)
        if way == "checksum":
            assert found == checksum(MemoryDisk(expected), NullJob())
        else:
            assert found == expected
        seen.right += 1


def check(repository: Repository, seen: Seen) -> None:
    """Verify the image; a writer that is at work is no damage."""
    result = verify(repository, VerifyOptions(deep=True, workers=2), NullJob())
    assert result.ok, (result.problems, result.damaged)
    seen.verified += 1


def read_on(image: Path, machine: Machine, way: str, is_over: Callable[[], bool], seen: Seen) -> None:
    """Look again and again, sometimes through an opening that is as old as the first look."""
    while not is_over():
        with opened(image, machine) as repository:
            for _ in range(3):
                if way == "verify":
                    check(repository, seen)
                else:
                    look(repository, way, seen)
            assert repository.warnings == []
            assert isinstance(repository.store, Container)
            assert repository.store.warnings == []
            seen.newer += repository._state


if __name__ == "__main__":
    task, path, locks, *rest = sys.argv[1:]
    machine = THIS_MACHINE if locks == "locks" else UNSEEN
    if task == "write":
        write(Path(path), machine, int(rest[0]), seed=int(rest[1]))
    else:
        over = Path(rest[1])
        seen = Seen()
        read_on(Path(path), machine, rest[0], over.exists, seen)
        sys.stdout.write(json.dumps(asdict(seen)))
