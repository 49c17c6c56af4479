"""The folder of a Parallels disk: what DiskDescriptor.xml says of its files.

    <Parallels_disk_image>
      <Disk_Parameters>  <Disk_size>sectors</Disk_size> ...
      <StorageData>
        <Storage>        <Start>sector</Start> <End>sector</End>
          <Image>        <GUID> <Type>Compressed or Plain</Type> <File>
      <Snapshots>
        <TopGUID>
        <Shot>           <GUID> <ParentGUID>, all zeros for the first

Storages follow each other on the disk; each has an image for every snapshot.  The state of the disk now is that of
TopGUID, over its parents.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final
from xml.parsers import expat

from ferrotype.block import Source, Traits, read
from ferrotype.block.views import Concat, Slice, Unavailable
from ferrotype.errors import FerrotypeError, FormatError, InvalidImage, UnsupportedError
from ferrotype.formats import MAX_SIZE, Image, left_out
from ferrotype.formats.outside import attempt
from ferrotype.formats.parallels import DESCRIPTOR, Expandable, probe
from ferrotype.formats.related import MAX_DEPTH, Related
from ferrotype.formats.tables import SECTOR
from ferrotype.units import MiB

__all__ = ["has_parent", "is_older", "open_disk"]

_MAX_DESCRIPTOR: Final = MiB  # bytes; a disk with many snapshots has a few KiB
_MAX_NESTING: Final = 32
_MAX_FILES: Final = 1000
_NONE: Final = "{00000000-0000-0000-0000-000000000000}"
_TOP: Final = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"  # of the current state, where none is named


def has_parent(descriptor: Source, name: str) -> bool:
    """Whether the image called ``name`` stands over another one; False where the descriptor cannot be read."""
    try:
        disk = _parsed(descriptor)
    except FormatError:
        return False
    guids = {guid for storage in disk.storages for guid, file in storage.files.items() if file.name == name}
    return any(disk.parents.get(guid, _NONE) != _NONE for guid in guids)


def is_older(descriptor: Source, name: str) -> bool:
    """Whether another image stands over the one called ``name``; False where the descriptor cannot be read."""
    try:
        disk = _parsed(descriptor)
    except FormatError:
        return False
    guids = {guid for storage in disk.storages for guid, file in storage.files.items() if file.name == name}
    return bool(guids) and disk.top not in guids


def open_disk(related: Related) -> Image:
    """The disk whose folder ``related`` is for.  ``missing``: a file of it, or the key, as encryption is not read."""
    with ExitStack() as stack:
        descriptor = related.file(DESCRIPTOR, "descriptor")
        try:
            disk = _parsed(descriptor)
        finally:
            descriptor.close()
        files = _Files(related, stack)
        if disk.encrypted:
            files.missing = UnsupportedError("the disk is encrypted", field="Encryption")
        source = _state(disk, disk.top, files)
        keep = stack.pop_all()
    return Image(
        "parallels",
        source,
        facts={
            "subformat": "folder",
            "files": sorted(files.named),
            "dirty": bool(files.warnings),
            "encrypted": disk.encrypted,
        },
        disks={guid.strip("{}"): _opener(disk, guid, files) for guid in disk.parents if guid != disk.top},
        warnings=tuple(files.warnings),
        besides=left_out("snapshot", [guid.strip("{}") for guid in disk.parents if guid != disk.top]),
        close=keep.close,
        missing=files.missing,
    )


def _opener(disk: _Disk, guid: str, files: _Files) -> Callable[[], Source]:
    def opened() -> Source:
        known = files.missing
        source = _state(disk, guid, files)
        if files.missing is not None and known is None:  # a file that the disk as it is now does without
            raise files.missing
        return source

    return opened


# ---------------------------------------------------------------------- the disk of the files


class _Files:
    """The images of the folder, each opened once; ``stack`` closes them."""

    def __init__(self, related: Related, stack: ExitStack) -> None:
        self._related, self._stack = related, stack
        self._opened: dict[str, Source] = {}
        self.named: set[str] = set()
        self.warnings: list[str] = []
        self.missing: FerrotypeError | None = None  # why no more of them is opened

    def layer(self, file: _File, length: int, below: Source | None) -> Source:
        """The disk of a file of the folder, over what is below it."""
        self.named.add(file.name)
        if self.missing is None and file.name not in self._opened:
            opened, self.missing = attempt(lambda: self._related.file(file.name, "image"))
            if opened is not None:
                self._stack.callback(opened.close)
                self._opened[file.name] = opened
        if self.missing is not None:
            return Unavailable(length, Traits(), self.missing)
        source = self._opened[file.name]
        if file.kind == "plain":
            if source.size < length:
                raise InvalidImage(f"the plain image {file.name!r} is shorter than its storage", offset=source.size)
            return Slice(source, 0, length)
        if not probe(source):
            raise InvalidImage(f"{file.name!r} is no expandable image", offset=0, field="magic")
        image = Expandable(source)
        if image.size < length:
            raise InvalidImage(f"the image {file.name!r} is shorter than its storage", field="nb_sectors")
        self.warnings += [f"{file.name}: {warning}" for warning in image.warnings]
        return Slice(image.source(below), 0, length)


def _state(disk: _Disk, guid: str, files: _Files) -> Source:
    """The disk as it was, or is, at a snapshot."""
    chain = _chain(disk, guid)
    parts = []
    for storage in disk.storages:
        below: Source | None = None
        for number in reversed(chain):
            file = storage.files.get(number)
            if file is None:
                raise InvalidImage(f"a storage has no image for the snapshot {number}", field="GUID")
            below = files.layer(file, storage.length, below)
        if below is not None:
            parts.append(below)
    return Concat(parts)


def _chain(disk: _Disk, guid: str) -> list[str]:
    """The snapshot and its parents, itself first."""
    chain: list[str] = []
    while guid != _NONE:
        if guid in chain:
            raise InvalidImage(f"the chain of snapshots is a loop at {guid}", field="ParentGUID")
        if len(chain) >= MAX_DEPTH:
            raise InvalidImage(f"the chain of snapshots has more than {MAX_DEPTH} layers", field="ParentGUID")
        if guid not in disk.parents:
            raise InvalidImage(f"there is no snapshot {guid}", field="ParentGUID" if chain else "TopGUID")
        chain.append(guid)
        guid = disk.parents[guid]
    return chain


# ---------------------------------------------------------------------- the descriptor


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    kind: str  # compressed or plain


@dataclass(frozen=True, slots=True)
class _Storage:
    start: int  # bytes
    length: int
    files: dict[str, _File]  # by GUID


@dataclass(frozen=True, slots=True)
class _Disk:
    storages: list[_Storage]
    parents: dict[str, str]  # GUID of a snapshot -> that of its parent
    top: str
    encrypted: bool


@dataclass(slots=True)
class _Element:
    """An XML element: what a descriptor needs of it."""

    tag: str
    text: str = ""
    children: list[_Element] = field(default_factory=list)

    def all(self, tag: str) -> list[_Element]:
        return [child for child in self.children if child.tag == tag]

    def first(self, tag: str) -> _Element:
        found = self.all(tag)
        if not found:
            raise InvalidImage(f"the descriptor has no {tag} in its {self.tag}", field=tag)
        return found[0]

    def number(self, tag: str) -> int:
        text = self.first(tag).text.strip()
        if not (text.isascii() and text.isdigit() and len(text) < 20) or int(text) * SECTOR > MAX_SIZE:
            raise InvalidImage(f"the descriptor says {text[:40]!r} where a number of sectors is needed", field=tag)
        return int(text)

    def guid(self, tag: str) -> str:
        return self.first(tag).text.strip().lower()


def _parsed(descriptor: Source) -> _Disk:
    root = _xml(descriptor)
    if root.tag != "Parallels_disk_image":
        raise InvalidImage(f"the descriptor is of {root.tag[:40]!r}, not of a Parallels disk", offset=0)
    parameters = root.first("Disk_Parameters")
    engines = [engine for encryption in parameters.all("Encryption") for engine in encryption.all("Engine")]
    encrypted = any(engine.text.strip().lower() not in ("", _NONE) for engine in engines)
    storages = [_storage(one) for one in root.first("StorageData").all("Storage")]
    storages.sort(key=lambda storage: storage.start)
    size = parameters.number("Disk_size") * SECTOR
    at = 0
    for storage in storages:
        if storage.start != at:
            raise InvalidImage(f"no storage, or two, at byte {min(at, storage.start)} of the disk", field="Start")
        at += storage.length
    if at != size:
        raise InvalidImage(f"the storages have {at} bytes, and the disk {size}", field="Disk_size")
    if sum(len(storage.files) for storage in storages) > _MAX_FILES:
        raise UnsupportedError(f"a disk of more than {_MAX_FILES} files", field="StorageData")
    snapshots = root.first("Snapshots")
    parents = {shot.guid("GUID"): shot.guid("ParentGUID") for shot in snapshots.all("Shot")}
    top = snapshots.guid("TopGUID") if snapshots.all("TopGUID") else _TOP
    return _Disk(storages, parents, top, encrypted)


def _storage(storage: _Element) -> _Storage:
    start, end = storage.number("Start") * SECTOR, storage.number("End") * SECTOR
    if end <= start:
        raise InvalidImage(f"a storage from byte {start} to {end} of the disk", field="End")
    files = {}
    for image in storage.all("Image"):
        kind = image.first("Type").text.strip().lower()
        if kind not in ("compressed", "plain"):
            raise UnsupportedError(f"a Parallels image of type {kind[:40]!r}", field="Type")
        name = image.first("File").text.strip().replace("\\", "/")
        if name.startswith("/"):  # where the disk once was: its files have moved with it
            name = name.rsplit("/", 1)[-1]
        files[image.guid("GUID")] = _File(name, kind)
    return _Storage(start, end - start, files)


def _xml(source: Source) -> _Element:
    """The document's root.  Declarations, and entities with them, are refused."""
    if source.size > _MAX_DESCRIPTOR:
        raise UnsupportedError(f"a descriptor of {source.size} bytes; at most {_MAX_DESCRIPTOR} are read")
    top = _Element("")
    path = [top]

    def start(tag: str, attributes: dict[str, str]) -> None:  # noqa: ARG001
        if len(path) > _MAX_NESTING:
            raise InvalidImage("the descriptor is nested too deeply")
        path[-1].children.append(_Element(tag))
        path.append(path[-1].children[-1])

    def end(tag: str) -> None:  # noqa: ARG001
        path.pop()

    def text(data: str) -> None:
        path[-1].text += data

    def refuse(*_: object) -> None:
        raise InvalidImage("the descriptor has a document type declaration, which no Parallels disk needs")

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(read(source, 0, source.size), True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise InvalidImage(f"the descriptor is no XML: {error}", offset=max(parser.ErrorByteIndex, 0)) from None
    return top.children[0]
