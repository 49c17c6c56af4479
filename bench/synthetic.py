"""Images of very many chunks, made in a minute: everything but the content of the chunks is real.

    synthetic.py IMAGE --chunks 10000000                       one snapshot of one disk, every cell another chunk
    synthetic.py IMAGE --chunks 1000000 --snapshots 20 --own 0.5     half of the chunks belong to one snapshot each
    synthetic.py IMAGE --chunks 0 --snapshots 1000                   many snapshots of an empty disk
    synthetic.py DISK --disk 10000000 --changed 100000         the disk of the first image, with so many cells of data

Packs, their tables, index segments, map pages, snapshots and the catalog are those that a backup would have written,
through the same code.  Frames are the bare head of an empty chunk: they are found, counted, moved and checked like
any other, but do not decode to what their id says.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ferrotype.objects.container import Container
from ferrotype.repository import snapshots, spare
from ferrotype.repository.chunkmap import MapBuilder
from ferrotype.repository.merging import build_segment
from ferrotype.repository.packs import PackBuilder
from ferrotype.repository.sealing import FRAME_HEAD, ID_SIZE, ZERO_ID, ChunkId
from ferrotype.repository.segments import ENTRY
from ferrotype.repository.snapshots import DiskRecord, Region, Snapshot
from ferrotype.repository.store import Repository

CHUNK = 4096  # bytes of a cell: the smallest there are, so that a disk of many cells is a small one
FRAMES = 275  # frames of a pack: as many as 16 MiB hold of 57 KiB; pack and table fill three blocks
PAGES = 511  # map pages of a pack of 16 MiB
MARGIN = 1024  # cells of zeros on both ends of each region: where `info` looks for tables and file systems
_FRAME = b"\0" * FRAME_HEAD  # an empty plaintext, not compressed
_DAY = datetime(2026, 1, 1, tzinfo=UTC)

Ids = NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Shape:
    """What an image holds."""

    chunks: int
    snapshots: int = 1
    own: float = 0.0  # share of the chunks that one snapshot alone has, each another one
    scattered: bool = False  # those stand in the packs of the others, not in packs of their own
    per_pack: int = FRAMES


@dataclass(slots=True)
class Stored:
    """Packs put so far, and the index entries of what is in them."""

    repository: Repository
    packs: list[str] = field(default_factory=list)
    entries: list[NDArray[np.void]] = field(default_factory=list)

    def put(self, ids: Ids, frames: list[bytes]) -> None:
        """One pack."""
        raw = ids.tobytes()
        builder = PackBuilder([raw[at : at + ID_SIZE] for at in range(0, len(raw), ID_SIZE)], frames)
        name, parts, start = builder.build(self.repository.sealer)
        self.repository.store.put(name, [b"".join(parts)])
        lengths = np.array([len(frame) for frame in frames], np.int64)
        entries = np.zeros(len(ids), ENTRY)
        entries["id"], entries["pack"], entries["length"] = ids, len(self.packs), lengths
        entries["offset"] = start + np.cumsum(lengths) - lengths
        self.packs.append(name)
        self.entries.append(entries)

    def index(self) -> None:
        """One segment for all, as the last of many merges leaves it."""
        everything = np.concatenate([np.zeros(0, ENTRY), *self.entries])
        self.entries.clear()
        if len(everything):
            name, parts = build_segment(everything, self.packs, self.repository.sealer, bytes(16))
            del everything
            self.repository.store.put(name, list(parts))


class Pages:
    """Map pages on their way into packs of their own."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._waiting: dict[bytes, bytes] = {}

    def __call__(self, page: bytes) -> ChunkId:
        sealer = self._stored.repository.sealer
        page_id = sealer.id_of(page)
        self._waiting[page_id] = sealer.seal(page_id, page)
        if len(self._waiting) >= PAGES:
            self.settle()
        return page_id

    def settle(self) -> None:
        if self._waiting:
            ids = np.frombuffer(b"".join(self._waiting), f"V{ID_SIZE}")
            self._stored.put(ids, list(self._waiting.values()))
            self._waiting = {}


def build(path: Path, shape: Shape) -> None:
    """A new image of that shape at ``path``; the same shape gives the same ids."""
    with Repository.create(Container.create(path), chunk_size=CHUNK) as repository:
        stored = Stored(repository)
        shared, owned = _chunks(shape, stored)
        pages = Pages(stored)
        root = _map(shared, pages)
        roots = [_map(ids, pages) for ids in owned]
        pages.settle()
        stored.index()
        spare.settle(repository.store)
        repository.store.flush()
        for number in range(shape.snapshots):
            regions = _regions([(_cells(shared), root), *([(_cells(owned[number]), roots[number])] if owned else [])])
            _put_snapshot(repository, number, regions)


