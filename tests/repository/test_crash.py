"""What a cut writer leaves is used, and never believed; ``tests/faults`` has the cuts at every operation."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.errors import WriteError
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.repository.writer import open_writer
from ferrotype.testing.faults import Fault, Faults
from tests.repository.small import (
    add_disk,
    back_up,
    changed,
    contents,
    create,
    open_at,
    restored,
    tiny,
)


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
