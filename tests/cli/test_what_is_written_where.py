"""Outputs: where none is made, which image is new, who may read them, and what others in the folder cannot do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ferrotype as library
from ferrotype.block.file import FileSink
from ferrotype.block.outputs import Outputs
from ferrotype.cli.progress import CliJob, Silent, stopping
from ferrotype.errors import Refused, WriteError
from ferrotype.fresh import among_devices, true_name
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.objects.holder import lock_path
from ferrotype.units import KiB, MiB
from tests.cli.program import environment, ferrotype, started
from tests.machine import loop, run

NOBODY = 65534
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can play another user")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "raw.img"
    path.write_bytes(os.urandom(MiB))
    return path


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder like /tmp: everybody may write there."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------- devices that are not there


@root
@pytest.mark.parametrize(
    "words",
    [
        ("restore", "IMAGE", "AT"),
        ("restore", "IMAGE", "AT.qcow2"),
        ("restore", "--dry-run", "IMAGE", "AT"),
        ("convert", "IMAGE", "AT.img"),
        ("convert", "-O", "raw", "-o", "split=1MiB", "IMAGE", "AT"),
        ("convert", "IMAGE", "AT.ferro"),
        ("backup", "RAW", "AT"),
        ("backup", "--dry-run", "RAW", "AT"),
        ("copy", "IMAGE", "AT"),
        ("salvage", "IMAGE", "AT"),
    ],
    ids=" ".join,
)
def test_no_file_is_made_where_a_device_is_missing(words: tuple[str, ...], raw: Path, tmp_path: Path) -> None:
    image, link = tmp_path / "a.ferro", tmp_path / "stick"
    ferrotype("backup", raw, image)
    name = f"ferrotype-test-{os.getpid()}"
    before = names(Path("/dev"))
    for at in (f"/dev/{name}", f"/dev/shm/../{name}", str(link)):
        link.unlink(missing_ok=True)
        link.symlink_to(f"/dev/{name}")
        if at == str(link) and any("AT." in word for word in words):
            continue
        said = [word.replace("IMAGE", str(image)).replace("RAW", str(raw)).replace("AT", at) for word in words]
        error = ferrotype(*said, code=3).err
        assert "does not exist" in error
        assert "the disks that are there: " in error
    assert names(Path("/dev")) == before


@root
def test_files_stand_in_memory_where_that_is_meant(tmp_path: Path) -> None:
    elsewhere = tmp_path / "dev"
    elsewhere.mkdir()
    run("mount", "-t", "devtmpfs", "none", elsewhere)
    try:
        assert among_devices(elsewhere / "sdz")
        with pytest.raises(Refused):
            FileSink.create(elsewhere / "sdz", 512)
    finally:
        run("umount", elsewhere)
    assert not among_devices("/dev/shm/disk.img")
    assert not among_devices(tmp_path / "disk.img")


# ---------------------------------------------------------------------- sectors


def test_the_sector_size_that_was_said_is_kept_and_given_back(tmp_path: Path) -> None:
    disk, image = tmp_path / "d.img", tmp_path / "a.ferro"
    disk.write_bytes(bytes(16 * MiB))
    with loop(disk, sector_size=4096) as device:
        run("sfdisk", "-q", device, text_in="label: dos\nstart=256, size=1024\nstart=2048, size=1024, type=7\n")
        table = json.loads(run("sfdisk", "-J", device))["partitiontable"]
    with disk.open("r+b") as file:
        for part in table["partitions"]:
            file.seek(part["start"] * 4096)
            file.write(os.urandom(MiB))
    starts = [part["start"] * 4096 for part in table["partitions"]]
    ferrotype("backup", "--sector-size", "4096", disk, image)
    assert ferrotype("list", "--json", image).document["snapshots"][0]["disks"][0]["sector_size"] == 4096
    found = ferrotype("info", "--json", image).document
    assert [volume["start"] for volume in found["volumes"]] == starts
    snapshot = library.backup(disk, tmp_path / "b.ferro", sector_size=4096)
    assert [volume["start"] for volume in snapshot.disks[0].volumes] == starts
    ferrotype("convert", "--sector-size", "4096", disk, tmp_path / "c.ferro")
    assert library.list_snapshots(tmp_path / "c.ferro")[0].disks[0].sector_size == 4096
    run("qemu-img", "convert", "-O", "qcow2", disk, tmp_path / "d.qcow2")
    snapshot = library.backup(tmp_path / "d.qcow2", tmp_path / "b.ferro", sector_size=4096)
    assert snapshot.disks[0].sector_size == 4096
    target = tmp_path / "t.img"
    target.write_bytes(bytes(16 * MiB))
    with loop(target, sector_size=4096) as device:
        ferrotype("restore", "--force", image, device)
        again = json.loads(run("sfdisk", "-J", device))["partitiontable"]["partitions"]
    assert [part["start"] for part in again] == [part["start"] for part in table["partitions"]]
    with loop(target) as device:
        ferrotype("restore", "--force", image, device, code=3)


# ---------------------------------------------------------------------- new images


def test_a_new_image_is_said_to_be_new(raw: Path, tmp_path: Path, password: Path) -> None:
    image = tmp_path / "a.ferro"
    first = ferrotype("backup", "--dry-run", "--json", raw, image).document
    assert first["new_image"] is True
    first = ferrotype("backup", "--json", raw, image).document
    mount = json.loads(run("findmnt", "-J", "-T", tmp_path, "-o", "SOURCE,FSTYPE,TARGET"))["filesystems"][0]
    assert (first["new_image"], first["encrypted"]) == (True, False)
    assert (first["image_on"]["type"], first["image_on"]["mounted_at"]) == (mount["fstype"], mount["target"])
    assert ferrotype("backup", "--json", "--existing", raw, image).document["new_image"] is False
    done = ferrotype("backup", "--password-file", password, raw, tmp_path / "b.ferro")
    assert f"b.ferro is a new image, encrypted, on {first['image_on']['source']} (" in done.err
    done = ferrotype("copy", image, tmp_path / "c.ferro")
    assert "c.ferro is a new image, not encrypted, on " in done.err
    assert ferrotype("copy", "--json", image, tmp_path / "c.ferro").document["new_image"] is False
    job = NullJob()
    library.backup(raw, tmp_path / "d.ferro", job=job)
    assert any("d.ferro is a new image" in note for note in job.notes)


def test_where_an_existing_image_is_wanted_none_is_made(raw: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.ferro"
    ferrotype("backup", raw, image)
    before = names(tmp_path)
    for target in (tmp_path / "b.ferro", tmp_path / "not-mounted" / "b.ferro"):
        for words in (("backup", "--existing", raw, target), ("copy", "--existing", image, target)):
            assert "is its disk mounted?" in ferrotype(*words, code=3).err
        with pytest.raises(Refused, match="does not exist"):
            library.backup(raw, target, existing=True)
        with pytest.raises(Refused, match="does not exist"):
            library.copy(image, target, existing=True)
    assert names(tmp_path) == before


# ---------------------------------------------------------------------- folders that others may write to


@root
def test_what_others_planted_is_neither_followed_nor_adopted(raw: Path, tmp_path: Path, shared: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (shared / ".a.ferro.new").symlink_to(victim)
    os.lchown(shared / ".a.ferro.new", NOBODY, NOBODY)
    ferrotype("backup", raw, shared / "a.ferro")
    assert victim.read_bytes() == b"precious"
    planted = shared / ".b.ferro.new"
    planted.touch()
    planted.chmod(0o666)
    os.chown(planted, NOBODY, NOBODY)
    ferrotype("backup", raw, shared / "b.ferro")
    status = (shared / "b.ferro").stat()
    assert (status.st_uid, status.st_mode & 0o777) == (0, 0o600)


@root
def test_a_link_is_followed_only_where_it_is_the_users_own(raw: Path, tmp_path: Path, shared: Path) -> None:
    image, victim = tmp_path / "a.ferro", tmp_path / "victim"
    ferrotype("backup", raw, image)
    victim.write_bytes(b"precious")
    for at, words in (
        ("x.img", ("restore", "--force", image)),
        ("x.qcow2", ("convert", "--force", image)),
        ("x.ferro", ("convert", "--force", image)),
        ("y.ferro", ("backup", raw)),
        ("z.ferro", ("copy", image)),
    ):
        (shared / at).symlink_to(image if at[0] in "yz" else victim)
        os.lchown(shared / at, NOBODY, NOBODY)
        assert "symbolic link of another user" in ferrotype(*words, shared / at, code=3).err
    assert victim.read_bytes() == b"precious"
    assert len(library.list_snapshots(image)) == 1
    (shared / "own.img").symlink_to(victim)
    ferrotype("restore", "--force", image, shared / "own.img")
    assert victim.read_bytes() == raw.read_bytes()
    assert (shared / "own.img").is_symlink()
    (shared / "folder").symlink_to(tmp_path)
    os.lchown(shared / "folder", NOBODY, NOBODY)
    with pytest.raises(Refused):
        true_name(shared / "folder" / "new.img")
    shared.chmod(0o755)
    assert true_name(shared / "folder" / "new.img") == tmp_path / "new.img"


@pytest.mark.parametrize("instead", ["nothing", "a file", "a link"])
def test_a_new_file_that_was_swapped_meanwhile_gets_no_name(tmp_path: Path, instead: str) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    with FileSink.create(tmp_path / "x.img", 4096) as sink:
        sink.write(0, memoryview(b"x" * 4096))
        (hidden,) = tmp_path.glob(".x.img.*")
        hidden.unlink()
        if instead == "a file":
            hidden.write_bytes(b"false")
        elif instead == "a link":
            hidden.symlink_to(victim)
        with pytest.raises(WriteError, match="deleted or replaced"):
            sink.commit()
    assert not (tmp_path / "x.img").exists()
    assert victim.read_bytes() == b"precious"
    assert (hidden.exists() or hidden.is_symlink()) == (instead != "nothing")  # it is not ours


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_nobody_reads_in_a_new_file_what_was_kept_from_them(raw: Path, tmp_path: Path, password: Path) -> None:
    image, locked = tmp_path / "a.ferro", tmp_path / "b.ferro"
    ferrotype("backup", raw, image)
    ferrotype("backup", "--password-file", password, raw, locked)
    locked.chmod(0o644)
    secret = ("--password-file", password)
    before = os.umask(0o022)
    try:
        for number, (source_mode, expected) in enumerate(((0o600, 0o600), (0o644, 0o644), (0o640, 0o640))):
            image.chmod(source_mode)
            raw.chmod(source_mode)
            at = tmp_path / f"{number}"
            at.mkdir()
            ferrotype("restore", image, at / "r.img")
            ferrotype("restore", image, at / "r.qcow2")
            ferrotype("convert", raw, at / "c.vmdk")
            library.restore(image, at / "p.img")
            assert [mode(path) for path in sorted(at.iterdir())] == [expected] * 4
        ferrotype("restore", *secret, locked, tmp_path / "r.img")
        ferrotype("convert", *secret, locked, tmp_path / "r.qcow2")
        assert (mode(tmp_path / "r.img"), mode(tmp_path / "r.qcow2")) == (0o600, 0o600)
    finally:
        os.umask(before)


@root
def test_the_lock_file_tells_no_more_than_the_image(tmp_path: Path) -> None:
    path = tmp_path / "a.ferro"
    store = Container.create(path)
    assert mode(lock_path(path)) == 0o600
    store.put("config", [b"x"])
    store.flush()
    store.close()
    for bits in (0o600, 0o640, 0o666):
        path.chmod(bits)
        os.chown(path, NOBODY, NOBODY)
        store = Container.open(path, writable=True)
        status = lock_path(path).stat()
        assert (status.st_uid, status.st_gid, mode(lock_path(path))) == (NOBODY, NOBODY, bits)
        store.close()


def test_salvage_that_fails_removes_its_own_files_and_no_others(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, other = tmp_path / "a.ferro", tmp_path / "out.ferro.001"
    ferrotype("backup", raw, image)
    other.write_bytes(b"precious")

    def fail(*given: Any) -> None:
        given[2].store.flush()
        raise WriteError("on purpose")

    monkeypatch.setattr("ferrotype.engine.salvage._keep", fail)
    with pytest.raises(WriteError):
        library.salvage(image, tmp_path / "out.ferro")
    assert other.read_bytes() == b"precious"
    assert names(tmp_path) == ["a.ferro", "out.ferro.001", "raw.img"]


# ---------------------------------------------------------------------- stopped, killed


def test_a_closed_terminal_stops_like_ctrl_c() -> None:
    job = CliJob(Silent(), lambda _: None)
    before = signal.getsignal(signal.SIGHUP)
    with stopping(job):
        signal.raise_signal(signal.SIGHUP)
        assert job.stop
        signal.raise_signal(signal.SIGHUP)  # the shell sends one as well
    assert signal.getsignal(signal.SIGHUP) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping(job):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_restore_whose_terminal_is_closed_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source.img"
    source.write_bytes(os.urandom(MiB) * 96)
    ferrotype("backup", source, tmp_path / "a.ferro")
    source.unlink()
    with started("restore", tmp_path / "a.ferro", tmp_path / "out.img", "--progress", "json") as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(signal.SIGHUP)
        code = process.wait(120)
    assert (code, names(tmp_path)) in [(130, ["a.ferro"]), (0, ["a.ferro", "out.img"])]


KILLED = """
import os, pathlib, signal, sys
from ferrotype.block.outputs import Outputs
from ferrotype.objects.container import Container
folder = pathlib.Path(sys.argv[1])
outputs = Outputs(folder / "disk.raw")
for number in range(1, 50):
    outputs.done(outputs.create(folder / f"disk.raw.{number:03}", 4096))
