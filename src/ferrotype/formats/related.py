"""What an image may open besides itself: parents, backing and data files, extents, split parts.

Whoever made an image chose the names inside it.  So a name is opened only

    relative to the folder of the file it stands in,
    never absolute, never an address (nbd:, json:, http: ...), never anything but a regular file,
    and where it leads, symbolic links followed, lies in the folder tree of the file the user named,

unless the user allows a folder or file by name.  A chain of images has at most ``MAX_DEPTH`` layers and no loop.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ferrotype.block import Source
from ferrotype.block.file import FileSource
from ferrotype.block.watched import Watched
from ferrotype.errors import DeviceError, InvalidImage, NotAllowed, UnsupportedError, UsageError
from ferrotype.job import Job, NullJob
from ferrotype.stall import Patience

if TYPE_CHECKING:
    from ferrotype.formats import Image

__all__ = ["MAX_DEPTH", "MAX_NAME", "Related", "is_address"]

MAX_DEPTH: Final = 64  # layers of a chain; each holds a file open and takes half a dozen calls, one inside the other
MAX_NAME: Final = 4096  # bytes of a path (limits.h)
MAX_COMPONENT: Final = 255  # bytes of each name in it
_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:")  # two letters or more: ``c:`` is a drive


class Related:
    """Opens what one image names.  ``nothing`` is that of an image which is no file, and so has no folder."""

    def __init__(
        self,
        path: Path | None,
        allowed: Sequence[Path] = (),
        *,
        patience: Patience | None = None,
        passphrase: Callable[[], bytes | None] = lambda: None,
        job: Job | None = None,
        holes: bool = True,
    ) -> None:
        """``path``: the file the user named; ``allowed``: further files and folders that may be opened.

        ``holes``: whether those that the file system tells of in these files are believed.
        """
        self.job: Job = job or NullJob()  # hears how long work on the way to the disk gets on, such as unpacking
        self.depth = 0  # how many files the image lies in, such as an archive
        self.packed = 0  # bytes of the outermost of them
        self.called = path.name if path is not None else ""
        self.path = path
        self.passphrase = passphrase  # asked for where an image is itself encrypted; None: the user gave none
        self._allowed = tuple(Path(os.path.realpath(one)) for one in allowed)
        # a link that the user named has two homes: its own folder, and that of what it leads to
        self._trees = tuple(Path(os.path.realpath(folder)) for folder in _homes(path))
        self._patience = patience
        self._holes = holes
        self._seen: tuple[tuple[int, int], ...] = (_identity(path),) if path is not None else ()
        self.opened: dict[Path, Watched] = {}  # everything opened so far, by this one and those made of it

    @classmethod
    def nothing(cls) -> Related:
        """Allows nothing."""
        return cls(None)

    def exists(self, name: str, what: str) -> bool:
        """Whether the name leads to an allowed file.  Raises NotAllowed as ``file`` does."""
        return os.path.exists(self._resolve(name, what))

    def file(self, name: str, what: str, *, glance: bool = False) -> Source:
        """The regular file a name inside the image leads to; ``what`` it is, for messages.

        With ``glance`` it may turn out to be none of the image's, and does not count as ``opened``.  Raises
        NotAllowed where it may not be opened and InvalidImage where it is not there.
        """
        path = self._resolve(name, what)
        known = path in self.opened
        file = self._open(path, name, what)
        if glance and not known:
            del self.opened[path]
        return file

    def sibling(self, name: str, what: str) -> Source | None:
        """A file beside the image whose name ferrotype made up, such as the next segment; None: there is none."""
        if self.path is None or os.sep in name or not _is_name(name):
            return None
        path = self._beside(name)
        return self._open(self._checked(path, name, what), name, what) if os.path.exists(path) else None

    def is_beside(self, name: str) -> bool:
        """Whether a file of this name stands beside the image."""
        return self.path is not None and _is_name(name) and os.path.exists(self._beside(name))

    def beside(self) -> list[str]:
        """The names of all that stands beside the image; none where its folder cannot be listed."""
        return list(dict.fromkeys(name for folder in _homes(self.path) for name in _names_in(folder)))

    def siblings(self, suffix: str, what: str, most: int) -> list[str]:
        """Files whose names end in ``suffix``, beside the image and where the user allows: names for ``file``.

        For formats that know another file by its content alone.  Raises UnsupportedError where there are more than
        ``most``.
        """
        names = [name for name in self.beside() if name.lower().endswith(suffix)]
        for one in self._allowed:
            found = [one / name for name in _names_in(one)] if one.is_dir() else [one]
            names += [str(path) for path in found if path.name.lower().endswith(suffix)]
        if len(names) > most:
            raise UnsupportedError(f"{len(names)} files may be the {what}; at most {most} are looked at")
        return names

    def within(self, name: str | None, *, packed: int = 0, called: str = "") -> Related:
        """The same for a file that lies in the image's file and is called ``name``; None: it may open nothing else.

        ``packed``: bytes of the file that all is unpacked from, unless it lies in another itself; ``called``: the
        name of one that may open nothing.
        """
        inner = Related(None, passphrase=self.passphrase, patience=self._patience, job=self.job, holes=self._holes)
        inner.depth, inner.packed, inner.called = self.depth + 1, self.packed or packed, name or called
        if name is not None and self.path is not None:
            inner.path, inner._allowed, inner._trees = self.path.with_name(name), self._allowed, self._trees
            inner._seen = self._seen
        inner.opened = self.opened
        return inner

    def inside(self) -> Related:
        """The same for the files in the folder that ``path`` is: names are resolved in it, and lead no further."""
        if self.path is None:
            return self
        inner = Related(
            self.path / "-",
            self._allowed,
            patience=self._patience,
            passphrase=self.passphrase,
            holes=self._holes,
        )
        inner._seen, inner.opened = self._seen, self.opened
        return inner

    def image(self, name: str, what: str, format: str | None = None) -> Image:
        """The image a name leads to, such as a parent, in ``format`` or what its content shows (``raw`` if said).

        Its own names are resolved in its own folder, under the same rules.  Raises as ``file`` does, InvalidImage at
        a loop and at a chain that is too long, and what is ``missing`` below: a chain can be read if all of it can.
        """
        from ferrotype.formats.registry import is_packed, open_file, recognise

        path = self._resolve(name, what)
        file = self._open(path, name, what)
        try:
            identity = _identity(path)
            if identity in self._seen:
                raise InvalidImage(f"the chain of images is a loop: the {what} {name!r} is part of it already")
            if len(self._seen) >= MAX_DEPTH:
                raise InvalidImage(f"the chain of images has more than {MAX_DEPTH} layers")
            inner = Related.nothing()
            inner.path, inner.passphrase, inner._patience = path, self.passphrase, self._patience
            inner._holes = self._holes
            inner._allowed, inner._trees, inner._seen = self._allowed, self._trees, (*self._seen, identity)
            inner.opened, inner.job, inner.depth, inner.packed = self.opened, self.job, self.depth, self.packed
            if is_packed(format or recognise(file)):
                raise UnsupportedError(f"the {what} {name!r} is packed: unpack it first")
            return open_file(file, inner, format)
        except BaseException:
            file.close()
            raise

    def _resolve(self, name: str, what: str) -> Path:
        if not _is_name(name):
            raise InvalidImage(f"the name of the {what} is no file name")
        if is_address(name):
            raise NotAllowed(f"the image names {name!r} as its {what}: an address inside an image is never opened")
        if self.path is None:
            raise NotAllowed(f"the image names {name!r} as its {what}, and only an image in a file may open others")
        absolute = os.path.isabs(name)
        path = Path(name) if absolute else self._beside(name)
        return self._checked(path, name, what, absolute=absolute)

    def _beside(self, name: str) -> Path:
        """The name in the folder of the image, or of what it is a link to where only that has it."""
        places = [folder / name for folder in _homes(self.path)]
        return next((place for place in places if os.path.exists(place)), places[0])

    def _checked(self, path: Path, name: str, what: str, *, absolute: bool = False) -> Path:
        real = Path(os.path.realpath(path))
        inside = not absolute and any(real.is_relative_to(tree) for tree in self._trees)
        if not inside and not any(real.is_relative_to(one) for one in self._allowed):
            raise NotAllowed(
                f"the image names {name!r} as its {what}, which is outside its own folder; "
                f"allow it with --allow-related if it is meant"
            )
        return real

    def _open(self, path: Path, name: str, what: str) -> Source:
        try:
            file = FileSource(path, patience=self._patience, holes=self._holes)
            self._watch(path, file)
            return file
        except UsageError as error:
            raise InvalidImage(f"the {what} {name!r} cannot be used: {error}") from None
        except DeviceError as error:
            raise DeviceError(f"the {what} {name!r} cannot be used: {error}") from error

    def _watch(self, path: Path, file: FileSource) -> None:
        known = self.opened.get(path)
        if known is None:
            self.opened[path] = Watched(file)
        else:
            known.again(file)


def is_address(name: str) -> bool:
    """Whether a name inside an image is taken for an address, such as ``nbd:...``, by us and by others."""
    return _ADDRESS.match(name) is not None


def _is_name(name: str) -> bool:
    try:
        octets = os.fsencode(name)
    except UnicodeEncodeError:  # half of a pair of UTF-16
        return False
    longest = max(map(len, octets.split(b"/")))
    return 0 < len(octets) <= MAX_NAME and longest <= MAX_COMPONENT and b"\0" not in octets


def _homes(path: Path | None) -> list[Path]:
    if path is None:
        return []
    return list(dict.fromkeys((path.parent, Path(os.path.realpath(path)).parent)))


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (-1, -1)
    return (status.st_dev, status.st_ino)
