"""Disks that are in somebody's hands: read with a warning, never written to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import ferrotype as api
from ferrotype import linux
from ferrotype.block import holders
from ferrotype.block.file import FileSource
from ferrotype.block.inventory import writers_of
from ferrotype.job import NullJob
from ferrotype.units import MiB
from tests.cli.program import PROGRAM, environment, ferrotype
from tests.machine import loop, mounted, need, run
from tests.volumes.disks import blank


@contextmanager
def held_by_qemu(image: Path, *, read_only: bool = False) -> Iterator[None]:
    """The image in the hands of QEMU's block layer, as a virtual machine's is."""
    need("qemu-nbd")
    socket = image.with_suffix(".sock")
    words = ["qemu-nbd", "-t", "-k", str(socket), "-f", "raw", *(["-r"] if read_only else []), str(image)]
    with subprocess.Popen(words) as process:
        try:
            until = time.monotonic() + 30
            while not socket.exists():
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.02)
            yield
        finally:
            process.terminate()


@contextmanager
def open_in_a_program(path: Path, mode: str) -> Iterator[int]:
    code = f"import sys; f = open({str(path)!r}, {mode!r}); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        yield process.pid
        process.stdin.close()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MiB))
    return path


@pytest.fixture
def image(disk: Path, tmp_path: Path) -> Path:
    api.backup(disk, tmp_path / "disk.ferro")
    return tmp_path / "disk.ferro"


def test_the_disk_of_a_running_machine_is_read_with_a_warning(disk: Path, tmp_path: Path) -> None:
    with held_by_qemu(disk):
        done = ferrotype("backup", disk, tmp_path / "a.ferro", code=8)
        assert "in use by a running virtual machine" in done.err
        assert "virtual machine" in ferrotype("convert", disk, tmp_path / "a.qcow2", code=8).err
    with held_by_qemu(disk, read_only=True):
        ferrotype("backup", disk, tmp_path / "a.ferro")


def test_the_disk_of_a_running_machine_is_not_written_to(disk: Path, image: Path) -> None:
    before = disk.read_bytes()
    for read_only in (False, True):
        with held_by_qemu(disk, read_only=read_only):
            for words in (["--force"], ["--force", "--delta"]):
                done = ferrotype("restore", image, disk, *words, code=3)
                assert "in use by a running virtual machine" in done.err
            ferrotype("convert", image, disk, "--force", code=3)
    assert disk.read_bytes() == before


def test_every_verb_that_reads_a_disk_warns(disk: Path, tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk.name, "-F", "raw", tmp_path / "over.qcow2")
    other = Path(shutil.copy(disk, tmp_path / "other.img"))
    with held_by_qemu(disk):
        for words in (
            ("checksum", tmp_path / "over.qcow2"),
            ("compare", other, disk),
            ("convert", other, tmp_path / "new.qcow2", "-B", disk.name, "--backing-format", "raw"),
        ):
            done = ferrotype(*words, "--json", code=8)
            assert any(f"{disk} is in use by a running virtual" in warning for warning in done.document["warnings"])


def test_every_file_that_is_replaced_or_removed_is_looked_at(disk: Path, tmp_path: Path) -> None:
    out, extent = tmp_path / "a.vmdk", tmp_path / "a-f001.vmdk"
    words = ("convert", disk, out, "-o", "subformat=twoGbMaxExtentFlat")
    ferrotype(*words)
    before = extent.stat().st_ino
    with held_by_qemu(extent):
        assert f"{extent} is in use" in ferrotype(*words, "--force", code=3).err
        assert f"{extent} is in use" in ferrotype("convert", disk, out, "--force", code=3).err  # it would be removed
    assert extent.stat().st_ino == before
    ferrotype(*words, "--force")


@pytest.mark.parametrize("kind", ["LOCK_EX", "LOCK_SH"])
def test_a_target_that_is_locked_by_flock(kind: str, disk: Path, image: Path) -> None:
    code = f"import fcntl, sys; f = open({str(disk)!r}); fcntl.flock(f, fcntl.{kind}); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for words in ((), ("--delta",)):
            done = ferrotype("restore", image, disk, "--force", *words, code=3)
            assert f"{disk} is locked by another program" in done.err
        ferrotype("checksum", disk)  # to read it is no harm
        process.communicate(b"\n")
    run("flock", disk, *PROGRAM, "restore", image, disk, "--force", env=environment())  # which holds it for us


def test_a_loop_device_that_is_held_where_it_does_not_show(disk: Path) -> None:
    """As one is that is mounted in another namespace."""
    with loop(disk) as device:
        held = os.open(device, os.O_RDONLY | os.O_EXCL)
        try:
            assert f"{device} is held by another program" in ferrotype("checksum", disk, code=8).err
        finally:
            os.close(held)
        ferrotype("checksum", disk)


def test_an_image_inside_of_the_disk_that_is_backed_up(tmp_path: Path) -> None:
    path = blank(tmp_path / "fs.img", 8 * MiB)
    run("mkfs.ext4", "-q", path)
    with loop(path) as device, mounted(device, "ext4", tmp_path / "mount") as root:
        done = ferrotype("backup", path, root / "inside.ferro", code=8)
    assert f"inside.ferro lies on {path}, which is being backed up" in done.err


def test_a_file_that_is_open_for_writing_elsewhere(disk: Path, image: Path, tmp_path: Path) -> None:
    with open_in_a_program(disk, "r+b") as pid:
        assert f"process {pid} " in ferrotype("restore", image, disk, "--force", code=3).err
        assert f"process {pid} " in ferrotype("backup", disk, tmp_path / "b.ferro", code=8).err
    with open_in_a_program(disk, "rb"):
        ferrotype("backup", disk, tmp_path / "b.ferro")
        ferrotype("restore", image, disk, "--force")


def test_a_file_behind_a_mounted_loop_device(tmp_path: Path) -> None:
    path = blank(tmp_path / "fs.img", 8 * MiB)
    run("mkfs.ext4", "-q", path)
    api.backup(path, tmp_path / "fs.ferro")
    with loop(path) as device:
        with mounted(device, "ext4", tmp_path / "mount"):
            done = ferrotype("backup", path, tmp_path / "a.ferro", code=8)
            assert f"is mounted at {tmp_path / 'mount'}" in done.err
            assert "mounted at" in ferrotype("convert", path, tmp_path / "a.vhd", code=8).err
            assert "mounted at" in ferrotype("restore", tmp_path / "fs.ferro", path, "--force", code=3).err
        ferrotype("backup", path, tmp_path / "a.ferro")  # attached, and nothing is written
        with mounted(device, "ext4", tmp_path / "mount", "ro,noload"):
            ferrotype("backup", path, tmp_path / "a.ferro")


def test_a_device_that_is_open_for_writing_elsewhere(disk: Path, image: Path, tmp_path: Path) -> None:
    with loop(disk) as device:
        with open_in_a_program(device, "r+b") as pid:
            assert f"process {pid} " in ferrotype("restore", image, device, "--force", code=3).err
            assert f"process {pid} " in ferrotype("backup", device, tmp_path / "b.ferro", code=8).err
        ferrotype("restore", image, device, "--force")


def test_reading_changes_nothing(disk: Path, tmp_path: Path) -> None:
    job = NullJob()
    api.backup(disk, tmp_path / "a.ferro", job=job)
    api.convert(disk, tmp_path / "a.qcow2", job=job)
    assert job.warnings == []


def test_holes_are_asked_for_when_all_is_stored(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On ZFS, overlays and others: what is not stored yet may count as a hole there."""
    called: list[str] = []

    def noted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object) -> Any:
            called.append(what)
            return function(*args)

        return call

    monkeypatch.setattr(os, "fdatasync", noted("stored", os.fdatasync))
    monkeypatch.setattr(linux, "data_runs", noted("asked", linux.data_runs))
    stored = ["stored", "asked", "asked"]
    for kind, expected in ((0x2FC12FC1, stored), (0x794C7630, stored), (0xEF53, ["asked", "asked"])):
        monkeypatch.setattr(linux, "file_system_type", lambda _, kind=kind: kind)
        with FileSource(disk) as source:
            source.extents(0, MiB)
            source.extents(0, MiB)
        assert called == expected
        called.clear()


def test_many_files_are_looked_for_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A split disk has thousands."""
    paths = [tmp_path / f"disk.{number:03}" for number in range(50)]
    for path in paths:
        path.write_bytes(b"x")
    passes: list[Path] = []
    listing = holders._numbers

    def listed(folder: Path) -> list[int]:
        passes.append(folder)
        return listing(folder)

    monkeypatch.setattr(holders, "_numbers", listed)
    with open_in_a_program(paths[7], "r+b") as pid:
        assert [f"process {pid} " in sentence for sentence in writers_of(*paths)] == [True]
    assert passes.count(Path("/proc")) == 1
