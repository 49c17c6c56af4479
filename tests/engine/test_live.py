"""Disks that are in use while they are read: the user is told, in words, in JSON and by the exit code."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import ferrotype as python
from ferrotype.block.file import FileSource
from ferrotype.block.watched import Watched
from ferrotype.job import NullJob
from ferrotype.units import MiB
from tests.cli.program import Done, environment
from tests.machine import run

CONTENT = random.Random(7).randbytes(2 * MiB)


class Meddler(NullJob):
    """A job during which another program does something, once the disk is open."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self._act: Callable[[], object] | None = act

    def begin(self, phase: str, total: int | None = None, /) -> None:  # noqa: ARG002  the protocol's signature
        act, self._act = self._act, None
        if act is not None:
            act()


def overwrite(path: Path, offset: int = 4096) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"another program")


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(512))


def overwrite_and_hide(path: Path) -> None:
    """As rsync --times does, and who wants not to be seen."""
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def disk_in(folder: Path) -> Path:
    path = folder / "disk.img"
    path.write_bytes(CONTENT)
    return path


def image_in(folder: Path, kind: str) -> tuple[Path, Path]:
    """What is read, and which file of it is written meanwhile."""
    raw, path = disk_in(folder), folder / f"a.{kind}"
    match kind:
        case "qcow2":
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
        case "vmdk":
            run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=twoGbMaxExtentFlat", raw, path)
            return path, folder / "a-f001.vmdk"
        case "over.qcow2":
            run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "disk.img", "-F", "raw", path)
            return path, raw
        case "001":
            path.write_bytes(CONTENT[:MiB])
            (folder / "a.002").write_bytes(CONTENT[MiB:])
            return path, folder / "a.002"
        case _:
            return raw, raw
    return path, path


# ruff: noqa: ARG005  of the verbs below some make nothing
VERBS: dict[str, Callable[[Path, Path, NullJob], object]] = {
    "backup": lambda disk, out, job: python.backup(disk, out / "new.ferro", job=job),
    "convert": lambda disk, out, job: python.convert(disk, out / "new.qcow2", job=job),
    "convert to a backup": lambda disk, out, job: python.convert(disk, out / "new.ferro", job=job),
    "checksum": lambda disk, out, job: python.checksum(disk, job=job),
    "compare": lambda disk, out, job: python.compare(disk, disk, job=job),
}


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vmdk", "over.qcow2", "001"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_file_that_changes_while_it_is_read(verb: str, kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    disk, written = image_in(tmp_path, kind)
    quiet = NullJob()
    VERBS[verb](disk, out, quiet)
    assert not [warning for warning in quiet.warnings if "changed while" in warning]
    for path in out.iterdir():
        path.unlink()
    job = Meddler(lambda: overwrite(written))
    VERBS[verb](disk, out, job)
    assert [warning for warning in job.warnings if f"{written} changed while it was read" in warning]


def test_the_file_that_a_new_image_stands_over(tmp_path: Path) -> None:
    base, top = disk_in(tmp_path), tmp_path / "top.raw"
    top.write_bytes(bytes(MiB) + CONTENT[MiB:])
    job = Meddler(lambda: overwrite(base))
    python.convert(top, tmp_path / "new.qcow2", backing="disk.img", backing_format="raw", job=job)
    assert [warning for warning in job.warnings if f"{base} changed while it was read" in warning]


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (overwrite, "another program wrote to it"),
        (overwrite_and_hide, "another program changed it, or its attributes"),
        (grow, "another program has added to it"),
        (lambda path: os.truncate(path, 512), "another program has cut it"),
        (lambda path: path.rename(path.with_name("elsewhere")), None),
        (lambda path: path.unlink(), None),
        (lambda path: path.with_name("second").hardlink_to(path), None),
        (lambda path: path.read_bytes(), None),
        (lambda path: FileSource(path).extents(0, MiB), None),
    ],
)
def test_what_counts_as_a_change(act: Callable[[Path], object], said: str | None, tmp_path: Path) -> None:
    path = disk_in(tmp_path)
    with FileSource(path) as file:
        watched = Watched(file)
        act(path)
        found = watched.change()
        assert (found is None) if said is None else (said in str(found))


def test_the_first_tick_of_the_clock(tmp_path: Path) -> None:
    """A write that follows the last one at once moves the time on, since it is waited for."""
    path = disk_in(tmp_path)
    for _ in range(20):
        overwrite(path)
        with FileSource(path) as file:
            watched = Watched(file)
            overwrite(path)
            assert watched.change()


def test_a_file_that_is_closed_and_opened_meanwhile(tmp_path: Path) -> None:
    path = disk_in(tmp_path)
    first = FileSource(path)
    watched = Watched(first)
    first.close()
    assert watched.change() is None
    with FileSource(path) as second:
        watched.again(second)
        assert watched.change() is None
        other = tmp_path / "other"
        other.write_bytes(CONTENT)
        other.rename(path)
        assert watched.change() is None  # what is open is the old one
        with FileSource(path) as third:
            watched.again(third)
            assert "parts of both were read" in str(watched.change())


# ---------------------------------------------------------------------- the program

MEDDLING = """
import os, sys
from pathlib import Path
from ferrotype.block.watched import Watched
from ferrotype.cli import main
change, path = Watched.change, Path(sys.argv.pop(1))
def meddled(self):
    with path.open("ab") as file:
        file.write(b"x")
    return change(self)
Watched.change = meddled
main()
"""


def meddled(path: Path, *words: str | Path) -> Done:
    """A run of the program, at whose end another one adds to ``path``."""
    argv = [sys.executable, "-c", MEDDLING, path, *words]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(), timeout=120, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("words", [("backup", "new.ferro"), ("convert", "new.qcow2"), ("checksum",)])
def test_the_program_says_so(words: tuple[str, ...], tmp_path: Path) -> None:
    path = disk_in(tmp_path)
    more = [tmp_path / name for name in words[1:]]
    done = meddled(path, words[0], path, *more)
    assert done.code == 8
    assert f"{path} changed while it was read: it had {2 * MiB} bytes" in done.err
    for one in more:
        one.unlink()
    done = meddled(path, words[0], path, *more, "--json")
    assert done.code == 8
    assert any("changed while it was read" in warning for warning in done.document["warnings"])
