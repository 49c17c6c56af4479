"""The disks that the tests of this folder share; none of the tests changes them."""

from __future__ import annotations

import pytest

from ferrotype.units import MiB
from tests import disks
from tests.disks import Disk, Volume

SIZES = {"vfat": 20, "ext4": 16, "ntfs": 12, "exfat": 8, "ext2": 6, "swap": 1, "noise": 1}  # MiB


def _volumes(factory: pytest.TempPathFactory, kinds: list[str], sector_size: int, seed: int) -> list[Volume]:
    folder = factory.mktemp("volumes")
    return [disks.make_volume(folder, kind, SIZES[kind] * MiB, sector_size=sector_size, seed=seed) for kind in kinds]


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> list[Volume]:
    """Volumes of 512-byte sectors."""
    return _volumes(tmp_path_factory, ["vfat", "ext4", "ntfs", "exfat", "swap", "noise"], 512, 1)


@pytest.fixture(scope="session")
def gpt512(tmp_path_factory: pytest.TempPathFactory, volumes: list[Volume]) -> Disk:
    return disks.gpt_disk(tmp_path_factory.mktemp("disk") / "gpt512.img", volumes, 512)


@pytest.fixture(scope="session")
def gpt4096(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    volumes = _volumes(tmp_path_factory, ["vfat", "ext4", "ntfs", "exfat", "swap"], 4096, 2)
    return disks.gpt_disk(tmp_path_factory.mktemp("disk") / "gpt4096.img", volumes, 4096)


@pytest.fixture(scope="session")
def mbr512(tmp_path_factory: pytest.TempPathFactory, volumes: list[Volume]) -> Disk:
    old = _volumes(tmp_path_factory, ["ext2"], 512, 3)
    return disks.mbr_disk(tmp_path_factory.mktemp("disk") / "mbr512.img", [*volumes[:1], *old, *volumes[2:5]], 512)


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory, volumes: list[Volume]) -> Disk:
    return disks.hybrid_disk(tmp_path_factory.mktemp("disk") / "hybrid.img", volumes[1:3])


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory, volumes: list[Volume]) -> Disk:
    return disks.bare_disk(tmp_path_factory.mktemp("disk") / "bare.img", volumes[1])
