"""Which file system stands on a volume.

    containers (RAID, LVM, LUKS ...)  ->  imaged whole
    one file system with a map        ->  opened
    one without                       ->  imaged whole, but called by its name
    two or more at once               ->  imaged whole: one is a leftover, and nothing says which
    nothing built in                  ->  what plug-ins (entry points ``ferrotype.filesystems``) recognise

A plug-in's entry point names a module, or any object, with ``probe`` and ``open`` like the modules here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Final

from ferrotype.block import Source
from ferrotype.block.views import Through
from ferrotype.errors import DeviceError, FormatError, UnsupportedError
from ferrotype.filesystems import FileSystem, Module
from ferrotype.filesystems.signatures import Peek, found, member

__all__ = ["FILESYSTEMS", "Identified", "identify", "standing"]

ENTRY_POINTS: Final = "ferrotype.filesystems"

FILESYSTEMS: Final[dict[str, str]] = {
    "fat": "ferrotype.filesystems.fat",
    "swap": "ferrotype.filesystems.swap",
    "ext": "ferrotype.filesystems.ext",
    "ntfs": "ferrotype.filesystems.ntfs",
    "exfat": "ferrotype.filesystems.exfat",
}
"""Name to module, imported only when a volume is looked at."""


@dataclass(frozen=True, slots=True)
class Identified:
    """What stands on a volume."""

    kind: str  # blkid's name
    label: str | None
    uuid: str | None
    filesystem: FileSystem | None  # opened; None where the volume has to be imaged whole
    problem: str | None  # why it has to be, for the user
    damaged: bool = False  # it is of a kind with a reader, which found bytes that contradict it, or none


class _Peeked(Through):
    """A volume whose first bytes are answered from what has been read already."""

    def __init__(self, source: Source, peek: Peek) -> None:
        super().__init__(source)
        self._peek = peek

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        if offset >= 0 and offset + len(buf) <= min(Peek.HEAD, self.size):
            data = self._peek.at(offset, len(buf))
            if len(data) == len(buf):
                buf[:] = data
                return
        self._source.read_into(offset, buf)


def identify(source: Source) -> Identified | None:
    """What stands on the volume ``source``, None where nothing is recognised.

    Reads about 800 KiB in a few requests, and what opening the file system takes.  Never raises on content, and not
    on what cannot be read either: that volume is imaged whole, and the copy reports the damage.
    """
    peek = Peek(source)
    if (container := member(peek)) is not None:
        return _whole(container.kind, container.label, container.uuid)
    mapped = list(_mapped(_Peeked(source, peek)))
    foreign = found(peek)
    sure = [hit for hit in foreign if not hit.weak]
    if mapped and (sure or len(mapped) > 1):
        names = [_kind(name, peek) for name, _ in mapped] + [hit.kind for hit in sure]
        return Identified(names[0], None, None, None, f"it has the signatures of {' and '.join(names)} at once")
    if mapped:
        name, module = mapped[0]
        return _open(_kind(name, peek), module, source)
    if foreign:
        hit = (sure or foreign)[0]
        return _whole(hit.kind, hit.label, hit.uuid)
    for name, module in _plugged_in(_Peeked(source, peek)):
        return _open(name, module, source)
    return None


def standing(source: Source) -> list[str]:
    """Kinds whose signatures stand on a source, for a disk that has a partition table as well.

    Containers first; weak signatures count for nothing here.  Never raises on content.
    """
    peek = Peek(source)
    container = member(peek)
    kinds = [container.kind] if container is not None else []
    kinds += [_kind(name, peek) for name, _ in _mapped(_Peeked(source, peek))]
    return kinds + [hit.kind for hit in found(peek) if not hit.weak]


def _whole(kind: str, label: str | None, uuid: str | None) -> Identified:
    return Identified(kind, label, uuid, None, f"ferrotype has no allocation map for {kind}")


def _open(kind: str, module: Module, source: Source) -> Identified:
    try:
        filesystem = module.open(source)
    except (FormatError, DeviceError) as error:
        return Identified(kind, None, None, None, str(error), damaged=not isinstance(error, UnsupportedError))
    facts = filesystem.facts
    return Identified(facts.kind, facts.label, facts.uuid, filesystem, None)


def _mapped(source: Source) -> Iterator[tuple[str, Module]]:
    for name, path in FILESYSTEMS.items():
        module: Module = import_module(path)
        if _probe(module, source):
            yield name, module


def _plugged_in(source: Source) -> Iterator[tuple[str, Module]]:
    from importlib.metadata import entry_points  # few volumes come to this, and it brings half of `email` along

    for entry in entry_points(group=ENTRY_POINTS):
        module: Module = entry.load()
        if _probe(module, source):
            yield entry.name, module


def _probe(module: Module, source: Source) -> bool:
    try:
        return module.probe(source)
    except (FormatError, DeviceError):  # where it would have to be known by cannot be read
        return False


def _kind(name: str, peek: Peek) -> str:
    """blkid's name of a file system that may fail to open."""
    if name == "fat":
        return "vfat"
    if name != "ext":
        return name
    compatible, incompatible, read_only = (peek.integer(1024 + at, 4) for at in (92, 96, 100))
    if incompatible & ~0x16 or read_only & ~0x07:  # anything that ext3 does not have
        return "ext4"
    return "ext3" if compatible & 0x04 else "ext2"
