"""Disk images of other programs, and every verb that takes or makes them."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ferrotype.units import KiB, MiB
from tests.block.nbd_servers import qemu_nbd
from tests.cli.program import ferrotype, started, tree
from tests.machine import loop, need, run

WRITTEN = ("raw", "qcow2", "vhdx", "vhd", "vdi", "vmdk", "E01", "ferro")
QEMU = {"vhd": "vpc"}


def digest(reference: str | Path, *words: str | Path) -> str:
    found: str = ferrotype("checksum", reference, "--json", *words).document["digest"]
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Path:
    """The disk without the remains in its free space, which a backup leaves out; sparse."""
    path = tmp_path_factory.mktemp("bare") / "bare.img"
    content = bytearray(disk.read_bytes())
    for extent in ferrotype("map", disk, "--json").document["extents"]:
        if extent["free"]:
            content[extent["start"] : extent["start"] + extent["length"]] = bytes(extent["length"])
    path.write_bytes(content)
    run("fallocate", "--dig-holes", path)
    return path


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory, bare: Path) -> Path:
    """The same disk as a chain: vm.qcow2 over base.qcow2, which lacks the second half."""
    need("qemu-img", "qemu-io")
    folder = tmp_path_factory.mktemp("vm")
    half = folder / "half.raw"
    half.write_bytes(bare.read_bytes()[: 12 * MiB] + bytes(12 * MiB))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", half, folder / "base.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", folder / "vm.qcow2")
    with bare.open("rb") as file:
        file.seek(12 * MiB)
        half.write_bytes(file.read())
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", half, folder / "rest.raw", ok=(0, 1))
    run("qemu-io", "-f", "qcow2", folder / "vm.qcow2", text_in=f"write -q -s {half} {12 * MiB} {12 * MiB}\nquit\n")
    half.unlink()
    (folder / "rest.raw").unlink(missing_ok=True)
    assert digest(folder / "vm.qcow2") == digest(bare)
    return folder / "vm.qcow2"


# ---------------------------------------------------------------------- the same disk in everything


@pytest.mark.parametrize("format", WRITTEN)
def test_a_disk_is_the_same_in_every_format(format: str, vm: Path, bare: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out.{format}"
    document = ferrotype("convert", vm, out, "--json").document
    assert document["disk_bytes"] == 24 * MiB
    assert 0 < document["read_bytes"] <= 16 * MiB  # half of it is not even known to be zeros
    assert 0 < document["written_bytes"] <= (24 * MiB if format in ("E01", "ferro") else document["read_bytes"])
    assert 0 < document["stored_bytes"] < 24 * MiB
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert digest(out) == digest(bare)
    same = ferrotype("compare", vm, out, "--json").document
    assert (same["identical"], same["first_difference"], same["differences"]) == (True, None, [])
    if format not in ("E01", "ferro"):
        run("qemu-img", "compare", "-f", QEMU.get(format, format), "-F", "raw", out, bare)
    info = ferrotype("info", out, "--json").document
    assert info["format"] == {"E01": "ewf"}.get(format, format)
    assert info["virtual_size"] == 24 * MiB
    assert info["stored_size"] > 2 * MiB
    assert [volume["label"] for volume in info["volumes"]] == ["ESP", "DATA"]
    assert ferrotype("info", out).out
    assert digest(f"{out}#ESP") == digest(f"{bare}#1")


@pytest.mark.parametrize("format", WRITTEN)
def test_a_backup_comes_back_in_every_format(format: str, image: Path, tmp_path: Path) -> None:
    if format == "ferro":
        return
    out = tmp_path / f"out.{format}"
    document = ferrotype("restore", f"{image}::first", out, "--json").document
    assert document["disk_bytes"] == 24 * MiB
    assert 2 * MiB < document["written_bytes"] < 12 * MiB
    assert digest(out) == digest(f"{image}::first")
    assert ferrotype("info", out, "--json").document["format"] == {"E01": "ewf"}.get(format, format)


def test_on_a_device_and_over_the_network(vm: Path, bare: Path, tmp_path: Path) -> None:
    wanted = digest(bare)
    with loop(bare, read_only=True) as device:
        assert digest(device) == wanted
        assert ferrotype("compare", device, vm, "--json").document["identical"] is True
        ferrotype("convert", device, tmp_path / "device.vdi")
    assert digest(tmp_path / "device.vdi") == wanted
    with qemu_nbd(vm, tmp_path, format="qcow2") as address:
        assert digest(address) == wanted
        assert digest(f"{address}#2") == digest(f"{bare}#DATA")
        assert ferrotype("compare", bare, address, "--json").document["identical"] is True
        info = ferrotype("info", address, "--json").document
        assert (info["format"], info["virtual_size"], info["table"]) == ("nbd", 24 * MiB, "gpt")
        ferrotype("convert", address, tmp_path / "served.qcow2")
        ferrotype("backup", address, tmp_path / "served.ferro")
        done = ferrotype("backup", address, tmp_path / "served.ferro", "--json").document
        assert (done["parent"] is not None, done["new_chunks"]) == (True, 0)
        extents = ferrotype("map", address, "--json").document["extents"]
        assert sum(extent["length"] for extent in extents if extent["zero"]) > 8 * MiB
        assert "is for files" in ferrotype("info", address, "--format", "qcow2", code=2).err
        assert "no export called 'x'" in ferrotype("info", address.replace("///", "///x"), code=2).err
    assert digest(tmp_path / "served.qcow2") == digest(tmp_path / "served.ferro") == wanted
    assert "cannot be reached" in ferrotype("info", address, code=6).err


def test_snapshots_inside_an_image_are_further_disks(vm: Path, bare: Path, tmp_path: Path) -> None:
    for file in vm.parent.iterdir():
        shutil.copy(file, tmp_path / file.name)
    own = tmp_path / "vm.qcow2"
    run("qemu-img", "snapshot", "-c", "before", own)
    run("qemu-io", "-f", "qcow2", own, text_in="write -q -P 7 8M 64k\nquit\n")
    assert digest(own) != digest(bare)
    assert digest(f"{own}::before") == digest(bare)
    assert ferrotype("info", own, "--json").document["disks"] == ["before"]
    assert "before" in ferrotype("info", own).out
    ferrotype("convert", f"{own}::before", tmp_path / "before.raw")
    run("cmp", tmp_path / "before.raw", bare)
    assert "before" in ferrotype("info", f"{own}::after", code=2).err


def test_snapshots_inside_an_image_may_have_any_name(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    own, digests = tmp_path / "vm.qcow2", []
    run("qemu-img", "create", "-q", "-f", "qcow2", own, "1M")
    for number, name in enumerate(("latest", "b#1", "a/b #2")):
        run("qemu-io", "-f", "qcow2", own, text_in=f"write -q -P {number + 1} 64k 64k\nquit\n")
        digests.append(digest(own))
        run("qemu-img", "snapshot", "-c", name, own)
    run("qemu-io", "-f", "qcow2", own, text_in="write -q -P 9 64k 64k\nquit\n")
    assert [digest(f"{own}::{name}") for name in ("latest", "b#1", "a/b #2")] == digests
    assert digest(own) not in digests
    run("qemu-img", "snapshot", "-d", "latest", own)
    assert digest(f"{own}::latest") == digest(own)


def test_info_names_the_files_a_disk_stands_in(vm: Path, tmp_path: Path) -> None:
    told = ferrotype("info", vm, "--json").document
    assert [file["path"] for file in told["files"]] == [str(vm), str(vm.parent / "base.qcow2")]
    assert told["stored_size"] == sum(file["stored_size"] for file in told["files"])
    assert told["files"][0]["size"] == vm.stat().st_size
    # looked at for its id, and no part of the disk
    for name in ("base.vdi", "child.vdi", "stranger.vdi"):
        run("qemu-img", "create", "-q", "-f", "vdi", tmp_path / name, "2M")
    base, child = (tmp_path / "base.vdi").read_bytes(), bytearray((tmp_path / "child.vdi").read_bytes())
    child[76] = 4  # differencing
    child[0x188 + 32 : 0x188 + 64] = base[0x188 : 0x188 + 32]
    (tmp_path / "child.vdi").write_bytes(child)
    told = ferrotype("info", tmp_path / "child.vdi", "--json").document
    assert [Path(file["path"]).name for file in told["files"]] == ["child.vdi", "base.vdi"]
    ferrotype("convert", tmp_path / "child.vdi", tmp_path / "stranger.vdi", "--force")
    ferrotype("convert", tmp_path / "child.vdi", tmp_path / "base.vdi", "--force", code=3)


# ---------------------------------------------------------------------- compare


def test_compare_says_where(bare: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    ferrotype("convert", bare, other)
    run("qemu-io", "-f", "qcow2", other, text_in=f"write -q -P 9 {8 * MiB + 3 * 512} 1024\nquit\n")
    document = ferrotype("compare", bare, other, "--json", code=1).document
    assert document["identical"] is False
    assert document["differences"] == [{"start": 8 * MiB + 3 * 512, "length": 1024}]
    assert document["first_difference"] == 8 * MiB + 3 * 512
    text = ferrotype("compare", other, bare, code=1).out
    assert f"first at byte {8 * MiB + 3 * 512}" in text
    assert "identical" in ferrotype("compare", f"{bare}#1", f"{other}#1").out


def test_compare_of_other_sizes_and_strictly(bare: Path, tmp_path: Path) -> None:
    longer, full = tmp_path / "longer.img", tmp_path / "full.img"
    shutil.copy(bare, longer)
    with longer.open("r+b") as file:
        file.truncate(25 * MiB)
    done = ferrotype("compare", bare, longer, "--json")
    assert done.document["identical"] is True
    assert any("sizes differ" in sentence for sentence in done.document["warnings"])
    strict = ferrotype("compare", bare, longer, "--strict", "--json", code=1).document
    assert (strict["identical"], strict["differences"]) == (False, [])
    assert strict["first_difference"] <= 24 * MiB
    full.write_bytes(bare.read_bytes())
    ferrotype("compare", bare, full)
    assert ferrotype("compare", bare, full, "--strict", "--json", code=1).document["allocation_differences"]
    ferrotype("compare", bare, bare, "--strict")
    with longer.open("r+b") as file:
        file.seek(25 * MiB - 1)
        file.write(b"x")
    assert ferrotype("compare", bare, longer, "--json", code=1).document["first_difference"] == 25 * MiB - 1


def test_compare_with_formats_named(bare: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.img"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", bare, odd)
    ferrotype("compare", bare, odd, code=2)
    ferrotype("compare", bare, odd, "--format", "raw", "--other-format", "qcow2")
    ferrotype("compare", odd, odd, "--format", "raw")


# ---------------------------------------------------------------------- convert


def test_formats_go_by_their_suffixes_too(bare: Path, tmp_path: Path) -> None:
    assert ferrotype("convert", bare, tmp_path / "disk", "-O", "VHDX", "--json").document["format"] == "vhdx"
    assert ferrotype("convert", bare, tmp_path / "case.e01", "-O", "E01", "--json").document["format"] == "ewf"
    assert digest(tmp_path / "case.e01", "--format", "E01") == digest(bare)
    assert "no format called 'xyz'" in ferrotype("info", bare, "--format", "xyz", code=2).err


def test_convert_says_what_may_be_chosen(bare: Path, tmp_path: Path) -> None:
    assert "split" in ferrotype("convert", bare, tmp_path / "a.raw", "-o", "help").out
    assert "level" in ferrotype("convert", bare, tmp_path / "a.ferro", "-o", "help").out
    assert ferrotype("convert", bare, tmp_path / "a.qcow2", "-o", "help", "--json").document["options"]
    assert not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(vm: Path, bare: Path, tmp_path: Path) -> None:
    document = ferrotype("convert", vm, tmp_path / "a.qcow2", "-n", "--json").document
    assert (document["dry_run"], document["disk_bytes"], document["format"]) == (True, 24 * MiB, "qcow2")
    assert 2 * MiB < document["read_bytes"] <= 16 * MiB
    (tmp_path / "b.raw").write_bytes(b"mine")
    ferrotype("convert", vm, tmp_path / "b.raw", "-n", code=3)
    ferrotype("convert", bare, bare, "-n", "--force", code=3)
    assert tree(tmp_path) == {"b.raw": b"mine"}


@pytest.mark.parametrize("format", ["raw", "qcow2", "ferro"])
def test_what_exists_is_replaced_only_by_force(format: str, bare: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out.{format}"
    out.write_bytes(b"mine")
    assert "--force" in ferrotype("convert", bare, out, code=3).err
    assert out.read_bytes() == b"mine"
    ferrotype("convert", bare, out, "--force")
    assert digest(out) == digest(bare)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_nothing_that_is_read_is_overwritten(vm: Path, tmp_path: Path) -> None:
    for file in vm.parent.iterdir():
        shutil.copy(file, tmp_path / file.name)
    top, base = tmp_path / "vm.qcow2", tmp_path / "base.qcow2"
    (tmp_path / "link.qcow2").symlink_to("base.qcow2")
    before = {name: data for name, data in tree(tmp_path).items() if name != "link.qcow2"}
    for out in (top, base, tmp_path / "link.qcow2"):
        assert "converted from" in ferrotype("convert", top, out, "--force", code=3).err
        assert "source itself" in ferrotype("backup", top, out, code=3).err
    assert {name: data for name, data in tree(tmp_path).items() if name != "link.qcow2"} == before
    # a file that the output brings along
    ferrotype("convert", top, tmp_path / "parts", "-O", "raw", "-o", "split=16MiB")
    first = tmp_path / "parts.001"
    words = ("--format", "raw", "-O", "raw", "-o", "split=8MiB", "--force")
    assert "being read" in ferrotype("convert", first, tmp_path / "parts", *words, code=3).err
    assert sorted(path.name for path in tmp_path.glob("parts*")) == ["parts.001", "parts.002"]
    assert digest(first, "--format", "raw") == digest(top)
    # the backing file that the new image stands on
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(MiB))
    assert "being read" in ferrotype("convert", other, base, "-B", "base.qcow2", "--force", code=3).err


def test_over_a_backing_file(vm: Path, bare: Path, tmp_path: Path) -> None:
    shutil.copy(vm.parent / "base.qcow2", tmp_path / "base.qcow2")
    out = tmp_path / "out.qcow2"
    ferrotype("convert", bare, out, "-B", "base.qcow2")
    assert out.stat().st_size < (tmp_path / "base.qcow2").stat().st_size + 6 * MiB
    assert json.loads(run("qemu-img", "info", "--output=json", out))["backing-filename"] == "base.qcow2"
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", out, bare)
    assert digest(out) == digest(bare)


def test_names_that_would_pass_for_addresses(bare: Path, tmp_path: Path) -> None:
    shutil.copy(bare, tmp_path / "nbd:base.raw")
    out = tmp_path / "out.qcow2"
    ferrotype("convert", bare, out, "-B", "nbd:base.raw")
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", out, bare)
    assert digest(out) == digest(bare)
    named = tmp_path / "vm:a.vmdk"
    ferrotype("convert", bare, named)
    assert digest(named) == digest(bare)
    flat = ("-o", "subformat=monolithicFlat", "--force")
    assert "colon" in ferrotype("convert", bare, named, *flat, code=2).err


def test_a_new_backup_image(bare: Path, tmp_path: Path, password: Path) -> None:
    """Every sector is kept, and the passphrase that was given locks it."""
    noisy, out = tmp_path / "noisy.img", tmp_path / "out.ferro"
    noisy.write_bytes(bare.read_bytes())
    free = max(
        (e for e in ferrotype("map", bare, "--json").document["extents"] if e["free"]), key=lambda e: int(e["length"])
    )
    with noisy.open("r+b") as file:
        file.seek(free["start"])
        file.write(b"remains of a file")
    ferrotype("convert", noisy, out, "-o", "level=3", "-o", "chunk_size=64KiB")
    assert digest(out) == digest(noisy)
    (snapshot,) = ferrotype("list", out, "--json").document["snapshots"]
    assert snapshot["name"] == "noisy.img"
    assert ferrotype("verify", out, "--deep", "--json").document["ok"] is True
    secret = tmp_path / "secret.ferro"
    ferrotype("convert", noisy, secret, "--password-file", password)
    ferrotype("list", secret, code=5)
    assert digest(secret, "--password-file", password) == digest(noisy)
    # and from one backup to another
    ferrotype("convert", f"{secret}#1", tmp_path / "part.ferro", "--password-file", password)
    assert digest(tmp_path / "part.ferro", "--password-file", password) == digest(f"{noisy}#1")


def test_sectors_of_another_size(tmp_path: Path) -> None:
    raw = tmp_path / "wide.img"
    raw.write_bytes(random.Random(1).randbytes(2 * MiB))
    ferrotype("convert", raw, tmp_path / "wide.vhdx", "--sector-size", "4096")
    assert ferrotype("info", tmp_path / "wide.vhdx", "--json").document["sector_size"] == 4096
    assert digest(tmp_path / "wide.vhdx") == digest(raw)  # qemu opens none of these


@pytest.fixture
def small_mount(tmp_path: Path) -> Iterator[Path]:
    """4 MiB and no more."""
    folder = tmp_path / "small"
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4m", "none", folder)
    try:
        yield folder
    finally:
        run("umount", folder)


@pytest.mark.parametrize("format", WRITTEN)
def test_a_full_disk_leaves_nothing(format: str, small_mount: Path, tmp_path: Path) -> None:
    noise = tmp_path / "noise.img"
    noise.write_bytes(random.Random(2).randbytes(9 * MiB))
    (small_mount / f"old.{format}").write_bytes(b"mine")
    for words in ((f"new.{format}",), (f"old.{format}", "--force")):
        done = ferrotype("convert", noise, small_mount / words[0], *words[1:], code=6)
        assert "space" in done.err
        assert tree(small_mount) == {f"old.{format}": b"mine"}


def test_what_cannot_fit_is_refused_at_once(image: Path, small_mount: Path, tmp_path: Path) -> None:
    """Preallocated, it takes all of the disk whatever that holds."""
    sparse = tmp_path / "sparse.img"
    with sparse.open("wb") as file:
        file.truncate(9 * MiB)
    (small_mount / "old.raw").write_bytes(b"mine")
    words = ("-o", "preallocation=full", "--force")
    for line in (("convert", sparse), ("restore", image)):
        for more in ((), ("-n",)):
            done = ferrotype(*line, small_mount / "old.raw", *words, *more, code=6)
            assert "are needed" in done.err
            assert "nothing was written" in done.err
    assert tree(small_mount) == {"old.raw": b"mine"}
    ferrotype("convert", sparse, small_mount / "new.raw")


@pytest.mark.parametrize(
    "words", [("raw",), ("qcow2",), ("vhdx",), ("vmdk",), ("qcow2", "-c"), ("E01",)], ids=" ".join
)
def test_what_may_not_fit_is_told(words: tuple[str, ...], small_mount: Path, tmp_path: Path) -> None:
    """It fits all the same where data turns out to be zeros: nothing is refused, and in the end nothing is wrong."""
    full = tmp_path / "full.img"
    full.write_bytes(random.Random(3).randbytes(MiB) + bytes(8 * MiB))
    packed = words[1:] == ("-c",) or words[0] == "E01"
    out = small_mount / f"a.{words[0]}"
    planned = ferrotype("convert", full, out, *words[1:], "-n", "--json").document
    assert planned["free_on_target_bytes"] == 4 * MiB
    assert planned["estimated_stored_bytes"] == (None if packed else 9 * MiB)
    said = ferrotype("convert", full, out, *words[1:], "-n").out
    assert "where 4 MiB are free" in said
    assert ("at most 9 MiB" in said) != packed
    done = ferrotype("convert", full, out, *words[1:])
    assert ("may not fit: up to 9 MiB" in done.err) != packed
    assert digest(out) == digest(full)


def test_a_dry_run_of_a_restore_says_what_it_takes(image: Path, small_mount: Path, tmp_path: Path) -> None:
    for name in ("a.img", "a.qcow2"):
        planned = ferrotype("restore", image, tmp_path / name, "-n", "--json").document
        done = ferrotype("restore", image, tmp_path / name, "--json").document
        assert done["written_bytes"] <= planned["estimated_stored_bytes"] <= done["written_bytes"] + 4 * MiB
        assert planned["free_on_target_bytes"] > 24 * MiB
    planned = ferrotype("restore", image, small_mount / "a.vdi", "-n", "--json").document
    assert planned["free_on_target_bytes"] == 4 * MiB


@pytest.mark.parametrize("format", ["raw", "qcow2", "ferro"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_nothing(format: str, number: int, tmp_path: Path) -> None:
    big = tmp_path / "big.img"
    with big.open("wb") as file:
        for seed in range(16):
            file.write(random.Random(seed).randbytes(16 * MiB))
    out = tmp_path / "out"
    out.mkdir()
    with started("convert", big, out / f"a.{format}") as process:
        while not any(out.iterdir()) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        code = process.wait(30)
    assert code == 130 or (code == 0 and digest(out / f"a.{format}") == digest(big))
    assert code == 0 or not list(out.iterdir())


# ---------------------------------------------------------------------- backup, verify, map


def test_a_backup_of_an_image_reads_what_it_stores(vm: Path, bare: Path, tmp_path: Path) -> None:
    for file in vm.parent.iterdir():
        shutil.copy(file, tmp_path / file.name)
    own, out = tmp_path / "vm.qcow2", tmp_path / "vm.ferro"
    first = ferrotype("backup", own, out, "--json").document
    assert first["disk_bytes"] == 24 * MiB
    assert first["read_bytes"] < 6 * MiB
    assert digest(out) == digest(bare)
    largest = max(
        (e for e in ferrotype("map", own, "--json").document["extents"] if e["data"] and not e["free"]),
        key=lambda extent: int(extent["length"]),
    )
    at = (largest["start"] + largest["length"] // 2) // 512 * 512
    run("qemu-io", "-f", "qcow2", own, text_in=f"write -q -P 7 {at} 512\nquit\n")
    second = ferrotype("backup", own, out, "--json").document
    assert second["parent"] == first["snapshot"]
    assert second["new_bytes"] <= 256 * KiB
    assert digest(out) == digest(own)
    assert [s["name"] for s in ferrotype("list", out, "--json").document["snapshots"]] == ["vm.qcow2"] * 2
    assert digest(f"{out}::latest~1") == digest(bare)
    # the same disk in another format is the same disk
    ferrotype("convert", own, tmp_path / "vm.vdi")
    third = ferrotype("backup", tmp_path / "vm.vdi", out, "--json").document
    assert (third["parent"], third["new_chunks"]) == (second["snapshot"], 0)


def test_verify_holds_an_image_against_its_own_checksums(bare: Path, tmp_path: Path) -> None:
    case = tmp_path / "case.E01"
    ferrotype("convert", bare, case)
    document = ferrotype("verify", case, "--json").document
    assert document["ok"] is True
    assert document["damaged"] == []
    assert document["checked_bytes"] > 0
    assert "no damage" in ferrotype("verify", case).out
    assert ferrotype("info", case, "--json").document["hashes"]
    data = bytearray(case.read_bytes())
    data[len(data) // 2] ^= 0xFF
    case.write_bytes(data)
    done = ferrotype("verify", case, "--json", code=1)
    assert done.document["ok"] is False
    assert done.document["damaged"][0]["problem"]
    assert "DAMAGED" in ferrotype("verify", case, code=1).out
    assert "as a whole" in ferrotype("verify", case, "--deep", code=2).err
    ferrotype("convert", bare, tmp_path / "a.qcow2")
    assert "no checksums" in ferrotype("verify", tmp_path / "a.qcow2", code=2).err


def test_map_says_where_it_stands(vm: Path, bare: Path) -> None:
    extents = ferrotype("map", vm, "--json").document["extents"]
    assert {extent["depth"] for extent in extents} == {0, 1}
    base = (vm.parent / "base.qcow2").read_bytes(), vm.read_bytes()
    content = bare.read_bytes()
    told = 0
    for extent in extents:
        if extent["data"]:
            file = base[0] if extent["depth"] else base[1]
            start, length = extent["start"], extent["length"]
            assert file[extent["offset"] : extent["offset"] + length] == content[start : start + length]
            told += 1
        else:
            assert extent["zero"] is True
    assert told > 3
    assert "layer 1 below" in ferrotype("map", vm).out
    # a partition's map has the offsets of the same file
    part = ferrotype("map", f"{vm}#2", "--json").document["extents"]
    assert part[0]["start"] == 0
    first = next(extent for extent in part if extent["data"])
    file = base[0] if first["depth"] else base[1]
    assert file[first["offset"] : first["offset"] + 512] == content[6 * MiB + first["start"] :][:512]
