"""Disks inside another file: unpacked from a stream, or members of an archive, and then any format again.

    vm.ova  ──member──>  disk1.vmdk.gz  ──unpacked──>  disk1.vmdk  ──the VMDK's own reader──>  the disk

What is inside goes by the same rules as a file of its name: its content says its format, raw is what is named so or
like nothing, and a name that promises a container must be one.  At most ``MAX_DEPTH`` files lie in each other, and
what is unpacked on the way is bounded by ``check_unpacked``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import PurePath
from typing import Final

from ferrotype.block import Source
from ferrotype.errors import UnsupportedError
from ferrotype.formats import Image
from ferrotype.formats.registry import FORMATS, RAW_SUFFIXES, open_file, recognise
from ferrotype.formats.related import Related
from ferrotype.job import Job
from ferrotype.units import GiB, TiB, format_size

__all__ = ["MAX_DEPTH", "check_unpacked", "open_inner", "wrapped_image"]

MAX_DEPTH: Final = 3  # files in each other: an OVA, a stream in it, and a container in that
_FREE: Final = 16 * GiB  # bytes that even the smallest file may unpack to: an empty card
_TIMES: Final = 1100  # by which it may grow beyond that; deflate cannot do more
_MOST: Final = 16 * TiB  # bytes, whatever it was packed from
_PART: Final = re.compile(r".*\.(\d{1,4}|[a-z]{2})", re.IGNORECASE | re.DOTALL)  # of a disk in pieces: .001, .aa


def check_unpacked(done: int, packed: int, advice: str) -> None:
    """Raise UnsupportedError where so many bytes came from ``packed`` ones that it may be a bomb."""
    most = min(_FREE + _TIMES * packed, _MOST)
    if done > most:
        raise UnsupportedError(
            f"{format_size(packed)} unpack to more than {format_size(most)}, not believed: {advice} if it is meant"
        )


def open_inner(inner: Source, name: str, related: Related) -> Image:
    """The image that stands in ``inner``, which it owns; ``name`` is what it is called, "" where that is not known.

    ``related`` is what the inner image may open.  Where this raises, ``inner`` is still the caller's.
    """
    from ferrotype.formats import raw
    from ferrotype.formats.names import no_raw_disk

    if related.depth > MAX_DEPTH:
        raise UnsupportedError(f"more than {MAX_DEPTH} files lie in each other: unpack the outer ones first")
    path = PurePath(name or "-")
    found = recognise(inner)
    if found is not None:
        if path.suffix.lower() in RAW_SUFFIXES:
            raise UnsupportedError(
                f"it holds {name!r}, which is named like a raw disk and whose content looks like {found}: unpack it, "
                f"and say --format raw, or {found}"
            )
        if FORMATS[found].tree:
            raise UnsupportedError(f"it holds a {found} image, which has files and no disk: unpack it first")
        return open_file(inner, related, headers_only=True)
    refused = no_raw_disk(path, inner, "or unpack it here and say --format raw if its bytes are the disk")
    if refused is not None:
        raise type(refused)(f"the file in it, {refused}")
    if _PART.fullmatch(path.name) and path.suffix.lower() not in RAW_SUFFIXES:
        raise UnsupportedError(f"it holds {name!r}, which looks like one part of several: unpack all of them first")
    if path.suffix.lower() not in RAW_SUFFIXES:
        related.job.note(f"{name or 'what it holds'} is read as a raw disk")
    return raw.open(inner, Related.nothing())


def wrapped_image(
    inner: Image,
    row: Mapping[str, object],
    *,
    close: Callable[[], None],
    warnings: tuple[str, ...] = (),
    disks: Mapping[str, Callable[[], Source]] | None = None,
    check: Callable[[Job], list[str]] | None = None,
) -> Image:
    """The inner image as the outer file's: ``row`` says what that is, and stands in ``facts`` under "wrapped".

    The outer file's checks come before the inner one's.
    """
    deeper = inner.facts.get("wrapped")
    facts = {**inner.facts, "wrapped": [dict(row), *(deeper if isinstance(deeper, list) else [])]}

    def both(job: Job) -> list[str]:
        return [*(check(job) if check is not None else []), *(inner.check(job) if inner.check is not None else [])]

    with ExitStack() as stack:
        stack.callback(close)
        stack.callback(inner.close)
        keep = stack.pop_all()
    return Image(
        inner.format,
        inner.source,
        facts=facts,
        disks={**inner.disks, **(disks or {})},
        hashes=inner.hashes,
        warnings=(*warnings, *inner.warnings),
        besides=inner.besides,
        remarks=inner.remarks,
        check=both if check is not None or inner.check is not None else None,
        close=keep.close,
        missing=inner.missing,
    )
