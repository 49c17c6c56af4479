"""Readers go on while a writer backs up, forgets, prunes and compacts, and never see wrong bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ferrotype.engine.forget import forget
from ferrotype.engine.prune import prune
from ferrotype.errors import IntegrityError, SnapshotForgotten
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.objects.machine import THIS_MACHINE
from ferrotype.objects.volumes import PosixFile
from ferrotype.repository.store import Repository
from tests.cli.program import environment
from tests.engine import traffic
from tests.engine.traffic import Seen
from tests.repository import small

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 12


def started(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.engine.traffic", *words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("locks", ["locks", "none"])
def test_readers_go_on_while_another_process_writes(tmp_path: Path, locks: str) -> None:
    """Four threads of this process, and a process of its own, read what another one changes.

    Without locks the writer punches holes and moves records under them.
    """
    image, over = tmp_path / "a.ferro", tmp_path / "over"
    machine = THIS_MACHINE if locks == "locks" else traffic.UNSEEN
    traffic.begin(image)
    seen = {way: Seen() for way in (*traffic.WAYS, "verify")}
    failed: list[BaseException] = []

    def read_on(way: str) -> None:
        try:
            traffic.read_on(image, machine, way, over.exists, seen[way])
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    reader = started("read", image, locks, "restore", over)
    writer = started("write", image, locks, str(ROUNDS), "1")
    threads = [threading.Thread(target=read_on, args=(way,)) for way in seen]
    for thread in threads:
        thread.start()
    _, writer_says = writer.communicate()
    over.touch()
    for thread in threads:
        thread.join()
    out, reader_says = reader.communicate()
    assert (writer.returncode, writer_says) == (0, "")
    assert (reader.returncode, reader_says) == (0, "")
    if failed:
        raise failed[0]
    apart = Seen(**json.loads(out))
    assert seen["verify"].verified
    assert all(s.right for way, s in seen.items() if way != "verify")
    assert apart.right
    if locks == "none":
        assert sum(s.newer for s in seen.values()) > 0


# ---------------------------------------------------------------------- at any point


class Watched(PosixFile):
    """A file in which something happens before a certain read."""

    def __init__(self, plan: Plan, path: Path, *, writable: bool, create: bool) -> None:
        super().__init__(path, writable=writable, create=create)
        self._plan = plan

    def read(self, offset: int, length: int, /) -> bytes:
        self._plan.step()
        return super().read(offset, length)


class Plan:
    """``act`` happens before the read with that number, and again ``gap`` reads later."""

    def __init__(self, at: int, act: Callable[[], None], gap: int = 0) -> None:
        self.reads = 0
        self._at = {at, at + gap}
        self._act = act
        self._lock = threading.Lock()
        self._acting = threading.Lock()

    def step(self) -> None:
        with self._lock:
            number, self.reads = self.reads, self.reads + 1
        if number in self._at:
            with self._acting:
                self._act()

    def opener(self, path: Path, /, *, writable: bool, create: bool = False) -> Watched:
        return Watched(self, path, writable=writable, create=create)


def everything_moves(image: Path) -> None:
    """A backup, all but two snapshots forgotten, a prune that punches, a compaction that moves what is left."""
    with traffic.opened(image, traffic.UNSEEN, writable=True) as repository:
        number = len(repository.snapshots())
        small.back_up(repository, traffic.content(f"s{number}"), f"s{number}", day=number)
        gone = [s for s in repository.snapshots() if s.name != traffic.KEPT][:-1]
        forget(repository, gone)
        prune(repository, NullJob())
        assert isinstance(repository.store, Container)
        repository.store.compact(lambda _: None)


def aged(path: Path) -> Path:
    """An image in which the next compaction moves nearly everything, the catalog too."""
    with small.create(Container.create(path), small.SECRET) as repository:
        for number in range(3):
            small.back_up(repository, traffic.content(f"s{number}"), f"s{number}", day=number)
        small.back_up(repository, traffic.content(traffic.KEPT), traffic.KEPT)
    return path


@pytest.mark.parametrize("way", [*traffic.WAYS, "verify"])
def test_everything_may_move_before_any_read(tmp_path: Path, way: str) -> None:
    """Once, or a second time while the reader still makes up for the first."""
    whole, image, seen, number = aged(tmp_path / "whole.ferro"), tmp_path / "a.ferro", Seen(), 0
    while True:
        shutil.copy(whole, image)
        plan = Plan(number, lambda: everything_moves(image), gap=number % 3 * 4)
        store = Container.open(image, opener=plan.opener, machine=traffic.UNSEEN)
        with small.tiny(Repository.open(store, small.SECRET)) as repository:
            if way == "verify":
                traffic.check(repository, seen)
            else:
                traffic.look(repository, way, seen)
            assert repository.warnings == store.warnings == []
        if plan.reads <= number:
            break
        number += 1 if number < 10 else 6
    assert number > 40


@pytest.mark.parametrize("way", traffic.WAYS)
def test_a_snapshot_that_was_forgotten_while_it_was_read_is_said_to_be(tmp_path: Path, way: str) -> None:
    image = aged(tmp_path / "a.ferro")
    with traffic.opened(image, traffic.UNSEEN) as repository:
        (first,) = [s for s in repository.snapshots() if s.name == "s0"]
        everything_moves(image)
        with pytest.raises(SnapshotForgotten, match=r"forgotten or moved while it was read; start again"):
            traffic.WAYS[way](repository, first)
        assert repository.warnings == []


def test_what_is_damaged_is_not_said_to_be_forgotten(tmp_path: Path) -> None:
    image = aged(tmp_path / "a.ferro")
    with traffic.opened(image, traffic.UNSEEN) as repository:
        everything_moves(image)
        (kept,) = [s for s in repository.snapshots() if s.name == traffic.KEPT]
        assert traffic.by_source(repository, kept) == traffic.content(traffic.KEPT)
        assert repository.refresh()
        assert not repository.refresh()
        with image.open("r+b") as file:
            for info in repository.store.list("pack/"):
                assert isinstance(repository.store, Container)
                file.seek(repository.store._log.entries[info.name].offset + info.size)
                file.write(b"\xff" * 64)
        with pytest.raises(IntegrityError):
            traffic.by_source(repository, kept)
        assert not repository.refresh()
