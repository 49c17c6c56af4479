"""SIGKILL of the program itself, at random moments of every verb that writes, on an ext4 of its own.

``FERROTYPE_KILLS=300 pytest tests/faults/test_kill.py`` tries it 300 times for each kind of image.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.errors import KeyRefused
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.repository.keys import Secret
from ferrotype.repository.slots import read_slots
from ferrotype.repository.source import SnapshotSource
from ferrotype.repository.store import Repository
from ferrotype.units import KiB, MiB
from tests.cli.program import PROGRAM, TIMEOUT, environment
from tests.machine import loop, mounted, need, run

ROUNDS = int(os.environ.get("FERROTYPE_KILLS", "12"))  # for each kind of image
_KILLED = 0.75  # share of the runs; the others come to their end
_DISK = 2 * MiB
_PIECE = 32 * KiB
_SPAN = {"backup": 0.25, "forget": 0.1, "prune": 0.1, "compact": 0.1, "add": 0.15, "remove": 0.1}  # seconds of work


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """On a file system with a journal, so that names and lengths are real."""
    need("losetup", "mkfs.ext4", "mount", "fuser")
    image = tmp_path / "ext4.img"
    with image.open("wb") as file:
        file.truncate(96 * MiB)
    run("mkfs.ext4", "-q", "-F", image)
    with loop(image) as device, mounted(device, "ext4", tmp_path / "mnt") as where:
        yield where
    image.unlink()


@dataclass(slots=True)
class Known:
    """What the program has said, and what it may have done before it was killed."""

    contents: dict[str, int] = field(default_factory=dict)  # snapshot -> which state of the disk
    committed: set[str] = field(default_factory=set)
    going: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    words: set[str] = field(default_factory=set)  # that open the image for certain
    words_going: set[str] = field(default_factory=set)
    words_gone: set[str] = field(default_factory=set)
    finished: int = 0
    killed: int = 0


@functools.cache
def state_of_disk(number: int) -> bytes:
    """The same disk as time goes by: two pieces of it are others in each state, and some are zeros."""
    pieces = [random.Random(n).randbytes(_PIECE) if n % 4 else bytes(_PIECE) for n in range(_DISK // _PIECE)]
    for n in range(1, number + 1):
        rng = random.Random(f"state {n}")
        for _ in range(2):
            pieces[rng.randrange(len(pieces))] = rng.randbytes(_PIECE)
    return b"".join(pieces)


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_the_program_is_killed_at_any_moment(folder: Path, encrypted: bool) -> None:
    rng = random.Random(20_260_101)
    image, disk = folder / "laptop.ferro", folder / "disk.img"
    for word in ("one", "two"):
        (folder / word).write_text(word)
    secret = Secret(b"one") if encrypted else None
    Repository.create(Container.create(image), secret, chunk_size=16 * KiB, pack_size=MiB).close()
    known = Known(words={"one"} if encrypted else set())
    for number in range(4 * ROUNDS):  # on a fast machine many come to their end before the moment has come
        if number >= ROUNDS and known.killed > ROUNDS // 4:
            break
        what = rng.choice(
            ["backup", "backup", "backup", "forget", "prune", "compact"] + ["add", "remove"] * encrypted
        )
        try:
            play(image, disk, what, number, known, rng)
            check(image, known, encrypted)
        except BaseException as error:
            error.add_note(f"round {number}, {what}")
            raise
    assert known.killed > ROUNDS // 4
    print(f" {known.killed} killed, {known.finished} came to their end")  # noqa: T201


def play(image: Path, disk: Path, what: str, number: int, known: Known, rng: random.Random) -> None:
    """Start one verb, kill it some time after it began to write, and note what it said."""
    here = sorted(known.committed - known.gone)
    word = sorted(known.words - known.words_gone)[:1]
    access: list[str | Path] = ["--password-file", image.parent / word[0]] if word else []
    target = ""
    argv: list[str | Path]
    if what == "backup" or (what == "forget" and len(here) < 2):
        what, target = "backup", f"state-{number}"
        known.contents[target] = number
        disk.write_bytes(state_of_disk(number))
        argv = ["backup", disk, image, "--name", target]
    elif what == "forget":
        target = rng.choice(here)
        known.going.add(target)
        argv = ["forget", image, target, *(["--prune"] if rng.random() < 0.5 else [])]
    elif what in ("prune", "compact"):
        argv = [what, image]
    else:
        change = _change_keys(image, what, known)
        if change is None:
            return
        target, argv = change
    wait = rng.random() * _SPAN[what] if rng.random() < _KILLED else TIMEOUT
    if _run([*argv, *access, "--quiet"], image, wait):
        known.killed += 1
        return
    known.finished += 1
    if what == "backup":
        known.committed.add(target)
    elif what == "forget":
        known.gone.add(target)
    elif what == "add":
        known.words.add(target)
    elif what == "remove":
        known.words_gone.add(target)


def _change_keys(image: Path, what: str, known: Known) -> tuple[str, list[str | Path]] | None:
    """Add the second word, or remove it; None where there is nothing to add or remove."""
    with contextlib.closing(Container.open(image)) as container:
        slots = read_slots(container)
    extra = [slot for slot in slots if slot.label == "two"]
    if what == "add" and not extra and "two" not in known.words_gone:
        return "two", ["key", "add", image, "--label", "two", "--new-password-file", image.parent / "two"]
    if what == "remove" and len(extra) == 1:
        known.words_going.add("two")
        return "two", ["key", "remove", image, extra[0].id]
    return None


def _run(argv: list[str | Path], image: Path, wait: float) -> bool:
    """Run the program; whether it had to be killed.  The moment counts from when it holds the image."""
    lock = image.with_name(f"{image.name}.lock")
    before = lock.read_bytes() if lock.exists() else b""
    process = subprocess.Popen(
        [*PROGRAM, *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    try:
        while process.poll() is None and (not lock.exists() or lock.read_bytes() == before):
            time.sleep(0.001)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
    finally:
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said.decode()
    return process.returncode != 0


def check(image: Path, known: Known, encrypted: bool) -> None:
    """Nothing that was said is untrue."""
    opened = 0
    for word in ("one", "two") if encrypted else ("",):
        container = Container.open(image)
        try:
            repository = Repository.open(container, Secret(word.encode()) if word else None)
        except KeyRefused:
            container.close()
            assert word not in known.words - known.words_going, f"{word} opens nothing any more"
            continue
        opened += 1
        with repository:
            assert word not in known.words_gone, f"{word} opens it again"
            _check_snapshots(repository, known)
    assert opened


def _check_snapshots(repository: Repository, known: Known) -> None:
    listed = {snapshot.name: snapshot for snapshot in repository.snapshots()}
    store = repository.store
    assert isinstance(store, Container)
    assert repository.warnings == []
    assert store.warnings == []
    lost = known.committed - known.going - known.gone - set(listed)
    assert not lost, f"lost: {lost}"
    back = known.gone & set(listed)
    assert not back, f"back: {back}"
    known.gone |= known.going - set(listed)
    known.going.clear()  # what is there after all must stay
    for name, snapshot in listed.items():
        known.committed.add(name)  # whoever saw it may rely on it
        disk = snapshot.disk()
        assert read(SnapshotSource(repository, disk), 0, disk.size) == state_of_disk(known.contents[name]), name
    result = verify(repository, VerifyOptions(deep=True, workers=1), NullJob())
    assert result.ok, result
