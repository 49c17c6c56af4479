"""The target is full, over quota, read-only, too small for a file, failing, slow or silent: what happens then.

``FERROTYPE_ROOM=4096 pytest tests/engine/test_target_trouble.py`` fills the disk at every block.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ferrotype.block.file import FileSink
from ferrotype.engine.opening import open_container
from ferrotype.engine.space import stored_bytes
from ferrotype.errors import DeviceError, WriteError
from ferrotype.job import NullJob
from ferrotype.objects import Bytes
from ferrotype.objects import container as container_module
from ferrotype.objects.volumes import PatientOpener, PosixFile
from ferrotype.stall import Beat, Patience
from ferrotype.trouble import why
from ferrotype.units import KiB, MiB
from tests.cli.program import attempt, ferrotype, started
from tests.engine.images import is_sound, opened, save
from tests.faults.promises import Told, check
from tests.faults.scenarios import SCENARIOS, Scenario, Stage
from tests.repository.small import SECRET
from tests.troubled import Trouble, troubled

STEP = int(os.environ.get("FERROTYPE_ROOM", "20000"))  # bytes of room between two tries
SEED = 5


# ---------------------------------------------------------------------- full, at every point


class Room:
    """A folder in which files may take up so many bytes of storage together."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder = folder
        self.size = size
        self.refused = 0

    def left(self) -> int:
        return self.size - sum(file.stat().st_blocks * 512 for file in self._folder.iterdir())

    def opener(self, path: Path, /, *, writable: bool, create: bool = False) -> PosixFile:
        return Cramped(self, path, writable=writable, create=create)


