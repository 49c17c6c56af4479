"""What is known of a mapped disk without reading it: holes of its file, and where each run stands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ferrotype.block import read
from ferrotype.block.file import FileSource
from ferrotype.block.memory import MemoryDisk
from ferrotype.block.views import Concat, Slice
from ferrotype.extents import ExtentMap, State
from ferrotype.formats import mapped
from ferrotype.formats.mapped import Kind, MappedSource, Mapping, Run, runs_of
from tests.formats.judges import MiB, opened, scattered
from tests.machine import need, run


class Pieces:
    """A layout of equal pieces, each of a kind and at a place."""

    def __init__(self, size: int, pieces: list[tuple[Kind, int]]) -> None:
        self._size = size
        self._whole = Mapping(
            np.arange(len(pieces) + 1, dtype=np.int64) * size,
            np.array([kind for kind, _ in pieces], np.uint8),
            np.array([place for _, place in pieces], np.int64),
            np.zeros(len(pieces), np.int64),
        )

    def mapping(self, offset: int, length: int, /) -> Mapping:
        return self._whole.clip(offset, length)

    def unpack(self, place: int, /) -> bytes:  # noqa: ARG002  the protocol's
        return b"\7" * self._size


class Asked(MemoryDisk):
    """Counts what its extents are asked for, and says that every other MiB is zeros."""

    asked: list[tuple[int, int]]

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        self.asked = [*getattr(self, "asked", []), (offset, length)]
        starts = [at for at in range(MiB, self.size, 2 * MiB) if at < offset + length and at + MiB > offset]
        low = [max(at, offset) for at in starts]
        high = [min(at + MiB, offset + length) for at in starts]
        return ExtentMap.from_runs(offset, length, low, high, State.ZERO | State.HOLE)


def test_the_files_own_holes_show_in_long_stored_runs() -> None:
    file = Asked(bytes(8 * MiB))
    layout = Pieces(2 * MiB, [(Kind.STORED, 3 * MiB), (Kind.HOLE, 0), (Kind.ZERO, 0), (Kind.STORED, MiB + 512)])
    source = MappedSource(file, layout, 8 * MiB, name="test")
    extents = source.extents(0, 8 * MiB)
    assert [(e.start, e.end, e.state) for e in extents] == [
        (0, MiB, State.ZERO),
        (MiB, 2 * MiB, State.DATA),
        (2 * MiB, 4 * MiB, State.ZERO | State.HOLE),
        (4 * MiB, 7 * MiB - 512, State.ZERO),
        (7 * MiB - 512, 8 * MiB - 512, State.DATA),
        (8 * MiB - 512, 8 * MiB, State.ZERO),
    ]
    assert file.asked == [(MiB + 512, 4 * MiB - 512)]
    inner = source.extents(MiB // 2, 3 * MiB)
    assert (inner.start, inner.end) == (MiB // 2, MiB // 2 + 3 * MiB)
    assert inner == extents.clip(MiB // 2, 3 * MiB)


def test_a_hole_of_the_file_hides_the_parent() -> None:
    """Its zeros are stored ones: the parent must not show there."""
    file = Asked(bytes(2 * MiB))
    parent = MemoryDisk(b"\1" * 2 * MiB)
    source = MappedSource(file, Pieces(2 * MiB, [(Kind.STORED, 0)]), 2 * MiB, name="test", parent=parent)
    assert [(e.start, e.state) for e in source.extents(0, 2 * MiB)] == [(0, State.DATA), (MiB, State.ZERO)]
    assert read(source, 0, 2 * MiB) == bytes(2 * MiB)


def test_short_runs_are_not_worth_a_question() -> None:
    file = Asked(bytes(4 * MiB))
    source = MappedSource(file, Pieces(MiB // 2, [(Kind.STORED, 3 * MiB)] * 6), 3 * MiB, name="test")
    assert source.extents(0, 3 * MiB).total(State.ZERO) == 0
    assert not hasattr(file, "asked")


def test_there_are_not_too_many_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_MOST_HOLES", 3)
    file = Asked(bytes(4 * MiB))
    source = MappedSource(file, Pieces(MiB, [(Kind.STORED, MiB)] * 8), 8 * MiB, name="test")
    assert source.extents(0, 8 * MiB).total(State.ZERO) == 3 * MiB
    assert len(file.asked) == 1


def test_what_lies_behind_the_end_of_the_file_is_not_asked_for() -> None:
    file = Asked(bytes(3 * MiB))
    source = MappedSource(
        file, Pieces(2 * MiB, [(Kind.STORED, 5 * MiB), (Kind.STORED, MiB + 512)]), 4 * MiB, name="t"
    )
    states = [(e.start, e.end, e.state) for e in source.extents(0, 4 * MiB)]
    assert states == [(0, 2 * MiB, State.DATA), (2 * MiB, 3 * MiB - 512, State.ZERO), (3 * MiB - 512, 4 * MiB, 0)]
    assert file.asked == [(MiB + 512, 2 * MiB - 512)]


# ---------------------------------------------------------------------- where it stands


def test_runs_lead_down_to_the_file_that_holds_them(tmp_path: Path) -> None:
    raw = tmp_path / "a.raw"
    raw.write_bytes(b"x" * 3 * MiB)
    with FileSource(raw) as file:
        middle = MappedSource(
            MemoryDisk(bytes(9 * MiB)),
            Pieces(MiB, [(Kind.HOLE, 0), (Kind.PACKED, 5), (Kind.HOLE, 0), (Kind.HOLE, 0)]),
            4 * MiB,
            name="middle",
            parent=file,
        )
        whole = MappedSource(
            MemoryDisk(bytes(9 * MiB)),
            Pieces(2 * MiB, [(Kind.HOLE, 0), (Kind.STORED, 512), (Kind.HOLE, 0)]),
            6 * MiB,
            name="top",
            parent=middle,
        )
        assert list(runs_of(whole, 0, 6 * MiB)) == [
            Run(0, MiB, Kind.STORED, 2, 0),
            Run(MiB, MiB, Kind.PACKED, 1, None),
            Run(2 * MiB, 2 * MiB, Kind.STORED, 0, 512),
            Run(4 * MiB, 2 * MiB, Kind.HOLE, 0, None),
        ]
        assert list(runs_of(whole, MiB // 2, MiB)) == [
            Run(MiB // 2, MiB // 2, Kind.STORED, 2, MiB // 2),
            Run(MiB, MiB // 2, Kind.PACKED, 1, None),
        ]
        assert list(runs_of(middle, 2 * MiB, 2 * MiB)) == [
            Run(2 * MiB, MiB, Kind.STORED, 1, 2 * MiB),
            Run(3 * MiB, MiB, Kind.HOLE, 0, None),
        ]
        parts = Concat([Slice(file, MiB, MiB), whole])
        assert list(runs_of(parts, 0, 2 * MiB)) == [
            Run(0, MiB, Kind.STORED, 0, MiB),
            Run(MiB, MiB, Kind.STORED, 2, 0),
        ]
        assert list(runs_of(MemoryDisk(b"abc"), 1, 2)) == [Run(1, 2, Kind.STORED, 0, None)]
        assert list(runs_of(file, 0, 0)) == []


def _judged(path: Path, format: str) -> list[dict[str, object]]:
    found = json.loads(run("qemu-img", "map", "-f", format, "--output=json", path))
    assert isinstance(found, list)
    return found


def _by_sector(rows: list[dict[str, object]], size: int) -> list[tuple[object, ...]]:
    """What a map says of each sector."""
    said: list[tuple[object, ...]] = []
    for row in rows:
        start, length = int(str(row["start"])), int(str(row["length"]))
        for at in range(start, min(start + length, size), 512):
            offset = row.get("offset")
            said.append(
                (row["depth"], row["present"], None if offset is None else int(str(offset)) + at - start, row["zero"])
            )
    return said


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vhdx", "vdi", "vpc", "raw"])
def test_a_map_says_what_qemu_says(tmp_path: Path, format: str) -> None:
    from tests.cli.program import ferrotype

    need("qemu-img", "qemu-io")
    size = 24 * MiB
    suffix = {"vpc": "vhd"}.get(format, format)
    path = scattered(tmp_path / f"a.{suffix}", format, size, seed=11, writes=40, zeros=format != "vpc")
    images = [path]
    if format == "qcow2":
        top = scattered(
            tmp_path / "top.qcow2", "qcow2", size + 3 * MiB, seed=12, writes=9, backing=(Path(path.name), "qcow2")
        )
        images.append(top)
    for image in images:
        if image.suffix[1:] != "raw":
            opened(image).close()
        ours = ferrotype("map", image, "--json").document["extents"]
        theirs = _judged(image, format)
        virtual = ours[-1]["start"] + ours[-1]["length"]
        mine, judged = _by_sector(ours, virtual), _by_sector(theirs, virtual)
        assert len(mine) == len(judged)
        for at, (own, other) in enumerate(zip(mine, judged, strict=True)):
            if own[3] and not other[3]:  # what is known to be zeros may be more
                continue
            if other[3] and not own[3] and other[2] is not None:  # a hole of the file inside a short run
                other = (*other[:3], False)
            if format not in ("qcow2", "vmdk", "raw") and None in (own[2], other[2]):
                own, other = (own[0], own[3]), (other[0], other[3])  # qemu says nothing more of these
            assert own == other, (image, at * 512)
        for extent in ours:
            assert extent["data"] == (not extent["zero"])
