"""``copy`` and ``salvage`` as a user calls them."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from ferrotype.objects.container import Container
from ferrotype.objects.layout import BLOCK
from tests.cli.conftest import PASSPHRASE
from tests.cli.program import ferrotype, tree
from tests.cli.test_verbs import TIME, check_shape

COPY = {
    "copied": [{"id": str, "source": str, "name": str}],
    "skipped": [str],
    "chunks": int,
    "stored_bytes": int,
    "sealed_anew": bool,
    "dry_run": bool,
}
SALVAGE = {
    "snapshots": [
        {
            "id": re.compile("[0-9a-f]{32}"),
            "name": str,
            "created": TIME,
            "complete": bool,
            "lost": [{"disk": str, "start": int, "length": int, "files": [str]}],
        }
    ],
    "lost_snapshots": [str],
    "chunks": {"intact": int, "damaged": int, "missing": int, "unused": int},
    "problems": [str],
    "kept": [str],
}


def digest(reference: str) -> str:
    return str(ferrotype("checksum", reference, "--json").document["digest"])


def test_copy(image: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.ferro"
    planned = ferrotype("copy", "-n", image, target, "--json").document
    check_shape(planned, COPY)
    assert (planned["dry_run"], len(planned["copied"])) == (True, 2)
    assert tree(tmp_path) == {}
    done = ferrotype("copy", f"{image}::first", target, "--json").document
    check_shape(done, COPY)
    assert [one["name"] for one in done["copied"]] == ["first"]
    assert done["copied"][0]["id"] == done["copied"][0]["source"]
    more = ferrotype("copy", image, target)
    assert "1 snapshot copied" in more.out
    assert "(first) is in" in more.err
    assert (
        ferrotype("list", target, "--json").document["snapshots"]
        == ferrotype("list", image, "--json").document["snapshots"]
    )
    assert digest(f"{target}::latest") == digest(f"{image}::latest")
    ferrotype("verify", "--deep", target)
    named = ferrotype("copy", image, tmp_path / "one.ferro", "--snapshot", "latest", "--json").document
    assert len(named["copied"]) == 1


def test_copy_refuses(image: Path, locked: Path, copy: Path, tmp_path: Path) -> None:
    before = copy.read_bytes()
    alias = tmp_path / "alias.ferro"
    alias.symlink_to(copy)
    ferrotype("copy", copy, alias, code=3)
    ferrotype("copy", copy, copy, code=3)
    ferrotype("copy", f"{copy}::nothing", tmp_path / "x.ferro", code=2)
    ferrotype("copy", f"{copy}#1", tmp_path / "x.ferro", code=2)
    ferrotype("copy", tmp_path / "nothing.ferro", tmp_path / "x.ferro", code=2)
    ferrotype("copy", image, tmp_path / "no folder" / "x.ferro", code=6)
    ferrotype("copy", locked, tmp_path / "x.ferro", code=5)
    ferrotype("copy", image, tmp_path / "x.ferro", code=5, env={"FERROTYPE_PASSWORD": "x"})
    ferrotype("copy", image, copy, "--split", "64MiB", code=2)
    assert copy.read_bytes() == before


def test_copy_between_images_with_other_keys(locked: Path, copy: Path, password: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.ferro"
    ferrotype("copy", locked, target, "--password-file", password)
    ferrotype("verify", target, "--password-file", password)
    done = ferrotype("copy", copy, target, "--snapshot", "first", "--target-password-file", password, "--json")
    assert done.document["sealed_anew"]
    assert any("other keys" in sentence for sentence in done.document["warnings"])
    there = ferrotype("checksum", f"{target}::first", "--json", env={"FERROTYPE_PASSWORD": PASSPHRASE}).document
    assert there["digest"] == digest(f"{copy}::first")
    opened = ferrotype("copy", locked, copy, "--password-file", password, code=8)
    assert "is not encrypted" in opened.err


def test_salvage_of_a_whole_image(image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.ferro"
    document = ferrotype("salvage", image, out, "--json").document
    check_shape(document, SALVAGE)
    assert document["problems"] == document["lost_snapshots"] == document["warnings"] == []
    assert [one["complete"] for one in document["snapshots"]] == [True, True]
    assert document["kept"] == [one["id"] for one in document["snapshots"]]
    assert digest(f"{out}::latest") == digest(f"{image}::latest")
    ferrotype("salvage", image, out, code=3)
    ferrotype("salvage", image, image, code=3)
    ferrotype("salvage", image, "--split", "64MiB", code=2)


def test_salvage_of_a_damaged_image(copy: Path, tmp_path: Path) -> None:
    damaged, out = tmp_path / "damaged.ferro", tmp_path / "out.ferro"
    data = copy.read_bytes()
    middle = len(data) // 2
    damaged.write_bytes(bytes(5 * BLOCK) + data[5 * BLOCK : middle] + data[middle + 1000 :])
    kept = damaged.read_bytes()
    for verb in ("list", "verify"):
        ferrotype(verb, damaged, code=4)
    done = ferrotype("salvage", damaged, out, "--json", code=8).document
    check_shape(done, SALVAGE)
    assert damaged.read_bytes() == kept
    losses = [loss for one in done["snapshots"] for loss in one["lost"]]
    assert losses
    assert any(loss["files"] for loss in losses)
    assert len(done["warnings"]) >= len(losses)
    listed = ferrotype("list", out, "--json", code=8).document["snapshots"]
    assert all("salvaged" in one["tags"] for one in listed if one["id"] not in {s["id"] for s in done["snapshots"]})
    ferrotype("verify", "--deep", out, code=8)
    first = done["snapshots"][0]
    restored, original = tmp_path / "restored.img", tmp_path / "original.img"
    ferrotype("restore", f"{out}::first", restored, code=8 if first["lost"] else 0)
    ferrotype("restore", f"{copy}::first", original)
    left = bytearray(original.read_bytes())
    for loss in first["lost"]:
        left[loss["start"] : loss["start"] + loss["length"]] = bytes(loss["length"])
    assert restored.read_bytes() == left
    text = ferrotype("salvage", damaged, code=8)
    assert "with losses" in text.out
    assert "bytes at" in text.err


def test_salvage_says_why_it_cannot(locked: Path, tmp_path: Path) -> None:
    ferrotype("salvage", tmp_path / "nothing.ferro", code=2)
    empty = tmp_path / "empty.ferro"
    empty.write_bytes(bytes(100_000))
    ferrotype("salvage", empty, code=4)
    ferrotype("salvage", locked, code=5)
    ferrotype("salvage", locked, code=5, env={"FERROTYPE_PASSWORD": "wrong"})
    headless = tmp_path / "headless.ferro"
    shutil.copy(locked, headless)
    with headless.open("r+b") as file:
        file.write(bytes(6 * BLOCK))  # volume header, anchors, configuration, key slot
    out = tmp_path / "out.ferro"
    ferrotype("salvage", headless, out, env={"FERROTYPE_PASSWORD": PASSPHRASE}, code=8)
    ferrotype("verify", out, env={"FERROTYPE_PASSWORD": PASSPHRASE})


@pytest.mark.parametrize("lost", ["tail", "a pack that no snapshot needs", "a spare copy"])
def test_salvage_that_cannot_name_all_that_may_be_lost_says_so(copy: Path, lost: str) -> None:
    container = Container.open(copy)
    prefix = "spare/" if lost == "a spare copy" else "pack/"
    entries = [entry for entry in container.live() if entry.name.startswith(prefix)]
    container.close()
    if lost == "tail":
        os.truncate(copy, copy.stat().st_size - 8192)  # catalog and newest snapshot
    elif lost == "a spare copy":
        garble(copy, entries[0].offset + 200)
    else:
        for snapshot in ferrotype("list", copy, "--json").document["snapshots"]:
            ferrotype("forget", copy, snapshot["id"])
        garble(copy, entries[0].offset + entries[0].length)
    done = ferrotype("salvage", copy, "--json", code=0 if lost == "a spare copy" else 8)
    assert done.document["problems"]


def garble(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (old,) = file.read(1)
        file.seek(at)
        file.write(bytes([old ^ 255]))
