"""The volumes of a container, opened and told apart from strangers by their headers.

    laptop.ferro   | VolumeHeader: uuid, volume 0, split | anchors | records ...
    .001, .002     | VolumeHeader: uuid, volume n, split |         | records ...

A header that is damaged keeps nobody from reading: anchors and record headers carry the same uuid.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from ferrotype.errors import InvalidImage, UsageError
from ferrotype.objects.layout import (
    ANCHORS_AT,
    BLOCK,
    RECORDS_AT,
    Anchor,
    RecordHeader,
    VolumeHeader,
)
from ferrotype.objects.reading import Records, next_magic
from ferrotype.objects.volumes import Opener, VolumeFile, volume_path
from ferrotype.units import MiB

_SEARCHED: Final = 64 * MiB  # bytes of a volume in which a record must begin, if its header is to be done without
_AGAIN: Final = 0.01  # seconds after which a block that may just be written is read a second time

Warn = Callable[[str], None]


def open_volumes(
    records: Records, opener: Opener, *, writable: bool, warn: Warn, known: Sequence[VolumeFile] = ()
) -> int:
    """Read the header of the first volume, which is open, and open the others; the split size (0: one file).

    Of ``known`` files those are used again that still have their name.  Raises InvalidImage or UnsupportedError for
    something else, and for a damaged header where ``writable`` is asked for.
    """
    header, guessed = _first(records, writable=writable, warn=warn)
    records.uuid, split = header.uuid, header.split
    while (split or guessed) and volume_path(records.path, len(records.files)).exists():
        number = len(records.files)
        path = volume_path(records.path, number)
        records.files.append(_same_file(path, known[number : number + 1]) or opener(path, writable=writable))
        try:
            split = _further(records, number, writable=writable, warn=warn) or split
        except InvalidImage:
            if not guessed:
                raise
            records.files.pop().close()  # of an image in one file, with a stranger beside it
            break
    return split


def _same_file(path: Path, known: Sequence[VolumeFile]) -> VolumeFile | None:
    with contextlib.suppress(OSError):
        for file in known:
            if path.samefile(f"/proc/self/fd/{file.fileno()}"):
                return file
    return None


def _first(records: Records, *, writable: bool, warn: Warn) -> tuple[VolumeHeader, bool]:
    """The first volume's header, and whether it had to be made up."""
    file, path = records.files[0], records.path
    try:
        header = _header(file, path, warn)
    except InvalidImage:
        uuid = _uuid_of(file)
        if uuid is None:
            raise
        _refuse_writing(path, writable=writable)
        warn(f"{path}: the volume header is damaged; the image is read without it")
        return VolumeHeader.make(uuid, 0, 0), True
    if header.volume:
        raise UsageError(f"{path} is volume {header.volume} of a split image; name the first one")
    return header, False


def _further(records: Records, number: int, *, writable: bool, warn: Warn) -> int:
    """Make sure that a further volume belongs to the container; its split size, 0 where that is lost."""
    file, path = records.files[number], volume_path(records.path, number)
    try:
        header = _header(file, path, warn)
    except InvalidImage as error:
        if _record_uuid(file, records.uuid) is None:
            raise InvalidImage(f"{path} cannot be told to belong to the image: {error}") from error
        _refuse_writing(path, writable=writable)
        warn(f"{path}: the volume header is damaged; the volume is read without it")
        return 0
    if header.uuid != records.uuid or header.volume != number:
        raise InvalidImage(f"{path} belongs to another image")
    return header.split


def _refuse_writing(path: Path, *, writable: bool) -> None:
    if writable:
        raise InvalidImage(
            f"{path}: the volume header is damaged, so it is not written to; save what it holds into a new image "
            f"with `ferrotype salvage`"
        )


def _header(file: VolumeFile, path: Path, warn: Warn) -> VolumeHeader:
    block = read_settled(file, 0, _is_clean_header)
    header = VolumeHeader.read(block)
    if any(block[VolumeHeader.SIZE :]):
        warn(f"{path}: the bytes behind a volume header are damaged; they hold nothing")
    return header


def _is_clean_header(block: bytes) -> bool:
    try:
        VolumeHeader.read(block)
    except InvalidImage:
        return False
    return not any(block[VolumeHeader.SIZE :])


def read_settled(file: VolumeFile, offset: int, is_clean: Callable[[bytes], bool]) -> bytes:
    """One block; read again a moment later where it is not clean: it may just be being written."""
    block = file.read(offset, BLOCK)
    if not is_clean(block):
        time.sleep(_AGAIN)
        block = file.read(offset, BLOCK)
    return block


def _uuid_of(file: VolumeFile) -> bytes | None:
    """The container's uuid, as an anchor or a record says it."""
    for at in ANCHORS_AT:
        block = file.read(at, BLOCK)
        if len(block) >= Anchor.SIZE and Anchor.read(block, uuid := Anchor.unpack(block).uuid):
            return uuid
    return _record_uuid(file, None)


def _record_uuid(file: VolumeFile, wanted: bytes | None) -> bytes | None:
    """The uuid in the first whole record header near the start of a volume; ``wanted`` alone, where that is given."""
    at, end = RECORDS_AT, min(file.size(), _SEARCHED)
    while (found := next_magic(file, at, end)) is not None:
        data = file.read(found, RecordHeader.SIZE)
        uuid = wanted if wanted is not None else RecordHeader.unpack(data.ljust(RecordHeader.SIZE, b"\0")).uuid
        if RecordHeader.read(data, uuid) is not None:
            return uuid
        at = found + BLOCK
    return None
