"""Who may write to an image and who is told why not; who reads it, and what waits for them."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ferrotype.errors import DeviceError, FerrotypeError, Locked, ObjectMissing
from ferrotype.objects import lock as lock_module
from ferrotype.objects.container import Container
from ferrotype.objects.holder import lock_path, look
from ferrotype.objects.layout import BLOCK
from ferrotype.objects.lock import STALE, WriterLock
from ferrotype.objects.machine import THIS_MACHINE
from ferrotype.objects.volumes import PosixFile, volume_path
from ferrotype.repository.keys import Secret
from ferrotype.units import KiB
from tests.cli.program import environment, ferrotype
from tests.objects.machines import OTHER, Played
from tests.repository import small

HERE = Played()
OLD = STALE + 20  # seconds


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "_SETTLE", 0.2)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "laptop.ferro"
    store = Container.create(path)
    store.put("config", [b"x"])
    store.flush()
    store.close()
    return path


def names(image: Path) -> list[str]:
    return sorted(path.name for path in image.parent.iterdir())


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then), follow_symlinks=False)


def written_by(image: Path, by: Played, **facts: Any) -> Path:
    """The lock file that a writer on some machine has left, or keeps."""
    path = lock_path(image)
    document = {
        "host": by.host,
        "machine": by.id,
        "boot": by.boot,
        "processes": by.processes,
        "pid": 4_000_000,
        "started": 77,
        "program": "ferrotype 9",
        "since": "2026-01-02T03:04:05Z",
        "token": "0123456789abcdef",
    }
    path.write_text(json.dumps(document | facts))
    return path


def can_write(image: Path, machine: Played) -> bool:
    try:
        store = Container.open(image, writable=True, machine=machine)
    except Locked:
        return False
    store.put(f"pack/{random.randbytes(8).hex()}", [b"y"])
    store.flush()
    assert store.warnings == []
    store.close()
    return True


# ---------------------------------------------------------------------- one writer of a machine


HOLD = """
import pathlib, sys
from ferrotype.objects.container import Container
store = Container.open(pathlib.Path(sys.argv[1]), writable=True)
print("held", flush=True)
sys.stdin.read()
store.close()
"""


@contextmanager
def holding(image: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the image open for writing."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, image],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_lock_file_says_who_writes_until_the_writer_closes(tmp_path: Path) -> None:
    path = tmp_path / "new.ferro"
    store = Container.create(path)
    hidden, lock = names(path)
    assert re.fullmatch(r"\.new\.ferro\.[0-9a-f]{16}\.new", hidden)
    assert lock == "new.ferro.lock"
    store.put("config", [b"x"])
    store.flush()
    said = json.loads(lock_path(path).read_bytes())
    assert (said["pid"], said["host"]) == (os.getpid(), os.uname().nodename)
    assert said["started"] == THIS_MACHINE.started(os.getpid())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", said["since"])
    store.close()
    assert names(path) == ["new.ferro"]
    reader = Container.open(path)
    assert names(path) == ["new.ferro"]
    reader.close()


def test_the_second_writer_is_told_who_holds_the_lock_and_since_when(tmp_path: Path) -> None:
    image, disk = tmp_path / "a.ferro", tmp_path / "disk.img"
    disk.write_bytes(os.urandom(64 * KiB))
    ferrotype("backup", disk, image)
    with holding(image) as holder:
        since = json.loads(lock_path(image).read_bytes())["since"]
        for words in (("backup", disk, image), ("compact", image)):
            error = ferrotype(*words, code=7).err
            assert f"process {holder.pid} (ferrotype " in error
            assert f"on {os.uname().nodename}) since {since}; wait for it to end, or stop it" in error
        ferrotype("verify", image)


def test_a_writer_without_a_lock_file_is_named_by_what_the_kernel_knows(image: Path) -> None:
    with holding(image) as holder:
        lock_path(image).unlink()
        with pytest.raises(Locked, match=rf"process {holder.pid} \(.* running since "):
            Container.open(image, writable=True)
        written_by(image, OTHER)  # left on a disk that no other machine can reach: not the one that holds the lock
        with pytest.raises(Locked, match=rf"process {holder.pid} \("):
            Container.open(image, writable=True)


def test_a_killed_writer_holds_nothing(image: Path) -> None:
    with holding(image) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert names(image) == ["laptop.ferro", "laptop.ferro.lock"]
    store = Container.open(image, writable=True)
    assert json.loads(lock_path(image).read_bytes())["pid"] == os.getpid()
    assert store.warnings == []
    store.close()
    assert names(image) == ["laptop.ferro"]


def test_the_lock_file_stands_beside_the_image_whatever_links_lead_to_it(image: Path, tmp_path: Path) -> None:
    link = tmp_path / "links" / "other.ferro"
    link.parent.mkdir()
    link.symlink_to(image)
    store = Container.open(link, writable=True)
    assert [path.name for path in link.parent.iterdir()] == ["other.ferro"]
    assert lock_path(image).exists()
    store.close()


@pytest.mark.parametrize("content", [b"", b"\0" * 300, b"{}", b"[" * 4000, b'{"pid": 1}', b"\xff" * 5000])
def test_hostile_lock_files_do_no_harm(image: Path, content: bytes) -> None:
    lock_path(image).write_bytes(content)
    assert can_write(image, replace(HERE, local=True, flocks=True))
    lock_path(image).write_bytes(content)
    with pytest.raises(Locked, match="somebody who is not named"):
        Container.open(image, writable=True, machine=HERE)
    age(lock_path(image), OLD)
    assert can_write(image, HERE)
    assert names(image) == ["laptop.ferro"]


def test_what_a_lock_file_says_cannot_reach_the_terminal(image: Path) -> None:
    written_by(image, OTHER, host="\x1b[2Jevil" * 20, pid=10**40)
    with pytest.raises(Locked) as caught:
        Container.open(image, writable=True, machine=HERE)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("machine", [HERE, replace(HERE, local=True, flocks=True)])
def test_no_link_is_followed_and_no_pipe_waited_for(image: Path, tmp_path: Path, machine: Played) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    makers: list[Callable[[], None]] = [
        lambda: lock_path(image).symlink_to(victim),
        lambda: os.mkfifo(lock_path(image)),
    ]
    for make in makers:
        make()
        age(lock_path(image), OLD)
        assert can_write(image, machine)
        assert victim.read_bytes() == b"precious"
        assert names(image) == ["laptop.ferro", "victim"]


def test_a_folder_that_takes_no_lock_file(image: Path) -> None:
    (lock_path(image) / "in the way").mkdir(parents=True)
    assert can_write(image, replace(HERE, local=True, flocks=True))
    age(lock_path(image), OLD)
    with pytest.raises(DeviceError, match="keeps other machines from writing"):
        Container.open(image, writable=True, machine=HERE)
    assert names(image) == ["laptop.ferro", "laptop.ferro.lock"]


def test_a_split_image_has_one_lock(tmp_path: Path) -> None:
    path = tmp_path / "a.ferro"
    store = Container.create(path, split=64 * 1024 * KiB)
    for number in range(2):
        store.put(f"pack/{number}", [bytes(40 * 1024 * KiB)])
    store.flush()
    assert names(path) == ["a.ferro", "a.ferro.001", "a.ferro.lock"]
    store.close()
    assert names(path) == ["a.ferro", "a.ferro.001"]


# ---------------------------------------------------------------------- several machines


def test_another_machine_holds_the_lock_while_it_gives_signs_of_life(image: Path) -> None:
    path = written_by(image, OTHER)
    before = path.read_bytes()
    age(path, STALE - 20)
    with pytest.raises(Locked) as caught:
        Container.open(image, writable=True, machine=HERE)
    assert "process 4000000 (ferrotype 9, on nas2) since 2026-01-02T03:04:05Z" in str(caught.value)
    assert "laptop.ferro.lock" in str(caught.value)
    assert "try again in three minutes" in str(caught.value)
    assert path.read_bytes() == before
    assert names(image) == ["laptop.ferro", "laptop.ferro.lock"]
    Container.open(image, machine=HERE).close()  # a reader asks nobody
    age(path, OLD)
    assert can_write(image, HERE)
    assert names(image) == ["laptop.ferro"]


def test_a_disk_that_no_other_machine_can_reach_is_not_locked_by_one(image: Path) -> None:
    written_by(image, OTHER)
    assert can_write(image, replace(HERE, local=True, flocks=True))


def test_age_is_measured_by_the_clock_of_the_file_system(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written_by(image, OTHER)
    real = time.time
    for offset in (-10_000, 10_000):  # this machine's clock is wrong
        monkeypatch.setattr(time, "time", lambda offset=offset: real() + offset)
        assert not can_write(image, HERE)
    monkeypatch.setattr(time, "time", real)
    age(path, OLD)
    monkeypatch.setattr(time, "time", lambda: real() - 10_000)
    assert can_write(image, HERE)


@pytest.mark.parametrize(
    ("facts", "seconds", "free"),
    [
        ({"boot": "before the restart"}, 0, True),
        ({"pid": 4_000_000}, 0, True),  # there is no such process
        ({"pid": 4_000_001, "started": 78}, 0, True),  # another process has the number now
        ({"pid": 4_000_001}, 0, False),
        ({"pid": 4_000_001}, OLD, False),  # it sleeps, and may wake up
        ({"processes": "pid:[2]"}, 0, False),  # in a container: whether it runs cannot be seen
        ({"processes": "pid:[2]"}, OLD, True),
        ({"machine": "", "boot": ""}, 0, False),  # it may be any machine
        ({"boot": "another", "host": "clone"}, 0, False),
    ],
)
def test_a_lock_of_this_machine(image: Path, facts: dict[str, Any], seconds: float, free: bool) -> None:
    age(written_by(image, HERE, **facts), seconds)
    assert can_write(image, replace(HERE, running={4_000_001: 77})) is free
    assert lock_path(image).exists() is not free


def test_of_many_that_take_over_a_stale_lock_one_gets_it(image: Path) -> None:
    age(written_by(image, OTHER), OLD)
    count = 8
    barrier = threading.Barrier(count)
    locks: list[WriterLock] = []
    refused: list[str] = []

    def take(number: int) -> None:
        machine = Played(host=f"host{number}", id=str(number) * 32, boot=f"boot{number}")
        fd = os.open(image, os.O_RDWR)
        try:
            barrier.wait()
            locks.append(WriterLock.take(fd, image, machine))
        except Locked as error:
            refused.append(str(error))
        finally:
            os.close(fd)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(locks) == 1
    assert len(refused) == count - 1
    # One that lost may have seen another that lost, a moment before that one was told.
    assert all(re.search(r"on host\d\)", message) for message in refused), refused
    assert json.loads(lock_path(image).read_bytes())["host"] == locks[0].holder.host
    locks[0].check(now=True)
    locks[0].release()
    assert names(image) == ["laptop.ferro"]


def test_a_machine_that_was_a_moment_slower_gets_the_lock_alone(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two found the same stale lock; the one whose file stands there in the end has it."""
    age(written_by(image, OTHER, host="gone"), OLD)
    monkeypatch.setattr("ferrotype.objects.lock.time.sleep", lambda _: written_by(image, OTHER))
    with pytest.raises(Locked, match="on nas2"):
        Container.open(image, writable=True, machine=HERE)
    assert json.loads(lock_path(image).read_bytes())["host"] == "nas2"


