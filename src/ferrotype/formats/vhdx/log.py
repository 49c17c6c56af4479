"""VHDX: the log of changes that may not have reached their places yet, replayed in memory.

    log region: a ring of sectors of 4 KiB
    | entry 7 | entry 8 | torn | old entry | old entry | entry 5 | entry 6 |
                      head                             tail (as entry 8 says)

    entry:  header, descriptors, more descriptors ... | data sector | data sector | ...
            "zero": a range of the file that is zeros   "data", high half of the sequence number,
            "desc": 4 KiB, whose first 8 and last 4       4084 bytes, low half
                    bytes are in the descriptor

Entries that follow each other with ascending numbers are a sequence; it is valid where it holds the tail that its
last entry names, and the valid one with the highest number is in force: [MS-VHDX] section 2.3.  Two rules are not
enforced, where what others write breaks them and the checksum proves it meant: file sizes are whole MiB (qemu states
the file's size as it is), and no sectors stand behind those that the descriptors need (entries may be aligned to more
than 4 KiB).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read_exactly_into
from ferrotype.block.file import check_read
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.extents import ExtentMap, State, overlay
from ferrotype.formats import MAX_SIZE
from ferrotype.formats.crc32c import crc32c
from ferrotype.formats.vhdx.records import Header
from ferrotype.records import Record, b4, b16, record, u32, u64
from ferrotype.units import KiB, MiB

__all__ = ["LogEntry", "Replayed", "replay"]

SECTOR: Final = 4 * KiB
MAX_LOG: Final = 16 * MiB  # that is replayed; Hyper-V and qemu make logs of 1 MiB
MAX_CHANGES: Final = 1 << 16  # descriptors that are replayed

Sectors = NDArray[np.uint8]  # of shape (count, 4096)


@record(endian="<", size=64)
class LogEntry(Record):
    """Section 2.3.1.1."""

    Signature: b4
    Checksum: u32
    EntryLength: u32
    Tail: u32
    SequenceNumber: u64
    DescriptorCount: u32
    Reserved: u32
    LogGuid: b16
    FlushedFileOffset: u64
    LastFileOffset: u64


# Sections 2.3.1.2 and 2.3.1.3 in one: ``Length`` is ZeroLength or LeadingBytes, ``Bytes`` Reserved or TrailingBytes
_DESCRIPTOR: Final = np.dtype(
    [("Signature", "<u4"), ("Bytes", "<u4"), ("Length", "<u8"), ("FileOffset", "<u8"), ("SequenceNumber", "<u8")]
)
_LOGE, _ZERO, _DESC, _DATA = (int.from_bytes(name, "little") for name in (b"loge", b"zero", b"desc", b"data"))


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """A valid entry: where it begins and ends in sectors of the ring, and its changes."""

    start: int
    count: int
    head: LogEntry
    descriptors: NDArray[np.void]
    data: Sectors


def replay(file: Source, header: Header) -> Replayed:
    """The file as it is after its log was replayed.

    Raises InvalidImage where the log has no valid sequence, which no log in use is without, or where the file has
    lost what it had when the log was written: section 2.3.3.
    """
    if header.LogVersion != 0:
        raise UnsupportedError(f"logs of version {header.LogVersion} are unknown", field="LogVersion")
    if header.LogLength > MAX_LOG:
        raise UnsupportedError(
            f"a log of {header.LogLength} bytes is too long to be replayed",
            offset=header.LogOffset,
            field="LogLength",
        )
    ring: Sectors = np.empty((header.LogLength // SECTOR, SECTOR), np.uint8)
    read_exactly_into(file, header.LogOffset, ring.reshape(-1).data, "log")
    sequence = _active(_entries(ring, header.LogGuid), len(ring))
    if not sequence:
        raise InvalidImage(
            "the image was not closed properly, and its log has no whole sequence of changes: it is damaged",
            offset=header.LogOffset,
            field="LogGuid",
        )
    last = sequence[-1].head
    if last.FlushedFileOffset > file.size:
        raise InvalidImage(
            f"the file had {last.FlushedFileOffset} bytes when its log was written, and has {file.size}",
            offset=header.LogOffset + sequence[-1].start * SECTOR,
            field="FlushedFileOffset",
        )
    return Replayed(file, last.LastFileOffset, sequence)


# ---------------------------------------------------------------------- finding what is valid


def _entries(ring: Sectors, guid: bytes) -> dict[int, _Entry]:
    """The valid entries by their first sector.  No two share a sector, so all of this is one pass over the log."""
    begins = np.ascontiguousarray(ring[:, :4]).view("<u4")[:, 0] == _LOGE if len(ring) else np.zeros(0, bool)
    headers = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.tile(begins, 2))])  # of entries, before a sector
    found = {}
    for start in np.flatnonzero(begins).tolist():
        head = LogEntry.unpack(memoryview(ring[start]))
        count = head.EntryLength // SECTOR
        if head.LogGuid != guid or head.EntryLength % SECTOR or not 1 <= count <= len(ring) or head.Tail % SECTOR:
            continue
        if headers[start + count] - headers[start] != 1 or head.SequenceNumber == 0 or head.Reserved:
            continue
        entry = _entry(ring, start, count, head)
        if entry is not None:
            found[start] = entry
    return found


def _entry(ring: Sectors, start: int, count: int, head: LogEntry) -> _Entry | None:
    """The entry of that many sectors, or None where it is torn."""
    leading = -(-(LogEntry.SIZE + head.DescriptorCount * _DESCRIPTOR.itemsize) // SECTOR)  # sectors of descriptors
    if leading > count:
        return None
    sectors = np.concatenate([ring[start : start + count], ring[: max(0, start + count - len(ring))]])
    octets = sectors.reshape(-1)
    octets[4:8] = 0
    if crc32c(octets) != head.Checksum:
        return None
    end = LogEntry.SIZE + head.DescriptorCount * _DESCRIPTOR.itemsize
    descriptors = octets[LogEntry.SIZE : end].view(_DESCRIPTOR)
    held = descriptors["Signature"] == _DESC
    zeros = descriptors["Signature"] == _ZERO
    if not (held | zeros).all() or (descriptors["FileOffset"] % SECTOR).any():
        return None
    if (descriptors["Length"][zeros] % SECTOR).any() or descriptors["Bytes"][zeros].any():
        return None
    if (descriptors["SequenceNumber"] != head.SequenceNumber).any() or leading + held.sum() > count:
        return None
    data = sectors[leading : leading + int(held.sum())]
    words = data.view("<u4")
    high, low = divmod(head.SequenceNumber, 1 << 32)
    if not ((words[:, 0] == _DATA) & (words[:, 1] == high) & (words[:, -1] == low)).all():
        return None
    return _Entry(start, count, head, descriptors, data)


def _active(entries: dict[int, _Entry], ring: int) -> list[_Entry]:
    """The entries to be replayed, in order, of a ring of that many sectors: sections 2.3.2 and 2.3.3.

    Only whole sequences are looked at: what is valid of a part with the same last entry is valid of the whole.
    """
    follows = {start: (start + entry.count) % ring for start, entry in entries.items()}
    follows = {
        start: then
        for start, then in follows.items()
        if then in entries and entries[then].head.SequenceNumber == entries[start].head.SequenceNumber + 1
    }
    best: list[_Entry] = []
    for first in entries.keys() - set(follows.values()):
        sequence = [entries[first]]
        while sequence[-1].start in follows:
            sequence.append(entries[follows[sequence[-1].start]])
        last = sequence[-1].head
        tails = [number for number, entry in enumerate(sequence) if entry.start == last.Tail // SECTOR]
        if tails and (not best or last.SequenceNumber > best[-1].head.SequenceNumber):
            best = sequence[tails[0] :]
    return best


# ---------------------------------------------------------------------- the file with the changes


class Replayed:
    """A file as it is once its log's changes are made, later ones over earlier ones.  Does not own the file."""

    def __init__(self, file: Source, size: int, sequence: Sequence[_Entry]) -> None:
        """``size`` is what the file is to be extended to; where it is longer it stays so."""
        descriptors = np.concatenate([entry.descriptors for entry in sequence])
        if len(descriptors) > MAX_CHANGES:
            raise UnsupportedError(f"a log of {len(descriptors)} changes is too long to be replayed")
        held = descriptors["Signature"] == _DESC
        starts = descriptors["FileOffset"]
        lengths = np.where(held, np.uint64(SECTOR), descriptors["Length"])
        if size > MAX_SIZE or (starts > MAX_SIZE // 2).any() or (lengths > MAX_SIZE // 2).any():
            raise InvalidImage("the log makes the file longer than any file", field="LastFileOffset")
        self.changes = len(descriptors)
        self._file = file
        self._data = _restored(np.concatenate([entry.data for entry in sequence]), descriptors[held])
        places = np.where(held, np.cumsum(held) - 1, _ZEROED)
        self._bounds, self._places = _layered(starts.astype(np.int64), lengths.astype(np.int64), places)
        self._size = max(size, file.size, int(self._bounds[-1]) if len(self._bounds) else 0)
        self.traits = file.traits

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        check_read("replayed file", self._size, offset, len(buf))
        end = offset + len(buf)
        inside = min(max(self._file.size - offset, 0), len(buf))
        if inside:
            self._file.read_into(offset, buf[:inside])
        buf[inside:] = bytes(len(buf) - inside)
        first = max(int(np.searchsorted(self._bounds, offset, "right")) - 1, 0)
        last = int(np.searchsorted(self._bounds, end, "left"))
        for number in range(first, min(last, len(self._places))):
            start, stop = int(self._bounds[number]), int(self._bounds[number + 1])
            low, high, place = max(start, offset), min(stop, end), int(self._places[number])
            if place == _UNCHANGED or low >= high:
                continue
            piece = buf[low - offset : high - offset]
            piece[:] = bytes(high - low) if place == _ZEROED else self._data[place, low - start : high - start].data

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        check_read("replayed file", self._size, offset, length)
        if length == 0:
            return ExtentMap.uniform(offset, 0)
        inside = min(max(self._file.size - offset, 0), length)
        below = [self._file.extents(offset, inside)] if inside else []
        below += (
            [ExtentMap.uniform(offset + inside, length - inside, State.ZERO | State.HOLE)] if inside < length else []
        )
        touched = np.flatnonzero(self._places != _UNCHANGED)
        starts, ends = self._bounds[touched], self._bounds[touched + 1]
        near = (starts < offset + length) & (ends > offset)
        changed = ExtentMap.from_runs(offset, length, starts[near], ends[near], State.DATA, State.HOLE)
        return overlay(changed, ExtentMap.concat(below))

    def close(self) -> None:
        """Nothing: the image closes the file."""


_UNCHANGED, _ZEROED = -2, -1  # places beside the rows of data sectors


def _restored(data: Sectors, descriptors: NDArray[np.void]) -> Sectors:
    """Data sectors with the bytes that their own marks took the place of, which stand in the descriptors."""
    data[:, :8] = np.ascontiguousarray(descriptors["Length"]).view(np.uint8).reshape(-1, 8)
    data[:, -4:] = np.ascontiguousarray(descriptors["Bytes"]).view(np.uint8).reshape(-1, 4)
    return data


def _layered(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], places: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranges that may overlap as bounds and the place that is in force between each two."""
    bounds = np.unique(np.concatenate([starts, starts + lengths]))
    found = np.full(max(len(bounds) - 1, 0), _UNCHANGED, np.int64)
    lows, highs = np.searchsorted(bounds, starts).tolist(), np.searchsorted(bounds, starts + lengths).tolist()
    for low, high, place in zip(lows, highs, places.tolist(), strict=True):
        found[low:high] = place
    return bounds, found
