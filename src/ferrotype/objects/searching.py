"""The search for records in every byte of damaged volumes, and what the catalogs among them say.

    ... | FERROREC header | payload | ... damage ... | FERROREC header | payload ... cut | FERROREC ...

Nothing leads here but the records themselves.  Their headers are looked for at any byte, since a region may have been
cut out of the file and the rest moved up; they prove themselves, and so does a payload that is whole.  Catalogs that
can be read tell which objects were deleted, and where those stand whose headers are lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import xxhash

from ferrotype.errors import FormatError, InvalidImage
from ferrotype.job import Job
from ferrotype.objects.damaged import DamagedVolume
from ferrotype.objects.layout import (
    ANCHORS_AT,
    BLOCK,
    RECORD_MAGIC,
    Anchor,
    CatalogEntry,
    Kind,
    RecordHeader,
    VolumeHeader,
    decode_catalog,
    padded,
)
from ferrotype.units import KiB, MiB

_WINDOW: Final = 8 * MiB  # bytes searched at a time; the first look behind a record is a short one
_GLANCE: Final = 8 * KiB
_MAX_CATALOG: Final = 256 * MiB
_MAX_ENTRIES: Final = 1 << 22  # of a catalog
_SPACE: Final = 4096  # of a small one
_LEAST_ENTRY: Final = 8  # bytes of one, with a name that tells it from others
_PACKED: Final = 16  # times that a file system may have made a payload smaller
_USUAL: Final = 64 * MiB  # bytes of a payload that need not be a hole in any file
_MAX_RECORDS: Final = 10_000_000  # 160 TB in packs of the usual size
_DISPROVED: Final = 8  # times the size of the volumes that payloads which are not whole may be read for
_MORE: Final = "what is lost may be more than can be named"

Volumes = Mapping[int, DamagedVolume]


class Found(NamedTuple):
    """A whole record header."""

    volume: int
    offset: int
    kind: int
    sequence: int
    length: int
    name: str
    uuid: bytes
    whole: bool  # its payload, too

    @property
    def end(self) -> int:
        return self.offset + padded(RecordHeader.SIZE + self.length)


@dataclass(slots=True)
class Told:
    """What the catalogs that can be read say."""

    state: dict[str, CatalogEntry] = field(default_factory=dict)  # the newest one they lead to
    places: dict[str, CatalogEntry] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)  # name -> sequence number of the catalog that says so
    complete: int = -1  # sequence number of the newest that stands alone
    listed: set[str] = field(default_factory=set)  # names in that
    newest: int = -1

    def deleted(self, name: str, sequence: int) -> bool:
        return self.removed.get(name, -1) > sequence or (sequence < self.complete and name not in self.listed)


@dataclass(slots=True)
class Finds:
    """The records of one container, and what is known of it besides."""

    uuid: bytes = b""
    records: list[Found] = field(default_factory=list)  # by volume and offset
    told: Told = field(default_factory=Told)
    problems: list[str] = field(default_factory=list)  # what is wrong, in words
    doubts: list[str] = field(default_factory=list)  # why more may be lost than can be named


def search(path: Path, volumes: Volumes, job: Job) -> Finds:
    """Search the volumes of a container whose first is ``path``.  Raises InvalidImage where no record is in them."""
    finds = _chosen(path, _records(volumes, job))
    anchored = _judge_heads(volumes, finds)
    _read_catalogs(volumes, finds, anchored)
    return finds


# ---------------------------------------------------------------------- records


def _records(volumes: Volumes, job: Job) -> list[Found]:
    """All whole record headers, whichever container they belong to."""
    found: list[Found] = []
    total = sum(volume.size for volume in volumes.values())
    job.begin("searching", total)
    budget = _DISPROVED * total
    most = _USUAL + _PACKED * sum(volume.stored for volume in volumes.values())
    for number, volume in volumes.items():
        at = told = 0
        while (at := _next_magic(volume, at)) >= 0:
            head = volume.read(at, RecordHeader.SIZE)
            header = RecordHeader.read(head, head[16:32])
            if header is None:
                at += len(RECORD_MAGIC)
                continue
            end = at + RecordHeader.SIZE + header.length
            whole = False
            if header.kind != Kind.FILLER and end <= volume.size and header.length <= most and budget > 0:
                whole = _checksum(volume, at + RecordHeader.SIZE, header.length) == header.payload_check
                budget -= 0 if whole else header.length
            found.append(
                Found(number, at, header.kind, header.sequence, header.length, header.text, header.uuid, whole)
            )
            if len(found) > _MAX_RECORDS:
                raise InvalidImage(f"{volume.path} has more records than any image")
            at = end if whole else at + RecordHeader.SIZE
            job.advance(at - told)
            told = at
        job.advance(max(0, volume.size - told))
    return found


def _next_magic(volume: DamagedVolume, at: int) -> int:
    """Where the next record header may begin, at any byte; -1 where there is none."""
    size = _GLANCE
    while at < volume.size:
        at = max(at, min(volume.file.data_from(at), volume.size))
        data = volume.read(at, size)
        if (found := data.find(RECORD_MAGIC)) >= 0:
            return at + found
        if at + len(data) >= volume.size or not data:
            return -1
        at += len(data) - len(RECORD_MAGIC) + 1
        size = min(size * 8, _WINDOW)
    return -1


def _checksum(volume: DamagedVolume, start: int, length: int) -> bytes:
    digest = xxhash.xxh3_128()
    for at in range(start, start + length, _WINDOW):
        digest.update(volume.read(at, min(_WINDOW, start + length - at)))
    return digest.digest()


def _chosen(path: Path, found: list[Found]) -> Finds:
    """The records of the container to which most bytes belong."""
    weight: Counter[bytes] = Counter()
    for record in found:
        weight[record.uuid] += BLOCK + (record.length if record.whole else 0)
    if not weight:
        raise InvalidImage(f"nothing of a ferrotype image was found in {path}")
    finds = Finds(weight.most_common(1)[0][0])
    others = [record for record in found if record.uuid != finds.uuid]
    if others:
        finds.problems.append(
            f"{len(others)} records of another image stand in {path}; they are left alone "
            f"(the first at byte {others[0].offset} of volume {others[0].volume})"
        )
    finds.records = sorted(
        (record for record in found if record.uuid == finds.uuid), key=lambda r: (r.volume, r.offset)
    )
    return finds


# ---------------------------------------------------------------------- what leads to them


def _judge_heads(volumes: Volumes, finds: Finds) -> int:
    """Say what is wrong with the structures that lead to the others; none of them is used here.

    Sequence number of the newest catalog that an anchor knows of; -1 where none does.
    """
    anchored = -1
    for number, volume in volumes.items():
        try:
            header = VolumeHeader.read(volume.read(0, BLOCK).ljust(BLOCK, b"\0"))
            if header.uuid != finds.uuid or header.volume != number:
                finds.problems.append(f"the volume header of {volume.path} is that of another volume")
        except FormatError:
            finds.problems.append(f"the volume header of {volume.path} is damaged")
    if first := volumes.get(0):
        anchors = [Anchor.read(first.read(at, BLOCK), finds.uuid) for at in ANCHORS_AT]
        catalogs = {(f.volume, f.offset, f.sequence) for f in finds.records if f.kind == Kind.CATALOG and f.whole}
        anchored = max((anchor.sequence for anchor in anchors if anchor), default=-1)
        leads = [a for a in anchors if a and (a.volume, a.offset, a.sequence) in catalogs]
        if not any(anchors):
            finds.problems.append(f"both anchors of {first.path} are damaged")
        elif not leads:
            finds.problems.append(f"no anchor of {first.path} leads to a catalog")
    for volume in volumes.values():
        if volume.bad:
            size = sum(end - start for start, end in volume.bad)
            finds.problems.append(f"{size} bytes of {volume.path} cannot be read, the first at {volume.bad[0][0]}")
    return anchored


def _read_catalogs(volumes: Volumes, finds: Finds, anchored: int) -> None:
    told = finds.told
    broken = False
    stored = sum(volume.stored for volume in volumes.values())
    most = min(_MAX_CATALOG, MiB + _PACKED * stored)  # one that is a hole has nothing to say
    records = [f for f in finds.records if f.kind == Kind.CATALOG and f.whole and f.length <= most]
    for record in sorted(records, key=lambda f: f.sequence):
        try:
            payload = volumes[record.volume].read(record.offset + RecordHeader.SIZE, record.length)
            catalog = decode_catalog(payload, min(_MAX_ENTRIES, _SPACE + len(payload) // _LEAST_ENTRY))
        except InvalidImage as error:
            finds.problems.append(str(error))
            continue
        added = {entry.name: entry for entry in catalog.added}
        broken |= catalog.previous is not None and catalog.previous[2] != told.newest
        if catalog.previous is None:
            broken = False
            told.state, told.complete, told.listed = {}, record.sequence, set(added)
        for name in catalog.removed:
            told.state.pop(name, None)
            told.removed[name] = record.sequence
        told.state |= added
        told.places |= added
        told.newest = record.sequence
    if told.newest < 0:
        finds.doubts.append(f"no catalog can be read; every record that was found counts, and {_MORE}")
    elif broken:
        finds.doubts.append(f"only parts of the catalog can be read; what was deleted may be back, and {_MORE}")
    if anchored > told.newest >= 0:
        finds.doubts.append(f"the newest catalog cannot be read; {_MORE}")
