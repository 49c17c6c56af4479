"""Restoring to files, to devices and into them, and looking before leaping."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ferrotype.units import MiB
from tests.cli.conftest import PASSPHRASE
from tests.cli.program import Word, answered, ferrotype, tree
from tests.machine import loop, run


@pytest.fixture
def plain(image: Path, tmp_path: Path) -> Path:
    """What a restore of the image gives."""
    ferrotype("restore", image, tmp_path / "plain.img")
    return tmp_path / "plain.img"


def test_to_a_device_after_its_name_was_typed(image: Path, plain: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old" * (8 * MiB))
    with loop(target) as device:
        screen = answered([(f"Type {device.name} to go on", "yes")], "restore", image, str(device), code=3)
        assert f"Everything on {device} will be overwritten" in screen
        assert target.read_bytes() == b"old" * (8 * MiB)
        assert "--force" in ferrotype("restore", image, device, code=3).err
        answered([(f"Type {device.name} to go on", device.name)], "restore", image, str(device))
    run("cmp", plain, target)


def test_only_what_differs(image: Path, plain: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(plain.read_bytes())
    words: tuple[Word, ...] = ("restore", image, target, "--delta", "--force", "--json")
    done = ferrotype(*words).document
    assert (done["written_bytes"], done["zeroed_bytes"], done["kept_bytes"]) == (0, 0, 24 * MiB)
    with target.open("r+b") as file:
        file.seek(7 * MiB)
        file.write(b"changed")
    before = target.stat().st_ino
    done = ferrotype(*words).document
    assert 0 < done["written_bytes"] + done["zeroed_bytes"] <= MiB
    assert target.stat().st_ino == before
    run("cmp", plain, target)


def test_zeros_are_written_unless_the_target_is_blank(image: Path, plain: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\xff" * 24 * MiB)
    with loop(target) as device:
        ferrotype("restore", image, device, "--force", "--no-blank")
        assert target.read_bytes().count(b"\xff" * 4096) > 0
        done = ferrotype("restore", image, device, "--force", "--json").document
    assert done["zeroed_bytes"] > 0
    run("cmp", plain, target)
    with target.open("wb") as file:
        file.truncate(24 * MiB)
    with loop(target) as device:
        done = ferrotype("restore", image, device, "--force", "--no-blank", "--json").document
    assert done["zeroed_bytes"] == 0
    run("cmp", plain, target)


def test_a_partition_into_a_partition(image: Path, plain: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\xee" * 24 * MiB)
    with loop(target, offset=2 * MiB, size=17 * MiB) as device:
        assert ferrotype("restore", f"{image}#2", device, "--force", "--json").document["disk_bytes"] == 16 * MiB
    content = target.read_bytes()
    assert content[2 * MiB : 18 * MiB] == plain.read_bytes()[6 * MiB : 22 * MiB]
    assert set(content[: 2 * MiB]) == set(content[18 * MiB :]) == {0xEE}


def test_a_larger_disk_gets_its_table_moved(image: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with target.open("wb") as file:
        file.truncate(40 * MiB)
    with loop(target) as device:
        done = ferrotype("restore", image, device, "--force", "--json").document
    assert done["table_moved"] is True
    assert "No problems found" in run("sgdisk", "-v", target)


def test_a_new_file_is_whole_or_not_there(image: Path, tmp_path: Path) -> None:
    ferrotype("restore", image, tmp_path / "no" / "out.img", code=2)
    ferrotype("restore", image, tmp_path / "out.img")
    assert [path.name for path in tmp_path.iterdir()] == ["out.img"]
    assert (tmp_path / "out.img").stat().st_blocks * 512 < 12 * MiB  # zeros are holes


def test_a_dry_run_writes_nothing(copy: Path, disk: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old" * (9 * MiB))
    (tmp_path / "other").write_bytes(b"old" * (9 * MiB))
    ferrotype("forget", copy, "first")
    before = tree(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with loop(tmp_path / "target") as device:
        lines: list[tuple[Word, ...]] = [
            ("backup", disk, copy),
            ("backup", disk, tmp_path / "new.ferro"),
            ("restore", copy, device),
            ("restore", copy, tmp_path / "other", "--delta"),
            ("restore", copy, tmp_path / "new.img"),
            ("forget", copy, "disk.img"),
            ("forget", copy, "--keep-last", "1", "--prune"),
            ("prune", copy),
            ("compact", copy),
        ]
        for words in lines:
            assert ferrotype(*words, "--dry-run", "--json").document["dry_run"] is True
    assert "nothing was written" in ferrotype("backup", disk, copy, "-n").out
    env = {"FERROTYPE_PASSWORD": PASSPHRASE}
    ferrotype("backup", disk, tmp_path / "locked.ferro", "-n", env=env)
    assert tree(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps


def test_what_a_dry_run_says_comes_true(tmp_path: Path) -> None:
    (tmp_path / "noise.img").write_bytes(os.urandom(6 * MiB) + bytes(2 * MiB))
    words: tuple[Word, ...] = ("backup", tmp_path / "noise.img", tmp_path / "a.ferro", "--json")
    planned = ferrotype(*words, "-n").document
    done = ferrotype(*words).document
    assert (planned["disk_bytes"], planned["read_bytes"]) == (done["disk_bytes"], done["read_bytes"])
    assert abs(planned["estimated_stored_bytes"] - done["stored_bytes"]) < done["stored_bytes"] // 4


def test_a_dry_run_refuses_what_the_restore_would(disk: Path, copy: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with target.open("wb") as file:
        file.truncate(2 * disk.stat().st_size // 4096 * 4096)
    with loop(target, sector_size=4096) as device:
        assert "sectors" in ferrotype("restore", copy, device, "--dry-run", code=3).err
