"""Onto a larger target: what its former owner left at the end must not take the disk at the next start."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferrotype.units import MiB
from tests.cli.program import ferrotype
from tests.machine import loop, run
from tests.owners import OWNERS
from tests.volumes.disks import blank, sfdisk

SIZE = 40 * MiB


@pytest.fixture(scope="module", params=["none", "dos", "gpt"])
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("small")
    disk = blank(folder / "disk.img", 16 * MiB)
    if request.param == "none":
        run("mkfs.ext4", "-q", disk)
    else:
        sfdisk(disk, f"label: {request.param}\nstart=2048, size=20480")
    ferrotype("backup", "-q", disk, folder / "a.ferro")
    return {"none": "ext4"}.get(request.param, request.param), folder / "a.ferro"


@pytest.mark.parametrize("name", sorted(OWNERS))
def test_a_former_owner_is_found_told_and_removed(name: str, image: tuple[str, Path], tmp_path: Path) -> None:
    kind, backup = image
    old = bytearray(b"\x11" * SIZE)
    OWNERS[name](old)
    target = tmp_path / "target"
    target.write_bytes(old)
    with loop(target) as device:
        planned = ferrotype("restore", "-n", backup, device, "--json").document["warnings"]
        done = ferrotype("restore", "--force", backup, device, "--json").document
        at = ("-o", "value", "-s", "PTTYPE" if kind in ("dos", "gpt") else "TYPE")
        assert run("blkid", "-p", *at, device).strip() == kind  # and no word of two owners
        again = ferrotype("info", device, "--json").document
        assert not [v for v in again["volumes"] if v["kept"]]
    behind = any(mark["start"] >= 16 * MiB for mark in done["removed"])
    assert behind == any("former owner" in text for text in done["warnings"])
    if any(
        old[16 * MiB :].count(sign) for sign in (b"Intel Raid", bytes.fromhex("fc4e2ba9"), bytes.fromhex("de11de11"))
    ):
        assert behind
        assert any("would be removed" in text for text in planned)
    if kind == "gpt":
        assert "No problems found" in run("sgdisk", "-v", target)
