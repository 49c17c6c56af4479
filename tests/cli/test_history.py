"""What the program says of the history of an image: which snapshots are of one disk, and what became of the image."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.cli.program import ferrotype


def test_clones_are_shown_apart_and_forget_says_what_it_judged_together(tmp_path: Path, disk: Path) -> None:
    image = tmp_path / "office.ferro"
    for name in ("reception", "lab"):
        shutil.copy(disk, tmp_path / f"{name}.img")
        ferrotype("backup", tmp_path / f"{name}.img", image)
    ferrotype("backup", "--name", "again", tmp_path / "lab.img", image)
    shown = ferrotype("list", image, "--json").document
    first, second, third = (snapshot["id"] for snapshot in shown["snapshots"])
    assert [snapshot["group"] for snapshot in shown["snapshots"]] == [1, 2, 2]
    assert [group["snapshots"] for group in shown["groups"]] == [[first], [second, third]]
    assert shown["groups"][1]["disks"][0]["path"] == str((tmp_path / "lab.img").resolve())
    text = ferrotype("list", image).out
    assert "group 1: reception.img of" in text
    assert "group 2: lab.img of" in text
    told = ferrotype("forget", "-n", "--keep-last", "1", image).out.splitlines()
    assert [line.split()[0] for line in told[:5]] == ["judged", "keep", "judged", "forget", "keep"]
    done = ferrotype("forget", "--keep-last", "1", image, "--json").document
    assert [group["snapshots"] for group in done["groups"]] == [[first], [second, third]]
    assert done["forgotten"] == [second]
    ferrotype("restore", f"{image}::reception.img", tmp_path / "back.img")


def test_one_disk_needs_no_groups(image: Path) -> None:
    assert "group" not in ferrotype("list", image).out
    assert "judged" not in ferrotype("forget", "-n", "--keep-last", "1", image).out
