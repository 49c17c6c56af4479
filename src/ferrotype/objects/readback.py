"""What was written is read again before a catalog names it: the first block of each record, its header in it.

    put, move    remember a checksum of the record's first block
    catalog      read those blocks, compare, and only then write the catalog

It costs one read of 4 KiB for each record, mostly from the kernel's memory.  A write that went to another place, was
lost on its way to a network's server, or was overwritten by a program that knows of no lock, shows here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ferrotype.errors import DeviceError, WriteError
from ferrotype.objects import Bytes
from ferrotype.objects.layout import BLOCK, CatalogEntry, checksum
from ferrotype.objects.reading import Records
from ferrotype.objects.volumes import volume_path


class ReadBack:
    """The records written since the last catalog."""

    def __init__(self) -> None:
        self._written: list[tuple[CatalogEntry, bytes]] = []

    def note(self, entry: CatalogEntry, parts: Sequence[Bytes]) -> None:
        """A record was written, whose bytes begin with ``parts``."""
        self._written.append((entry, checksum(_first_block(parts))))

    def check(self, records: Records, counts: Callable[[CatalogEntry], bool]) -> None:
        """Compare those that still count.  Raises WriteError naming the first place that does not read back."""
        for entry, wanted in self._written:
            if counts(entry):
                _compare(records, entry, wanted)
        self._written = []


def check_catalog(records: Records, entry: CatalogEntry, payload: bytes) -> None:
    """Compare a whole catalog record, which an anchor is about to lead to.  Raises WriteError."""
    try:
        same = records.is_at(entry) and records.payload_checksum(entry) == checksum(payload)
    except DeviceError as error:
        raise WriteError(_sentence(records, entry, str(error))) from error
    if not same:
        raise WriteError(_sentence(records, entry, "other bytes stand there"))


def _compare(records: Records, entry: CatalogEntry, wanted: bytes) -> None:
    try:
        found = records.files[entry.volume].read(entry.offset, BLOCK)
    except DeviceError as error:
        raise WriteError(_sentence(records, entry, str(error))) from error
    if checksum(found) != wanted:
        raise WriteError(_sentence(records, entry, "other bytes stand there"))


def _sentence(records: Records, entry: CatalogEntry, why: str) -> str:
    what = entry.name or "the catalog"
    return (
        f"{volume_path(records.path, entry.volume)}: {what}, written at byte {entry.offset}, does not read back "
        f"({why}); nothing was committed: check the device that holds the image"
    )


def _first_block(parts: Sequence[Bytes]) -> bytes:
    """The first ``BLOCK`` bytes of what the parts make together."""
    block = b""
    for part in parts:
        block += bytes(memoryview(part)[: BLOCK - len(block)])
        if len(block) == BLOCK:
            break
    return block
