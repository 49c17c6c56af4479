"""The disks and images that the tests of this folder share; none of the tests changes them."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ferrotype.units import KiB, MiB
from tests import disks
from tests.disks import Disk, Volume
from tests.work.truth import Truth

_ROOM = 1 << 30  # bytes free in /dev/shm, where nobody else's writing makes a sync wait
SIZES = {"vfat": 8, "ext4": 24, "ntfs": 12}  # MiB


@pytest.fixture(scope="session")
def first_day(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """A disk of three aged file systems, with stale bytes wherever they use nothing."""
    folder = tmp_path_factory.mktemp("volumes")
    volumes = [disks.make_volume(folder, kind, size * MiB) for kind, size in SIZES.items()]
    return Truth(disks.gpt_disk(folder / "disk.img", volumes, 512))


@pytest.fixture(scope="session")
def second_day(first_day: Truth, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """The same disk after a day: files came and went in one of its file systems."""
    folder = tmp_path_factory.mktemp("second")
    path = folder / "disk.img"
    shutil.copyfile(first_day.path, path)
    old = first_day.disk.volume("ext4")
    with disks.opened(path, "ext4", folder / "mount", offset=old.start, size=old.size) as root:
        (root / "new").write_bytes(random.Random(2).randbytes(300 * KiB))
        (root / "d1" / "f1").unlink()
    now = Volume("ext4", disks.cut_out(path, old, folder / "ext4.volume"), old.size, {}, old.index, old.start)
    volumes = tuple(now if volume is old else volume for volume in first_day.disk.volumes)
    return Truth(Disk(path, 512, volumes))


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A folder for images, in memory where there is enough of it."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or shutil.disk_usage(shm).free < _ROOM:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="ferrotype-work-", dir=shm) as folder:
        yield Path(folder)
