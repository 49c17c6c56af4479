"""How large the disk of an EWF image is: all sections must say the same, and the tables must bear it out.

    volume (segment 1)   sectors, chunks          programs that do not come back to the start leave 0 there
    data   (the others)  sectors, chunks          a copy of it; version 2 repeats its texts instead
    tables               chunks                   each is found by them

A disk that is read short, or that takes in a segment of another one, would be believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ferrotype.errors import FormatError, InvalidImage, ReadError
from ferrotype.formats.ewf.chunks import ChunkLayout
from ferrotype.formats.ewf.metadata import Media
from ferrotype.formats.ewf.records import check_media

__all__ = ["Said", "behind_the_end", "settled"]


class Said(NamedTuple):
    """What one section says of the disk; 0: nothing."""

    where: str
    sectors: int
    chunks: int


def settled(media: Media, said: Sequence[Said], tables: int | None) -> tuple[Media, list[str]]:
    """The disk as all sections have it together, and what is to be said of those that say nothing.

    ``tables``: chunks that the tables hold; None where segments are missing.  Raises InvalidImage.
    """
    stated = [one for one in said if one.sectors]
    if not stated:
        if tables:
            raise InvalidImage(
                f"no section says how many sectors the disk has, and the tables have {tables} chunks: "
                "where it ends cannot be known",
                field="sectors count",
            )
        return media, []
    first = stated[0]
    for one in stated:
        if one.sectors != first.sectors:
            raise InvalidImage(
                f"{first.where} says that the disk has {first.sectors} sectors, and {one.where} {one.sectors}: "
                "segments of different images are mixed, or one is damaged",
                field="sectors count",
            )
    media = replace(media, sectors=first.sectors)
    check_media(media)
    for one in said:
        if one.chunks and one.chunks != media.chunks:
            raise InvalidImage(
                f"{one.where} says that the disk has {one.chunks} chunks, and {media.sectors} sectors need "
                f"{media.chunks}",
                field="chunk count",
            )
    if tables is not None and tables != media.chunks:
        raise InvalidImage(
            f"the tables have {tables} chunks where a disk of {media.sectors} sectors needs {media.chunks}: "
            f"the image is {'incomplete or ' if tables < media.chunks else ''}damaged",
            field="number of entries",
        )
    return media, _silent(said, first, media)


def _silent(said: Sequence[Said], first: Said, media: Media) -> list[str]:
    volume = said[0]
    if not volume.sectors:
        what = f"{first.where} says {media.sectors}, which the tables bear out, and that was read"
        return [f"{volume.where} says that the disk has 0 sectors; {what}"]
    if not volume.chunks and any(one.chunks for one in said):
        return [f"{volume.where} says that the disk has 0 chunks; the tables have {media.chunks}, and were read"]
    return []


def behind_the_end(layout: ChunkLayout, media: Media) -> list[str]:
    """A sentence where the last chunk holds more than the disk does, and not only zeros."""
    if not media.sectors % media.chunk_sectors:
        return []
    number = media.chunks - 1
    try:
        behind = layout.unpack(number)[layout.length(number) :]
    except (FormatError, ReadError):
        return []  # it is told when it is read
    if not any(behind):
        return []
    stated = f"the last of the {media.sectors} sectors that the disk is said to have"
    return [f"the last chunk holds {len(behind)} bytes behind {stated}; they are no zeros, and are not read"]
