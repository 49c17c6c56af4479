"""Virtual-disk containers: files that hold a disk in a form of their own, each in one module here.

    file ── probe ──>  is it mine?
         ── open  ──>  Image: the disk as a Source, further disks (internal snapshots), facts
    new files <── create ── Sink: takes the disk's bytes, finish() makes the tables

A format's module has what the Protocol ``Format`` says, and one that can be written what ``Writable`` says as well;
a row of ``registry.FORMATS`` names it.  Plug-ins join through the entry point group ``ferrotype.formats``, whose
entries name such a module.  What a file says is believed only after it was checked: wrong bytes raise InvalidImage,
right ones that ask for more than the module does UnsupportedError, and files named inside are opened by ``Related``,
or not at all.  Where the file is right and the disk cannot be read for want of something else, such as a parent or
a key, ``open`` gives an Image that says so: ``Image.missing``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, cast, runtime_checkable

from ferrotype.block import Sink, Source
from ferrotype.block.views import Unavailable
from ferrotype.errors import FerrotypeError, UsageError

if TYPE_CHECKING:
    from ferrotype.block.outputs import Outputs
    from ferrotype.formats.related import Related
    from ferrotype.job import Job

__all__ = [
    "Backing",
    "Folder",
    "Format",
    "Image",
    "Marking",
    "Option",
    "Options",
    "Packer",
    "Room",
    "Roomy",
    "Spec",
    "Tree",
    "TreeEntry",
    "TreeFormat",
    "Writable",
    "WritableSink",
    "left_out",
    "plain_room",
]

MAX_SIZE: Final = 1 << 62  # bytes of a disk; beyond it offsets stop being what the kernel and numpy can say

_NAMED: Final = 5  # of many

T = TypeVar("T")


class Image:
    """An opened container.  It owns its file, and everything else it was opened with: ``close`` closes all.

    ``facts`` are for people and scripts, JSON-ready.  Keys that formats share: ``subformat`` (str), ``unit`` (bytes
    of a cluster, block, grain or chunk), ``compression`` (str), ``backing`` ({"name", "format"} or None),
    ``encrypted``, ``dirty`` and ``corrupt`` (bool), ``files`` (names of further files the disk stands in),
    ``created``.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        *,
        facts: Mapping[str, object] | None = None,
        disks: Mapping[str, Callable[[], Source]] | None = None,
        hashes: Mapping[str, str] | None = None,
        warnings: tuple[str, ...] = (),
        besides: tuple[str, ...] = (),
        remarks: tuple[str, ...] = (),
        check: Callable[[Job], list[str]] | None = None,
        close: Callable[[], None] = lambda: None,
        missing: FerrotypeError | None = None,
    ) -> None:
        """With ``missing`` no more than the size and the traits of ``source`` and of further disks is ever used."""
        self.format = name  # of the registry
        self.missing = missing  # why the disk cannot be read as things are: no parent, no key ...; None: it can
        self.source = self._readable(source)  # the disk as it is now; raises ``missing`` where it is read
        self.facts = dict(facts or {})
        self.disks = dict(disks or {})  # such as internal snapshots, by name; opened when asked for
        self.hashes = dict(hashes or {})  # of the whole disk, as the container states them: {"md5": hex digits}
        self.warnings = warnings  # what the user should know before believing the disk
        self.besides = (
            besides  # what of the user's the files hold besides the disk: whoever takes only the disk says it
        )
        self.remarks = remarks  # the same of what is nobody's data, such as records of what changed
        self.check = check  # proves the container's own checksums and returns a sentence for each damage; None: none
        self._closing = ExitStack()
        self._closing.callback(close)
        self._closing.callback(source.close)

    def disk(self, name: str | None) -> Source:
        """The disk, or one of the further ones, which ``close`` closes as well.  Raises UsageError."""
        if name is None:
            return self.source
        if name not in self.disks:
            known = ", ".join(self.disks) or "none"
            raise UsageError(f"the {self.format} image holds no disk called {name!r}; further disks in it: {known}")
        source = self.disks[name]()
        self._closing.callback(source.close)
        return self._readable(source)

    def _readable(self, source: Source) -> Source:
        return source if self.missing is None else Unavailable(source.size, source.traits, self.missing)

    def close(self) -> None:
        self._closing.close()


def left_out(kind: str, names: Sequence[str]) -> tuple[str, ...]:
    """``Image.besides`` of an image whose further ``disks`` are of a kind, such as "internal snapshot"."""
    if not names:
        return ()
    named = ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")
    many = f"{kind} is" if len(names) == 1 else f"{kind}s are"
    return (f"{len(names)} {many} not taken ({named}), only the disk as it is now: FILE::NAME names one of them",)


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that may be chosen when an image of a format is made: ``convert -o NAME=VALUE``."""

    help: str
    parse: Callable[[str], object] = str  # raises ValueError where the text means nothing; ``units.parse_size`` ...


Options = Mapping[str, Option]


def one_of(*words: str) -> Callable[[str], str]:
    """The ``parse`` of an option that is one of some words."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(" or ".join(words) if len(words) == 2 else f"one of {', '.join(words)}")
        return text

    return parse


