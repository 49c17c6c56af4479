"""VMDK, the disks of VMware.

    descriptor ──> extent: FLAT, VMFS           a part of a file, as it is
               ──> extent: SPARSE, VMFSSPARSE,  grains found through tables: vmdk_sparse, vmdk_cowd,
                           SESPARSE             vmdk_sesparse
               ──> extent: ZERO                 nothing
               ──> parent                       another VMDK, which shows through the holes; known by its CID

The descriptor is a file of its own, or stands in the one sparse extent there is (monolithicSparse, streamOptimized).
Extents follow each other on the disk.  Written from VMware's "Virtual Disk Format 5.0".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from ferrotype.block import Source, read
from ferrotype.block.views import Concat, Slice
from ferrotype.errors import FerrotypeError, InvalidImage, UnsupportedError
from ferrotype.formats import Image
from ferrotype.formats.mapped import Kind, MappedSource, Mapping
from ferrotype.formats.outside import attempt
from ferrotype.formats.related import Related
from ferrotype.formats.signs import is_vmdk_text
from ferrotype.formats.vmdk.beside import Extents, parent_name
from ferrotype.formats.vmdk.cowd import COWD_MAGIC, open_cowd
from ferrotype.formats.vmdk.descriptor import MAX_DESCRIPTOR, NO_PARENT, SECTOR, Descriptor, Extent, parse
from ferrotype.formats.vmdk.sesparse import CONST_MAGIC, open_sesparse
from ferrotype.formats.vmdk.sparse import MAGIC, Sparse, carried_descriptor, open_hosted
from ferrotype.formats.vmdk.tables import KeptGrains, keep_grains
from ferrotype.formats.vmdk.writer import OPTIONS, create, room
from ferrotype.job import Job

__all__ = ["OPTIONS", "create", "open", "probe", "room"]

_SE_MAGIC: Final = CONST_MAGIC.to_bytes(8, "little")
_SPARSE: Final[dict[bytes, Callable[[Source, KeptGrains], Sparse]]] = {
    MAGIC: open_hosted,
    COWD_MAGIC: open_cowd,
    _SE_MAGIC[:4]: open_sesparse,
}
_MOST_TABLES: Final = 1 << 22  # of all extents; what they take in memory is 16 bytes each
_MOST_COMPRESSED: Final = 16  # extents, each of which keeps some unpacked grains
_ON_DEVICES: Final = ("VMFSRDM", "VMFSRDMP", "VMFSRAW")  # types of extents
_DEVICE: Final = re.compile(r"[\\/]{2}[.?][\\/]")  # how Windows names devices


def probe(file: Source) -> bool:
    """Whether the file begins as a sparse extent or a descriptor does."""
    head = read(file, 0, min(file.size, SECTOR))
    if head[:4] == _SE_MAGIC[:4]:
        return head[4:8] == _SE_MAGIC[4:]
    return head[:4] in _SPARSE or is_vmdk_text(head)


def open(file: Source, related: Related) -> Image:
    """The disk that a descriptor, or the one sparse extent that holds it, describes; and the extent alone.

    Extents and the parent come through ``related``; one that cannot be had is ``missing``.  Raises UnsupportedError
    for extents that stand on devices.
    """
    head = read(file, 0, min(file.size, 8))
    with ExitStack() as stack:
        build = _Building(related, stack)
        if head[:4] not in _SPARSE:
            if file.size > MAX_DESCRIPTOR:
                raise InvalidImage(f"this is no VMDK: no magic number, and {file.size} bytes are no descriptor")
            image = build.described(parse(read(file, 0, file.size)), file)
        elif head[:4] == MAGIC and (text := carried_descriptor(file)) is not None:
            image = build.described(parse(text), file)
        else:
            image = build.alone(_SPARSE[head[:4]](file, build.kept), file)
        build.keep = stack.pop_all()
    return image


@dataclass(slots=True)
class _Building:
    """A disk that is being put together."""

    related: Related
    stack: ExitStack
    keep: ExitStack = field(default_factory=ExitStack)  # what the image closes
    files: dict[str, Source | None] = field(default_factory=dict)  # of the extents, by name
    found: list[Sparse] = field(default_factory=list)
    kept: KeptGrains = field(default_factory=keep_grains)
    warnings: list[str] = field(default_factory=list)
    missing: FerrotypeError | None = None
    beside: Extents | None = None

    # ------------------------------------------------------------------ disks

    def alone(self, sparse: Sparse, file: Source) -> Image:
        """The disk in one sparse extent, with or without a descriptor in it."""
        self.found.append(sparse)
        if sparse.descriptor is None or not sparse.descriptor.strip(b"\0"):
            if sparse.delta:
                raise UnsupportedError("this is one extent of a disk that has a parent: open its descriptor instead")
            self.warnings.append("this is an extent without its descriptor: it may be only a part of a disk")
            return self._image(
                file, None, None, MappedSource(file, sparse.layout, sparse.size, name="VMDK", ragged=sparse.grain - 1)
            )
        descriptor = parse(sparse.descriptor)
        if len(descriptor.extents) != 1:
            raise UnsupportedError(f"a sparse extent that describes a disk of {len(descriptor.extents)} extents")
        size = self._extent_size(descriptor.extents[0], sparse)
        parent = self._parent(descriptor)
        source = MappedSource(
            file,
            sparse.layout,
            size,
            name="VMDK",
            parent=parent.source if parent is not None else None,
            ragged=sparse.grain - 1,
        )
        return self._image(file, descriptor, parent, source)

    def described(self, descriptor: Descriptor, file: Source) -> Image:
        """The disk in the extents that a descriptor names."""
        for extent in descriptor.extents:
            self._check_extent(extent)
        self.beside = Extents(self.related, descriptor)
        parent = self._parent(descriptor)
        parts: list[Source] = []
        at = 0
        for extent in descriptor.extents:
            parts.append(self._part(extent, at, file, parent.source if parent is not None else None))
            at += extent.size
        self.warnings += self.beside.warnings
        return self._image(file, descriptor, parent, parts[0] if len(parts) == 1 else Concat(parts))

    def _image(self, file: Source, descriptor: Descriptor | None, parent: Image | None, source: Source) -> Image:
        for sparse in self.found:
            self.warnings += [warning for warning in sparse.warnings if warning not in self.warnings]
        checks = [sparse.check for sparse in self.found if sparse.check is not None]

        def check(job: Job) -> list[str]:
            found: list[str] = []
            for one in checks:
                found += one(job)
            return found

        def close() -> None:
            with self.keep:
                self.keep.callback(file.close)

        return Image(
            "vmdk",
            source,
            facts=self._facts(descriptor),
            warnings=(*self.warnings, *(f"the parent: {one}" for one in (parent.warnings if parent else ()))),
            check=check if checks else None,
            close=close,
            missing=self.missing,
        )

    def _facts(self, descriptor: Descriptor | None) -> dict[str, object]:
        facts: dict[str, object] = {
            "subformat": descriptor.create_type if descriptor else self.found[0].subformat,
            "encrypted": False,
            "dirty": any(sparse.dirty for sparse in self.found),
            "backing": None,
        }
        if descriptor is not None and descriptor.parent_hint is not None:
            facts["backing"] = {"name": descriptor.parent_hint, "format": "vmdk"}
        if self.found:
            facts["unit"] = max(sparse.grain for sparse in self.found)
        if any(sparse.compressed for sparse in self.found):
            facts["compression"] = "deflate"
        if self.files:
            facts["files"] = list(self.files)
        if descriptor is not None:
            facts["extents"] = [
                {"type": extent.type, "sectors": extent.sectors, "file": extent.name} for extent in descriptor.extents
            ]
            facts["parent_cid"] = f"{descriptor.parent_cid:08x}"
            facts["cid"] = f"{descriptor.cid:08x}" if descriptor.cid is not None else None
            for key, name in (("adaptertype", "adapter_type"), ("virtualhwversion", "hardware_version")):
                if key in descriptor.database:
                    facts[name] = descriptor.database[key]
        return facts

    # ------------------------------------------------------------------ parents and extents

    def _parent(self, descriptor: Descriptor) -> Image | None:
        """The parent, where there is one and it can be had."""
        hint = descriptor.parent_hint
        if hint is None:
            if descriptor.parent_cid != NO_PARENT:
                raise InvalidImage("the disk has a parent, and does not say which", field="parentFileNameHint")
            return None
        if descriptor.parent_cid == NO_PARENT:
            self.warnings.append(f"the disk does not say which content its parent {hint!r} had")
        parent, missing = attempt(lambda: self._with_content(hint, descriptor.parent_cid))
        self.missing = self.missing or missing
        return parent

    def _with_content(self, name: str, cid: int) -> Image:
        """The parent, which must be the one that the disk was made over."""
        parent = self.related.image(parent_name(self.related, name, cid), "parent", "vmdk")
        self.stack.callback(parent.close)
        found, wanted = parent.facts.get("cid"), f"{cid:08x}"
        if cid != NO_PARENT and found != wanted:
            raise InvalidImage(
                f"the disk was made over content {wanted}, and its parent {name!r} has content "
                f"{found}: it was changed since, and the two no longer belong together",
                field="parentCID",
            )
        return parent

    @staticmethod
    def _check_extent(extent: Extent) -> None:
        """Extents are judged by what they are, whatever stands behind them or is said of the type of the disk.

        VirtualBox calls any set of FLAT extents fullDevice or partitionedDevice, and some write a partition's UUID
        and a device's identity behind the offset.
        """
        if extent.type in _ON_DEVICES or _DEVICE.match(extent.name or ""):
            raise UnsupportedError(
                f"an extent of type {extent.type} stands on a device of its host: read that device instead"
            )
        if extent.type not in ("FLAT", "VMFS", "SPARSE", "VMFSSPARSE", "SESPARSE", "ZERO"):
            raise UnsupportedError(f"extents of type {extent.type[:40]!r} cannot be read")
        if extent.type == "ZERO":
            return
        if extent.access == "NOACCESS":
            raise UnsupportedError(f"the disk denies access to its extent {extent.name!r}")
        if not extent.name:
            raise InvalidImage(f"an extent of type {extent.type} names no file")

    def _part(self, extent: Extent, start: int, main: Source, parent: Source | None) -> Source:
        """An extent that begins at byte ``start`` of the disk; ``main`` is the file with the descriptor.

        Of one that is ``missing`` the size is right, and nothing else.
        """
        name = extent.name
        if extent.type == "ZERO" or name is None or (file := self._file(name)) is None:
            return MappedSource(main, _Nothing(), extent.size, name="VMDK")
        if extent.type in ("FLAT", "VMFS"):
            offset = (extent.offset or 0) * SECTOR
            if offset + extent.size > file.size:
                raise InvalidImage(
                    f"the extent {name!r} is cut short: it has {file.size} bytes and needs {offset + extent.size}"
                )
            return Slice(file, offset, extent.size)
        opener = _SPARSE.get(read(file, 0, min(file.size, 4)))
        if opener is None:
            raise InvalidImage(f"the extent {name!r} is no sparse extent", offset=0)
        try:
            sparse = opener(file, self.kept)
        except InvalidImage as error:
            raise InvalidImage(f"the extent {name!r}: {error}") from None
        self.found.append(sparse)
        self._check_room()
        size = self._extent_size(extent, sparse)
        if parent is not None and start:
            parent = Slice(parent, start, min(size, parent.size - start)) if start < parent.size else None
        return MappedSource(
            file, sparse.layout, size, name=f"VMDK extent {name}", parent=parent, ragged=sparse.grain - 1
        )

    def _check_room(self) -> None:
        """Raises UnsupportedError where the extents together would take memory that no real disk does."""
        tables = sum(sparse.shape.tables for sparse in self.found)
        if tables > _MOST_TABLES:
            raise UnsupportedError(f"the sparse extents have more than {_MOST_TABLES} grain tables")
        if sum(sparse.compressed for sparse in self.found) > _MOST_COMPRESSED:
            raise UnsupportedError(f"the disk has more than {_MOST_COMPRESSED} compressed extents")

    def _file(self, name: str) -> Source | None:
        """The file of an extent, where it can be had; extents may share one."""
        if name not in self.files:
            self.files[name], missing = attempt(lambda: self._open_extent(name))
            self.missing = self.missing or missing
            if (file := self.files[name]) is not None:
                self.stack.callback(file.close)
        return self.files[name]

    def _open_extent(self, name: str) -> Source:
        return self.related.file(self.beside.name(name) if self.beside is not None else name, "extent")

    def _extent_size(self, extent: Extent, sparse: Sparse) -> int:
        """Bytes of the disk in a sparse extent: the line says it, the extent's own capacity may be whole grains."""
        if extent.size > sparse.size:
            raise InvalidImage(
                f"the descriptor says that an extent has {extent.sectors} sectors, and its header "
                f"{sparse.size // SECTOR}",
                field="capacity",
            )
        if sparse.size - extent.size >= sparse.grain:
            self.warnings.append(
                f"an extent has {sparse.size // SECTOR} sectors, of which the descriptor uses {extent.sectors}"
            )
        return extent.size


class _Nothing:
    """The layout of a ZERO extent."""

    def mapping(self, offset: int, length: int, /) -> Mapping:
        return Mapping.uniform(offset, length, Kind.ZERO)

    def unpack(self, place: int, /) -> bytes:
        raise InvalidImage("nothing is stored in a ZERO extent", offset=place)