def _chunks(shape: Shape, stored: Stored) -> tuple[Ids, list[Ids]]:
    """Put all packs; the ids that all snapshots share, and those that each has for itself."""
    rng = np.random.default_rng(shape.chunks)
    ids = np.frombuffer(rng.bytes(ID_SIZE * shape.chunks), f"V{ID_SIZE}")
    alone = int(shape.own * shape.chunks) // shape.snapshots  # of each snapshot
    order = rng.permutation(shape.chunks) if shape.scattered else np.arange(shape.chunks)
    owners = [order[n * alone : (n + 1) * alone] for n in range(shape.snapshots)] if alone else []
    bounds = [0, shape.chunks] if shape.scattered else [*range(0, alone * len(owners) + 1, alone or 1), shape.chunks]
    for first, last in pairwise(bounds):
        for at in range(first, last, shape.per_pack):  # a pack holds the chunks of one snapshot
            part = ids[at : min(at + shape.per_pack, last)]
            stored.put(part, [_FRAME] * len(part))
    return ids[np.sort(order[alone * len(owners) :])], [ids[np.sort(mine)] for mine in owners]


def _map(ids: Ids, pages: Pages) -> ChunkId:
    if not len(ids):
        return ZERO_ID
    builder = MapBuilder(_cells(ids), pages)
    for at in range(0, len(ids), 1 << 20):
        builder.put(MARGIN + at, ids[at : at + (1 << 20)].tobytes())
    return builder.finish()


def _cells(ids: Ids) -> int:
    return len(ids) + 2 * MARGIN


def _regions(parts: list[tuple[int, ChunkId]]) -> Iterator[Region]:
    at = 0
    for cells, root in parts:
        yield Region(at, cells * CHUNK, root.hex())
        at += cells * CHUNK


def _put_snapshot(repository: Repository, number: int, regions: Iterator[Region]) -> None:
    touching = tuple(regions)
    volumes = tuple(
        {
            "index": n, "start": region.start, "size": region.length, "type": "Linux filesystem", "label": f"part{n}",
            "partition_label": "", "uuid": f"{n:08x}-0000-4000-8000-{number:012x}", "filesystem": "ext4",
            "block_size": 4096, "used_bytes": region.length, "clean": True,
        }
        for n, region in enumerate(touching, 1)
    )  # fmt: skip
    disk = DiskRecord(
        name="disk.img", size=touching[-1].start + touching[-1].length, sector_size=512, chunk_size=CHUNK,
        regions=touching, source="disk.img", volumes=volumes,
    )  # fmt: skip
    created = _DAY + timedelta(hours=number)
    snapshot = Snapshot(created=created, host="machine", name="disk.img", disks=(disk,), unique=f"{number:016x}")
    name, frame = repository.sealer.seal_object(snapshots.KIND, snapshots.encode(snapshot))
    repository.store.put(name, [frame])
    repository.store.flush()  # each with a catalog of its own, as backups leave them


def make_disk(path: Path, cells: int, changed: int) -> None:
    """A sparse disk that an image of as many chunks knows; ``changed`` of its cells hold new data, strewn evenly.

    All others are zeros: it would take the whole disk to read the same bytes again.
    """
    rng = np.random.default_rng(cells)
    step = cells // changed
    with path.open("wb") as file:
        file.truncate((cells + 2 * MARGIN) * CHUNK)
        for cell in (np.arange(changed) * step + rng.integers(0, step, changed)).tolist():
            os.pwrite(file.fileno(), rng.bytes(CHUNK), (MARGIN + cell) * CHUNK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--chunks", type=int, default=0)
    parser.add_argument("--snapshots", type=int, default=1)
    parser.add_argument("--own", type=float, default=0.0)
    parser.add_argument("--scattered", action="store_true")
    parser.add_argument("--per-pack", type=int, default=FRAMES)
    parser.add_argument("--disk", type=int, metavar="CELLS", help="make a sparse disk instead of an image")
    parser.add_argument("--changed", type=int, default=0)
    asked = parser.parse_args()
    if asked.disk:
        make_disk(asked.path, asked.disk, asked.changed)
    else:
        build(asked.path, Shape(asked.chunks, asked.snapshots, asked.own, asked.scattered, asked.per_pack))


if __name__ == "__main__":
    main()
