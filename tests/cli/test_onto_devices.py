"""``convert`` onto a device: what is asked, what is refused, and that the device holds the disk then."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ferrotype.units import MiB
from tests.cli.program import Word, answered, ferrotype
from tests.machine import loop, mounted, need, run


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Path:
    """The disk as a qcow2, which knows what of it is zeros."""
    path = tmp_path_factory.mktemp("vm") / "vm.qcow2"
    ferrotype("convert", disk, path)
    return path


def target_of(folder: Path, size: int = 24 * MiB) -> Path:
    """A file of old bytes, for a device to stand on."""
    path = folder / "target"
    path.write_bytes(b"\xee" * size)
    return path


@pytest.mark.parametrize("format", ["raw", "qcow2", "vhdx", "E01", "ferro"])
def test_any_disk_onto_a_device(format: str, vm: Path, disk: Path, tmp_path: Path) -> None:
    source, target = tmp_path / f"source.{format}", target_of(tmp_path)
    ferrotype("convert", vm, source)
    with loop(target) as device:
        done = ferrotype("convert", source, device, "--force", "--json").document
        assert ferrotype("compare", source, device, "--json").document["identical"] is True
    run("cmp", disk, target)
    assert (done["format"], done["disk_bytes"], done["table_moved"]) == ("raw", 24 * MiB, False)
    assert done["written_bytes"] + done["zeroed_bytes"] == 24 * MiB
    assert done["read_bytes"] <= (24 * MiB if format == "E01" else 16 * MiB)  # which knows of no zeros
    assert 2 * MiB < done["written_bytes"] < 12 * MiB


def test_zeros_that_nobody_knew_are_zeroed(tmp_path: Path) -> None:
    """Of all lengths, at odd places; and an end that is no multiple of anything but sectors."""
    content = bytearray(os.urandom(5 * MiB + 7 * 512))
    for start, length in ((512, 512), (100_000, 70_000), (MiB + 512, 300_000), (3 * MiB, MiB), (5 * MiB, 7 * 512)):
        content[start : start + length] = bytes(length)
    source, target = tmp_path / "source.img", target_of(tmp_path, len(content))
    source.write_bytes(content)
    with loop(target) as device:
        done = ferrotype("convert", source, device, "--force", "--json").document
    assert target.read_bytes() == content
    assert done["zeroed_bytes"] >= MiB
    with loop(source, read_only=True) as before, loop(target_of(tmp_path, len(content))) as device:
        ferrotype("convert", before, device, "--force")  # and from a device, which knows nothing of zeros
    assert target.read_bytes() == content


def test_the_name_is_typed_first(vm: Path, disk: Path, tmp_path: Path) -> None:
    target = target_of(tmp_path)
    with loop(target) as device:
        assert "--force" in ferrotype("convert", vm, device, code=3).err
        screen = answered([(f"Type {device.name} to go on", "yes")], "convert", vm, str(device), code=3)
        assert f"Everything on {device} will be overwritten with {vm}" in screen
        assert "nothing was written" in screen
        assert set(target.read_bytes()) == {0xEE}
        answered([(f"Type {device.name} to go on", device.name)], "convert", vm, str(device))
    run("cmp", disk, target)


def test_a_dry_run_writes_nothing(vm: Path, tmp_path: Path) -> None:
    target = target_of(tmp_path)
    with loop(target) as device:
        done = ferrotype("convert", vm, device, "-n", "--json").document
        assert (done["dry_run"], done["format"], done["disk_bytes"]) == (True, "raw", 24 * MiB)
        assert str(device) in ferrotype("convert", vm, device, "-n").out
    assert set(target.read_bytes()) == {0xEE}


def test_what_would_do_harm_is_refused(vm: Path, disk: Path, tmp_path: Path) -> None:
    for words in ((), ("--force",), ("-n",)):
        target = target_of(tmp_path, 20 * MiB)
        with loop(target) as device:
            assert "are needed" in ferrotype("convert", vm, device, *words, code=3).err
            assert set(target.read_bytes()) == {0xEE}
        target = target_of(tmp_path)
        with loop(target, sector_size=4096) as device:
            assert "sectors of 4096" in ferrotype("convert", vm, device, *words, code=3).err
            assert set(target.read_bytes()) == {0xEE}
        shutil.copy(disk, target)
        with loop(target) as device:
            assert "converted from" in ferrotype("convert", target, device, *words, code=3).err
            assert "converted from" in ferrotype("convert", device, target, "-O", "raw", *words, code=3).err
        run("cmp", disk, target)


def test_a_device_that_cannot_be_written_is_refused(vm: Path, tmp_path: Path) -> None:
    with loop(target_of(tmp_path), read_only=True) as device:
        assert "write-protected" in ferrotype("convert", vm, device, "--force", code=3).err


def test_a_device_in_use_is_refused(vm: Path, tmp_path: Path) -> None:
    need("mke2fs")
    target = target_of(tmp_path, 32 * MiB)
    run("mke2fs", "-q", "-F", target)
    with loop(target) as device, mounted(device, "ext2", tmp_path / "mnt") as root:
        before = target.read_bytes()[-MiB:]
        assert "is mounted at" in ferrotype("convert", vm, device, "--force", code=3).err
        own = root / "own.qcow2"
        shutil.copy(vm, own)
        assert "converted from" in ferrotype("convert", own, device, "--force", code=3).err
        assert target.read_bytes()[-MiB:] == before


def test_other_sectors_are_taken_where_the_disk_has_them(tmp_path: Path) -> None:
    source = tmp_path / "wide.img"
    source.write_bytes(os.urandom(2 * MiB))
    target = target_of(tmp_path, 2 * MiB)
    with loop(target, sector_size=4096) as device:
        ferrotype("convert", source, device, "--force", code=3)
        ferrotype("convert", source, device, "--force", "--sector-size", "4096")
    run("cmp", source, target)


def test_a_device_holds_no_image(vm: Path, tmp_path: Path) -> None:
    target = target_of(tmp_path)
    words: list[tuple[Word, ...]] = [("-O", "qcow2"), ("-c",), ("-o", "split=1GiB"), ("-B", "base.qcow2")]
    with loop(target) as device:
        for more in words:
            assert f"{device} is a device" in ferrotype("convert", vm, device, "--force", *more, code=2).err
        ferrotype("convert", vm, device, "--force", "-O", "raw")


def test_a_larger_device_gets_its_table_moved(vm: Path, tmp_path: Path) -> None:
    target = target_of(tmp_path, 40 * MiB)
    with loop(target) as device:
        done = ferrotype("convert", vm, device, "--force", "--json").document
        assert done["table_moved"] is True
        assert "No problems found" in run("sgdisk", "-v", device)
        assert "moved to the end" in ferrotype("convert", vm, device, "--force").out
        assert ferrotype("compare", f"{vm}#2", f"{device}#2", "--json").document["identical"] is True
    assert set(target.read_bytes()[25 * MiB : 39 * MiB]) == {0xEE}


def test_a_disk_without_a_table_leaves_no_older_one_behind(tmp_path: Path) -> None:
    source, target = tmp_path / "plain.img", tmp_path / "target"
    source.write_bytes(os.urandom(MiB))
    target.write_bytes(bytes(4 * MiB))
    run("sgdisk", "-o", target)
    assert target.read_bytes()[-512:-504] == b"EFI PART"
    with loop(target) as device:
        done = ferrotype("convert", source, device, "--force", "--json").document
        assert done["table_moved"] is False
    assert target.read_bytes()[:MiB] == source.read_bytes()
    assert target.read_bytes()[-512:-504] == bytes(8)


def test_a_partition_into_a_partition(vm: Path, disk: Path, tmp_path: Path) -> None:
    target = target_of(tmp_path)
    with loop(target, offset=2 * MiB, size=17 * MiB) as device:
        done = ferrotype("convert", f"{vm}#2", device, "--force", "--json").document
        assert (done["disk_bytes"], done["table_moved"]) == (16 * MiB, False)
    content = target.read_bytes()
    assert content[2 * MiB : 18 * MiB] == disk.read_bytes()[6 * MiB : 22 * MiB]
    assert set(content[: 2 * MiB]) == set(content[18 * MiB :]) == {0xEE}


def test_restore_of_what_is_no_backup_names_convert(vm: Path, tmp_path: Path) -> None:
    target = target_of(tmp_path, MiB)
    with loop(target) as device:
        for out in (device, tmp_path / "new.img", tmp_path / "new.vhdx"):
            said = ferrotype("restore", vm, out, "--force", code=2).err
            assert "not in a backup" in said
            assert "convert" in said
    assert set(target.read_bytes()) == {0xEE}
