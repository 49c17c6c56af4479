"""Disk images whose disk cannot be read as things are: ``info`` tells what it can, all else fails at once."""

from __future__ import annotations

from pathlib import Path

import pytest

import ferrotype as api
from ferrotype.errors import InvalidImage, KeyRefused
from ferrotype.units import KiB, MiB
from tests.cli.program import ferrotype
from tests.formats.test_luks import SECRET, encrypted
from tests.machine import run

SIZE = 3 * MiB
NO_DISK = ("sector_size", "table", "disk_id", "volumes", "free_bytes", "hole_bytes")


@pytest.fixture
def child(tmp_path: Path) -> Path:
    """A qcow2 whose backing file is gone."""
    folder = tmp_path / "in"
    folder.mkdir()
    path, named = folder / "child.qcow2", ["-b", "base.qcow2", "-F", "qcow2"]
    run("qemu-img", "create", "-q", "-f", "qcow2", folder / "base.qcow2", str(SIZE))
    run("qemu-img", "create", "-q", "-f", "qcow2", *named, path)
    run("qemu-img", "snapshot", "-c", "before", path)
    whole = ferrotype("info", path, "--json").document
    assert whole["readable"] is True
    assert set(NO_DISK) <= set(whole)
    (folder / "base.qcow2").unlink()
    return path


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encrypted(tmp_path_factory.mktemp("luks"))[0]


def test_info_tells_what_the_headers_say(child: Path) -> None:
    told = ferrotype("info", child, "--json", code=4).document
    assert (told["format"], told["virtual_size"], told["readable"]) == ("qcow2", SIZE, False)
    assert told["container"]["backing"] == {"name": "base.qcow2", "format": "qcow2"}
    assert told["container"]["unit"] == 64 * KiB
    assert told["disks"] == ["before"]
    assert told["stored_size"] > 0
    assert [told[key] for key in NO_DISK] == [None, None, None, [], None, None]
    assert [file["path"] for file in told["files"]] == [str(child)]
    assert told["kind"] == "InvalidImage"
    assert "the backing file 'base.qcow2' cannot be used" in told["error"]
    plain = ferrotype("info", child, code=4)
    assert told["error"] in plain.err
    assert f"{child}: qcow2, 3 MiB ({SIZE} bytes)" in plain.out
    assert "backing: name base.qcow2" in plain.out
    assert "further disks in it: before" in plain.out
    assert "sector" not in plain.out


def test_info_of_a_disk_inside_it(child: Path) -> None:
    assert ferrotype("info", f"{child}::before", "--json", code=4).document["readable"] is False
    assert "holds no disk called 'after'" in ferrotype("info", f"{child}::after", code=2).err
    assert "'base.qcow2'" in ferrotype("info", f"{child}#1", code=4).err  # nobody knows its partitions


def test_info_without_the_passphrase(locked: Path, tmp_path: Path) -> None:
    wrong = {"FERROTYPE_PASSWORD": "no"}
    for env, says in (({}, "is encrypted; give --password-file"), (wrong, "opens no key slot")):
        told = ferrotype("info", locked, "--json", env=env, code=5).document
        assert (told["virtual_size"], told["readable"], told["container"]["encrypted"]) == (SIZE, False, True)
        assert told["container"]["encryption"]["cipher"] == "aes-xts-plain64"
        assert says in told["error"]
        assert says in ferrotype("convert", locked, tmp_path / "out.raw", env=env, code=5).err
        assert says in ferrotype("checksum", locked, env=env, code=5).err
    assert list(tmp_path.iterdir()) == []
    told = ferrotype("info", locked, "--json", env={"FERROTYPE_PASSWORD": SECRET}).document
    assert told["readable"] is True


def test_info_of_a_damaged_image_is_an_error(child: Path) -> None:
    data = child.read_bytes()
    child.write_bytes(data[:40] + b"\xff" * 8 + data[48:])  # where the L1 table is
    assert ferrotype("info", child, "--json", code=4).document["kind"] == "InvalidImage"


def test_everything_else_fails_at_once(child: Path, tmp_path: Path) -> None:
    raw, out = tmp_path / "same.raw", tmp_path / "out"
    raw.write_bytes(bytes(SIZE))
    out.mkdir()
    for words in (
        ("backup", child, out / "a.ferro"),
        ("convert", child, out / "a.raw"),
        ("convert", raw, out / "a.qcow2", "-B", child, "--backing-format", "qcow2"),
        ("compare", raw, child),
        ("checksum", f"{child}::before"),
        ("map", child),
        ("restore", child, out / "a.raw"),
        ("verify", child),
    ):
        done = ferrotype(*words, "--json", code=4)
        assert "the backing file 'base.qcow2' cannot be used" in done.document["error"], words
        assert done.document["kind"] == "InvalidImage"
    assert list(out.iterdir()) == []


def test_a_file_that_may_not_be_opened(child: Path, tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", str(SIZE))
    (child.parent / "base.qcow2").symlink_to(tmp_path / "base.qcow2")
    told = ferrotype("info", child, "--json", code=4).document
    assert told["readable"] is False
    assert "outside its own folder" in told["error"]
    assert ferrotype("checksum", child, "--json", code=4).document["kind"] == "NotAllowed"
    assert ferrotype("info", child, "--allow-related", tmp_path, "--json").document["readable"] is True


def test_the_python_interface_hands_out_no_such_disk(child: Path, locked: Path, tmp_path: Path) -> None:
    for path, kind in ((child, InvalidImage), (locked, KeyRefused)):
        with pytest.raises(kind), api.open_disk(path):
            pass
        for act in (
            lambda path=path: api.info(path),
            lambda path=path: api.checksum(path),
            lambda path=path: api.convert(path, tmp_path / "out.raw"),
            lambda path=path: api.backup(path, tmp_path / "out.ferro"),
        ):
            with pytest.raises(kind):
                act()
    assert not list(tmp_path.glob("out*"))