store = Container.create(folder / "a.ferro")
print("made", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def making(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is making a disk in parts, and an image."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        try:
            yield process
        finally:
            process.kill()


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    with making(tmp_path) as process:
        made = [name for name in names(tmp_path) if name.startswith(".disk.raw.")]
        assert len(made) == 49
        foreign = tmp_path / f".disk.raw.001.{'0' * 16}.part.mine"
        foreign.write_bytes(b"somebody's")
        with Outputs(tmp_path / "disk.raw") as outputs:  # while the other one runs, nothing of it is touched
            outputs.create(tmp_path / "disk.raw.001", 4096)
        assert [name for name in names(tmp_path) if name in made] == made
        process.send_signal(signal.SIGKILL)
        process.wait()
    with Outputs(tmp_path / "disk.raw") as outputs:
        outputs.create(tmp_path / "disk.raw.001", 4096)
        outputs.commit()
    store = Container.create(tmp_path / "a.ferro")
    store.put("config", [b"x"])
    store.flush()
    store.close()
    assert names(tmp_path) == [foreign.name, "a.ferro", "disk.raw.001"]


@root
def test_files_of_others_are_no_leftovers(tmp_path: Path) -> None:
    left = tmp_path / f".x.img.{'1' * 16}.part"
    left.touch()
    os.chown(left, NOBODY, NOBODY)
    linked = tmp_path / f".x.img.{'2' * 16}.part"
    linked.touch()
    os.link(linked, tmp_path / "kept")
    own = tmp_path / f".x.img.{'3' * 16}.part"
    own.touch()
    FileSink.create(tmp_path / "x.img", 512).close()
    assert names(tmp_path) == [left.name, linked.name, "kept"]


# ---------------------------------------------------------------------- an image that goes meanwhile


class Doing(NullJob):
    """Does something once, in the middle of a phase."""

    def __init__(self, phase: str, act: object) -> None:
        super().__init__()
        self.phase, self.act, self.now = phase, act, False

    def begin(self, phase: str, total: int | None = None, /) -> None:
        self.now = phase.startswith(self.phase)
        super().begin(phase, total)

    def advance(self, count: int, /) -> None:
        super().advance(count)
        if self.now and self.act is not None:
            act, self.act = self.act, None
            act()  # type: ignore[operator]


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_backup_into_an_image_that_is_gone_fails(raw: Path, tmp_path: Path, how: str) -> None:
    image, other = tmp_path / "a.ferro", tmp_path / "other"
    library.backup(raw, image)
    other.write_bytes(image.read_bytes())
    raw.write_bytes(os.urandom(MiB))

    def act() -> None:
        if how == "deleted":
            image.unlink()
        elif how == "moved":
            image.rename(tmp_path / "moved")
        else:
            other.rename(image)

    with pytest.raises(WriteError, match="deleted, moved or replaced"):
        library.backup(raw, image, job=Doing("backing up", act))


def test_whatever_is_committed_is_in_the_image_of_that_name(raw: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.ferro"
    store = Container.create(image, split=64 * MiB)
    for name in "abc":
        store.put(name, [os.urandom(40 * MiB if name != "c" else 4 * KiB)])
        store.flush()
    (tmp_path / "a.ferro.001").rename(tmp_path / "away")
    store.put("d", [b"x"])
    with pytest.raises(WriteError, match=r"a\.ferro\.001 was deleted"):
        store.flush()
    (tmp_path / "away").rename(tmp_path / "a.ferro.001")
    store.flush()
    image.unlink()
    store.delete("d")
    with pytest.raises(WriteError, match="was deleted"):  # as forget and prune do
        store.flush()
    store.close()


@pytest.mark.parametrize("out", ["x.img", "x.qcow2"])
def test_an_output_whose_hidden_file_is_gone_fails(raw: Path, tmp_path: Path, out: str) -> None:
    image, folder = tmp_path / "a.ferro", tmp_path / "out"
    library.backup(raw, image)
    folder.mkdir()

    def act() -> None:
        for path in folder.iterdir():
            path.unlink()

    with pytest.raises(WriteError, match="deleted or replaced"):
        library.convert(image, folder / out, job=Doing("", act))
    assert names(folder) == []
    if out == "x.img":
        with pytest.raises(WriteError, match="deleted or replaced"):
            library.restore(image, folder / out, job=Doing("restoring", act))