def test_a_writer_that_does_not_know_yet_removes_nobody_elses_lock(image: Path) -> None:
    store = Container.open(image, writable=True, machine=HERE)
    written_by(image, OTHER)
    store.close()
    assert json.loads(lock_path(image).read_bytes())["host"] == "nas2"


def test_a_process_that_let_go_of_an_image_can_have_it_again(image: Path) -> None:
    """As after a cut that it survived: the file is closed, and the lock file names this very process."""
    shared = replace(HERE, flocks=True)
    store = Container.open(image, writable=True, machine=shared)
    with pytest.raises(Locked):
        Container.open(image, writable=True, machine=shared)
    store._files[0].close()
    again = Container.open(image, writable=True, machine=shared)
    store.close()
    assert json.loads(lock_path(image).read_bytes())["pid"] == os.getpid()
    again.close()
    assert names(image) == ["laptop.ferro"]


def test_two_creations_on_two_machines_do_not_harm_each_other(tmp_path: Path) -> None:
    path = tmp_path / "new.ferro"
    first = Container.create(path, machine=HERE)
    first.put("config", [b"first"])
    with pytest.raises(Locked, match="on here"):
        Container.create(path, machine=OTHER)
    first.flush()
    first.close()
    assert names(path) == ["new.ferro"]
    found = Container.open(path)
    assert found.get("config") == b"first"
    found.close()


