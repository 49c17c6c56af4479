"""Opening an image that exists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ferrotype.engine.remembered import Memory
from ferrotype.errors import UsageError
from ferrotype.objects.container import Container
from ferrotype.objects.volumes import Opener, PosixFile, volume_path
from ferrotype.repository.keys import Secret
from ferrotype.repository.store import Repository

SecretSource = Callable[[Path], Secret | None]


def open_container(path: Path, *, writable: bool = False, opener: Opener = PosixFile) -> Container:
    """The container an existing image is kept in."""
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    return Container.open(path, writable=writable, opener=opener)


def open_image(
    path: Path,
    secret: SecretSource,
    *,
    writable: bool = False,
    level: int = 1,
    secret_given: bool = False,
    opener: Opener = PosixFile,
    memory: Memory | None = None,
) -> Repository:
    """An existing image as a repository, held against what is remembered of it, which its end brings up to date.

    Raises KeyRefused where a secret was given and none is needed.
    """
    place = memory.before(path) if memory else None
    container = open_container(path, writable=writable, opener=opener)
    try:
        wanted = secret_given or is_encrypted(container)
        repository = Repository.open(container, secret(path) if wanted else None, level=level)
    except BaseException:
        container.close()
        raise
    repository.warnings += container.warnings
    if place is not None:
        place.opened(repository, writable=writable)
        repository.at_end = lambda: place.left(repository, written=writable)
    return repository


def image_files(image: Path) -> list[Path]:
    """All files an image is stored in."""
    files = [image]
    while (more := volume_path(image, len(files))).exists():
        files.append(more)
    return files


def is_encrypted(container: Container) -> bool:
    """Whether a passphrase or key file is needed."""
    return any(True for _ in container.list("key/"))
