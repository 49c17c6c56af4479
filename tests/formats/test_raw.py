"""The raw disk: sparse, preallocated, split."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.block.memory import MemoryDisk
from ferrotype.block.outputs import Outputs
from ferrotype.engine.convert import copy
from ferrotype.engine.writing import parse_options
from ferrotype.errors import InvalidImage, Refused, UsageError
from ferrotype.formats import Spec, numbered, raw
from ferrotype.formats.registry import writer
from ferrotype.job import NullJob
from tests.formats.judges import MiB, check_reader, make_image, make_image_piecemeal, opened, random_disk

CONTENT = random_disk(5 * MiB + 1536, seed=3)


@pytest.mark.parametrize("make", [make_image, make_image_piecemeal])
@pytest.mark.parametrize("option", ["preallocation=off", "preallocation=full"])
def test_a_raw_disk_is_the_disk(tmp_path: Path, make: type, option: str) -> None:
    path = make(tmp_path / "a.raw", "raw", CONTENT, option)
    assert path.read_bytes() == CONTENT
    full = path.stat().st_blocks * 512 >= len(CONTENT)
    assert full == (option == "preallocation=full")


def test_a_split_disk_is_read_from_its_first_part(tmp_path: Path) -> None:
    make_image(tmp_path / "a.raw", "raw", CONTENT, "split=2MiB")
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == ["a.raw.001", "a.raw.002", "a.raw.003"]
    assert b"".join(part.read_bytes() for part in parts) == CONTENT
    check_reader(parts[0], CONTENT, "raw")
    image = opened(parts[0], "raw")
    assert image.facts == {"subformat": "split", "parts": 3}
    image.close()
    parts[1].unlink()
    with pytest.raises(InvalidImage, match=r"part a\.raw\.002 of a split file is missing"):
        opened(parts[0], "raw")


def test_parts_are_whole_sectors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="whole sectors"):
        make_image(tmp_path / "a.raw", "raw", CONTENT, "split=2000001")
    assert [path.name for path in tmp_path.iterdir()] == ["a.raw.content.raw"]


# ---------------------------------------------------------------------- parts, few and many


def _replaced(path: Path, content: bytes, *texts: str, replace: bool = True) -> None:
    """The image, written anew over what stands there."""
    with Outputs(path, replace=replace) as outputs:
        sink = writer("raw").create(outputs, Spec(len(content), chosen=parse_options("raw", texts)))
        copy(MemoryDisk(content), sink, NullJob())
        outputs.commit()
        sink.close()


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than two parts are too many to be open at once."""
    monkeypatch.setattr(raw, "_AT_ONCE", 2)


@pytest.mark.usefixtures("in_turn")
@pytest.mark.parametrize("make", [make_image, make_image_piecemeal])
@pytest.mark.parametrize("option", ["preallocation=off", "preallocation=full"])
def test_many_parts_are_made_one_after_the_other(tmp_path: Path, make: type, option: str) -> None:
    content = CONTENT + bytes(4 * MiB) + CONTENT[: MiB + 512] + bytes(3 * MiB)  # parts of zeros within and behind
    make(tmp_path / "a.raw", "raw", content, "split=1MiB", option)
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [f"a.raw.{number:03}" for number in range(1, 15)]
    assert b"".join(part.read_bytes() for part in parts) == content
    full = sum(part.stat().st_blocks * 512 for part in parts) >= len(content)
    assert full == (option == "preallocation=full")
    check_reader(parts[0], content, "raw", rounds=40)


def test_many_parts_are_read_with_few_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbered, "_OPEN", 1)
    make_image(tmp_path / "a.raw", "raw", CONTENT, "split=1MiB")
    check_reader(tmp_path / "a.raw.001", CONTENT, "raw")
    image = opened(tmp_path / "a.raw.001", "raw")
    open_parts = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if os.path.islink(fd)]
    assert sum(str(tmp_path) in name for name in open_parts) == 2  # the first, and the one read last
    (tmp_path / "a.raw.002").write_bytes(b"shorter")
    with pytest.raises(InvalidImage, match=r"a\.raw\.002 was removed or changed"):
        read(image.source, MiB, 512)
    image.close()


@pytest.mark.parametrize("split", ["2MiB", "1MiB"])
def test_fewer_parts_leave_none_of_the_older_disk(tmp_path: Path, split: str, request: pytest.FixtureRequest) -> None:
    if split == "1MiB":
        request.getfixturevalue("in_turn")
    path = tmp_path / "a.raw"
    make_image(path, "raw", CONTENT, "split=1MiB")
    (tmp_path / "a.raw.0007").write_bytes(b"mine")
    _replaced(path, CONTENT[: 3 * MiB], f"split={split}")
    assert b"".join(p.read_bytes() for p in sorted(tmp_path.glob("a.raw.00?"))) == CONTENT[: 3 * MiB]
    assert len(list(tmp_path.iterdir())) == (2 if split == "2MiB" else 3) + 1
    image = opened(tmp_path / "a.raw.001", "raw")
    assert image.source.size == 3 * MiB
    image.close()


def test_parts_that_would_follow_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.raw.003").write_bytes(b"mine")
    with pytest.raises(Refused, match=r"a\.raw\.003 exists and would be read as a part"):
        _replaced(tmp_path / "a.raw", CONTENT[: 2 * MiB], "split=1MiB", replace=False)
    (tmp_path / "a.raw.002").write_bytes(b"mine")
    with pytest.raises(Refused, match=r"a\.raw\.002 exists and would be read as a part"):
        _replaced(tmp_path / "a.raw.001", CONTENT, replace=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.raw.002", "a.raw.003"]
    _replaced(tmp_path / "a.raw.001", CONTENT)
    assert [path.name for path in tmp_path.iterdir()] == ["a.raw.001"]
    check_reader(tmp_path / "a.raw.001", CONTENT, "raw", rounds=10)
