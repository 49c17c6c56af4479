"""What a file system claims to occupy, against what others say is in use, and against its map of free space."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ferrotype.extents import State
from ferrotype.filesystems import FileSystem

SECTOR = 512


def claimed(filesystem: FileSystem, size: int) -> tuple[NDArray[np.bool_], int]:
    """For each sector whether anything claims a byte of its cluster; and how many files were met."""
    found, files = np.zeros(-(-size // SECTOR), bool), 0
    unit = filesystem.facts.block_size if filesystem.facts.kind.startswith("ext") else SECTOR  # bigalloc's clusters
    for claims in filesystem.claims():
        files += claims.files
        for start, end in zip(claims.starts.tolist(), claims.ends.tolist(), strict=True):
            found[start // unit * unit // SECTOR : -(-end // unit) * unit // SECTOR] = True
    return found, files


def check_claims(filesystem: FileSystem, size: int, in_use: Iterable[int], *, more: int = 0) -> int:
    """All bytes ``in_use`` (one of each sector) are claimed, nothing free is, and what is neither is little.

    ``more``: bytes that the map calls used and nobody owns.  Returns how many files were met.
    """
    found, files = claimed(filesystem, size)
    sectors = np.array(sorted({at // SECTOR for at in in_use}), np.int64)
    assert len(sectors)
    assert found[sectors].all(), f"in use and not claimed: sectors {sectors[~found[sectors]][:10]}"
    free = np.zeros(len(found), bool)
    for start, end in zip(*(edges.tolist() for edges in filesystem.allocation().runs(State.FREE)), strict=True):
        free[start // SECTOR : -(-end // SECTOR)] = True
    assert free.any()
    assert not (found & free).any()
    nobodys = ~found & ~free
    nobodys[filesystem.facts.size // SECTOR :] = False
    assert int(nobodys.sum()) * SECTOR <= more, f"neither claimed nor free: {np.flatnonzero(nobodys)[:10]}"
    return files