@pytest.mark.parametrize("how", ["taken over", "gone"])
@pytest.mark.parametrize("act", ["put", "flush", "reclaim", "compact"])
def test_a_writer_that_lost_its_lock_writes_no_more(image: Path, how: str, act: str) -> None:
    store = Container.open(image, writable=True, machine=HERE)
    store.put("pack/one", [b"y" * 5000])
    store.flush()
    store.put("pack/two", [b"z" * 5000])
    if how == "taken over":
        written_by(image, OTHER)
    else:
        lock_path(image).unlink()
    before = image.read_bytes()
    assert store._log.lock is not None
    if act == "put":  # it is found out at the next sign of life
        store._log.lock.refresh()
    actions: dict[str, Callable[[], object]] = {
        "put": lambda: store.put("pack/three", [b"x"]),
        "flush": store.flush,
        "reclaim": store.reclaim,
        "compact": lambda: store.compact(lambda _: None),
    }
    for _ in range(2):
        with pytest.raises(Locked, match="nothing more is written") as caught:
            actions[act]()
    assert ("on nas2" in str(caught.value)) is (how == "taken over")
    assert image.read_bytes() == before
    store.close()
    assert lock_path(image).exists() is (how == "taken over")  # it is not this writer's to remove


def test_a_writer_that_slept_looks_before_it_writes(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Container.open(image, writable=True, machine=HERE)
    written_by(image, OTHER)
    store.put("pack/one", [b"y"])  # it cannot know yet
    now = lock_module._now()
    monkeypatch.setattr(lock_module, "_now", lambda: now + 600)
    with pytest.raises(Locked, match="on nas2"):
        store.put("pack/two", [b"y"])
    store.close()


def test_a_writer_that_cannot_reach_its_lock_file_gives_up_in_time(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Container.open(image, writable=True, machine=HERE)

    def unreachable(_: Path) -> None:
        raise OSError(5, "Input/output error")

    now = lock_module._now()
    monkeypatch.setattr(lock_module, "look", unreachable)
    monkeypatch.setattr(lock_module, "_now", lambda: now + 70)
    store.put("pack/one", [b"y"])
    monkeypatch.setattr(lock_module, "_now", lambda: now + 100)
    with pytest.raises(Locked, match="could not be refreshed"):
        store.put("pack/two", [b"y"])
    monkeypatch.setattr(lock_module, "look", look)
    store.close()


@pytest.mark.parametrize("machine", [HERE, replace(HERE, local=True, flocks=True)])
def test_a_writer_gives_signs_of_life(image: Path, machine: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "_REFRESH", 0.02)
    store = Container.open(image, writable=True, machine=machine)
    path = lock_path(image)
    for _ in range(2):
        age(path, 1000)
        end = time.monotonic() + 20
        while path.stat().st_mtime < time.time() - 500:
            assert time.monotonic() < end
            time.sleep(0.01)
    store.close()
    assert names(image) == ["laptop.ferro"]
    assert not [t for t in threading.enumerate() if t.name == "ferrotype-lock" and _ends_not(t)]


def _ends_not(thread: threading.Thread) -> bool:
    thread.join(20)
    return thread.is_alive()


# ---------------------------------------------------------------------- readers


def full_of_holes(image: Path) -> dict[str, bytes]:
    """Objects with deleted ones between them, whose space was not given back yet."""
    rng = random.Random(1)
    store = Container.open(image, writable=True)
    model = {f"pack/{number:02}": rng.randbytes(100 * KiB) for number in range(20)}
    for name, data in model.items():
        store.put(name, [data])
    store.flush()
    for name in sorted(model)[::2]:
        store.delete(name)
        del model[name]
    store.flush()
    store.close()
    return model


def packs(store: Container) -> dict[str, bytes]:
    return {info.name: store.get(info.name) for info in store.list("pack/")}


def test_space_is_given_back_when_nobody_reads(image: Path) -> None:
    older = Container.open(image, writable=True)
    older.put("pack/99", [b"9" * 100 * KiB])
    older.flush()
    older.close()
    reader = Container.open(image)
    model = full_of_holes(image)
    writer = Container.open(image, writable=True)
    blocks = image.stat().st_blocks
    writer.delete("pack/99")
    report = writer.reclaim()
    assert (report.readers, report.freed, report.dead) == (True, 0, 0)
    assert image.stat().st_blocks >= blocks
    assert reader.get("pack/99") == b"9" * 100 * KiB  # it was deleted, and is still there for who saw it
    reader.close()
    report = writer.reclaim()
    assert not report.readers
    assert report.freed >= 11 * 100 * KiB - 2 * BLOCK  # a catalog was written in between
    writer.close()
    with_all = Container.open(image)
    assert packs(with_all) == model
    with_all.close()


def test_compacting_waits_for_readers(image: Path) -> None:
    model = full_of_holes(image)
    reader, writer = Container.open(image), Container.open(image, writable=True)
    before = image.read_bytes()
    with pytest.raises(Locked, match=r"is being read.* start again"):
        writer.compact(lambda _: None)
    assert image.read_bytes() == before
    reader.close()
    assert writer.compact(lambda _: None) > 0
    writer.close()
    again = Container.open(image)
    assert packs(again) == model
    again.close()


def test_the_command_line_says_that_an_image_is_being_read(tmp_path: Path) -> None:
    image = tmp_path / "a.ferro"
    with small.create(Container.create(image), small.SECRET, small.LEAST) as repository:
        kept = repository.add_key(Secret(b"second"), cost=small.LEAST)
        gone = small.back_up(repository, small.disk_content(40, 1), "gone")
        other = repository.add_key(Secret(b"third"), cost=small.LEAST)
        repository.store.delete(f"snapshot/{gone.id}")
        repository.store.flush()
    env = {"FERROTYPE_PASSWORD": "correct horse"}
    reader = Container.open(image)
    salts = [json.loads(reader.get(f"key/{slot.id}"))["salt"].encode() for slot in (kept, other)]
    removed = ferrotype("key", "remove", image, kept.id, env=env).out
    assert "stay in it until the next `ferrotype prune`" in removed
    pruned = ferrotype("prune", image, env=env).out
    assert "its space comes back with a later `ferrotype prune`" in pruned
    assert all(salt in image.read_bytes() for salt in salts)
    assert "is being read" in ferrotype("compact", image, code=7).err
    blocks = image.stat().st_blocks
    reader.close()
    document = ferrotype("prune", image, "--json", env=env).document
    assert (document["readers"], document["freed_bytes"] > 16 * KiB) == (False, True)
    assert image.stat().st_blocks < blocks
    assert [salt in image.read_bytes() for salt in salts] == [False, True]
    assert ferrotype("key", "remove", image, other.id, "--json", env=env).document["overwritten"] is True
    assert not any(salt in image.read_bytes() for salt in salts)


def test_a_reader_that_comes_while_records_move_goes_on_without_its_lock(image: Path) -> None:
    model = full_of_holes(image)
    writer = Container.open(image, writable=True)
    readers: list[Container] = []

    def meanwhile(_: int) -> None:
        if not readers:
            readers.append(Container.open(image))
            assert packs(readers[0]) == model

    writer.compact(meanwhile)
    writer.close()
    (reader,) = readers
    reader.refresh()
    assert packs(reader) == model
    assert reader.warnings == []
    reader.close()


def test_a_process_that_reads_and_writes_one_image_is_told_apart_from_itself(image: Path) -> None:
    first, second, writer = Container.open(image), Container.open(image), Container.open(image, writable=True)
    first.close()  # the lock of the second is its own
    assert writer.reclaim().readers
    second.close()
    assert not writer.reclaim().readers
    Container.open(image).close()
    writer.close()


# ---------------------------------------------------------------------- a newer state


def test_a_reader_goes_on_to_a_newer_state(image: Path) -> None:
    reader, writer = Container.open(image), Container.open(image, writable=True)
    assert not reader.refresh()
    writer.put("pack/one", [b"one"])
    assert not reader.refresh()  # nothing was committed
    writer.flush()
    with pytest.raises(ObjectMissing):
        reader.get("pack/one")
    assert reader.refresh()
    assert not reader.refresh()
    assert reader.get("pack/one") == b"one"
    writer.delete("pack/one")
    writer.flush()
    assert reader.refresh()
    with pytest.raises(ObjectMissing):
        reader.get("pack/one")
    assert not writer.refresh()
    writer.close()
    reader.close()
    assert reader.warnings == []


def test_a_reader_follows_volumes_that_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferrotype.objects.container._LEAST_SPLIT", 64 * KiB)
    image = tmp_path / "a.ferro"
    writer = Container.create(image, split=128 * KiB, machine=replace(HERE, local=True))
    writer.put("config", [b"x"])
    writer.flush()
    reader = Container.open(image, machine=HERE)
    rng = random.Random(3)
    for _ in range(4):
        model = {f"pack/{rng.randbytes(8).hex()}": rng.randbytes(50 * KiB) for _ in range(8)}
        for name, data in model.items():
            writer.put(name, [data])
        writer.flush()
        assert reader.refresh()
        assert packs(reader) == model
        kept = dict(sorted(model.items())[:2])
        for name in model.keys() - kept.keys():
            writer.delete(name)
        writer.compact(lambda _: None)
        assert not volume_path(image, 2).exists()
        assert reader.refresh()
        assert packs(reader) == kept
        for name in kept:
            writer.delete(name)
    writer.close()
    reader.close()
    assert reader.warnings == []


def test_a_volume_may_come_between_two_looks_of_an_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferrotype.objects.container._LEAST_SPLIT", 64 * KiB)
    image = tmp_path / "a.ferro"
    writer = Container.create(image, split=128 * KiB)
    writer.put("config", [b"x"])
    writer.flush()
    model = {f"pack/{number}": os.urandom(50 * KiB) for number in range(8)}

    class Looking(PosixFile):
        looks = 0

        def read(self, offset: int, length: int, /) -> bytes:
            Looking.looks += offset == BLOCK
            if Looking.looks == 2 and offset == BLOCK:  # the volumes were counted
                for name, data in model.items():
                    writer.put(name, [data])
                writer.flush()
            return super().read(offset, length)

    reader = Container.open(image, opener=Looking)
    writer.close()
    assert packs(reader) == model
    assert reader.warnings == []
    reader.close()


def test_threads_may_read_while_one_of_them_goes_on(image: Path) -> None:
    """Whatever a thread is given is of one of the states, or it is told that there is none."""
    writer = Container.open(image, writable=True, machine=replace(HERE, local=True))
    reader = Container.open(image, machine=HERE)
    model: dict[str, bytes] = {}
    ended = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        rng = random.Random(4)
        while not ended.is_set():
            for info in reader.list("pack/"):
                try:
                    reader.get(info.name)
                    reader.size(info.name)
                    reader.check(info.name)
                except FerrotypeError as error:
                    if not isinstance(error, ObjectMissing) and "damaged" not in str(error):
                        wrong.append(error)
                except BaseException as error:  # noqa: BLE001
                    wrong.append(error)
            if rng.random() < 0.5:
                reader.refresh()

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    rng = random.Random(5)
    for _ in range(25):
        for name in [name for name in model if rng.random() < 0.5]:
            writer.delete(name)
            del model[name]
        for _ in range(5):
            name = f"pack/{rng.randbytes(8).hex()}"
            model[name] = rng.randbytes(rng.randrange(20_000))
            writer.put(name, [model[name]])
        writer.flush() if rng.random() < 0.7 else writer.compact(lambda _: None)
    writer.flush()
    ended.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    reader.refresh()
    assert packs(reader) == model
    writer.close()
    reader.close()


def test_a_killed_writer_whose_parent_has_not_asked_for_it_holds_nothing() -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        assert THIS_MACHINE.started(child) is not None
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # from now on a zombie
        assert THIS_MACHINE.started(child) is None
    finally:
        os.waitpid(child, 0)


def test_of_many_first_backups_into_one_new_image_one_wins(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(os.urandom(512 * KiB))
    for image in (tmp_path / "a.ferro", tmp_path / "b.ferro"):
        command = [sys.executable, "-m", "ferrotype", "backup", "--progress", "none", str(disk), str(image)]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": environment()}
        runs = [subprocess.Popen(command, **quiet) for _ in range(10)]
        said = [run.communicate()[1].decode() for run in runs]
        codes = [run.returncode for run in runs]
        assert 0 in codes, (codes, said)
        assert set(codes) <= {0, 7}, (codes, said)  # who comes when another is done makes the second snapshot
        made = ferrotype("list", image, "--json").document["snapshots"]
        assert len(made) == codes.count(0)
        ferrotype("verify", "--deep", image)
