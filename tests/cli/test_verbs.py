"""Every verb: what a person reads, and the JSON document that scripts rely on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ferrotype.units import KiB, MiB
from tests.cli.program import Done, attempt, ferrotype
from tests.machine import loop, run

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


def check_shape(document: Any, shape: Any) -> None:
    """``document`` has every key of ``shape``, with values of the types it names."""
    if isinstance(shape, dict):
        assert shape.keys() <= document.keys(), shape.keys() - document.keys()
        for key, inner in shape.items():
            check_shape(document[key], inner)
    elif isinstance(shape, list):
        assert isinstance(document, list)
        for entry in document:
            check_shape(entry, shape[0])
    elif isinstance(shape, re.Pattern):
        assert shape.fullmatch(document), document
    else:
        assert isinstance(document, shape), (document, shape)
        assert shape is not int or not isinstance(document, bool)


LIST = {
    "snapshots": [
        {
            "id": re.compile("[0-9a-f]{32}"),
            "created": TIME,
            "name": str,
            "tags": [str],
            "disks": [{"name": str, "size": int, "sector_size": int}],
            "stored_bytes": int,
        }
    ]
}
VOLUME = {
    "index": int,
    "start": int,
    "size": int,
    "type": str,
    "label": str,
    "filesystem": str,
    "block_size": int,
    "used_bytes": int,
    "clean": bool,
}
INFO = {"format": str, "virtual_size": int, "sector_size": int, "table": str, "volumes": [VOLUME]}
MAP = {"extents": [{"start": int, "length": int, "data": bool, "zero": bool, "free": bool}]}
BACKUP = {
    "snapshot": re.compile("[0-9a-f]{32}"),
    "disk_bytes": int,
    "read_bytes": int,
    "stored_bytes": int,
    "free_bytes": int,
    "deduplicated_bytes": int,
    "seconds": float,
}
DAMAGE = {"snapshot": str, "disk": str, "start": int, "length": int, "files": [str]}
VERIFY = {"ok": bool, "checked_bytes": int, "damaged": [DAMAGE]}
CHECKSUM = {"algorithm": str, "digest": re.compile("[0-9a-f]{64}")}


def test_list(image: Path, disk: Path) -> None:
    document = ferrotype("list", image, "--json").document
    check_shape(document, LIST)
    first, second = document["snapshots"]
    assert (first["name"], first["tags"], second["name"], second["tags"]) == ("first", ["keep"], "disk.img", [])
    assert first["disks"] == [{"name": "disk.img", "size": 24 * MiB, "sector_size": 512, "unreadable": []}]
    assert first["created"] < second["created"]
    assert first["stored_bytes"] > 2 * MiB > 300 * KiB > second["stored_bytes"] > 64 * KiB
    lines = ferrotype("list", image).out.splitlines()
    assert lines[0].split() == ["snapshot", "taken", "what", "disk", "data", "new"]
    assert [line.split()[0] for line in lines[1:]] == [first["id"][:8], second["id"][:8]]
    assert "first [keep]" in lines[1]
    assert "24 MiB" in lines[1]


@pytest.mark.parametrize("where", ["disk", "image"])
def test_info(where: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(where)
    document = ferrotype("info", path, "--json").document
    check_shape(document, INFO)
    assert document["format"] == {"disk": "raw", "image": "ferro"}[where]
    assert (document["virtual_size"], document["sector_size"], document["table"]) == (24 * MiB, 512, "gpt")
    esp, data = document["volumes"]
    assert (esp["index"], esp["start"], esp["size"]) == (1, MiB, 5 * MiB)
    assert (data["index"], data["start"], data["size"]) == (2, 6 * MiB, 16 * MiB)
    assert [(v["label"], v["filesystem"], v["clean"]) for v in (esp, data)] == [
        ("ESP", "vfat", True),
        ("DATA", "ext4", True),
    ]
    assert 2 * MiB < data["used_bytes"] < 8 * MiB
    text = ferrotype("info", path).out
    assert f"{24 * MiB} bytes" in text
    assert re.search(r"2 +6 MiB +16 MiB +ext4 +DATA", text)
    assert "▕" in text


def test_info_of_what_holds_nothing_known(tmp_path: Path) -> None:
    (tmp_path / "noise.img").write_bytes(b"nothing known " * 5000 + bytes(40 * 14))
    document = attempt("info", tmp_path / "noise.img", "--json").document
    assert document["table"] is None
    assert [volume["filesystem"] for volume in document["volumes"]] in ([], [None])


def test_map_covers_the_disk(disk: Path) -> None:
    document = ferrotype("map", disk, "--json").document
    check_shape(document, MAP)
    at = 0
    for extent in document["extents"]:
        assert extent["start"] == at
        assert extent["length"] > 0
        at += extent["length"]
    assert at == 24 * MiB
    free = sum(extent["length"] for extent in document["extents"] if extent["free"])
    info = ferrotype("info", disk, "--json").document
    kept = sum(volume["used_bytes"] for volume in info["volumes"])
    assert free == 21 * MiB - kept
    lines = ferrotype("map", disk).out.splitlines()[1:]
    assert [tuple(map(int, line.split()[:2])) for line in lines] == [
        (extent["start"], extent["length"]) for extent in document["extents"]
    ]


def test_backup(disk: Path, tmp_path: Path) -> None:
    document = ferrotype("backup", disk, tmp_path / "a.ferro", "--json").document
    check_shape(document, BACKUP)
    assert document["disk_bytes"] == 24 * MiB
    assert 2 * MiB < document["stored_bytes"] < document["read_bytes"] < 8 * MiB
    stored = (tmp_path / "a.ferro").stat().st_size
    assert 0 <= stored - document["stored_bytes"] < 128 * KiB
    free = sum(e["length"] for e in ferrotype("map", disk, "--json").document["extents"] if e["free"])
    assert document["free_bytes"] == free
    again = ferrotype("backup", disk, tmp_path / "a.ferro", "--json").document
    assert again["deduplicated_bytes"] > 2 * MiB
    assert again["stored_bytes"] < 64 * KiB
    text = ferrotype("backup", disk, tmp_path / "a.ferro").out
    assert re.match(r"snapshot [0-9a-f]{8} of disk.img: read .* of 24 MiB in .*; stored ", text)


def test_backup_of_several_disks_and_of_every_sector(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "other.img").write_bytes(b"other bytes" * 1000 + bytes(96))
    words = ("backup", disk, tmp_path / "other.img", tmp_path / "a.ferro", "--all-sectors", "--json")
    document = attempt(*words).document
    assert document["disk_bytes"] == 24 * MiB + 11096
    assert document["free_bytes"] == 0
    (snapshot,) = ferrotype("list", tmp_path / "a.ferro", "--json").document["snapshots"]
    assert [entry["name"] for entry in snapshot["disks"]] == ["disk.img", "other.img"]
    whole = ferrotype("restore", tmp_path / "a.ferro::latest/disk.img", tmp_path / "out.img", "--json").document
    assert whole["disk_bytes"] == 24 * MiB
    assert (tmp_path / "out.img").read_bytes() == disk.read_bytes()


def test_verify(image: Path) -> None:
    for words in ([], ["--deep"], ["--sample", "10%"]):
        document = ferrotype("verify", image, "--json", *words).document
        check_shape(document, VERIFY)
        assert document["ok"] is True
        assert document["damaged"] == []
        assert 0 < document["checked_bytes"] <= image.stat().st_size
    assert "no damage" in ferrotype("verify", image).out


def test_checksum_is_the_same_wherever_the_disk_is_kept(disk: Path, tmp_path: Path) -> None:
    """A backup without free space differs from its source there; the source without free space is the judge."""
    bare = tmp_path / "bare.img"
    bare.write_bytes(disk.read_bytes())
    with bare.open("r+b") as file:
        for extent in ferrotype("map", bare, "--json").document["extents"]:
            if extent["free"]:
                file.seek(extent["start"])
                file.write(bytes(extent["length"]))
    source = ferrotype("checksum", bare, "--json").document
    check_shape(source, CHECKSUM)
    with loop(bare) as device:
        assert ferrotype("checksum", device, "--json").document["digest"] == source["digest"]
    ferrotype("backup", bare, tmp_path / "a.ferro")
    assert ferrotype("checksum", tmp_path / "a.ferro", "--json").document["digest"] == source["digest"]
    ferrotype("restore", tmp_path / "a.ferro", tmp_path / "back.img")
    run("cmp", bare, tmp_path / "back.img")
    text = ferrotype("checksum", tmp_path / "back.img").out
    assert text == f"{source['digest']}  {tmp_path / 'back.img'}\n"
    with bare.open("r+b") as file:
        file.write(b"\x01")
    assert ferrotype("checksum", bare, "--json").document["digest"] != source["digest"]


def test_disks(disk: Path) -> None:
    with loop(disk, read_only=True) as device:
        document = attempt("disks", "--json").document
        check_shape(document, {"disks": [{"path": str, "size": int, "sector_size": int}]})
        found = {entry["path"]: entry for entry in document["disks"]}
        assert found[str(device)]["size"] == 24 * MiB
        assert found[str(device)]["read_only"] is True
        assert [v["label"] for v in found[str(device)]["volumes"]] == ["ESP", "DATA"]
        done = attempt("disks")
        assert str(device) in done.out
        assert "ext4" in done.out


def test_forget_prune_compact(copy: Path) -> None:
    before = copy.stat().st_size
    document = ferrotype("forget", copy, "--keep-last", "1", "--json").document
    check_shape(document, {"kept": [{"id": str, "reasons": [str]}], "forgotten": [str], "dry_run": bool})
    assert (len(document["kept"]), len(document["forgotten"])) == (1, 1)
    (left,) = ferrotype("list", copy, "--json").document["snapshots"]
    assert document["kept"] == [{"id": left["id"], "reasons": ["last"]}]
    pruned = ferrotype("prune", copy, "--json").document
    check_shape(pruned, {"freed_bytes": int, "live_bytes": int, "dry_run": bool})
    compacted = ferrotype("compact", copy, "--json").document
    check_shape(compacted, {"freed_bytes": int, "file_bytes": int})
    assert compacted["file_bytes"] == copy.stat().st_size <= before
    assert ferrotype("verify", copy, "--deep", "--json").document["ok"] is True


def test_forget_by_name_gives_the_space_back_at_once(copy: Path, disk: Path) -> None:
    done = ferrotype("forget", copy, "first", "--prune", "--json").document
    assert len(done["forgotten"]) == 1
    assert done["prune"]["freed_bytes"] >= 0
    assert [s["name"] for s in ferrotype("list", copy, "--json").document["snapshots"]] == ["disk.img"]
    ferrotype("forget", copy, "--keep-daily", "2", "first", code=2)
    ferrotype("forget", copy, code=2)
    ferrotype("forget", copy, "nobody", code=2)
    text = ferrotype("forget", copy, "disk.img").out
    assert re.match(r"forget +[0-9a-f]{8} ", text)
    assert "holds no snapshot" in ferrotype("list", copy).out
    assert ferrotype("list", copy, "--json").document["snapshots"] == []


def test_quiet_says_nothing(disk: Path, image: Path, tmp_path: Path) -> None:
    for words in (("list", image), ("info", image), ("backup", disk, tmp_path / "a.ferro"), ("verify", image)):
        done = ferrotype(*words, "-q", "--progress", "json")
        assert (done.out, done.err) == ("", "")
    assert ferrotype("list", tmp_path / "nothing", "-q", code=2).err.startswith("ferrotype: ")


def test_progress_as_json(disk: Path, tmp_path: Path) -> None:
    done = ferrotype("backup", disk, tmp_path / "a.ferro", "--progress", "json", "--json")
    lines = [json.loads(line) for line in done.err.splitlines()]
    assert lines
    for line in lines:
        assert line.keys() >= {"phase", "done", "total", "rate", "seconds_left"}
        assert isinstance(line["done"], int)
        assert line["total"] is None or line["done"] <= line["total"]
    assert {"backing up disk.img", "committing"} <= {line["phase"] for line in lines}
    assert done.document["disk_bytes"] == 24 * MiB
    quiet: Done = ferrotype("backup", disk, tmp_path / "a.ferro", "--progress", "auto")
    assert quiet.err == ""


def test_a_split_image(disk: Path, tmp_path: Path) -> None:
    noise = tmp_path / "noise.img"
    with noise.open("wb") as file, Path("/dev/urandom").open("rb") as source:
        file.write(source.read(80 * MiB))
    path = tmp_path / "split.ferro"
    attempt("backup", noise, path, "--split", "64MiB", "--pack-size", "8MiB")
    files = sorted(tmp_path.glob("split.ferro*"))
    assert len(files) == 2
    assert all(file.stat().st_size <= 64 * MiB for file in files)
    assert ferrotype("verify", path, "--json").document["ok"] is True
    assert ferrotype("checksum", path).out.split()[0] == ferrotype("checksum", noise).out.split()[0]
    assert "name the first" in ferrotype("list", files[1], code=2).err
    assert ferrotype("restore", path, files[1], "--force", code=3).err
    files[1].rename(tmp_path / "elsewhere")
    assert "split.ferro" in ferrotype("checksum", path, code=6).err


def test_dry_runs_speak_of_what_would_be(
    copy: Path, locked: Path, password: Path, disk: Path, tmp_path: Path
) -> None:
    """None says that it is done, or is so."""
    key = ("--password-file", password)
    for words, sentences in (
        (("backup", disk, tmp_path / "new.ferro"), ["would be a new image", "would read"]),
        (("backup", disk, copy), ["would read"]),
        (("restore", copy, tmp_path / "out.img"), ["would write"]),
        (("convert", disk, tmp_path / "out.qcow2"), ["would read", "and write"]),
        (("forget", copy, "--keep-last", "1"), ["would forget", "would keep"]),
        (("prune", copy), ["would be given back"]),
        (("compact", copy), ["would be given back"]),
        (("copy", copy, tmp_path / "new.ferro"), ["would be a new image", "would copy"]),
        (("copy", *key, locked, copy), ["would be sealed anew", "would copy", "could be read"]),
    ):
        done = attempt(words[0], "-n", *words[1:])
        assert done.code in (0, 8), done
        said = done.out + done.err
        for sentence in sentences:
            assert sentence in said, said
        assert "is a new image" not in said
        assert "nothing was" in said
