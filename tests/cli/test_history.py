"""What the program says of the history of an image: which snapshots are of one disk, and what became of the image."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ferrotype import api
from ferrotype.engine import remembered
from ferrotype.job import NullJob
from tests.cli.program import Done, ferrotype


def test_clones_are_shown_apart_and_forget_says_what_it_judged_together(tmp_path: Path, disk: Path) -> None:
    image = tmp_path / "office.ferro"
    for name in ("reception", "lab"):
        shutil.copy(disk, tmp_path / f"{name}.img")
        ferrotype("backup", tmp_path / f"{name}.img", image)
    ferrotype("backup", "--name", "again", tmp_path / "lab.img", image)
    shown = ferrotype("list", image, "--json").document
    first, second, third = (snapshot["id"] for snapshot in shown["snapshots"])
    assert [snapshot["group"] for snapshot in shown["snapshots"]] == [1, 2, 2]
    assert [group["snapshots"] for group in shown["groups"]] == [[first], [second, third]]
    assert shown["groups"][1]["disks"][0]["path"] == str((tmp_path / "lab.img").resolve())
    text = ferrotype("list", image).out
    assert "group 1: reception.img of" in text
    assert "group 2: lab.img of" in text
    told = ferrotype("forget", "-n", "--keep-last", "1", image).out.splitlines()
    assert [line.removeprefix("would ").split()[0] for line in told[:5]] == [
        "judged",
        "keep",
        "judged",
        "forget",
        "keep",
    ]
    done = ferrotype("forget", "--keep-last", "1", image, "--json").document
    assert [group["snapshots"] for group in done["groups"]] == [[first], [second, third]]
    assert done["forgotten"] == [second]
    ferrotype("restore", f"{image}::reception.img", tmp_path / "back.img")


def test_one_disk_needs_no_groups(image: Path) -> None:
    assert "group" not in ferrotype("list", image).out
    assert "judged" not in ferrotype("forget", "-n", "--keep-last", "1", image).out


# ---------------------------------------------------------------------- what a client remembers

Client = Callable[..., Done]


@pytest.fixture
def client(tmp_path: Path) -> Client:
    """The program, run by a user who has a memory."""

    def run(*words: str | Path, code: int = 0) -> Done:
        return ferrotype(*words, code=code, env={"XDG_STATE_HOME": str(tmp_path / "state")})

    return run


def memories(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "state" / "ferrotype" / "images").glob("*"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.img"
    path.write_bytes(b"content" * 20000)
    return path


def test_salvage_tells_that_the_newest_snapshot_is_not_found(client: Client, tmp_path: Path, small: Path) -> None:
    image = tmp_path / "x.ferro"
    client("backup", "--name", "first", small, image)
    size = image.stat().st_size
    client("backup", "--name", "second", small, image)
    assert client("salvage", image).err == ""
    os.truncate(image, size)
    done = client("salvage", image, code=8)
    assert "its newest snapshot was" in done.err
    assert "(second), of which nothing is found" in done.err
    assert "1 complete, 0 with losses" in done.out
    with image.open("r+b") as file:  # everything
        file.truncate(16384)
    assert "(second), of which nothing is found" in client("salvage", image, code=8).err


@pytest.mark.parametrize("verb", ["list", "verify", "restore"])
def test_an_image_that_went_back_in_time_is_told(client: Client, tmp_path: Path, small: Path, verb: str) -> None:
    image, old = tmp_path / "x.ferro", tmp_path / "old.ferro"
    client("backup", "--name", "first", small, image)
    shutil.copy(image, old)
    client("backup", "--name", "second", small, image)
    newest = client("list", image, "--json").document["snapshots"][-1]["id"]
    shutil.copy(old, image)
    more = (tmp_path / "back.img",) if verb == "restore" else ()
    for _ in range(2):  # it is said until something is written
        told = client(verb, image, *more, "--json", *(["--force"] if more else []), code=8).document["warnings"]
        assert len([w for w in told if "went back in time" in w and newest[:8] in w and "(second)" in w]) == 1, told
    client("backup", small, image, code=8)
    client("list", image)
    assert len(memories(tmp_path)) == 1


def test_an_image_that_was_replaced_is_told(client: Client, tmp_path: Path, small: Path) -> None:
    image = tmp_path / "x.ferro"
    client("backup", small, image)
    image.unlink()
    ferrotype("backup", small, image)  # by somebody else
    assert "was replaced by another image" in client("list", image, code=8).err
    told = client("backup", small, image, code=8)
    assert "was replaced by another image" in told.err
    client("list", image)


def test_an_image_that_is_made_where_one_was_is_told(client: Client, tmp_path: Path, small: Path) -> None:
    image, away = tmp_path / "x.ferro", tmp_path / "unmounted.ferro"
    client("backup", small, image)
    image.rename(away)
    assert "look whether its disk is mounted" in client("backup", small, image, code=8).err
    client("list", image)
    away.replace(image)  # disks that are put in by turns
    client("list", image)


def test_what_others_do_to_the_image_is_no_alarm(client: Client, tmp_path: Path, small: Path) -> None:
    image, copy = tmp_path / "x.ferro", tmp_path / "copy.ferro"
    client("backup", "--name", "first", small, image)
    client("backup", "--name", "second", small, image)
    for words in (("forget", image, "second"), ("prune", image), ("compact", image), ("backup", small, image)):
        ferrotype(*words)
        client("list", image)
    ferrotype("copy", image, copy)
    copy.replace(image)  # the same snapshots in another file
    client("list", image)
    client("backup", small, image)
    other = tmp_path / "elsewhere.ferro"
    shutil.copy(image, other)
    client("list", other)


def test_copies_that_are_put_in_by_turns_are_known(client: Client, tmp_path: Path, small: Path) -> None:
    image, one, two = tmp_path / "x.ferro", tmp_path / "one.ferro", tmp_path / "two.ferro"
    client("backup", small, image)
    shutil.copy(image, two)
    client("backup", small, image)
    image.rename(one)
    two.rename(image)
    client("backup", small, image, code=8)  # the second disk, for the first time
    for _ in range(2):
        image.rename(two)
        one.rename(image)
        client("backup", small, image)
        image.rename(one)
        two.rename(image)
        client("backup", small, image)


@pytest.mark.parametrize("damage", ["file", "garbage", "long"])
def test_a_memory_that_fails_changes_nothing(client: Client, tmp_path: Path, small: Path, damage: str) -> None:
    image = tmp_path / "x.ferro"
    client("backup", small, image)
    (memory,) = memories(tmp_path)
    if damage == "file":
        shutil.rmtree(tmp_path / "state")
        (tmp_path / "state").write_text("no folder")
    else:
        memory.write_bytes(b"{" if damage == "garbage" else b" " * (1 << 20))
    told = client("backup", small, image, "--json").document["warnings"]
    assert [warning for warning in told if "kept whole" not in warning] == []
    client("list", image)


def test_memories_are_small_and_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    monkeypatch.setattr(remembered, "_PLACES", 3)
    state = tmp_path / "state"
    for number in range(5):
        api.backup(small, tmp_path / f"{number}.ferro", state=state)
    assert len(list((state / "images").glob("*"))) == 3
    image = tmp_path / "x.ferro"
    for _ in range(12):
        api.backup(small, image, state=state)
        image.unlink()
    assert max(file.stat().st_size for file in (state / "images").glob("*")) < 8 << 10


def test_from_python_it_is_asked_for(tmp_path: Path, small: Path) -> None:
    image, old, state = tmp_path / "x.ferro", tmp_path / "old.ferro", tmp_path / "state"
    api.backup(small, image, state=state)
    shutil.copy(image, old)
    api.backup(small, image, state=state)
    shutil.copy(old, image)
    job = NullJob()
    api.list_snapshots(image, job=job)
    assert job.warnings == []
    api.list_snapshots(image, state=state, job=job)
    api.verify(image, state=state, job=job)
    api.restore(image, tmp_path / "back.img", state=state, job=job)
    assert len(job.warnings) == 3
    assert all("went back in time" in warning for warning in job.warnings)


def test_a_reader_that_ends_after_a_writer_remembers_no_older_state(tmp_path: Path, small: Path) -> None:
    image, state = tmp_path / "x.ferro", tmp_path / "state"
    api.backup(small, image, state=state)
    job = NullJob()
    with api._image(image, None, remembered.Memory(state, job.warn)):
        api.backup(small, image, state=state)
        written = next((state / "images").glob("*")).read_bytes()
    assert next((state / "images").glob("*")).read_bytes() == written
    api.list_snapshots(image, state=state, job=job)
    assert job.warnings == []
