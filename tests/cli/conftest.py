"""A small disk and images of it, which the tests of this folder share and none of them changes."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from ferrotype.units import KiB, MiB
from tests.cli.program import ferrotype
from tests.machine import run

PASSPHRASE = "correct horse battery"


def make_disk(path: Path, seed: int = 1) -> Path:
    """24 MiB: a GPT, a FAT volume ESP with some files, an ext4 volume DATA with more."""
    folder = path.parent / f"{path.name}.parts"
    (folder / "tree").mkdir(parents=True)
    rng = random.Random(seed)
    for number in range(20):
        (folder / "tree" / f"f{number}").write_bytes(rng.randbytes(100 * KiB))
    esp, data = folder / "esp", folder / "data"
    esp.write_bytes(bytes(5 * MiB))
    run("mkfs.vfat", "-n", "ESP", esp)
    run("mcopy", "-i", esp, folder / "tree" / "f0", "::/")
    data.write_bytes(bytes(16 * MiB))
    run("mke2fs", "-q", "-F", "-t", "ext4", "-L", "DATA", "-d", folder / "tree", data)
    with path.open("wb") as file:
        file.truncate(24 * MiB)
    run("sfdisk", "-q", path, text_in="label: gpt\nstart=2048, size=10240, type=uefi\nstart=12288, size=32768\n")
    with path.open("r+b") as file:
        for start, part in ((2048, esp), (12288, data)):
            file.seek(start * 512)
            file.write(part.read_bytes())
    shutil.rmtree(folder)
    return path


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_disk(tmp_path_factory.mktemp("disk") / "disk.img")


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Path:
    """Two snapshots: the first is named "first" and tagged "keep", between them a file changed."""
    folder = tmp_path_factory.mktemp("image")
    changed, path = folder / "disk.img", folder / "laptop.ferro"
    shutil.copy(disk, changed)
    ferrotype("backup", changed, path, "--name", "first", "--tag", "keep")
    extents = ferrotype("map", changed, "--json").document["extents"]
    largest = max((e for e in extents if not e["free"] and not e["zero"]), key=lambda e: int(e["length"]))
    with changed.open("r+b") as file:
        file.seek(largest["start"] + largest["length"] // 2)
        file.write(random.Random(2).randbytes(64 * KiB))
    ferrotype("backup", changed, path)
    changed.unlink()
    return path


@pytest.fixture(scope="session")
def locked(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Path:
    """An encrypted image."""
    path = tmp_path_factory.mktemp("locked") / "locked.ferro"
    ferrotype("backup", f"{disk}#1", path, env={"FERROTYPE_PASSWORD": PASSPHRASE})
    return path


@pytest.fixture
def password(tmp_path: Path) -> Path:
    path = tmp_path / "passphrase"
    path.write_text(PASSPHRASE + "\nthe second line is not part of it\n")
    return path


@pytest.fixture
def copy(tmp_path: Path, image: Path) -> Path:
    """The image, to be changed."""
    return Path(shutil.copy(image, tmp_path / "copy.ferro"))
