"""Verbs run on small images while their work is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from ferrotype.block import Source
from ferrotype.block.device import open_source
from ferrotype.block.file import FileSink, FileSource
from ferrotype.engine.backup import BackupOptions
from ferrotype.engine.restore import Part, RestoreOptions, restore
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.repository.keys import Secret
from ferrotype.repository.store import Repository
from ferrotype.units import MiB
from tests.engine.images import CHUNK, back_up, create, opened
from tests.work.counting import Work, counting, id_key, object_key

PACK: Final = MiB  # bytes


@contextmanager
def counted_on(repository: Repository) -> Iterator[Work]:
    """Counts what is done in the block, and can tell what is hashed with the repository's keys."""
    with counting() as work:
        work.ids, work.objects = id_key(repository.sealer), object_key(repository.sealer)
        yield work


def counted_backup(image: Path, source: Path | Source, secret: Secret | None = None, workers: int = 2) -> Work:
    """The work of a backup into an image that is there."""
    disk = open_source(source) if isinstance(source, Path) else source
    try:
        with opened(image, writable=True, secret=secret) as repository, counted_on(repository) as work:
            back_up(repository, disk, options=BackupOptions(workers=workers))
    finally:
        disk.close()
    return work


def make(image: Path, *sources: Path | Source, secret: Secret | None = None) -> Path:
    """An image with a snapshot of each source, all being the same disk on other days."""
    if secret is None:
        create(image, pack_size=PACK)
    else:
        Repository.create(Container.create(image), secret, chunk_size=CHUNK, pack_size=PACK).close()
    for source in sources:
        counted_backup(image, source, secret)
    return image


@contextmanager
def part_of(image: Path, secret: Secret | None = None, snapshot: str = "latest") -> Iterator[Part]:
    """A snapshot's only disk, whole."""
    with opened(image, secret=secret) as repository:
        disk = repository.snapshot(snapshot).disk()
        yield Part(repository, disk, 0, disk.size)


def counted_restore(image: Path, out: Path, secret: Secret | None = None, *, delta: bool = False) -> Work:
    """The work of restoring the newest snapshot to a file, which is there already if it is a delta."""
    with part_of(image, secret) as part, ExitStack() as stack:
        target = stack.enter_context(FileSource(out)) if delta else None
        sink = stack.enter_context(FileSink.open_existing(out) if delta else FileSink.create(out, part.length))
        with counted_on(part.repository) as work:
            restore(part, sink, RestoreOptions(delta=delta, workers=2), NullJob(), target=target)
            sink.commit()
    return work