@dataclass(frozen=True, slots=True)
class Spec:
    """The disk that an image is to be made of, and how."""

    size: int  # bytes
    sector_size: int = 512
    compress: bool = False  # the user asked for the compressed kind, where there is a choice
    chosen: Mapping[str, object] = field(default_factory=dict)  # parsed values of the module's OPTIONS
    backing: Backing | None = None

    def get(self, name: str, default: T) -> T:
        """What was chosen, else ``default``; the option's ``parse`` gives values of the default's type."""
        value = self.chosen.get(name)
        return default if value is None else cast("T", value)


@dataclass(frozen=True, slots=True)
class Backing:
    """The lower layer that an image is made on: what is equal to it is not stored again."""

    name: str  # as the new image will say it: relative to its folder
    format: str
    source: Source


class Format(Protocol):
    """What the module of a format that can be read has."""

    def probe(self, file: Source, /) -> bool:
        """Whether the file is of this format.  Reads little; FormatError and DeviceError count as no."""

    def open(self, file: Source, related: Related, /) -> Image:
        """Open it; the image owns ``file`` from then on.  What raises leaves ``file`` open for the caller to close.

        Reads headers and the tables that must be in memory, nothing that grows with the disk's data.  What cannot be
        read for want of another file, or of a key, may be told as ``Image.missing`` instead of raised.
        """


@runtime_checkable
class Folder(Protocol):
    """What the module of a format has whose images are folders of files."""

    def probe_folder(self, path: Path, /) -> bool:
        """Whether the folder is such an image."""

    def open_folder(self, path: Path, related: Related, /) -> Image:
        """Open it.  ``related`` is that of the folder: names are resolved beside it, files in it by ``inside``."""


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """A file, folder or link of an image that holds files and no disk."""

    name: str
    kind: str  # "file", "folder" or "link", whose content is not a file's
    size: int = 0  # bytes
    modified: str | None = None  # RFC 3339
    digest: str = ""  # of the content, as the image names it; "" where it is empty
    streams: tuple[str, ...] = ()  # names of further contents, read as PATH:NAME


class Tree(Protocol):
    """An opened image that holds files and folders, such as a WIM.  Paths are relative and divided by ``/``."""

    format: str
    facts: dict[str, object]  # for people and scripts, JSON-ready
    warnings: tuple[str, ...]

    def list(self, path: str = "", /) -> Iterator[TreeEntry]:
        """What lies in a folder; "" is the top.  Raises UsageError where there is no such folder."""

    def walk(self, path: str = "", /) -> Iterator[tuple[str, TreeEntry]]:
        """Everything below a folder, each with its path, a folder before what lies in it.  It always ends."""

    def read(self, path: str, /) -> Iterator[bytes]:
        """The content of a file, a piece at a time, proven where the format can.  Raises UsageError, InvalidImage."""

    def close(self) -> None: ...


@runtime_checkable
class TreeFormat(Protocol):
    """What the module of a format has whose images hold files and no disk."""

    def probe(self, file: Source, /) -> bool:
        """As ``Format.probe``."""

    def open_tree(self, file: Source, related: Related, /) -> Tree:
        """Open it; the tree owns ``file`` from then on."""


@runtime_checkable
class Writable(Format, Protocol):
    """What the module of a format that can be written has besides."""

    OPTIONS: Options

    def create(self, outputs: Outputs, spec: Spec, /) -> WritableSink:
        """Begin an image of a disk that is all zeros so far.  Raises UsageError where the options do not fit."""


@dataclass(frozen=True, slots=True)
class Room:
    """What is known, before a disk is read, of the bytes that the files of its image take up."""

    least: int = 0  # whatever the disk holds
    unit: int = 0  # bytes of the disk that are stored together, as they are, where any is no zero; 0: they are packed


@runtime_checkable
class Roomy(Protocol):
    """What the module of a format that can be written may have besides."""

    def room(self, spec: Spec, /) -> Room:
        """What an image takes up.  The options need not fit: ``create`` looks at that."""


def plain_room(spec: Spec) -> Room:  # noqa: ARG001  the protocol's signature
    """``room`` of a format whose images hold the disk as it is, and leave out its zeros however it is called."""
    return Room(unit=1)


@runtime_checkable
class WritableSink(Sink, Protocol):
    """A disk that is being written into an image.

    Writes begin and end at multiples of ``traits.unit``, or at the end of the disk; nothing is written twice.
    ``write`` and ``write_zeros`` may be called from many threads unless ``traits.ordered`` is set.  Where the files
    are written behind (``Outputs``) one thread calls them, and what it gives stays as it is until the next call.
    """

    def finish(self) -> None:
        """Write the tables and headers.  Nothing may be written afterwards; the caller commits the files."""


@runtime_checkable
class Marking(WritableSink, Protocol):
    """A sink that keeps where its zeros stand for what could not be read."""

    def mark_unreadable(self, ranges: Sequence[tuple[int, int]], /) -> None:
        """All of them, ascending, as start and length in bytes.  Called once, before ``finish``."""


@runtime_checkable
class Packer(WritableSink, Protocol):
    """A sink that keeps its units in a form that takes work, such as compressed.

    ``pack`` runs on all cores, ``put`` in order; ``write`` is the two in turn.
    """

    def pack(self, offset: int, data: memoryview, /) -> object:
        """The form in which a range of whole units is kept.  Any thread, any order, changes nothing."""

    def put(self, offset: int, packed: object, /) -> None:
        """Store what ``pack`` returned for ``offset``.  One thread at a time, offsets ascend."""
