"""Power cuts: at every operation of a small life of an image, in three ways; and a process killed for real."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ferrotype.engine.forget import forget
from ferrotype.engine.prune import prune
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.errors import WriteError
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.repository.keys import Secret
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import open_writer
from ferrotype.testing.faults import Fault, Faults, PowerCut
from tests.repository.small import (
    QUICK,
    SECRET,
    add_disk,
    back_up,
    changed,
    contents,
    create,
    disk_content,
    open_at,
    restored,
    tiny,
)

FIRST = disk_content(24, 1)
SECOND = changed(FIRST, 2)
THIRD = changed(SECOND, 3)
DISKS = {"first": FIRST, "second": SECOND, "third": THIRD}
OTHER = Secret(b"another one")


@dataclass(slots=True)
class Acknowledged:
    """What calls that returned have promised."""

    created: bool = False
    committed: set[str] = field(default_factory=set)
    forgotten: set[str] = field(default_factory=set)
    going: set[str] = field(default_factory=set)  # being forgotten
    stored: set[str] = field(default_factory=set)  # disks all of whose chunks were checkpointed
    key_added: bool = False


def life(path: Path, faults: Faults, secret: Secret | None, told: Acknowledged) -> None:
    """Everything that is ever done to an image, in small."""
    repository = create(Container.create(path, opener=faults.opener), secret)
    told.created = True
    back_up(repository, FIRST, "first", day=1, checkpoint=7)
    told.committed.add("first")
    repository.close()

    repository = open_at(path, secret, writable=True, opener=faults.opener)
    with open_writer(repository) as writer:
        add_disk(writer, repository, SECOND)
        writer.checkpoint()
        told.stored.add("second")
    back_up(repository, SECOND, "second", day=2)
    told.committed.add("second")
    first = repository.snapshot("first")
    told.going.add("first")
    forget(repository, [first])
    told.forgotten.add("first")
    prune(repository, NullJob())
    if secret:
        slot = repository.add_key(OTHER, cost=QUICK)
        told.key_added = True
        told.key_added = False
        repository.remove_key(slot.id)
    back_up(repository, THIRD, "third", day=3)
    told.committed.add("third")
    store = repository.store
    assert isinstance(store, Container)
    store.compact(lambda _: None)
    repository.close()


def check_image(path: Path, secret: Secret | None, told: Acknowledged) -> None:
    """What was promised is there, nothing is there by half, and it can be worked on."""
    with open_at(path, secret) as repository:
        check_snapshots(repository, told)
    if told.key_added:
        open_at(path, OTHER).close()
    with open_at(path, secret, writable=True) as repository:
        check_snapshots(repository, told)
        result = verify(repository, VerifyOptions(deep=True, workers=1), NullJob())
        assert result.ok, result
        for name in sorted(told.stored):
            with open_writer(repository) as writer:
                before = writer.stored
                add_disk(writer, repository, DISKS[name])
                assert writer.stored == before, "chunks were stored again"
        fresh = changed(THIRD, 4)
        back_up(repository, fresh, "fresh", day=9)
        prune(repository, NullJob())
        assert contents(repository)["fresh"] == fresh
    with open_at(path, secret) as repository:
        check_snapshots(repository, told, "fresh")
        assert verify(repository, VerifyOptions(deep=True, workers=1), NullJob()).ok


def check_snapshots(repository: Repository, told: Acknowledged, *extra: str) -> None:
    listed = {snapshot.name: snapshot for snapshot in repository.snapshots()}
    assert repository.warnings == []
    assert told.committed - told.going <= set(listed), "a committed snapshot is lost"
    assert not told.forgotten & set(listed), "a forgotten snapshot is back"
    assert set(listed) <= {*DISKS, *extra}
    for name, snapshot in listed.items():
        if name in DISKS:
            assert restored(repository, snapshot) == DISKS[name]


def operations(tmp_path: Path, secret: Secret | None) -> int:
    faults = Faults()
    life(tmp_path / "whole.ferro", faults, secret, Acknowledged())
    faults.close()
    return faults.operations


@pytest.mark.parametrize("how", [Fault.LOST, Fault.TORN, Fault.DROPPED])
@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "encrypted"])
def test_the_power_may_go_at_any_operation(tmp_path: Path, how: Fault, secret: Secret | None) -> None:
    total = operations(tmp_path, secret)
    assert total > 60
    for number in range(int(secret is not None), total, 1 + (secret is not None)):
        path = tmp_path / f"{number}.ferro"
        told = Acknowledged()
        faults = Faults(at=number, how=how, seed=number)
        with contextlib.suppress(PowerCut):
            life(path, faults, secret, told)
        faults.close()
        try:
            if path.exists():
                check_image(path, secret, told)
            else:
                assert not told.created
        except BaseException as error:
            error.add_note(f"cut at operation {number} of {total}, {how}")
            raise
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("how", [Fault.REFUSED, Fault.SHORT])
def test_storage_may_refuse_any_operation(tmp_path: Path, how: Fault) -> None:
    """A full disk, then room again: the error is told, nothing is lost, and what failed is not taken for stored."""
    total = operations(tmp_path, None)
    for number in range(0, total, 2):
        path = tmp_path / f"{number}.ferro"
        told = Acknowledged()
        faults = Faults(at=number, how=how)
        refused = False
        try:
            life(path, faults, None, told)
        except WriteError:
            refused = True
        faults.close()
        try:
            if path.exists():
                check_image(path, None, told)
            else:
                assert refused
        except BaseException as error:
            error.add_note(f"refused operation {number} of {total}, {how}")
            raise
        path.unlink(missing_ok=True)


def test_a_backup_goes_on_where_the_cut_one_was(tmp_path: Path) -> None:
    """Packs that were stored and not checkpointed are taken up, each frame proven."""
    path = tmp_path / "laptop.ferro"
    create(Container.create(path)).close()
    content = random.Random(1).randbytes(60 * 4096)

    class Stop(Exception):
        pass

    repository = open_at(path, writable=True)
    with pytest.raises(Stop), open_writer(repository) as writer:
        add_disk(writer, repository, content)
        raise Stop
    repository.close()
    with open_at(path, writable=True) as repository, open_writer(repository) as writer:
        assert writer.adopted >= 54
        add_disk(writer, repository, content)
        assert writer.stored == 0


KILLED = """
import random, sys, pathlib
from tests.repository.small import *
from ferrotype.engine.forget import forget
from ferrotype.engine.prune import prune
from ferrotype.job import NullJob

path, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2])
rng = random.Random(seed)
repository = open_at(path, writable=True)
for number in range(10_000):
    name = f"{seed}-{number}"
    known = repository.snapshots()
    content = disk_content(40, rng.randrange(50))
    (path.parent / name).write_bytes(content)
    back_up(repository, content, name, day=seed * 1000 + number, checkpoint=rng.choice([0, 9]))
    print("committed", name, flush=True)
    if len(known) > 3:
        gone = rng.choice(known)
        print("forgetting", gone.name, flush=True)
        forget(repository, [gone])
        prune(repository, NullJob())
    if rng.random() < 0.4:
        repository.store.compact(lambda _: None)
"""


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "laptop.ferro"
    create(Container.create(path)).close()
    rng = random.Random(7)
    committed: set[str] = set()
    forgotten: set[str] = set()
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root / 'src'}:{root}"}
    for seed in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, path, str(seed)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert child.stdout is not None
        lines = [child.stdout.readline()]  # the first commit: start-up is over
        time.sleep(rng.random() * 0.8)
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()
        child.wait()
        child.stdout.close()
        for line in lines:
            word, name = line.split()
            (committed if word == "committed" else forgotten).add(name)
        with open_at(path) as repository:
            listed = {snapshot.name: snapshot for snapshot in repository.snapshots()}
            assert committed - forgotten <= set(listed)
            for name, snapshot in listed.items():
                assert restored(repository, snapshot) == (tmp_path / name).read_bytes()
            assert verify(repository, VerifyOptions(deep=True), NullJob()).ok
    assert len(committed) > 10


def test_a_failed_pack_is_not_taken_for_stored(tmp_path: Path) -> None:
    """The disk is full for one pack and has room for the small index behind it."""
    path = tmp_path / "laptop.ferro"
    create(Container.create(path)).close()
    content = random.Random(1).randbytes(30 * 4096)
    for number in range(14):
        faults = Faults()
        repository = open_at(path, writable=True, opener=faults.opener)
        faults._at, faults._how = faults.operations + number, Fault.SHORT
        fresh = changed(content, number, 0.9)
        with contextlib.suppress(WriteError):
            back_up(repository, fresh, f"try-{number}")
        repository.close()
        with open_at(path, writable=True) as again:
            back_up(again, fresh, f"again-{number}")
            assert contents(again)[f"again-{number}"] == fresh
            assert verify(again, VerifyOptions(deep=True), NullJob()).ok
    assert tiny(repository) is repository
