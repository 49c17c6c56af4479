"""What a reference may look like, and what it leads to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ferrotype.engine.references import parse
from ferrotype.errors import UsageError
from ferrotype.units import MiB
from tests.cli.program import ferrotype
from tests.machine import run


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.ferro", ("a.ferro", None, None, None)),
        ("a.ferro::latest", ("a.ferro", "latest", None, None)),
        ("a.ferro::latest~1", ("a.ferro", "latest~1", None, None)),
        ("a.ferro::", ("a.ferro", "latest", None, None)),
        ("a.ferro::x/sda", ("a.ferro", "x", "sda", None)),
        ("a.ferro::x/sda#2", ("a.ferro", "x", "sda", "2")),
        ("a.ferro::/sda", ("a.ferro", "latest", "sda", None)),
        ("a.ferro#ESP", ("a.ferro", None, None, "ESP")),
        ("/dev/sda#2", ("/dev/sda", None, None, "2")),
        ("/a#b/c.img", ("/a#b/c.img", None, None, None)),
        ("/a#b/c.img#1", ("/a#b/c.img", None, None, "1")),
        ("/a::b/c.ferro::latest", ("/a::b/c.ferro", "latest", None, None)),
        ("a.img#My Disk", ("a.img", None, None, "My Disk")),
    ],
)
def test_parts(text: str, parts: tuple[str, ...]) -> None:
    found = parse(text)
    assert (str(found.path), found.snapshot, found.disk, found.partition) == parts


@pytest.mark.parametrize("text", ["", "a.img#"])
def test_what_names_nothing(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


def test_a_name_that_exists_is_meant_whatever_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a#2", "b::latest", "c::x#1"):
        Path(name).touch()
        found = parse(name)
        assert (str(found.path), found.snapshot, found.disk, found.partition) == (name, None, None, None)
    assert parse("b::latest#1").partition == "1"
    assert str(parse("a#2::latest").path) == "a#2"


def digest(reference: str | Path) -> str:
    return ferrotype("checksum", reference).out.split()[0]


def test_snapshots(image: Path) -> None:
    first, second = (s["id"] for s in ferrotype("list", image, "--json").document["snapshots"])
    older, newer = digest(f"{image}::{first}"), digest(f"{image}::{second}")
    assert older != newer
    for same in ("latest~1", first[:8], first[:6].upper(), "first", "keep", "latest~1/disk.img"):
        assert digest(f"{image}::{same}") == older, same
    for same in ("", "::", "::latest", "::latest~0", "::disk.img", "::/disk.img"):
        assert digest(f"{image}{same}") == newer, same


def test_partitions(disk: Path, image: Path, tmp_path: Path) -> None:
    esp, data = (tmp_path / name for name in ("esp", "data"))
    content = disk.read_bytes()
    esp.write_bytes(content[MiB : 6 * MiB])
    data.write_bytes(content[6 * MiB : 22 * MiB])
    for part, number, label in ((esp, 1, "ESP"), (data, 2, "DATA")):
        wanted = digest(part)
        assert digest(f"{disk}#{number}") == wanted
        assert digest(f"{disk}#{label}") == wanted
        assert ferrotype("info", f"{image}::first#{label}", "--json").document["virtual_size"] == part.stat().st_size
    for reference in (f"{image}#DATA", f"{image}::latest/disk.img#2"):
        (tmp_path / "back").unlink(missing_ok=True)
        ferrotype("restore", reference, tmp_path / "back")
        run("e2fsck", "-fn", tmp_path / "back")


def test_a_partition_backed_up_alone(disk: Path, tmp_path: Path) -> None:
    """Its disk is called after it, and that name is found again in spite of its sign."""
    path = tmp_path / "a.ferro"
    ferrotype("backup", f"{disk}#ESP", f"{disk}#2", path)
    (snapshot,) = ferrotype("list", path, "--json").document["snapshots"]
    assert [(d["name"], d["size"]) for d in snapshot["disks"]] == [
        ("disk.img#ESP", 5 * MiB),
        ("disk.img#2", 16 * MiB),
    ]
    done = ferrotype("checksum", path, code=2)
    assert "disk.img#ESP" in done.err
    assert "/DISK" in done.err
    assert ferrotype("info", f"{path}::latest/disk.img#2", "--json").document["virtual_size"] == 16 * MiB
    assert (
        ferrotype("restore", f"{path}::latest/disk.img#ESP", tmp_path / "esp", "--json").document["disk_bytes"]
        == 5 * MiB
    )


def test_odd_paths(disk: Path, image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a#1::b [x]"
    folder.mkdir()
    odd = Path(shutil.copy(image, folder / "we::ird#2.ferro"))
    assert digest(odd) == digest(f"{odd}::latest") == digest(image)
    assert ferrotype("info", f"{odd}::first#ESP", "--json").document["virtual_size"] == 5 * MiB
    assert str(folder) in ferrotype("info", odd).out.replace("\n", "")
    source = shutil.copy(disk, str(folder / "d#1.img"))
    ferrotype("backup", source, folder / "new::.ferro")
    assert [s["name"] for s in ferrotype("list", folder / "new::.ferro", "--json").document["snapshots"]] == [
        "d#1.img"
    ]


def test_names_that_are_no_text(disk: Path, tmp_path: Path) -> None:
    odd = bytes(tmp_path) + b"/\xff\x1b[31m.img"
    Path(os.fsdecode(odd)).write_bytes(disk.read_bytes())
    path = bytes(tmp_path) + b"/\xfe.ferro"
    ferrotype("backup", odd, path)
    ferrotype("backup", odd, path, "--name", b"\xfd", "--tag", b"\xfc")
    names = [snapshot["name"] for snapshot in ferrotype("list", path, "--json").document["snapshots"]]
    assert names[1] == "\ufffd"
    assert names[0].endswith(".img")
    assert "\ufffd" in ferrotype("list", path).out
