"""The backing file of an image: the lower layer that shows where the image has nothing of its own."""

from __future__ import annotations

from contextlib import closing
from typing import Final

from ferrotype.errors import UnsupportedError
from ferrotype.formats import Image
from ferrotype.formats.registry import FORMATS, recognise
from ferrotype.formats.related import Related

__all__ = ["format_told", "open_backing", "qemu_name"]

_WHAT: Final = "backing file"
_QEMU: Final = {"vpc": "vhd", "file": "raw", "host_device": "raw"}  # what QEMU calls formats: what they are here


def qemu_name(format: str) -> str:
    """What QEMU calls a format."""
    return {"vhd": "vpc"}.get(format, format)


def format_told(name: str) -> str:
    """The format that an image calls ``name``.  Raises UnsupportedError."""
    found = _QEMU.get(name, name)
    if found not in FORMATS:
        raise UnsupportedError(f"the {_WHAT} is said to be in the format {name!r}", field="backing format")
    return found


def open_backing(related: Related, name: str, format: str | None) -> Image:
    """The image under another one, in the format told, else in the one its content shows, which is never ``raw``.

    Raises UnsupportedError where neither says what it is, and as ``Related.image`` does.
    """
    if format is None:
        with closing(related.file(name, _WHAT)) as file:
            if recognise(file) is None:
                raise UnsupportedError(
                    f"the image does not say in which format its {_WHAT} {name!r} is, and the file shows none; "
                    f"write it into the image with qemu-img rebase -u if it is raw",
                    field="backing format",
                )
    return related.image(name, _WHAT, format)
