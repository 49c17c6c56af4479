"""Images that hold files and no disk, such as WIM: what they are, as data, for ``info``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ferrotype.block.device import open_source
from ferrotype.engine.references import Access, parse
from ferrotype.errors import FormatError
from ferrotype.formats import Tree
from ferrotype.formats.registry import RAW_SUFFIXES, open_tree
from ferrotype.formats.related import Related

__all__ = ["as_json", "tree_behind"]


@contextmanager
def tree_behind(text: str, access: Access) -> Iterator[Tree | None]:
    """The image of files that a reference names; None where it names something else, or a part of one."""
    reference = parse(text)
    path = reference.path
    named = reference.address is not None or reference.snapshot is not None or reference.partition is not None
    if named or not os.path.isfile(path) or (access.format is None and path.suffix.lower() in RAW_SUFFIXES):
        yield None
        return
    file = open_source(path, patience=access.patience)
    try:
        related = Related(path, access.related, patience=access.patience)
        try:
            tree = open_tree(file, related, access.format)
        except FormatError as error:
            raise error.of(str(path)) from None
        yield tree
    finally:
        file.close()  # the tree owns nothing else


def as_json(tree: Tree) -> dict[str, object]:
    """The document of ``info``: the keys of a disk's, without what only a disk has."""
    return {
        "format": tree.format,
        "virtual_size": None,
        "stored_size": None,
        "sector_size": None,
        "container": dict(tree.facts),
        "hashes": {},
        "disks": [],
        "table": None,
        "disk_id": None,
        "volumes": [],
        "free_bytes": 0,
        "hole_bytes": 0,
    }
