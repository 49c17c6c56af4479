"""Opening the image a backup goes into, and making it where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ferrotype.engine.references import SecretSource, open_image
from ferrotype.errors import DeviceError, UsageError
from ferrotype.objects.container import Container
from ferrotype.objects.memory import MemoryStore
from ferrotype.repository.config import DEFAULT_CHUNK, DEFAULT_LEVEL, DEFAULT_PACK
from ferrotype.repository.keys import Secret
from ferrotype.repository.store import Repository


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """How to write; all but the level count only for a new image."""

    level: int = DEFAULT_LEVEL
    split: int = 0  # bytes a volume may grow to; 0: one file
    chunk_size: int | None = None
    pack_size: int | None = None
    encrypt: bool = False


@contextmanager
def open_or_create(
    path: Path,
    options: ImageOptions,
    secret: SecretSource,
    new_secret: Callable[[Path], Secret],
    *,
    dry_run: bool = False,
) -> Iterator[Repository]:
    """The image at ``path``, open for writing; made new where there is none.

    A dry run opens an existing image for reading, and has a new one in memory only.
    """
    if path.exists():
        if options.split or options.chunk_size or options.pack_size or options.encrypt:
            raise UsageError(f"{path} exists; its split, chunk and pack sizes and its encryption stay as they are")
        with open_image(path, secret, writable=not dry_run, level=options.level) as repository:
            yield repository
        return
    if not path.parent.is_dir():
        raise DeviceError(f"the folder {path.parent} does not exist")
    locked = new_secret(path) if options.encrypt else None
    store = MemoryStore() if dry_run else Container.create(path, split=options.split)
    try:
        repository = Repository.create(
            store,
            locked,
            chunk_size=options.chunk_size or DEFAULT_CHUNK,
            pack_size=options.pack_size or DEFAULT_PACK,
            level=options.level,
        )
        yield repository
    finally:
        store.close()
