"""Repositories of the interesting size: chunks of 4 KiB, packs of a few chunks, disks of a few dozen."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from ferrotype.block import read
from ferrotype.objects import ObjectStore
from ferrotype.objects.container import Container
from ferrotype.objects.volumes import Opener, PosixFile
from ferrotype.repository import keys
from ferrotype.repository.chunkmap import MapBuilder
from ferrotype.repository.keys import Cost, Secret
from ferrotype.repository.sealing import ZERO_ID
from ferrotype.repository.snapshots import DiskRecord, Region, Snapshot, clock_order
from ferrotype.repository.source import SnapshotSource
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import Writer, open_writer

CHUNK = 4096
PACK = 12_000  # bytes: three chunks that do not compress
QUICK = Cost(memory=64, passes=1, lanes=1)
LEAST, keys.LEAST = keys.LEAST, QUICK  # or opening thousands of images would take hours
SECRET = Secret(b"correct horse")
START = datetime(2026, 1, 1, 12, tzinfo=UTC)


def tiny(repository: Repository) -> Repository:
    """With packs far smaller than a configuration allows."""
    repository.config = msgspec.structs.replace(repository.config, pack_size=PACK)
    return repository


def create(store: ObjectStore, secret: Secret | None = None, cost: Cost = QUICK) -> Repository:
    """An image of tiny packs; the program itself, run apart, opens none whose slots cost less than ``LEAST``."""
    return tiny(Repository.create(store, secret, chunk_size=CHUNK, cost=cost))


def open_at(
    path: Path, secret: Secret | None = None, *, writable: bool = False, opener: Opener = PosixFile
) -> Repository:
    store = Container.open(path, writable=writable, opener=opener)
    try:
        return tiny(Repository.open(store, secret))
    except BaseException:
        store.close()
        raise


def disk_content(cells: int, seed: int) -> bytes:
    """Random chunks, compressible ones and zeros."""
    rng = random.Random(seed)
    kinds = (rng.randbytes(CHUNK), bytes(CHUNK), rng.randbytes(64) * (CHUNK // 64))
    return b"".join(rng.choice([rng.randbytes(CHUNK), *kinds]) for _ in range(cells))


def changed(content: bytes, seed: int, share: float = 0.4) -> bytes:
    """The same disk later on."""
    rng = random.Random(seed)
    cells = [content[at : at + CHUNK] for at in range(0, len(content), CHUNK)]
    return b"".join(rng.randbytes(CHUNK) if rng.random() < share else cell for cell in cells)


def add_disk(
    writer: Writer, repository: Repository, content: bytes, name: str = "sda", checkpoint: int = 0
) -> DiskRecord:
    """Store a disk's content as a backup does; a checkpoint after every ``checkpoint`` cells."""
    sealer = repository.sealer
    builder = MapBuilder(-(-len(content) // CHUNK), writer.add_plain)
    for cell, at in enumerate(range(0, len(content), CHUNK)):
        plain = content[at : at + CHUNK]
        if any(plain):
            chunk_id = sealer.id_of(plain)
            if chunk_id not in writer:
                writer.add(chunk_id, sealer.seal(chunk_id, plain))
            builder.put(cell, chunk_id)
        if checkpoint and cell % checkpoint == checkpoint - 1:
            writer.checkpoint()
    root = builder.finish() if content else ZERO_ID
    region = Region(0, len(content), root.hex())
    return DiskRecord(name=name, size=len(content), sector_size=512, chunk_size=CHUNK, regions=(region,))


def snapshot_of(*disks: DiskRecord, name: str, day: int = 0) -> Snapshot:
    created = START + timedelta(days=day)
    order = clock_order(created)
    return Snapshot(created=created, host="here", name=name, disks=disks, unique=name, order=order)


def back_up(repository: Repository, content: bytes, name: str, *, day: int = 0, checkpoint: int = 0) -> Snapshot:
    """One committed snapshot of one disk."""
    with open_writer(repository) as writer:
        return writer.commit(
            snapshot_of(add_disk(writer, repository, content, checkpoint=checkpoint), name=name, day=day)
        )


def restored(repository: Repository, snapshot: Snapshot) -> bytes:
    """Every byte of a snapshot's only disk."""
    disk = snapshot.disk()
    return read(SnapshotSource(repository, disk), 0, disk.size)


def contents(repository: Repository) -> dict[str, bytes]:
    """Name and bytes of every snapshot listed."""
    return {snapshot.name: restored(repository, snapshot) for snapshot in repository.snapshots()}