class Cramped(PosixFile):
    """A file that a write fills up as far as there is room."""

    def __init__(self, room: Room, path: Path, *, writable: bool, create: bool) -> None:
        self._room = room
        super().__init__(path, writable=writable, create=create)

    def _write(self, offset: int, parts: Sequence[Bytes], beat: Beat) -> None:
        data = b"".join(parts)
        new = max(0, offset + len(data) - self.size())
        fits = len(data) - max(0, new - max(0, self._room.left()) // 4096 * 4096)
        super()._write(offset, [data[: max(0, fits)]], beat)
        if fits < len(data):
            self._room.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        pass


def _fill(scenario: Scenario, folder: Path, *, encrypted: bool) -> tuple[int, int]:
    """Live a life with less and less room, and check each time; how often it was tried, and how often refused."""
    secret = SECRET if encrypted else None
    tries = refused = missing = 0
    while True:
        place = folder / f"{missing}"
        place.mkdir()
        room = Room(place, 1 << 40)
        told = Told(lambda: 0)
        stage = Stage(place, secret, room.opener, told, scenario.split)
        scenario.before(stage)
        start = room.size - room.left()
        if tries == 0:  # how much room a life takes that has enough
            scenario.life(stage)
            missing, tries = max(STEP, room.size - room.left() - start + 8 * KiB), 1
            shutil.rmtree(place)
            continue
        room.size = start + missing - STEP
        try:
            scenario.life(stage)
        except WriteError as error:
            refused += "no space left" in str(error)
        if stage.repository is not None:
            stage.repository.close()
        try:
            if (place / "laptop.ferro").exists():
                check(place / "laptop.ferro", secret, told.until(0), thorough=False)
            else:
                assert not told.until(0).created
            names = {path.name for path in place.iterdir()}
            assert not [name for name in names if name.endswith((".new", ".lock"))], names
        except BaseException as error:
            error.add_note(f"{scenario} with room for {missing - STEP} more bytes")
            raise
        shutil.rmtree(place)
        tries, missing = tries + 1, missing - STEP
        if missing < STEP:
            return tries, refused


@pytest.mark.parametrize(
    "name", ["first-backup", "increment", "compact-front", "compact-scattered", "roll-over", "key-add"]
)
def test_the_disk_is_full_at_any_point(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is told, everything committed is whole, and with room again the next backup uses what was stored."""
    monkeypatch.setattr(container_module, "_LEAST_SPLIT", 4 * KiB)
    (scenario,) = [s for s in SCENARIOS if s.name == name]
    _, refused = _fill(scenario, tmp_path, encrypted=scenario.encrypted_only)
    assert refused


# ---------------------------------------------------------------------- through the kernel, by the program


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    path = tmp_path / "noise.img"
    path.write_bytes(random.Random(SEED).randbytes(4 * MiB))
    return path


def _with_image(disk: Trouble, folder: Path) -> tuple[Path, Path]:
    """An image with one snapshot, by its path on the mount and behind it."""
    first = folder / "first.img"
    first.write_bytes(random.Random(SEED + 1).randbytes(2 * MiB))
    save(disk.backing / "a.ferro", first)
    return disk.path / "a.ferro", disk.backing / "a.ferro"


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ({"space": 4 * MiB}, "there is no space left: .* are free and .* more are needed.*`ferrotype prune`"),
        ({"quota": 4 * MiB}, "the disk quota is used up"),
        ({"largest": 3 * MiB}, "takes no file of .* make a new image with --split 64MiB"),
        ({"read_only": True}, "read-only"),
        ({"broken": True}, "may be failing, or was pulled out"),
    ],
    ids=["full", "quota", "largest", "read-only", "pulled out"],
)
def test_a_backup_to_a_target_in_trouble(tmp_path: Path, noise: Path, trouble: dict[str, int], words: str) -> None:
    with troubled(tmp_path) as disk:
        image, left = _with_image(disk, tmp_path)
        disk.behave(**trouble)
        done = attempt("backup", noise, image, "-q")
        assert done.code == 6, done
        assert str(image) in done.err
        assert _matches(words, done.err), done.err
        is_sound(left)
        disk.behave()
        assert save(image, noise).statistics.new_bytes <= 4 * MiB
        is_sound(left)


def _matches(words: str, text: str) -> bool:
    import re

    return re.search(words, text) is not None


def test_a_stick_that_is_pulled_out_while_it_is_written(tmp_path: Path, noise: Path) -> None:
    """From the nth operation on nothing works any more."""
    with troubled(tmp_path) as disk:
        image, left = _with_image(disk, tmp_path)
        for number in (4, 12):
            disk.behave(cut_at=number)  # nothing is lost, but no operation works any more
            done = attempt("backup", noise, image, "-q")
            assert done.code in (0, 6), done
            assert done.code == 0 or "it may be failing, or was pulled out" in done.err
            disk.behave()
            is_sound(left)
            with opened(left) as repository:
                assert len(repository.snapshots()) >= 1


def test_files_may_not_grow_beyond_a_limit(tmp_path: Path, noise: Path) -> None:
    """ulimit -f: an error, not the end of the process by SIGXFSZ."""
    image = tmp_path / "a.ferro"
    words = ["backup", str(noise), str(image), "-q"]
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 1024; exec "$@"', "-", *_program(), *words],
        capture_output=True,
        text=True,
        check=False,
        env=_environment(),
    )
    assert limited.returncode == 6, limited
    assert "this process may write files of 1 MiB only (ulimit -f)" in limited.stderr
    assert "--split" in limited.stderr
    is_sound(image)


def _program() -> Sequence[str]:
    from tests.cli.program import PROGRAM

    return PROGRAM


def _environment() -> dict[str, str]:
    from tests.cli.program import environment

    return environment()


# ---------------------------------------------------------------------- no answer


@pytest.mark.parametrize("operation", ["write", "fsync", "getattr"])
def test_the_program_ends_though_the_storage_does_not_answer(tmp_path: Path, noise: Path, operation: str) -> None:
    with troubled(tmp_path) as disk:
        image, left = _with_image(disk, tmp_path)
        (tmp_path / "link").symlink_to(disk.path)
        image = tmp_path / "link" / image.name
        disk.behave(stall=(operation,), after=3)
        done = attempt("backup", noise, image, "-q", "--stall-limit", "1")
        assert done.code == 6, done
        assert f"{image}: the storage " in done.err
        assert "the image is consistent, start again when the storage is back" in done.err
        is_sound(left)
        assert disk.stalled() > 0
        disk.behave()
        is_sound(left)


def test_ctrl_c_while_the_storage_does_not_answer(tmp_path: Path, noise: Path) -> None:
    with troubled(tmp_path) as disk:
        image, left = _with_image(disk, tmp_path)
        disk.behave(stall=("write",), after=3)
        with started("backup", noise, image, "--stall-limit", "0") as process:
            while not disk.stalled():
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        is_sound(left)


def test_slow_is_not_stalled(tmp_path: Path, noise: Path) -> None:
    """Every single operation takes a tenth of the limit, and all together a multiple of it."""
    with troubled(tmp_path) as disk:
        image, left = _with_image(disk, tmp_path)
        disk.behave(slow=0.04)
        patience = Patience(2.0)
        file = PosixFile(image.with_name("b"), writable=True, create=True, patience=patience)
        data = random.Random(1).randbytes(8 * MiB)
        file.write(0, [data[:MiB], data[MiB:]])  # 64 requests
        file.sync()
        file.publish(image.with_name("b"))
        file.close()
        disk.behave()
        assert (disk.backing / "b").read_bytes() == data
        is_sound(left)


STALLS: dict[str, Callable[[PosixFile], object]] = {
    "write": lambda file: file.write(0, [b"x"]),
    "fsync": lambda file: file.sync(),
    "read": lambda file: file.read(0, 1 << 20),
    "truncate": lambda file: file.truncate(0),
    "fallocate": lambda file: file.punch(0, 8192),
    "rename": lambda file: file.publish(file.path),
    "getattr": lambda file: file.size(),
}


def test_no_operation_on_an_image_waits_for_ever(tmp_path: Path) -> None:
    """The first one fails after the limit, all others at once, and closing waits for nothing."""
    threads = set(threading.enumerate())
    with troubled(tmp_path) as disk:
        for name, operation in STALLS.items():
            patience = Patience(0.3)
            path = disk.path / name
            file = PosixFile(path, writable=True, create=True, patience=patience)
            file.write(0, [bytes(1 << 20)])
            disk.behave(stall=(name,))
            with pytest.raises(DeviceError, match=r"the storage has not answered for 0\.3 s; the image is consist"):
                operation(file)
            assert disk.stalled() == 1
            for other in STALLS.values():
                with pytest.raises(DeviceError, match="does not answer"):
                    other(file)
            file.close()
            disk.behave()
        disk.behave(stall=("open",))
        with pytest.raises(DeviceError, match="has not answered"):
            PatientOpener(Patience(0.3))(disk.path / "rename", writable=True)
        disk.behave()
    _all_end(threads)


def test_a_user_who_stops_is_not_kept_waiting(tmp_path: Path) -> None:
    threads = set(threading.enumerate())

    class Stopped(Exception):
        pass

    def stop(_path: Path, _seconds: float) -> None:
        raise Stopped

    with troubled(tmp_path) as disk:
        sink = FileSink.create(disk.path / "out.img", MiB, patience=Patience(0, stop))
        disk.behave(stall=("write",))
        with pytest.raises(Stopped):
            sink.write(0, memoryview(bytes(4096)))
        with pytest.raises(WriteError, match="does not answer; the restore is not complete"):
            sink.flush()
        sink.close()
    _all_end(threads)


def _all_end(before: set[threading.Thread]) -> None:
    """The threads that are newer go once their calls have returned."""
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive()


# ---------------------------------------------------------------------- what is not stored


def test_a_sync_that_failed_once_is_never_believed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of lost pages once, and of a later sync says that it went well."""
    file = PosixFile(tmp_path / "a", writable=True, create=True)
    file.write(0, [bytes(4096)])

    def fails(_: int) -> None:
        raise OSError(errno.EIO, "lost")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fails)
        with pytest.raises(WriteError, match="could not be stored"):
            file.sync()
    with pytest.raises(WriteError, match="earlier writes could not be stored: the device reports an error"):
        file.sync()
    file.close()


@pytest.mark.parametrize(
    "code",
    [
        getattr(errno, name)
        for name in (
            "ENOSPC",
            "EDQUOT",
            "EFBIG",
            "EROFS",
            "EIO",
            "ENODEV",
            "ENXIO",
            "ESTALE",
            "EHOSTDOWN",
            "ETIMEDOUT",
        )
    ],
    ids=lambda code: errno.errorcode[code],
)
def test_every_trouble_has_words_of_its_own(code: int) -> None:
    sentence = why(OSError(code, os.strerror(code)))
    assert sentence != os.strerror(code)
    assert ";" in sentence  # what, and what to do


# ---------------------------------------------------------------------- room, asked for beforehand


def test_a_restore_that_does_not_fit_makes_nothing(tmp_path: Path) -> None:
    """Zeros need no room; what does is known to the byte."""
    source = tmp_path / "disk.img"
    content = random.Random(3).randbytes(2 * MiB) + bytes(6 * MiB) + random.Random(4).randbytes(MiB)
    source.write_bytes(content)
    image = tmp_path / "a.ferro"
    save(image, source)
    with troubled(tmp_path, space=3 * MiB - 4096) as disk:
        done = attempt("restore", image, disk.path / "out.img", "-q")
        assert done.code == 6, done
        assert f"3 MiB ({3 * MiB} bytes) are needed and 3 MiB ({3 * MiB - 4096} bytes) are free" in done.err
        assert "nothing was written" in done.err
        assert list(disk.backing.iterdir()) == []
        disk.behave(space=3 * MiB)
        ferrotype("restore", image, disk.path / "out.img", "-q")
        assert (disk.backing / "out.img").read_bytes() == content
        (disk.backing / "out.img").unlink()
        disk.behave(largest=8 * MiB)
        done = attempt("restore", image, disk.path / "out.img", "-q")
        assert done.code == 6, done
        assert "takes no file of 9 MiB" in done.err
        assert list(disk.backing.iterdir()) == []


def test_what_is_needed_of_a_part_is_exact(tmp_path: Path) -> None:
    from ferrotype.engine.restore import Part

    content = random.Random(3).randbytes(5 * 64 * KiB) + bytes(3 * 64 * KiB) + b"x" * 1000
    (tmp_path / "disk.img").write_bytes(content)
    save(tmp_path / "a.ferro", tmp_path / "disk.img")
    with opened(tmp_path / "a.ferro") as repository:
        disk = repository.snapshot().disk()
        assert stored_bytes(Part(repository, disk, 0, disk.size)) == 5 * 64 * KiB + 1000
        assert stored_bytes(Part(repository, disk, 1000, 64 * KiB)) == 64 * KiB
        assert stored_bytes(Part(repository, disk, 6 * 64 * KiB, 1000)) == 0


def test_a_backup_says_beforehand_that_it_may_not_fit(tmp_path: Path, noise: Path) -> None:
    with troubled(tmp_path) as disk:
        image, _ = _with_image(disk, tmp_path)
        disk.behave(space=4 * MiB)
        planned = ferrotype("backup", noise, image, "--dry-run", "--json", code=8).document
        assert planned["free_on_target_bytes"] < 2 * MiB
        assert "would grow by about 4 MiB" in planned["warnings"][0]
        done = attempt("backup", noise, image)
        assert done.code == 6
        assert "will grow by about 4 MiB" in done.err
        disk.behave(space=64 * MiB)
        planned = ferrotype("backup", noise, image, "--dry-run", "--json").document
        assert planned["free_on_target_bytes"] > 50 * MiB
        done = ferrotype("backup", noise, image, "--json")
        assert done.document["free_on_target_bytes"] > 50 * MiB


def test_prune_and_compact_do_what_there_is_room_for(tmp_path: Path) -> None:
    """Dead packs go without room; rewriting is refused beforehand, and done once there is some."""
    from ferrotype.engine.forget import forget
    from ferrotype.engine.prune import prune

    rng = random.Random(9)
    shared, dead, other = (rng.randbytes(size * MiB) for size in (2, 5, 1))
    source = tmp_path / "disk.img"
    with troubled(tmp_path) as disk:
        image, left = disk.path / "a.ferro", disk.backing / "a.ferro"
        mixed = b"".join(
            shared[at : at + 65536] + other[at // 2 : at // 2 + 65536] for at in range(0, 2 * MiB, 65536)
        )
        source.write_bytes(mixed + dead)
        save(left, source)
        source.write_bytes(shared)
        save(left, source)
        with opened(left, writable=True) as repository:
            forget(repository, repository.snapshots()[:1])
        before = left.stat().st_blocks * 512
        disk.behave(space=before + 512 * KiB)
        job = NullJob()
        with opened(image, writable=True) as repository:
            result = prune(repository, job)
        assert result.deleted_packs
        assert result.freed_bytes >= 3 * MiB
        is_sound(left)
        disk.behave(space=left.stat().st_blocks * 512 + 4096)
        container = open_container(left)
        holes = container.hole_size
        container.close()
        assert holes > MiB
        done = attempt("compact", image, "-q")
        assert done.code == 6, done
        assert "needs" in done.err
        assert "nothing was changed" in done.err
        disk.behave()
        ferrotype("compact", image, "-q")
        is_sound(left)
        assert left.stat().st_size < 5 * MiB


def test_compacting_needs_no_more_room_than_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was moved gives its old place back at once."""
    from ferrotype.objects import compaction
    from ferrotype.objects.container import Container

    monkeypatch.setattr(compaction, "BATCH", 64 * KiB)
    path = tmp_path / "a.ferro"
    container = Container.create(path)
    rng = random.Random(1)
    for number in range(64):
        container.put(f"spare/{number:02}", [rng.randbytes(32_000)])
    container.flush()
    for number in range(32):
        container.delete(f"spare/{number:02}")
    container.reclaim()
    if path.stat().st_blocks * 512 > 40 * 32 * KiB:
        pytest.skip("no holes here")
    most = 0

    def look(_: int) -> None:
        nonlocal most
        most = max(most, path.stat().st_blocks * 512)

    before = path.stat().st_blocks * 512
    container.compact(look)
    container.close()
    assert most < before + 4 * 64 * KiB
    with contextlib.closing(Container.open(path)) as again:
        assert len(list(again.list("spare/"))) == 32
