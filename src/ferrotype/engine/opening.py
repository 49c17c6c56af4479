"""Opening an image that exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ferrotype.engine.remembered import Memory
from ferrotype.errors import FormatError, InvalidImage, KeyNotKnown, KeyRefused, UsageError
from ferrotype.objects.container import Container
from ferrotype.objects.volumes import Opener, PosixFile, volume_path
from ferrotype.repository.keys import Secret
from ferrotype.repository.slots import listed_slots
from ferrotype.repository.spare import KEYS, read_heads
from ferrotype.repository.store import Repository

SecretSource = Callable[[Path], Secret | None]


def open_container(path: Path, *, writable: bool = False, opener: Opener = PosixFile) -> Container:
    """The container an existing image is kept in.  Raises InvalidImage where the file is none."""
    if not path.exists():
        whole = _whole(path)
        more = f"; this verb takes a whole image: name {whole}" if whole is not None else ""
        raise UsageError(f"{path} does not exist{more}")
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    try:
        return Container.open(path, writable=writable, opener=opener)
    except InvalidImage as error:
        if error.field != "magic":
            raise error.of(str(path)) from None
        raise InvalidImage(
            f"{path} is not a ferrotype image: `ferrotype info {path}` says what it is, and `ferrotype backup {path} "
            f"IMAGE` makes an image of it; if it was one, `ferrotype salvage {path}` finds what is left"
        ) from None
    except FormatError as error:
        raise error.of(str(path)) from None


def _whole(path: Path) -> Path | None:
    """The file that is there, if a reference to something in it was given."""
    for sign in ("#", "::"):
        base, found, _ = str(path).rpartition(sign)
        base = base.partition("::")[0]
        if found and base and Path(base).is_file():
            return Path(base)
    return None


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
        with _telling(path, container):
            wanted = secret_given or is_encrypted(container)
            chosen = _chosen(path, container, secret) if wanted else None
            repository = Repository.open(container, chosen, level=level)
    except BaseException:
        container.close()
        raise
    repository.warnings += container.warnings
    if place is not None:
        place.opened(repository, writable=writable)
        repository.at_end = lambda: place.left(repository, written=writable)
    return repository


def _chosen(path: Path, container: Container, secret: SecretSource) -> Secret | None:
    try:
        return secret(path)
    except KeyRefused:  # nobody is asked for what opens nothing
        listed_slots(container, lambda _: None)
        raise


@contextmanager
def _telling(path: Path, container: Container) -> Iterator[None]:
    """Errors of the opening name the image, and say where a key is not known since its slot may be lost."""
    try:
        yield
    except KeyNotKnown as error:
        if container.warnings:
            raise KeyNotKnown(
                f"{path} is cut short or damaged, and its key slots may be lost in part: {error} "
                f"({container.warnings[0]}); look for another copy of the image, or try `ferrotype salvage {path}`"
            ) from None
        raise error.of(str(path)) from None
    except (FormatError, KeyRefused) as error:
        raise error.of(str(path)) from None


def image_files(image: Path) -> list[Path]:
    """All files an image is stored in."""
    files = [image]
    while (more := volume_path(image, len(files))).exists():
        files.append(more)
    return files


def is_encrypted(container: Container) -> bool:
    """Whether a passphrase or key file is needed; of an image that is damaged, whether there is anything it opens."""
    if any(True for _ in container.list(KEYS)):
        return True
    return bool(container.warnings) and bool(read_heads(container).slots)
