"""Each exit code in the situation it is for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ferrotype.units import KiB, MiB
from tests.cli.conftest import make_disk
from tests.cli.program import attempt, ferrotype, tree
from tests.machine import loop, mounted, need, run


def damage(image: Path, marker: bytes | None = None) -> None:
    """Change the middle of the file, which is a pack of file contents."""
    data = bytearray(image.read_bytes())
    at = len(data) // 3
    data[at] ^= 0xFF
    image.write_bytes(data)


def test_1_a_damaged_image_is_not_verified(copy: Path, tmp_path: Path) -> None:
    damage(copy)
    document = ferrotype("verify", copy, "--json", code=1).document
    assert document["ok"] is False
    assert document["damaged"]
    for entry in document["damaged"]:
        assert entry.keys() >= {"snapshot", "disk", "start", "length", "files"}
        assert entry["disk"] == "disk.img"
        assert 0 <= entry["start"] < entry["start"] + entry["length"] <= 24 * MiB
    text = ferrotype("verify", copy, "--deep", code=1).out
    assert "DAMAGED" in text
    assert "cannot be given back" in text
    # 4: reading what is damaged fails, and leaves nothing behind
    assert "damaged" in ferrotype("restore", copy, tmp_path / "out.img", code=4).err
    assert [path.name for path in tmp_path.iterdir()] == ["copy.ferro"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["list", "nowhere.ferro"], "nowhere.ferro does not exist"),
        (["compact", "nowhere.ferro"], "nowhere.ferro does not exist"),
        (["key", "list", "nowhere.ferro"], "nowhere.ferro does not exist"),
        (["verify", "."], "is not a file"),
        (["info", "nowhere.img"], "does not exist"),
        (["info", "copy.ferro::nobody"], "nobody"),
        (["info", "copy.ferro::latest~2"], "only 2 snapshots"),
        (["info", "copy.ferro::latest/sda"], "sda"),
        (["info", "copy.ferro#3"], "there is: 1 (ESP), 2 (DATA)"),
        (["info", "copy.ferro#"], "no partition is named"),
        (["checksum", ""], "empty"),
        (["restore", "plain.img", "out.img"], "not in a backup"),
        (["restore", "copy.ferro", "out.qcow2", "--delta"], "raw disks"),
        (["restore", "copy.ferro", "out.qcow2", "-o", "nothing=1"], "no option of qcow2"),
        (["restore", "copy.ferro", "out.ferro"], "with copy"),
        (["restore", "copy.ferro", "out.vmd", "-O", "vmd"], "no format called"),
        (["convert", "plain.img", "out"], "say it with -O"),
        (["convert", "plain.img", "out.wim"], "wim"),
        (["convert", "plain.img", "out.raw", "-c"], "compressed"),
        (["convert", "plain.img", "out.raw", "-o", "split=7MB"], "decimal unit"),
        (["convert", "plain.img", "out.ferro", "-B", "plain.img"], "backing"),
        (["convert", "plain.img", "out.qcow2", "-B", "nothing.img"], "not there"),
        (["convert", "plain.img", "out.qcow2", "-o", "nothing=1"], "no option of qcow2"),
        (["compare", "plain.img"], "Missing argument"),
        (["compare", "plain.img", "nowhere.img"], "does not exist"),
        (["verify", "plain.img", "--format", "raw"], "no checksums"),
        (["info", "nbd://"], "nbd://host"),
        (["info", "nbds://host/x"], "TLS"),
        (["info", "nbd://host/x#"], "no partition is named"),
        (["backup", "copy.ferro", "new.ferro", "--split", "1MiB"], "64MiB"),
        (["backup", "plain.img", "copy.ferro", "--split", "64MiB"], "exists"),
        (["backup", "plain.img", "new.ferro", "--chunk-size", "3000"], "chunk size"),
        (["backup", "plain.img", "new.ferro", "--split", "7MB"], "decimal unit"),
        (["verify", "copy.ferro", "--sample", "200%"], "not a share"),
        (["info", "plain.img", "--sector-size", "1000"], "power of two"),
        (["frobnicate"], "No such command"),
        (["list"], "Missing argument"),
        (["list", "copy.ferro", "--no-such-option"], "No such option"),
        (["backup", "plain.img", "new.ferro", "--level", "99"], "range"),
    ],
)
def test_2_the_command_was_wrong(words: list[str], sentence: str, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.img").write_bytes(bytes(MiB))
    done = ferrotype(*words, code=2, cwd=tmp_path)
    assert done.out == ""
    assert sentence in done.err
    assert sorted(tree(tmp_path)) == ["copy.ferro", "plain.img"]


class Test3Refused:
    """Where something would be harmed, and nothing is written."""

    def test_a_file_that_exists(self, copy: Path, tmp_path: Path) -> None:
        (tmp_path / "out.img").write_bytes(b"mine")
        assert "--force" in ferrotype("restore", copy, tmp_path / "out.img", code=3).err
        document = ferrotype("restore", copy, tmp_path / "out.img", "--json", code=3).document
        assert document["kind"] == "Refused"
        assert "out.img exists" in document["error"]
        assert (tmp_path / "out.img").read_bytes() == b"mine"
        ferrotype("restore", copy, tmp_path / "out.img", "--force")
        assert (tmp_path / "out.img").stat().st_size == 24 * MiB

    def test_itself(self, copy: Path, tmp_path: Path) -> None:
        before = copy.read_bytes()
        (tmp_path / "link").symlink_to(copy)
        for target in (copy, tmp_path / "link"):
            assert "restored from" in ferrotype("restore", copy, target, "--force", code=3).err
        assert "is the source itself" in ferrotype("backup", copy, copy, code=3).err
        assert copy.read_bytes() == before

    def test_a_mounted_device_and_the_disk_that_holds_the_image(self, copy: Path, tmp_path: Path) -> None:
        held = tmp_path / "held.img"
        with held.open("wb") as file:
            file.truncate(40 * MiB)
        run("mke2fs", "-q", "-F", "-t", "ext4", held)
        with loop(held) as device, mounted(device, "ext4", tmp_path / "mount") as root:
            assert "mounted at" in ferrotype("restore", copy, device, "--force", code=3).err
            assert "in use" in ferrotype("restore", copy, held, "--force", "--delta", code=3).err
            shutil.copy(copy, root / "inside.ferro")
            assert "holds" in ferrotype("restore", root / "inside.ferro", device, "--force", code=3).err
            assert (root / "inside.ferro").read_bytes() == copy.read_bytes()
        run("e2fsck", "-fn", held)

    def test_too_small_or_of_other_sectors(self, copy: Path, tmp_path: Path) -> None:
        small, wide = tmp_path / "small.img", tmp_path / "wide.img"
        small.write_bytes(b"s" * 23 * MiB)
        wide.write_bytes(b"w" * 32 * MiB)
        with loop(small) as device:
            for words in ([], ["--dry-run"]):
                assert "are needed" in ferrotype("restore", copy, device, "--force", *words, code=3).err
        with loop(wide, sector_size=4096) as device:
            assert "sectors of 4096 bytes" in ferrotype("restore", copy, device, "--force", code=3).err
        assert "are needed" in ferrotype("restore", copy, small, "--force", "--delta", code=3).err
        assert small.read_bytes() == b"s" * 23 * MiB
        assert wide.read_bytes() == b"w" * 32 * MiB

    def test_what_is_not_a_file(self, copy: Path, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for target in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
            ferrotype("restore", copy, target, "--force", code=3)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.ferro", "pipe"]


class Test4Input:
    """Not an image, a damaged one, one of other software."""

    def test_not_an_image(self, disk: Path, tmp_path: Path) -> None:
        (tmp_path / "text.ferro").write_text("no image\n" * 1000)
        (tmp_path / "empty.ferro").touch()
        for name in ("text.ferro", "empty.ferro"):
            for words in (["list"], ["info"], ["verify"], ["compact"]):
                ferrotype(*words, tmp_path / name, code=4)
        before = (tmp_path / "text.ferro").read_bytes()
        ferrotype("backup", disk, tmp_path / "text.ferro", code=4)
        assert (tmp_path / "text.ferro").read_bytes() == before
        ferrotype("list", disk, code=4)

    def test_a_damaged_start(self, copy: Path, tmp_path: Path) -> None:
        """It is read with a warning where records follow, never written to, and refused where nothing follows."""
        with copy.open("r+b") as file:
            file.write(b"\0" * 16)
        for words in (("list", copy), ("restore", copy, tmp_path / "out.img")):
            assert "volume header is damaged" in ferrotype(*words, code=8).err
        assert "ferrotype salvage" in ferrotype("forget", copy, "--keep-last", "1", code=4).err
        with copy.open("r+b") as file:
            file.write(bytes(copy.stat().st_size))
        for words in (("list", copy), ("restore", copy, tmp_path / "out.img")):
            ferrotype(*words, code=4)

    def test_one_of_other_software(self, tmp_path: Path) -> None:
        """What it is follows from its content; half of one is refused, and so is one of an unknown feature."""
        need("qemu-img")
        for kind, name in (("qcow2", "a.qcow2"), ("vmdk", "a.vmdk"), ("vdi", "a.vdi"), ("qcow2", "unnamed")):
            path = tmp_path / name
            run("qemu-img", "create", "-f", kind, path, "1M")
            assert ferrotype("info", path, "--json").document["format"] == kind
            with path.open("r+b") as file:
                file.truncate(100 if kind != "vmdk" else 600)
            for words in (("info", path), ("checksum", path), ("backup", path, tmp_path / "new.ferro")):
                assert ferrotype(*words, "--json", code=4).document["kind"] in ("InvalidImage", "UnsupportedError")
        run("qemu-img", "create", "-f", "qcow2", tmp_path / "odd.qcow2", "1M")
        with (tmp_path / "odd.qcow2").open("r+b") as file:
            file.seek(72)
            file.write(b"\x80")  # an incompatible feature that nobody knows
        assert ferrotype("info", tmp_path / "odd.qcow2", "--json", code=4).document["kind"] == "UnsupportedError"
        assert not (tmp_path / "new.ferro").exists()

    def test_one_that_names_what_it_may_not_open(self, tmp_path: Path) -> None:
        need("qemu-img")
        elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
        elsewhere.mkdir()
        folder.mkdir()
        (elsewhere / "base.raw").write_bytes(b"base" * MiB)
        for name in (str(elsewhere / "base.raw"), "../elsewhere/base.raw"):
            top = folder / "top.qcow2"
            run("qemu-img", "create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", top)
            for words in (("info", top), ("checksum", top), ("convert", top, tmp_path / "out.raw")):
                done = ferrotype(*words, "--json", code=4)
                assert done.document["kind"] == "NotAllowed"
                assert "--allow-related" in done.err
            for allowed in (elsewhere, elsewhere / "base.raw"):
                found = ferrotype("checksum", top, "--allow-related", allowed).out.split()[0]
                assert found == ferrotype("checksum", elsewhere / "base.raw").out.split()[0]
            ferrotype("checksum", top, "--allow-related", tmp_path / "other", code=4)
        assert not (tmp_path / "out.raw").exists()


@pytest.fixture
def small_mount(tmp_path: Path) -> Iterator[Path]:
    """8 MiB and no more."""
    folder = tmp_path / "small"
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=8m", "none", folder)
    try:
        yield folder
    finally:
        run("umount", folder)


class Test6Failed:
    """Reading or writing fails."""

    def test_a_full_target_keeps_what_it_has(self, disk: Path, small_mount: Path, tmp_path: Path) -> None:
        image = small_mount / "a.ferro"
        ferrotype("backup", disk, image)
        good = ferrotype("checksum", image).out
        (tmp_path / "noise.img").write_bytes(os.urandom(20 * MiB))
        for _ in range(2):  # the second one takes up what the first one left
            done = attempt("backup", tmp_path / "noise.img", image, "--pack-size", "1MiB")
            assert done.code == 2
            done = ferrotype("backup", tmp_path / "noise.img", image, code=6)
            assert "space" in done.err
            assert str(image) in done.err
        (snapshot,) = ferrotype("list", image, "--json").document["snapshots"]
        assert snapshot["name"] == "disk.img"
        assert ferrotype("verify", image, "--deep", "--json").document["ok"] is True
        assert ferrotype("checksum", image).out == good
        ferrotype("prune", image)
        ferrotype("backup", disk, image)

    def test_a_full_target_of_a_restore(self, image: Path, small_mount: Path) -> None:
        (small_mount / "ballast").write_bytes(bytes(6 * MiB))
        assert "space" in ferrotype("restore", image, small_mount / "out.img", code=6).err
        assert [path.name for path in small_mount.iterdir()] == ["ballast"]

    def test_a_folder_that_is_not_there(self, disk: Path, tmp_path: Path) -> None:
        assert "does not exist" in ferrotype("backup", disk, tmp_path / "no" / "a.ferro", code=6).err

    def test_standard_output(self, image: Path) -> None:
        for words in (["list", image], ["list", image, "--json"], ["--help"]):
            for redirect, code, said in (
                (">/dev/full", 6, "no space left"),
                ("| true; exit ${PIPESTATUS[0]}", 6, ""),
            ):
                done = run_in_shell(f'"$@" {redirect}', *words)
                assert done[0] == code or (not said and done[0] == 0), (words, redirect)
                assert said in done[1]
                assert "Traceback" not in done[1]
        assert run_in_shell('"$@" >&-', "list", "-q", image) == (0, "")
        assert run_in_shell('"$@" >/dev/null 2>&-', "list", image) == (0, "")
        assert run_in_shell('"$@" <&-', "restore", image, "/dev/null")[0] == 3


def run_in_shell(line: str, *words: str | Path) -> tuple[int, str]:
    import subprocess

    from tests.cli.program import PROGRAM, environment

    done = subprocess.run(
        ["bash", "-c", line, "bash", *PROGRAM, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(),
        check=False,
    )
    return done.returncode, done.stderr.decode()


def test_8_a_device_that_cannot_be_read(tmp_path: Path) -> None:
    """The end of a loop device whose file was cut answers with an input/output error."""
    backing = tmp_path / "backing"
    content = os.urandom(4 * MiB)
    backing.write_bytes(content)
    with loop(backing) as device:
        os.truncate(backing, 3 * MiB)
        assert "could not be read" in ferrotype("checksum", device, code=8).err
        done = ferrotype("backup", device, tmp_path / "a.ferro", "--json", code=8)
        assert any("could not be read" in warning for warning in done.document["warnings"])
    assert ferrotype("verify", tmp_path / "a.ferro", "--json", code=8).document["ok"] is True
    assert "are zeros" in ferrotype("restore", tmp_path / "a.ferro", tmp_path / "out.img", code=8).err
    assert (tmp_path / "out.img").read_bytes() == content[: 3 * MiB] + bytes(MiB)


def test_8_a_dirty_file_system_is_kept_whole(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.img", seed=3)
    part = tmp_path / "part"
    with disk.open("r+b") as file:
        file.seek(6 * MiB)
        part.write_bytes(file.read(16 * MiB))
        run("debugfs", "-w", "-R", "set_super_value state 0", part)
        file.seek(6 * MiB)
        file.write(part.read_bytes())
    done = ferrotype("backup", disk, tmp_path / "a.ferro", "--json", code=8)
    assert len(done.document["warnings"]) == 1
    assert done.document["free_bytes"] < 5 * MiB
    assert "warning: " in done.err
    assert ferrotype("info", tmp_path / "a.ferro", "--json").document["volumes"][1]["clean"] is False
    ferrotype("restore", tmp_path / "a.ferro#2", tmp_path / "back", code=0)
    run("cmp", part, tmp_path / "back")
    assert ferrotype("backup", disk, tmp_path / "a.ferro", "--all-sectors", "-q").err == ""


def test_a_file_is_raw_by_its_suffix_or_by_word(tmp_path: Path) -> None:
    need("qemu-img")
    named = tmp_path / "named.img"
    run("qemu-img", "create", "-f", "qcow2", named, "1M")
    size = named.stat().st_size
    for words in (("info", named), ("checksum", named), ("backup", named, tmp_path / "a.ferro")):
        done = ferrotype(*words, code=2)
        assert "--format raw, or qcow2" in done.err
    assert ferrotype("checksum", named, "--format", "raw", "--json").document["size"] == size
    unnamed = tmp_path / "unnamed"
    unnamed.write_bytes(b"some bytes" * 100 * KiB)
    done = ferrotype("checksum", unnamed)
    assert f"{unnamed} is read as a raw disk" in done.err
    for suffix in (".raw", ".img", ".dd", ".iso", ".bin", ".IMG"):
        shutil.copy(unnamed, tmp_path / f"x{suffix}")
    assert ferrotype("checksum", tmp_path / "x.dd").err == ""
    assert ferrotype("checksum", named, "--format", "qcow2", "--json").document["size"] == MiB
    ferrotype("info", unnamed, "--format", "qcow2", code=4)  # it is none
    assert "no format called 'qcow9'" in ferrotype("info", unnamed, "--format", "qcow9", code=2).err
