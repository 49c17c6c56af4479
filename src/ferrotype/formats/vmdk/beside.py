"""Where the files stand that a VMDK descriptor names, when somebody moved or renamed them.

    new.vmdk        names old-s001.vmdk         and new-s001.vmdk stands beside it: the set was renamed
    disk-1.vmdk     names /vmfs/.../disk.vmdk   and disk.vmdk stands beside it, with the content it was made over

A name that was left behind may belong to another disk by now, which must not be read in silence.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Final

from ferrotype.block import Source, read, read_exactly
from ferrotype.errors import FerrotypeError, InvalidImage
from ferrotype.formats.related import Related
from ferrotype.formats.vmdk.descriptor import MAX_DESCRIPTOR, NO_PARENT, Descriptor, parse
from ferrotype.formats.vmdk.sparse import MAGIC, embedded_descriptor

__all__ = ["Extents", "descriptor_in", "parent_name", "parents_named"]

_PART: Final = re.compile(r"(.*?)((?:-[sf]\d{3,6}|-flat|-delta|-sesparse)\.vmdk)", re.IGNORECASE | re.DOTALL)


def descriptor_in(file: Source) -> Descriptor | None:
    """The descriptor in a file, be it one or a sparse extent that holds one; None: it holds none."""
    if read(file, 0, min(file.size, 4)) == MAGIC:
        text = embedded_descriptor(file)
        return parse(text) if text is not None and text.strip(b"\0") else None
    return parse(read_exactly(file, 0, file.size, "the descriptor")) if file.size <= MAX_DESCRIPTOR else None


def parents_named(file: Source) -> list[str]:
    """The parent's name, as the descriptor says it.  Raises InvalidImage and UnsupportedError."""
    found = descriptor_in(file)
    return [] if found is None or found.parent_hint is None else [found.parent_hint]


def _glance(related: Related, name: str, what: str) -> Descriptor | None:
    """The descriptor in the file of a name, where it can be had."""
    try:
        if not related.exists(name, what):
            return None
        file = related.file(name, what, glance=True)
    except FerrotypeError:
        return None
    try:
        return descriptor_in(file)
    except FerrotypeError:
        return None
    finally:
        file.close()


def parent_name(related: Related, hint: str, cid: int) -> str:
    """The name that leads to the parent: the one said, or its last part where only that has the content ``cid``."""
    last = hint.replace("\\", "/").rsplit("/", 1)[-1]
    if cid == NO_PARENT or last in ("", hint):
        return hint
    for name in (hint, last):
        found = _glance(related, name, "parent")
        if found is not None and found.cid == cid:
            return name
    return hint


class Extents:
    """Which files the extents of one descriptor are."""

    def __init__(self, related: Related, descriptor: Descriptor) -> None:
        self._related, self._descriptor = related, descriptor
        self._others: dict[str, Descriptor | None] = {}
        self.warnings: list[str] = []

    def name(self, named: str) -> str:
        """The name of the file that an extent is, where the descriptor says ``named``.

        Raises InvalidImage where two files may be meant.
        """
        part = _PART.fullmatch(named)
        own = self._related.path.name if self._related.path is not None else ""
        if part is None or "/" in named or not own.lower().endswith(".vmdk"):
            return named
        stem, mine = part[1], PurePosixPath(own).name[: -len(".vmdk")]
        if stem.casefold() == mine.casefold():
            return named
        renamed = mine + part[2]
        there, here = self._related.exists(named, "extent"), self._related.exists(renamed, "extent")
        other = there and self._is_of(f"{stem}.vmdk", named)
        if here and not there:
            self.warnings.append(f"the descriptor names {named!r}, which is not there: {renamed!r} is read instead")
            return renamed
        if here and other:
            self.warnings.append(
                f"the descriptor names {named!r}, which belongs to {stem + '.vmdk'!r}: {renamed!r} is read instead"
            )
            return renamed
        if here:
            raise InvalidImage(
                f"the descriptor names {named!r}, and {renamed!r} beside it goes by the descriptor's own name: "
                "move the one that does not belong to this disk elsewhere"
            )
        if other:
            self.warnings.append(f"the extent {named!r} belongs to {stem + '.vmdk'!r} too, which has other content")
        return named

    def _is_of(self, descriptor: str, extent: str) -> bool:
        """Whether another descriptor, of other content, names the extent as well."""
        if descriptor not in self._others:
            self._others[descriptor] = _glance(self._related, descriptor, "extent")
        found = self._others[descriptor]
        return (
            found is not None
            and (found.cid is None or found.cid != self._descriptor.cid)
            and any(one.name == extent for one in found.extents)
        )
