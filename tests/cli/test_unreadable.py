"""What cannot be read, now or when an image was made, is said by every verb: in words, in JSON, by the exit code."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ferrotype as python
from ferrotype.errors import ReadError
from ferrotype.job import NullJob
from ferrotype.units import KiB, MiB
from tests.block.nbd_servers import failing_nbdkit
from tests.cli.program import attempt, ferrotype
from tests.machine import need, run
from tests.troubled import troubled

SIZE = 8 * MiB
BAD = (5 * MiB + 4096, 4096)  # start, length
ROWS = [{"start": BAD[0], "length": BAD[1]}]
CONTENT = random.Random(11).randbytes(SIZE)
LEFT = CONTENT[: BAD[0]] + bytes(BAD[1]) + CONTENT[sum(BAD) :]
WORDS = f"4096 bytes at {BAD[0]} (sectors {BAD[0] // 512} to {sum(BAD) // 512 - 1})"


def rows(document: dict[str, Any]) -> list[dict[str, int]]:
    return [{"start": row["start"], "length": row["length"]} for row in document["unreadable"]]


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A raw disk in a file of which 4 KiB cannot be read."""
    with troubled(tmp_path_factory.mktemp("failing"), bad=(BAD,)) as disk:
        (disk.backing / "disk.img").write_bytes(CONTENT)
        yield disk.path / "disk.img"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "whole.img"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory, failing: Path) -> Path:
    """A backup of the failing disk."""
    path = tmp_path_factory.mktemp("snapshot") / "a.ferro"
    done = ferrotype("backup", failing, path, "--json", code=8)
    assert done.document["unreadable"] == [{"disk": "disk.img", **ROWS[0]}]
    assert any(WORDS in warning for warning in done.document["warnings"])
    return path


# ---------------------------------------------------------------------- a disk that fails now


