"""Images that stand over a file: whoever is given the base of a chain would take an old state for the disk.

    vm.vmdk  <── vm-000001.vmdk  <── vm-000002.vmdk         the disk as it is now is in the last one

Only names in headers are read, of a bounded number of regular files beside the base; nothing is opened that they
name.  A format with chains says in ``parents_named`` what an image of it calls its parent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from ferrotype.block import Source, read
from ferrotype.block.file import FileSource
from ferrotype.errors import FerrotypeError
from ferrotype.stall import Patience

__all__ = ["leaves_over"]

_MOST: Final = 200  # files whose headers are read
_LISTED: Final = 10_000  # entries of a folder
_HEAD: Final = 512  # bytes
_JSON_NAME: Final = re.compile(r'"(?:file\.)?filename"\s*:\s*"([^"\\]*)"')


def leaves_over(path: Path, patience: Patience | None = None) -> list[str]:
    """Names of the files beside ``path`` that stand over it and have nothing over themselves; none where it is none.

    Files that cannot be read, or are damaged, say nothing.
    """
    base = os.path.realpath(path)
    folder = os.path.dirname(base)
    own = os.path.basename(base)
    ids: dict[str, str] = {}  # of images whose children do not know their names
    children: dict[str, set[str]] = {}
    for child in [own, *_files(folder, own)]:
        for parent in _parents(child, folder, patience, ids):
            children.setdefault(parent, set()).add(child)

    def over(name: str) -> set[str]:
        return (children.get(name, set()) | children.get(ids.get(name, ""), set())) - {name, own}

    found, at = set[str](), [own]
    while at:
        fresh = over(at.pop()) - found
        found |= fresh
        at += fresh
    return sorted(name for name in found if not over(name)) or sorted(found)


def _files(folder: str, base: str) -> list[str]:
    """Regular files, the likeliest first: those that are called like the base."""
    stem = base.split(".", 1)[0]
    names = []
    try:
        with os.scandir(folder) as entries:
            for count, entry in enumerate(entries):
                if count >= _LISTED:
                    break
                if entry.name != base and entry.is_file(follow_symlinks=False):
                    names.append(entry.name)
    except OSError:
        pass
    return sorted(names, key=lambda name: (not name.startswith(stem), name))[:_MOST]


def _parents(name: str, folder: str, patience: Patience | None, ids: dict[str, str]) -> Iterator[str]:
    """What a file's header says of its parent: a name in the folder, or an id.  The file's own goes to ``ids``."""
    try:
        file = FileSource(os.path.join(folder, name), patience=patience)
    except FerrotypeError:
        return
    with file:
        try:
            named = _reader(file)
            texts = named(file) if named is not None else []
            if named is not None and named.__module__ == "ferrotype.formats.vdi":
                from ferrotype.formats.vdi import own_id

                ids[name] = own_id(file)
        except FerrotypeError:
            return
    for text in texts:
        if text.startswith("vdi:"):
            yield text
            continue
        inner = _JSON_NAME.findall(text) if text.startswith("json:") else [text.removeprefix("file:")]
        for one in inner:
            plain = one.replace("\\", "/")
            place = os.path.realpath(os.path.join(folder, plain)) if "\0" not in plain else ""
            if os.path.dirname(place) == folder:
                yield os.path.basename(place)
            elif not os.path.exists(place):  # the chain was moved here from another folder
                yield plain.rsplit("/", 1)[-1]


def _reader(file: Source) -> Callable[[Source], list[str]] | None:
    """What tells the parents of an image, by its first bytes."""
    head = read(file, 0, min(file.size, _HEAD))
    if head.startswith((b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\3")):
        from ferrotype.formats.qcow2.header import parents_named as qcow2

        return qcow2
    if head.startswith(b"QFI\xfb\0\0\0\1"):
        from ferrotype.formats.qcow import parents_named as qcow

        return qcow
    if head.startswith(b"QED\0"):
        from ferrotype.formats.qed import parents_named as qed

        return qed
    if head.startswith(b"vhdxfile"):
        from ferrotype.formats.vhdx import parents_named as vhdx

        return vhdx
    if head.startswith(b"conectix"):
        from ferrotype.formats.vhd import parents_named as vhd

        return vhd
    if head[0x40:0x44] == b"\x7f\x10\xda\xbe":
        from ferrotype.formats.vdi import parents_named as vdi

        return vdi
    from ferrotype.formats.signs import is_vmdk_text

    if head.startswith(b"KDMV") or is_vmdk_text(head):
        from ferrotype.formats.vmdk.beside import parents_named as vmdk

        return vmdk
    return None
