"""What is said where an image is damaged, or where something else was meant: the file, what is wrong, what to do."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from ferrotype.objects.container import Container
from ferrotype.units import KiB, MiB
from tests.cli.program import ferrotype


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of one disk, plain and encrypted, and what opens that."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "disk.img").write_bytes(os.urandom(3 * MiB))
    for name in ("right", "wrong"):
        (folder / name).write_text(name)
    (folder / "key").write_bytes(b"a key file")
    ferrotype("backup", folder / "disk.img", folder / "plain.ferro")
    ferrotype("backup", folder / "disk.img", folder / "locked.ferro", "--password-file", folder / "right")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    for file in made.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


def wipe(image: Path, *prefixes: str) -> None:
    """Overwrite all objects of some kinds."""
    container = Container.open(image)
    entries = [entry for entry in container.live() if entry.name.startswith(prefixes)]
    container.close()
    with image.open("r+b") as file:
        for entry in entries:
            file.seek(entry.offset)
            file.write(b"\xa5" * entry.span)


def cut(image: Path, size: int) -> None:
    os.truncate(image, size)


@pytest.mark.parametrize("verb", ["list", "verify", "info", "checksum", "prune"])
def test_that_all_key_slots_are_lost_is_said(here: Path, verb: str) -> None:
    image = here / "locked.ferro"
    wipe(image, "key/", "spare/")
    for secret in ((), ("--password-file", here / "right")):
        error = ferrotype(verb, image, *secret, code=4).err
        assert "locked.ferro" in error
        assert "all of its key slots are lost" in error
        assert "salvage" in error


def test_key_list_tells_lost_slots_from_none(here: Path) -> None:
    assert "is not encrypted" in ferrotype("key", "list", here / "plain.ferro").out
    wipe(here / "locked.ferro", "key/", "spare/")
    error = ferrotype("key", "list", here / "locked.ferro", code=4).err
    assert "locked.ferro: the image is encrypted, and all of its key slots are lost" in error
    for name in ("plain.ferro", "locked.ferro"):
        wipe(here / name, "config", "key/", "spare/")
        assert "is damaged" in ferrotype("key", "list", here / name, code=4).err


def test_a_wrong_key_is_told_with_the_damage_that_may_be_why(here: Path) -> None:
    image, wrong = here / "locked.ferro", ("--password-file", here / "wrong")
    whole = ferrotype("list", image, *wrong, code=5).err
    assert "locked.ferro: the passphrase opens none" in whole
    assert "damaged" not in whole
    assert "key file was given" in ferrotype("list", image, "--key-file", here / "key", code=5).err
    cut(image, image.stat().st_size - 64 * KiB)
    for verb in ("list", "verify"):
        error = ferrotype(verb, image, *wrong, code=5).err
        assert "is cut short or damaged, and its key slots may be lost in part" in error
        assert f"ferrotype salvage {image}" in error
    assert "locked.ferro" in ferrotype("salvage", image, *wrong, code=5).err


@pytest.mark.parametrize("name", ["plain.ferro", "locked.ferro"])
def test_a_cut_image_is_not_said_to_be_empty(here: Path, name: str) -> None:
    image = here / name
    cut(image, 2 * MiB)
    secret = ("--password-file", here / "right") if name == "locked.ferro" else ()
    done = ferrotype("list", image, *secret, code=8)
    assert "yet" not in done.out
    for said in (done.out, ferrotype("restore", image, here / "out.img", *secret, code=4).err):
        assert f"{image}: no snapshot can be found in it, and it is cut short or damaged" in said
        assert "ferrotype salvage" in said
    assert ferrotype("key", "list", image, code=8).out


@pytest.mark.parametrize(
    ("words", "code", "sentences"),
    [
        (["list", "plain.ferro", "--password-file", "right"], 5, ["plain.ferro: a passphrase", "not encrypted"]),
        (["salvage", "plain.ferro", "--password-file", "right"], 5, ["plain.ferro: a passphrase", "not encrypted"]),
        (["key", "add", "plain.ferro", "--new-password-file", "right"], 2, ["plain.ferro", "--encrypt", "copy"]),
        (["backup", "disk.img", "new.ferro", "--encrypt"], 5, ["new.ferro would be a new image", "--password-file"]),
        (["backup", "disk.img", "plain.ferro", "--encrypt"], 2, ["plain.ferro exists", "leave out --encrypt"]),
        (["list", "plain.ferro::latest"], 2, ["plain.ferro::latest does not exist", "name plain.ferro"]),
        (["verify", "plain.ferro::latest/x#2"], 2, ["does not exist", "name plain.ferro"]),
        (["info", "plain.ferro::latest/sda"], 2, ["plain.ferro: ", "no disk 'sda'; there is: disk.img"]),
        (["checksum", "plain.ferro::nobody"], 2, ["plain.ferro: no snapshot is called 'nobody'"]),
        (["bakup", "disk.img", "plain.ferro"], 2, ["No such command 'bakup'", "backup"]),
        (["zzzz"], 2, ["No such command 'zzzz'", "--help"]),
        *(
            (
                [*words, "disk.img"],
                4,
                ["disk.img is not a ferrotype image", "ferrotype info disk.img", "backup disk.img"],
            )
            for words in (["list"], ["verify"], ["prune"], ["compact"], ["key", "list"], ["backup", "plain.ferro"])
        ),
    ],
)
def test_a_sentence_names_the_file_and_the_next_step(
    words: list[str], code: int, sentences: list[str], here: Path
) -> None:
    done = ferrotype(*words, code=code, cwd=here)
    assert done.out == ""
    for sentence in sentences:
        assert sentence in done.err
    assert "field magic" not in done.err
    assert not (here / "new.ferro").exists()


@pytest.mark.parametrize("verb", ["restore", "checksum", "convert"])
@pytest.mark.parametrize("name", ["plain.ferro", "locked.ferro"])
def test_damage_is_told_with_its_place_and_the_next_step(here: Path, name: str, verb: str) -> None:
    image = here / name
    container = Container.open(image)
    pack = max(
        (entry for entry in container.live() if entry.name.startswith("pack/")), key=lambda entry: entry.length
    )
    container.close()
    with image.open("r+b") as file:  # of 24 chunks in the order of the disk, one in the middle
        file.seek(pack.offset + pack.length // 2)
        file.write(b"\xa5" * 16)
    secret = ("--password-file", here / "right") if name == "locked.ferro" else ()
    words = {
        "restore": ("restore", image, here / "out.img"),
        "checksum": ("checksum", image),
        "convert": ("convert", image, here / "out.qcow2"),
    }[verb]
    error = ferrotype(*words, *secret, code=4).err
    place = re.search(r"disk disk\.img: (\d+) bytes at (\d+) cannot be given back: chunk", error)
    assert place is not None, error
    damaged = ferrotype("verify", image, *secret, "--json", code=1).document["damaged"]
    assert (int(place[2]), int(place[1])) == (damaged[0]["start"], damaged[0]["length"])
    assert f"`ferrotype verify {image}`" in error
    assert f"`ferrotype salvage {image} OUT`" in error
