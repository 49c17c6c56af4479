"""Short ways to back up to and restore from an image, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ferrotype.block import Source, read
from ferrotype.block.device import open_source
from ferrotype.engine.backup import BackupOptions, backup
from ferrotype.engine.checksum import checksum
from ferrotype.engine.prepare import NamedSource
from ferrotype.engine.references import Access, open_disk
from ferrotype.engine.restore import RestoreOptions, RestoreResult, restore
from ferrotype.engine.targets import open_target
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.extents import ExtentMap
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.objects.memory import MemoryStore
from ferrotype.repository.keys import Secret
from ferrotype.repository.snapshots import Snapshot
from ferrotype.repository.store import Repository
from ferrotype.units import KiB

CHUNK = 64 * KiB


def in_memory(chunk_size: int = CHUNK) -> Repository:
    return Repository.create(MemoryStore(), chunk_size=chunk_size, pack_size=1 << 20)


def create(path: Path, *, chunk_size: int = CHUNK, pack_size: int = 4 << 20, secret: Secret | None = None) -> None:
    Repository.create(Container.create(path), secret, chunk_size=chunk_size, pack_size=pack_size).close()


@contextmanager
def opened(path: Path, *, writable: bool = False, secret: Secret | None = None) -> Iterator[Repository]:
    with Repository.open(Container.open(path, writable=writable), secret) as repository:
        yield repository


def back_up(
    repository: Repository,
    *sources: Source,
    name: str = "disk",
    options: BackupOptions | None = None,
    job: NullJob | None = None,
) -> Snapshot:
    """A snapshot of sources called ``disk``, ``disk 2`` ..."""
    named = [
        NamedSource(source, name if number == 1 else f"{name} {number}", "test")
        for number, source in enumerate(sources, 1)
    ]
    return backup(repository, named, options or BackupOptions(), job or NullJob())


def save(
    image: Path,
    disk: Path,
    sector_size: int | None = None,
    *,
    options: BackupOptions | None = None,
    job: NullJob | None = None,
) -> Snapshot:
    """Back a file or device up into an image, which is made if need be."""
    if not image.exists():
        create(image)
    source = open_source(disk, sector_size=sector_size)
    try:
        with opened(image, writable=True) as repository:
            return back_up(repository, source, name=disk.name, options=options, job=job)
    finally:
        source.close()


def give_back(
    reference: str,
    target: Path,
    *,
    size: int = 0,
    in_place: bool = False,
    options: RestoreOptions | None = None,
    job: NullJob | None = None,
) -> RestoreResult:
    """Restore what a reference names to a new file of ``size`` bytes (0: as large as the disk), or in place."""
    job = job or NullJob()
    with open_disk(reference, Access(), job) as disk:
        assert disk.repository is not None
        sector_size = disk.part.disk.sector_size
        with open_target(target, size or disk.source.size, sector_size, in_place=in_place) as opened_target:
            return restore(
                disk.part,
                opened_target.sink,
                options or RestoreOptions(),
                job,
                target=opened_target.source,
            )


def bytes_of(reference: str) -> bytes:
    """All bytes behind a reference."""
    with open_disk(reference, Access(format="raw" if "::" not in reference else None), NullJob()) as disk:
        return read(disk.source, 0, disk.source.size)


def hash_of(reference: str) -> str:
    with open_disk(reference, Access(), NullJob()) as disk:
        return checksum(disk.source, NullJob())


def is_sound(image: Path) -> None:
    with opened(image) as repository:
        result = verify(repository, VerifyOptions(deep=True), NullJob())
        assert result.ok, (result.problems, result.damaged)


class Watched:
    """A source over another that counts what is read, and can fail or change ranges of it."""

    def __init__(self, base: Source) -> None:
        self._base = base
        self.size = base.size
        self.traits = base.traits
        self.reads: list[tuple[int, int]] = []

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        self.reads.append((offset, len(buf)))
        self._base.read_into(offset, buf)

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return self._base.extents(offset, length)

    def close(self) -> None:
        self._base.close()
