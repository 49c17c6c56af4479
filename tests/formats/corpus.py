"""The truth of the corpus about a disk in a container."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ferrotype.block import Source, read
from ferrotype.extents import State
from tests.formats.judges import opened
from tests.machine import corpus

_CELL = 64 << 10


def entries(*formats: str) -> list[dict[str, Any]]:
    """The entries of the corpus in these formats."""
    return [entry for entry in corpus() if entry["format"] in formats]


def check_virtual_disk(entry: dict[str, Any], path: Path, format: str | None = None) -> None:
    """The disk in an image has the size and the content that are recorded."""
    wanted = entry["virtual_disk"]
    image = opened(path, format)
    try:
        disk = image.source
        assert disk.size == wanted["size"]
        whole, sparse = hashlib.sha256(), hashlib.sha256()
        for at in _cells(disk, every="sha256" in wanted):
            piece = read(disk, at, min(_CELL, disk.size - at))
            whole.update(piece)
            if piece.count(0) < len(piece):
                sparse.update(at.to_bytes(8, "little") + piece)
        sparse.update(disk.size.to_bytes(8, "little"))
        assert sparse.hexdigest() == wanted["sparse64k_sha256"]
        if "sha256" in wanted:  # else the disk is too large to be read in full
            assert whole.hexdigest() == wanted["sha256"]
    finally:
        image.close()


def _cells(disk: Source, *, every: bool) -> Iterator[int]:
    """Where the cells of a disk start: every one's, or of those not known to be zeros."""
    known = disk.extents(0, disk.size).cut(_CELL).masked(State.DATA if every else State.ZERO)
    for start, end in zip(*(bounds.tolist() for bounds in known.runs(State.ZERO, present=False)), strict=True):
        yield from range(start, end, _CELL)
