"""What rests on what: real loop devices, partitions and mounts, and device mapper in a feigned sysfs."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ferrotype.block import sysfs
from ferrotype.block.device import DeviceSink
from ferrotype.block.disks import Disk, disks
from ferrotype.block.inventory import lies_on, same_storage, uses
from ferrotype.errors import Refused
from ferrotype.units import GiB, MiB
from tests.machine import IN_CI, loop, mounted, need, run


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as out:
        out.truncate(48 * MiB)
    return path


@contextlib.contextmanager
def partitioned(image: Path) -> Iterator[tuple[Path, Path, Path]]:
    """A loop device with two partitions, ext4 on the first: the disk and its partitions."""
    need("partx", "sfdisk", "mkfs.ext4")
    table = "label: gpt\nstart=1MiB,size=32MiB\nstart=34MiB,size=8MiB\n"
    run("sfdisk", "-q", "--no-reread", "--no-tell-kernel", image, text_in=table)
    with loop(image) as disk:
        run("partx", "-a", disk)
        try:
            first, second = Path(f"{disk}p1"), Path(f"{disk}p2")
            run("mkfs.ext4", "-q", first)
            yield disk, first, second
        finally:
            run("partx", "-d", disk)


def listed(path: Path) -> Disk | None:
    return next((disk for disk in disks() if disk.path == path), None)


# ---------------------------------------------------------------------- the list


def test_disks_are_those_lsblk_shows() -> None:
    need("lsblk")
    import json

    columns = "KNAME,SIZE,LOG-SEC,PHY-SEC,RM,ROTA,RO,TYPE"
    shown = json.loads(run("lsblk", "-J", "-b", "-d", "-o", columns))["blockdevices"]
    expected = {
        (e["kname"], e["size"], e["log-sec"], e["phy-sec"], e["rm"], e["rota"], e["ro"])
        for e in shown
        if e["size"] and "ram" not in e["kname"] and e["type"] != "loop"
    }
    found = {
        (d.path.name, d.size, d.sector_size, d.physical_sector_size, d.removable, d.rotational, d.read_only)
        for d in disks()
        if d.backing_file is None
    }
    assert found == expected
    assert found


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_loop_device_is_listed_while_attached(image: Path, sector_size: int) -> None:
    with loop(image, sector_size=sector_size, read_only=True) as device:
        disk = listed(device)
        assert disk is not None
        assert (disk.size, disk.sector_size, disk.read_only) == (48 * MiB, sector_size, True)
        assert disk.backing_file == str(image)
        assert (disk.partitions, disk.mounts, disk.holders) == ((), (), ())
    assert listed(device) is None


def test_partitions_and_mounts_are_listed(image: Path, tmp_path: Path) -> None:
    with partitioned(image) as (device, first, second), mounted(first, "ext4", tmp_path / "a b\\c"):
        disk = listed(device)
        assert disk is not None
        assert [(p.path, p.number, p.start, p.size, p.mounts) for p in disk.partitions] == [
            (first, 1, MiB, 32 * MiB, (str(tmp_path / "a b\\c"),)),
            (second, 2, 34 * MiB, 8 * MiB, ()),
        ]
        assert disk.mounts == ()
    assert image.stat().st_size == 48 * MiB


# ---------------------------------------------------------------------- in use


def test_an_idle_device_is_free(image: Path) -> None:
    with loop(image) as device:
        assert uses(device) == ()
        assert uses(image) == (f"{device} is attached to it as a loop device",)
    assert uses(image) == ()
    assert uses("/dev/null") == uses("/no/such") == uses("/") == ()


def test_a_mounted_partition_keeps_its_disk(image: Path, tmp_path: Path) -> None:
    where = tmp_path / "mnt"
    with partitioned(image) as (disk, first, second):
        assert uses(disk) == ()
        with mounted(first, "ext4", where):
            reason = f"{first} is mounted at {where}"
            assert uses(disk) == uses(first) == (reason,)
            assert uses(second) == ()
            assert uses(image) == (f"{disk} is attached to it as a loop device", reason)
            with pytest.raises(Refused, match=f"{disk} is in use: {reason}; release it first"):
                DeviceSink(disk)
            DeviceSink(second).close()
        assert uses(disk) == ()


def test_a_mount_of_the_whole_disk_keeps_its_partitions(image: Path, tmp_path: Path) -> None:
    run("mkfs.ext4", "-q", image)
    with loop(image) as disk:
        run("addpart", disk, "1", "2048", "4096")
        try:
            with mounted(disk, "ext4", tmp_path / "mnt"):
                assert uses(f"{disk}p1") == (f"{disk} is mounted at {tmp_path / 'mnt'}",)
        finally:
            run("delpart", disk, "1")


def test_a_loop_device_over_a_device(image: Path, tmp_path: Path) -> None:
    run("mkfs.ext4", "-q", image)
    with loop(image) as lower, loop(lower) as upper:
        assert uses(lower) == (f"{upper} is attached to it as a loop device",)
        with mounted(upper, "ext4", tmp_path / "mnt"):
            assert uses(lower)[-1] == f"{upper} is mounted at {tmp_path / 'mnt'}"
        assert f"{lower} is attached" not in str(uses(upper))


def test_parts_of_one_file_are_told_apart(image: Path, tmp_path: Path) -> None:
    with (
        loop(image, offset=0, size=16 * MiB) as one,
        loop(image, offset=16 * MiB, size=16 * MiB) as other,
        loop(image, offset=8 * MiB, size=16 * MiB) as across,
    ):
        assert not same_storage(one, other)
        assert same_storage(one, across)
        assert same_storage(across, other)
        assert same_storage(image, other)
        run("mkfs.ext4", "-q", one)
        with mounted(one, "ext4", tmp_path / "mnt"):
            assert not any("mounted" in reason for reason in uses(other))
            assert any("mounted" in reason for reason in uses(across))


def test_swap(image: Path) -> None:
    need("mkswap", "swapon")
    run("mkswap", image)
    with loop(image) as device:
        if subprocess.run(["swapon", device], capture_output=True, check=False).returncode:
            pytest.skip("this kernel does not swap here")
        try:
            assert uses(device) == (f"{device} is used as swap space",)
            assert uses(image)[-1] == f"{device} is used as swap space"
        finally:
            run("swapoff", device)
        assert uses(device) == ()


def test_someone_holding_the_device(image: Path) -> None:
    with loop(image) as device, DeviceSink(device):
        assert uses(device) == (f"{device} is held by another program",)


# ---------------------------------------------------------------------- lying on


def test_a_file_lies_on_its_partition_and_disk(image: Path, tmp_path: Path) -> None:
    with partitioned(image) as (disk, first, second), mounted(first, "ext4", tmp_path / "mnt") as where:
        (where / "here").write_bytes(b"x")
        (where / "link").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "to").symlink_to(where / "not" / "yet")
        for file in (where / "here", where / "new", where / "no" / "folder" / "yet", where, tmp_path / "to"):
            assert lies_on(file, first)
            assert lies_on(file, disk)
            assert not lies_on(file, second)
        for file in (where / "link", tmp_path / "new", Path("/dev/shm/x")):
            assert not lies_on(file, first)
            assert not lies_on(file, disk)
        # the partition itself, written to as a file
        assert lies_on(first, disk)
        assert lies_on(first, first)
        assert not lies_on(second, first)
    assert not lies_on(tmp_path / "mnt" / "here", "/dev/null")
    assert not lies_on(image, "/no/such")


def test_a_file_on_a_loop_on_a_loop(tmp_path: Path) -> None:
    """A file system in a file of a file system in a file: the innermost file lies on both devices."""
    outer, inner = tmp_path / "outer.raw", tmp_path / "outer" / "inner.raw"
    with outer.open("wb") as out:
        out.truncate(64 * MiB)
    run("mkfs.ext4", "-q", outer)
    with loop(outer) as below, mounted(below, "ext4", tmp_path / "outer"):
        with inner.open("wb") as out:
            out.truncate(16 * MiB)
        run("mkfs.ext4", "-q", inner)
        with loop(inner) as above, mounted(above, "ext4", tmp_path / "inner") as where:
            assert lies_on(where / "f", above)
            assert lies_on(where / "f", below)
            assert lies_on(inner, below)
            assert lies_on(inner, above)  # all of it: it is what the device is
            assert not lies_on(outer, above)
            assert lies_on(above, below)
            assert lies_on(where / "f", inner)
            assert not same_storage(above, below)
            assert same_storage(above, inner)
        with loop(inner) as above:
            inner.unlink()
            assert lies_on(above, below)


def test_a_file_lies_on_the_disk_of_this_machine(tmp_path: Path) -> None:
    """Against findmnt and lsblk, where the folder for tests has a device at all."""
    need("findmnt", "lsblk")
    source = run("findmnt", "-n", "-o", "MAJ:MIN", "-T", tmp_path).strip()
    if not Path(f"/sys/dev/block/{source}").exists():
        pytest.skip("the folder for tests is not on a block device")
    device = Path("/dev") / Path(f"/sys/dev/block/{source}").resolve().name
    for line in run("lsblk", "-n", "-s", "-r", "-o", "KNAME", device).splitlines():
        assert lies_on(tmp_path / "x", Path("/dev") / line)
        assert uses(Path("/dev") / line)


def can_mount(kind: str) -> None:
    if kind not in Path("/proc/filesystems").read_text().split():
        (pytest.fail if IN_CI else pytest.skip)(f"this kernel does not mount {kind}")


def test_btrfs_has_devices_that_no_mount_names(tmp_path: Path) -> None:
    can_mount("btrfs")
    need("mkfs.btrfs", "btrfs")
    images = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for image in images:
        with image.open("wb") as out:
            out.truncate(128 * MiB)
    with loop(images[0]) as one, loop(images[1]) as two, loop(images[2]) as other:
        run("mkfs.btrfs", "-q", "-f", "-m", "single", "-d", "single", one, two)
        run("btrfs", "device", "scan", one, two)
        with mounted(one, "btrfs", tmp_path / "mnt") as where:
            run("btrfs", "-q", "subvolume", "create", where / "sub")
            for file in (where / "f", where / "sub" / "f"):
                assert lies_on(file, one)
                assert lies_on(file, two)
                assert not lies_on(file, other)
            for device in (one, two):
                assert any(f"mounted at {where}" in reason for reason in uses(device))
            assert uses(other) == ()
        run("btrfs", "device", "scan", "--forget", one)


def test_overlay_file_systems_lie_on_their_folders(image: Path, tmp_path: Path) -> None:
    can_mount("overlay")
    run("mkfs.ext4", "-q", image)
    with loop(image) as device, mounted(device, "ext4", tmp_path / "disk") as disk:
        for name in ("upper", "work"):
            (disk / name).mkdir()
        (tmp_path / "lower").mkdir()
        options = f"lowerdir={tmp_path / 'lower'},upperdir={disk / 'upper'},workdir={disk / 'work'}"
        with mounted(Path("overlay"), "overlay", tmp_path / "mnt", options) as where:
            assert lies_on(where / "f", device)
            assert any("mounted at" in reason for reason in uses(device))


# ---------------------------------------------------------------------- the same


def test_same_storage(image: Path, tmp_path: Path) -> None:
    (tmp_path / "hard").hardlink_to(image)
    (tmp_path / "soft").symlink_to(image)
    (tmp_path / "other").write_bytes(b"x")
    assert same_storage(image, image)
    assert same_storage(tmp_path / "hard", tmp_path / "soft")
    assert not same_storage(image, tmp_path / "other")
    assert not same_storage(tmp_path / "no", tmp_path / "no")
    with partitioned(image) as (disk, first, second):
        number = os.stat(disk).st_rdev
        os.mknod(tmp_path / "alias", stat.S_IFBLK | 0o600, number)
        for one, other in [(disk, first), (disk, tmp_path / "alias"), (disk, image), (first, image), (second, disk)]:
            assert same_storage(one, other)
            assert same_storage(other, one)
        assert not same_storage(first, second)
        with loop(first) as upper:
            assert same_storage(upper, first)
            assert same_storage(upper, disk)
            assert same_storage(upper, image)
            assert not same_storage(upper, second)


# ---------------------------------------------------------------------- what this machine may not have


VPD_80 = "\0\x80\0\x08  S3R1AL"  # a unit serial number page: its header, and 8 bytes


@pytest.fixture
def feigned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with LVM: vg-root on sda2 and sdb, vg-home on sdb, md127 on sdc1; md127 has a partition.

    Device nodes stand in ``dev``; they have numbers no driver owns and are only ever looked at.
    """
    sys, dev = tmp_path / "sys", tmp_path / "dev"
    for name, number, size, extra in [
        ("sda", "240:0", 100, {"device/model": "FAKE DISK  ", "device/vpd_pg80": VPD_80, "removable": "1"}),
        ("sda/sda1", "240:1", 10, {"partition": "1", "start": "2048"}),
        ("sda/sda2", "240:2", 80, {"partition": "2", "start": str(11 * GiB // 512)}),
        ("sda/sda10", "240:10", 1, {"partition": "10", "start": str(95 * GiB // 512)}),
        ("sdb", "240:16", 50, {}),
        ("sdc", "240:32", 50, {}),
        ("sdc/sdc1", "240:33", 49, {"partition": "1", "start": "2048"}),
        ("dm-0", "241:0", 20, {"dm/name": "vg-root"}),
        ("dm-1", "241:1", 20, {"dm/name": "vg-home"}),
        ("md127", "242:0", 49, {"md/level": "raid1"}),
        ("md127/md127p1", "243:0", 48, {"partition": "1", "start": "2048"}),
        ("zram0", "244:0", 1, {}),
        ("ram0", "245:0", 1, {}),
        ("sr0", "246:0", 0, {}),
        ("cciss!c0d0", "247:0", 5, {}),
    ]:
        folder = sys / "devices" / name
        leaf = name.rpartition("/")[2]
        facts = {
            "dev": number,
            "size": str(size * GiB // 512),
            "uevent": f"MAJOR=1\nDEVNAME={leaf.replace('!', '/')}",
        }
        for key, value in (facts | extra).items():
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(f"{value}\n".encode("latin-1"))
        links = [sys / "dev" / "block" / number] + ([] if "/" in name else [sys / "block" / name])
        for link in links:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder)
        major, minor = map(int, number.split(":"))
        node = dev / leaf.replace("!", "/")
        node.parent.mkdir(parents=True, exist_ok=True)
        os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(major, minor))
    for upper, lower in [("dm-0", "sda/sda2"), ("dm-0", "sdb"), ("dm-1", "sdb"), ("md127", "sdc/sdc1")]:
        for links_in, other in [(f"{upper}/slaves", lower), (f"{lower}/holders", upper)]:
            (sys / "devices" / links_in).mkdir(exist_ok=True)
            (sys / "devices" / links_in / other.rpartition("/")[2]).symlink_to(sys / "devices" / other)
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "mountinfo").write_text(
        f"20 1 241:0 / / rw shared:1 - ext4 {dev}/dm-0 rw\n"
        f"21 20 0:99 /home /home rw - btrfs {dev}/dm-1 rw\n"
        f"22 20 243:0 / /srv\\040x rw - xfs {dev}/md127p1 rw\n"
        f"23 20 240:1 / /boot rw master:1 propagate_from:2 - ext4 /dev/root rw\n"
    )
    (proc / "swaps").write_text(f"Filename Type Size Used Priority\n{dev}/sda10 partition 1 0 -2\n")
    monkeypatch.setattr(sysfs, "SYS", sys)
    monkeypatch.setattr(sysfs, "DEV", dev)
    monkeypatch.setattr(sysfs, "PROC", proc)
    return dev


def test_disks_of_a_feigned_machine(feigned: Path) -> None:
    found = {disk.path.relative_to(feigned).as_posix(): disk for disk in disks()}
    assert list(found) == ["cciss/c0d0", "dm-0", "dm-1", "md127", "sda", "sdb", "sdc"]
    sda = found["sda"]
    assert (sda.model, sda.serial, sda.removable, sda.size) == ("FAKE DISK", "S3R1AL", True, 100 * GiB)
    assert [(p.number, p.mounts, p.holders) for p in sda.partitions] == [
        (1, ("/boot",), ()),
        (2, (), ("dm-0",)),
        (10, (), ()),
    ]
    assert found["dm-1"].mounts == ("/home",)
    assert found["sdb"].holders == ("dm-0", "dm-1")
    assert found["md127"].partitions[0].mounts == ("/srv x",)


def test_uses_on_a_feigned_machine(feigned: Path) -> None:
    dev = feigned
    root, home = f"{dev}/dm-0 (vg-root)", f"{dev}/dm-1 (vg-home)"
    assert set(uses(dev / "sda")) == {
        f"{dev}/sda2 is part of {root}",
        f"{root} is mounted at /",
        f"{dev}/sda1 is mounted at /boot",
        f"{dev}/sda10 is used as swap space",
    }
    assert uses(dev / "sda1") == (f"{dev}/sda1 is mounted at /boot",)
    assert uses(dev / "sda10") == (f"{dev}/sda10 is used as swap space",)
    assert set(uses(dev / "sdb")) == {
        f"{dev}/sdb is part of {root}",
        f"{dev}/sdb is part of {home}",
        f"{root} is mounted at /",
        f"{dev}/dm-1 is mounted at /home",
    }
    assert set(uses(dev / "sdc")) == {f"{dev}/sdc1 is part of {dev}/md127", f"{dev}/md127p1 is mounted at /srv x"}
    assert uses(dev / "cciss" / "c0d0") == ()


def test_same_storage_through_the_device_mapper(feigned: Path) -> None:
    dev = feigned
    for one, other in [
        ("dm-0", "sda2"),
        ("dm-0", "sda"),
        ("dm-0", "sdb"),
        ("dm-1", "sdb"),
        ("md127p1", "sdc1"),
        ("md127", "sdc"),
    ]:
        assert same_storage(dev / one, dev / other), (one, other)
        assert same_storage(dev / other, dev / one), (one, other)
        assert lies_on(dev / one, dev / other)
        assert not lies_on(dev / other, dev / one)
    for one, other in [("dm-0", "dm-1"), ("dm-0", "sda1"), ("dm-1", "sda"), ("sda1", "sda2"), ("sdb", "sdc")]:
        assert not same_storage(dev / one, dev / other), (one, other)
        assert not lies_on(dev / one, dev / other)


def test_what_sysfs_says_is_not_trusted(feigned: Path) -> None:
    """Devices below themselves, and numbers that are none, end in an answer."""
    folder = sysfs.SYS / "devices" / "sdb"
    (folder / "slaves").mkdir()
    (folder / "slaves" / "dm-0").symlink_to(sysfs.SYS / "devices" / "dm-0")
    (folder / "size").write_text("²\n")
    (sysfs.PROC / "self" / "mountinfo").write_text("nonsense\n1 2 - x\n20 1 241:0 / /ok rw - ext4 none rw\n")
    assert same_storage(feigned / "dm-0", feigned / "sda2")
    assert not lies_on(feigned / "dm-1", feigned / "sdc")
    assert f"{feigned}/dm-0 (vg-root) is mounted at /ok" in uses(feigned / "sda")
    assert all(disk.path.name != "sdb" for disk in disks())
