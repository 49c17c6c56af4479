"""Where a differencing VHD finds its parent.

The dynamic disk header has the parent's name, and locators hold paths to it as Windows writes them:

    W2ru   ..\\base\\parent.vhd       from the child's folder
    W2ku   C:\\disks\\parent.vhd      absolute, which means nothing here but by its last part

The first of these names counts that leads to a VHD with the parent's unique id.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Final

from ferrotype.block import Source, read
from ferrotype.errors import DeviceError, FormatError, InvalidImage, NotAllowed
from ferrotype.formats import Image
from ferrotype.formats.related import MAX_NAME, Related
from ferrotype.formats.vhd.records import DynamicHeader, ParentLocator, find_footer

__all__ = ["open_parent", "parent_names"]

_RELATIVE, _ABSOLUTE = b"W2ru", b"W2ku"
_LOCATORS: Final = 8


def open_parent(wanted: uuid.UUID, names: Sequence[str], related: Related) -> Image:
    """The parent of a differencing disk, by its id and the names it may have.

    Raises InvalidImage where no name leads to the parent, and NotAllowed where it might be behind one that may not be
    followed.
    """
    tried: list[str] = []
    refused: NotAllowed | None = None
    for name in names:
        try:
            if not related.exists(name, "parent"):
                tried.append(f"{name!r} is not there")
            elif (found := _unique_id(related, name)) != wanted:
                tried.append(f"{name!r} is another: {found}")
            else:
                return related.image(name, "parent", "vhd")
        except NotAllowed as error:
            refused = refused or error
    if refused is not None:
        raise refused
    raise InvalidImage(
        f"the parent {wanted} of this differencing disk was not found: {'; '.join(tried) or 'no name'}"
    )


def _unique_id(related: Related, name: str) -> uuid.UUID | str:
    """The id of a possible parent, or why it has none; read before it is opened with all of its own chain."""
    file = related.file(name, "parent", glance=True)
    try:
        return uuid.UUID(bytes=find_footer(file).footer.UniqueId)
    except (FormatError, DeviceError) as error:
        return str(error)
    finally:
        file.close()


def parent_names(file: Source, header: DynamicHeader) -> list[str]:
    """The names to try, the likeliest first."""
    located = dict(_located(file, header))
    name = _text(header.ParentUnicodeName, "utf-16-be")
    said = [located.get(_RELATIVE), name, located.get(_ABSOLUTE)]
    paths = [_as_path(one) for one in said if one]
    relative = [path for path in paths if not _is_absolute(path)]
    bare = [path.rsplit("/", 1)[-1] for path in paths]
    absolute = [path for path in paths if path.startswith("/") and not path.startswith("//")]
    return list(dict.fromkeys(name for name in (*relative, *bare, *absolute) if name))


def _located(file: Source, header: DynamicHeader) -> Iterator[tuple[bytes, str]]:
    for number in range(_LOCATORS):
        locator = ParentLocator.unpack(header.ParentLocators, number * ParentLocator.SIZE)
        start, length = locator.PlatformDataOffset, locator.PlatformDataLength
        if locator.PlatformCode not in (_RELATIVE, _ABSOLUTE) or not 0 < length <= 2 * MAX_NAME:
            continue
        if start + length > file.size:
            raise InvalidImage(
                "the path of the parent lies outside the file", offset=start, field="PlatformDataOffset"
            )
        yield locator.PlatformCode, _text(read(file, start, length), "utf-16-le")


def _text(data: bytes, encoding: str) -> str:
    text = data[: len(data) // 2 * 2].decode(encoding, "replace")
    return text.split("\0", 1)[0]


def _as_path(name: str) -> str:
    path = name.replace("\\", "/")
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    return path


def _is_absolute(path: str) -> bool:
    return path.startswith("/") or path[1:2] == ":"