@pytest.mark.parametrize("suffix", ["raw", "qcow2", "vmdk", "E01"])
def test_a_failing_disk_is_converted(failing: Path, suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"out.{suffix}"
    done = ferrotype("convert", failing, out, "--json", code=8)
    assert rows(done.document) == ROWS
    assert any(WORDS in warning for warning in done.document["warnings"])
    with python.open_disk(out) as disk:
        found = bytearray(SIZE)
        disk.read_into(0, memoryview(found))
    assert found == LEFT


def test_converted_to_a_backup_it_is_recorded(failing: Path, tmp_path: Path) -> None:
    done = ferrotype("convert", failing, tmp_path / "out.ferro", "--json", code=8)
    assert rows(done.document) == ROWS
    listed = ferrotype("list", tmp_path / "out.ferro", "--json", code=8).document
    assert listed["snapshots"][0]["disks"][0]["unreadable"] == ROWS


def test_behind_a_format_no_more_is_lost(failing: Path, tmp_path: Path) -> None:
    """A qcow2 whose file has a bad range: its clusters are lost down to the sector."""
    need("qemu-img")
    folder = failing.parents[1] / "backing"
    run("qemu-img", "convert", "-O", "qcow2", folder / "disk.img", folder / "disk.qcow2")
    placed = run("qemu-img", "map", "--output=json", folder / "disk.qcow2")
    assert placed
    done = ferrotype("backup", failing.with_name("disk.qcow2"), tmp_path / "a.ferro", "--json", code=8)
    assert sum(row["length"] for row in done.document["unreadable"]) == BAD[1]
    (folder / "disk.qcow2").unlink()


def test_over_a_network_no_more_is_lost(whole: Path, tmp_path: Path) -> None:
    with failing_nbdkit(whole, tmp_path, *BAD) as address:
        done = ferrotype("backup", address, tmp_path / "a.ferro", "--json", code=8)
        assert rows(done.document) == ROWS
        assert rows(ferrotype("convert", address, tmp_path / "a.raw", "--json", code=8).document) == ROWS
    assert (tmp_path / "a.raw").read_bytes() == LEFT


def test_a_chunk_that_does_not_decode_costs_itself(whole: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.E01"
    ferrotype("convert", whole, image)
    data = bytearray(image.read_bytes())
    at = len(data) // 2  # in the middle of some chunk
    data[at] ^= 0xFF
    image.write_bytes(data)
    done = ferrotype("backup", image, tmp_path / "a.ferro", "--json", code=8)
    (row,) = rows(done.document)
    assert row["length"] == 32 * KiB
    assert row["start"] % (32 * KiB) == 0
    assert any("damaged" in warning for warning in done.document["warnings"])


def test_the_checksum_is_that_of_the_backup(failing: Path, snapshot: Path) -> None:
    one = ferrotype("checksum", failing, "--json", code=8).document
    other = ferrotype("checksum", snapshot, "--json", code=8).document
    assert one["digest"] == other["digest"]
    assert rows(one) == rows(other) == ROWS


def test_nobody_is_given_a_checksum_in_silence(failing: Path) -> None:
    with pytest.raises(ReadError):
        python.checksum(failing)
    job = NullJob()
    python.checksum(failing, job=job)
    assert any(WORDS in warning for warning in job.warnings)


# ---------------------------------------------------------------------- compare


def test_what_cannot_be_compared_is_not_equal(failing: Path, whole: Path, snapshot: Path) -> None:
    for other in (whole, snapshot, failing):
        done = ferrotype("compare", failing, other, "--json", code=8).document
        assert done["identical"] is False
        assert done["first_difference"] is None
        assert done["differences"] == []
        assert ROWS[0] | {"disk": 0} in done["unreadable"]
    assert not python.compare(snapshot, whole).identical
    assert "nobody knows" in ferrotype("compare", snapshot, whole, code=8).out


def test_what_differs_elsewhere_is_a_no(failing: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    done = ferrotype("compare", failing, other, "--json", code=1).document
    assert done["first_difference"] == SIZE - 1
    assert [row["start"] for row in done["differences"]] == [SIZE - 512]


# ---------------------------------------------------------------------- a backup with holes in it


@pytest.mark.parametrize("words", [("list",), ("verify",), ("verify", "--deep")], ids=" ".join)
def test_verbs_of_an_image(snapshot: Path, words: tuple[str, ...]) -> None:
    done = ferrotype(*words, snapshot, code=8)
    assert "4096 bytes in 1 place are zeros" in done.err
    document = ferrotype(*words, snapshot, "--json", code=8).document
    if words[0] == "verify":
        assert rows(document) == ROWS
    else:
        assert document["snapshots"][0]["disks"][0]["unreadable"] == ROWS


@pytest.mark.parametrize("verb", ["info", "map"])
def test_verbs_of_a_disk(snapshot: Path, verb: str) -> None:
    done = ferrotype(verb, snapshot, "--json", code=8)
    assert rows(done.document) == ROWS
    assert any(WORDS in warning for warning in done.document["warnings"])


@pytest.mark.parametrize("verb", ["restore", "convert"])
@pytest.mark.parametrize("suffix", ["img", "qcow2"])
def test_given_back_it_is_said(snapshot: Path, verb: str, suffix: str, tmp_path: Path) -> None:
    done = ferrotype(verb, snapshot, tmp_path / f"out.{suffix}", "--json", code=8)
    assert rows(done.document) == ROWS
    assert sum(WORDS in warning for warning in done.document["warnings"]) == 1


def test_it_stays_recorded(snapshot: Path, tmp_path: Path) -> None:
    """In a copy, in a backup that is made of the snapshot, and in one that it is converted to."""
    copied = ferrotype("copy", snapshot, tmp_path / "copy.ferro", "--json", code=8).document
    assert rows(copied) == ROWS
    assert rows(ferrotype("backup", snapshot, tmp_path / "backup.ferro", "--json", code=8).document) == ROWS
    assert rows(ferrotype("convert", snapshot, tmp_path / "other.ferro", "--json", code=8).document) == ROWS
    for name in ("copy", "backup", "other"):
        listed = ferrotype("list", tmp_path / f"{name}.ferro", "--json", code=8).document
        assert listed["snapshots"][0]["disks"][0]["unreadable"] == ROWS


# ---------------------------------------------------------------------- E01


@pytest.mark.parametrize("kind", ["failing", "snapshot"])
def test_an_e01_keeps_its_table_of_errors(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    image = tmp_path / "disk.E01"
    ferrotype("convert", request.getfixturevalue(kind), image, code=8)
    need("ewfinfo")
    need("ewfverify")
    told = run("ewfinfo", image)
    first, count = BAD[0] // 512, BAD[1] // 512
    assert re.search(rf"at sector\(s\): {first} - {first + count - 1} number: {count}", told), told
    run("ewfverify", "-q", image)
    assert rows(ferrotype("info", image, "--json", code=8).document) == ROWS
    assert rows(ferrotype("verify", image, "--json", code=8).document) == ROWS
    assert rows(ferrotype("backup", image, tmp_path / "a.ferro", "--json", code=8).document) == ROWS
    assert rows(ferrotype("convert", image, tmp_path / "a.qcow2", "--json", code=8).document) == ROWS
    again = tmp_path / "again.E01"
    ferrotype("convert", image, again, code=8)
    assert rows(ferrotype("info", again, "--json", code=8).document) == ROWS


# ---------------------------------------------------------------------- no disk, and less of one


@pytest.mark.parametrize("words", [("backup", "a.ferro"), ("convert", "a.qcow2"), ("convert", "a.raw")], ids=" ".join)
def test_a_disk_of_no_bytes_is_none(words: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "disk.img").touch()
    done = ferrotype(words[0], tmp_path / "disk.img", tmp_path / words[1], code=4)
    assert "0 bytes" in done.err
    assert os.listdir(tmp_path) == ["disk.img"]


def test_a_disk_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    with path.open("r+b") as file:
        file.truncate(3 * MiB)
        file.truncate(SIZE)  # a hole: nothing of it is ever read

    class Cuts(NullJob):
        def begin(self, phase: str, total: int | None = None, /) -> None:  # noqa: ARG002
            os.truncate(path, 3 * MiB)

    job = Cuts()
    python.convert(path, tmp_path / "out.qcow2", job=job)
    assert any("another program has cut it" in warning for warning in job.warnings)


# ---------------------------------------------------------------------- quiet


def test_quiet_is_not_silent(failing: Path, tmp_path: Path) -> None:
    done = ferrotype("backup", failing, tmp_path / "a.ferro", "-q", code=8)
    assert WORDS in done.err
    assert done.out == ""
    assert len(done.err.splitlines()) == 1
    done = ferrotype("backup", failing, tmp_path / "a.ferro", "-q", "--no-warnings", code=8)
    assert done.err == done.out == ""
    done = ferrotype("backup", failing, tmp_path / "a.ferro", "--no-warnings", code=8)
    assert "warning" not in done.err
    assert done.out


# ---------------------------------------------------------------------- what is no matter of ranges


@pytest.mark.parametrize("words", [("backup", "a.ferro"), ("convert", "a.raw")], ids=" ".join)
def test_storage_that_does_not_answer_is_asked_once(words: tuple[str, str], tmp_path: Path) -> None:
    with troubled(tmp_path) as disk:
        (disk.backing / "disk.img").write_bytes(CONTENT)
        disk.behave(stall=("read",))
        target = tmp_path / words[1]
        done = ferrotype(words[0], disk.path / "disk.img", target, "--stall-limit", "1", code=6)
        assert "has not answered for 1 s" in done.err
        assert disk.stalled() == 1
        assert not target.exists() or words[0] == "backup"


def test_a_device_without_a_medium_is_none(tmp_path: Path) -> None:
    """An idle loop device has no bytes, like a card reader without a card."""
    need("losetup")
    if os.geteuid():
        pytest.skip("needs root")
    for verb, name in (("backup", "a.ferro"), ("convert", "a.qcow2")):
        for _ in range(20):
            idle = run("losetup", "-f").strip()
            done = attempt(verb, idle, tmp_path / name)
            if run("losetup", "-f").strip() == idle:
                break
            (tmp_path / name).unlink(missing_ok=True)  # another test took it meanwhile
        assert (done.code, "no medium" in done.err) == (4, True)
    assert os.listdir(tmp_path) == []


def test_a_disk_of_which_nothing_can_be_read_is_none(tmp_path: Path) -> None:
    """Zeros are not what it held: no snapshot, no image, no sum."""
    (tmp_path / "dead").mkdir()
    backup, image = tmp_path / "a.ferro", tmp_path / "a.vhd"
    with troubled(tmp_path / "dead", bad=((0, MiB),)) as disk:
        (disk.backing / "disk.img").write_bytes(CONTENT[:MiB])
        dead = disk.path / "disk.img"
        for verb, outputs in (("backup", [backup]), ("convert", [image]), ("checksum", [])):
            done = ferrotype(verb, dead, *outputs, "--format", "raw", code=6)
            assert "nothing of it could be read" in done.err
    assert ferrotype("list", backup, "--json").document["snapshots"] == []
    assert not image.exists()


def test_the_sums_of_a_backup_add_up(tmp_path: Path) -> None:
    """Data that fill a part of their cells, beside holes and free space; and a second time, when all is known."""
    path = tmp_path / "fs.img"
    path.touch()
    os.truncate(path, 32 * MiB)
    run("mkfs.ext4", "-q", path)
    run("debugfs", "-w", "-R", f"write {__file__} a", path)
    for _ in range(2):
        document = ferrotype("backup", path, tmp_path / "a.ferro", "--json").document
        parts = ("free_bytes", "zero_bytes", "deduplicated_bytes", "new_bytes")
        assert sum(document[part] for part in parts) == document["disk_bytes"] == 32 * MiB
