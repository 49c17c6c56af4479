"""Clonezilla images: a folder with the partition tables of disks, and an image of each partition in use.

    disk  parts                              names: "sda sdb", "sda1 sda5 sdb1"
    sda-pt.sf  sda-pt.parted  sda-mbr ...    the table: ``tables``
    sda1.ext4-ptcl-img.zst.aa .ab ...        partclone, compressed, split
    sda2.dd-ptcl-img.gz                      every byte
    sda3.ntfs-img.gz.aa                      ntfsclone
    swappt-sda5.info                         a swap partition: its UUID and label

Each disk is put together again: table sectors and partitions at their places, zeros where nothing was saved.  The
first disk is the image; the others, and each partition, are further disks under their names.  Source: Clonezilla's
ocs-functions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ferrotype.block import Source, read
from ferrotype.block.memory import MemoryDisk
from ferrotype.block.views import Concat, Slice
from ferrotype.errors import FormatError, InvalidImage, UnsupportedError, UsageError
from ferrotype.formats import MAX_SIZE, Image, left_out, ntfsclone, partclone
from ferrotype.formats.clonezilla.disk import composed, swap_page
from ferrotype.formats.clonezilla.tables import (
    Partition,
    Table,
    boot_records,
    gdisk_sectors,
    inside,
    master_boot_record,
    parse_dump,
    parted_size,
)
from ferrotype.formats.related import Related
from ferrotype.formats.spool import Spool
from ferrotype.formats.streams import COMPRESSIONS, unpacked
from ferrotype.job import Job
from ferrotype.units import KiB, MiB

__all__ = ["open", "open_folder", "probe", "probe_folder"]

MAX_FILES: Final = 20_000  # of a folder
MAX_TEXT: Final = MiB  # bytes of a file that is read as text
MAX_SECTORS: Final = 64 * MiB  # bytes of a file that holds sectors of a table, or what stands behind it
_IMAGE: Final = re.compile(
    r"(?P<part>[\w.!-]+?)\.(?P<kind>[\w+-]+?)-(?P<program>ptcl-img|img)"
    rf"(?:\.(?P<compression>{'|'.join(COMPRESSIONS)}|lrz|uncomp))?(?:\.(?P<split>[a-z]{{2}}))?"
)
_NAME: Final = re.compile(r"[\w.!-]{1,64}")


@dataclass(slots=True)
class Saved:
    """The files of one partition's image."""

    program: str  # "ptcl-img" or "img"
    kind: str  # "ext4", "dd" ...
    compression: str
    files: dict[str, str] = field(default_factory=dict)  # by their split suffix, "" where it is one file


def probe(file: Source) -> bool:  # noqa: ARG001
    """Never: an image is a folder."""
    return False


def open(file: Source, related: Related) -> Image:  # noqa: ARG001
    """Never: raises UsageError."""
    raise UsageError("a Clonezilla image is a folder: name that")


def probe_folder(path: Path) -> bool:
    """Whether the folder has Clonezilla's list of partitions, and a table or an image."""
    if not (path / "parts").is_file():
        return False
    names = _names(path)
    return any(name.endswith("-pt.sf") or _IMAGE.fullmatch(name) for name in names)


def open_folder(path: Path, related: Related) -> Image:
    """The first disk; the others and each partition by name.  Streams are unpacked when they are read.

    The headers of all partitions are read, and the bitmaps behind them.
    """
    with ExitStack() as stack:
        folder = _Folder(path, related.inside(), stack)
        disks = folder.words("disk") if folder.has("disk") else []
        parts = folder.words("parts")
        for part in parts:
            folder.open_part(part)
        whole: dict[str, Source] = {}
        for disk in disks:
            whole[disk] = folder.compose(disk)
        further = {**folder.parts, **whole}
        if not further:
            raise InvalidImage("the Clonezilla folder names no disk and no partition")
        placed = folder.placed
        for part in folder.parts:
            if disks and part not in placed and part not in disks:
                folder.warnings.append(f"{part} is on none of the saved disks, and is read under its own name")
        first = next(iter(whole or further))
        facts: dict[str, object] = {
            "subformat": "disk" if disks else "partitions",
            "disks": disks,
            "partitions": [folder.described[part] for part in folder.described],
            "unpacked_bytes": folder.unpacked_bytes,  # what may be needed in the folder for temporary files
        }
        checks = dict(folder.images)
        keep = stack.pop_all()
    return Image(
        "clonezilla",
        Slice(further[first], 0, further[first].size),
        facts=facts,
        disks={name: (lambda source=source: Slice(source, 0, source.size)) for name, source in further.items()},  # type: ignore[misc]
        warnings=tuple(folder.warnings),
        besides=left_out("further disk", (list(whole) or list(further))[1:]),
        check=lambda job: _damages(checks, job),
        close=keep.close,
    )


def _damages(images: dict[str, Image], job: Job) -> list[str]:
    """The damage that the partitions' own checksums show."""
    found = []
    for part, image in images.items():
        try:
            found += [f"{part}: {text}" for text in (image.check(job) if image.check else ())]
        except FormatError as error:  # the stream that the image is kept in
            found.append(f"{part}: {error}")
    return found


def _names(path: Path) -> list[str]:
    names = []
    with os.scandir(path) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) > MAX_FILES:
                break
    return sorted(names)


class _Folder:
    """A folder while it is opened: what was found in it so far.  ``stack`` closes all that was opened."""

    def __init__(self, path: Path, related: Related, stack: ExitStack) -> None:
        self._related, self._stack = related, stack
        names = _names(path)
        if len(names) > MAX_FILES:
            raise UnsupportedError(f"a Clonezilla folder of more than {MAX_FILES} files")
        self._known = frozenset(names)
        self._saved = _saved(names)
        self.parts: dict[str, Source] = {}
        self.images: dict[str, Image] = {}
        self.described: dict[str, dict[str, object]] = {}
        self.placed: set[str] = set()
        self.warnings: list[str] = []
        self.unpacked_bytes = 0
        self._tables: dict[str, tuple[Table, int]] = {}

    def has(self, name: str) -> bool:
        return name in self._known

    def data(self, name: str, limit: int = MAX_SECTORS) -> bytes:
        """All of a small file.  Raises InvalidImage where it is not small."""
        file = self._related.file(name, "file of the Clonezilla image")
        try:
            if file.size > limit:
                raise InvalidImage(f"{name} has {file.size} bytes")
            return read(file, 0, file.size)
        finally:
            file.close()

    def text(self, name: str) -> str:
        return self.data(name, MAX_TEXT).decode("utf-8", "replace")

    def words(self, name: str) -> list[str]:
        words = list(dict.fromkeys(self.text(name).split()))
        if len(words) > 1024 or not all(_NAME.fullmatch(word) for word in words):
            raise InvalidImage(f"the names in the file {name!r} are none")
        return words

    # ------------------------------------------------------------------ partitions

    def open_part(self, part: str) -> None:
        """Have the image of a partition in ``parts``, or say why there is none."""
        saved = self._saved.get(part)
        fact: dict[str, object] = {"name": part}
        self.described[part] = fact
        if saved is None:
            if self.has(f"swappt-{part}.info"):
                fact["kind"] = "swap"
            else:
                self.warnings.append(f"the image has no files of {part}, which reads as zeros")
            return
        fact |= {"kind": saved.kind, "compression": saved.compression or None, "files": len(saved.files)}
        joined = self._joined(part, saved)
        compression = saved.compression
        head = joined if not compression else MemoryDisk(_head(joined, compression))
        if saved.program == "ptcl-img" and not partclone.probe(head) and saved.kind != "dd":
            raise InvalidImage(f"the image of {part} is not by partclone")
        if partclone.probe(head):
            image = self._opened(partclone, joined, compression, partclone.stored_size(head))
        elif ntfsclone.probe(head):
            image = self._opened(ntfsclone, joined, compression, ntfsclone.stored_size(head))
        elif saved.kind == "dd":
            size = self._size_of(part)
            if compression and size is None:
                raise UnsupportedError(f"the size of {part} is not known: the partition table was not saved")
            source = self._spooled(joined, compression, (size or 0, True)) if compression else joined
            image = Image("raw", Slice(source, 0, source.size))
        else:
            raise UnsupportedError(f"the image of {part} is by a program that is not known here")
        fact |= {"format": image.format, "size": image.source.size}
        self.warnings += [f"{part}: {warning}" for warning in image.warnings]
        self.images[part], self.parts[part] = image, image.source

    def _opened(self, module: object, joined: Source, compression: str, bound: tuple[int, bool]) -> Image:
        source = self._spooled(joined, compression, bound) if compression else joined
        opener = partclone.open if module is partclone else ntfsclone.open
        image = opener(source, Related.nothing())
        self._stack.callback(image.close)
        return image

    def _spooled(self, joined: Source, compression: str, bound: tuple[int, bool]) -> Spool:
        """The stream unpacked; ``bound``: bytes in it, and whether that is exact."""
        size, exact = bound
        spool = Spool(joined, compression, size if exact else None, limit=size)
        self._stack.callback(spool.close)
        self.unpacked_bytes += spool.size
        return spool

    def _joined(self, part: str, saved: Saved) -> Source:
        """The files of an image in a row.  Raises InvalidImage where one of them is missing."""
        suffixes = sorted(saved.files)
        wanted = (
            [""] if suffixes == [""] else [f"{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(len(suffixes))]
        )
        if suffixes != wanted:
            missing = next(iter(sorted(set(wanted) - set(suffixes))), "")
            raise InvalidImage(f"the image of {part} lacks the file that ends in .{missing}")
        files = []
        for suffix in suffixes:
            files.append(self._related.file(saved.files[suffix], f"image of {part}"))
            self._stack.callback(files[-1].close)
        return Concat(files) if len(files) > 1 else files[0]

    def _size_of(self, part: str) -> int | None:
        for disk in self.words("disk") if self.has("disk") else self._disks_of_tables():
            table, _ = self._table(disk)
            for one in table.partitions:
                if one.name == part:
                    return one.size * table.sector_size
        return None

    def _disks_of_tables(self) -> list[str]:
        return [name.removesuffix("-pt.sf") for name in sorted(self._known) if name.endswith("-pt.sf")]

    # ------------------------------------------------------------------ disks

    def _table(self, disk: str) -> tuple[Table, int]:
        """The table of a disk, and the sectors of the disk; 0 where they are not known."""
        if disk not in self._tables:
            dump = self.text(f"{disk}-pt.sf") if self.has(f"{disk}-pt.sf") else ""
            table = parse_dump(dump)
            size = parted_size(self.text(f"{disk}-pt.parted")) if self.has(f"{disk}-pt.parted") else None
            self._tables[disk] = (table, size or 0)
        return self._tables[disk]

    def compose(self, disk: str) -> Source:
        """A disk put together from what was saved of it."""
        if disk in self.parts:
            return self.parts[disk]  # a file system without a table
        table, sectors = self._table(disk)
        unit = table.sector_size
        end = max((one.end for one in table.partitions), default=0) * unit
        size = sectors * unit
        if not table.partitions:
            raise UnsupportedError(f"the image has no partition table of {disk}")
        if size < end:
            size = -(-end // MiB) * MiB + MiB  # room for a second GPT
            self.warnings.append(f"the size of {disk} was not saved; it is taken to end behind its partitions")
        if size > MAX_SIZE:
            raise InvalidImage(f"the disk {disk} has {size} bytes", field="parted")
        pieces: list[tuple[int, Source]] = [(at, MemoryDisk(data)) for at, data in self._sectors(disk, table, size)]
        for one in table.partitions:
            source = self._partition(one, unit)
            if source is not None and source.size:
                pieces.append((one.start * unit, source))
        return composed(pieces, size, unit)

    def _partition(self, one: Partition, unit: int) -> Source | None:
        room = one.size * unit
        source = self.parts.get(one.name)
        if source is None and self.has(f"swappt-{one.name}.info"):
            self.placed.add(one.name)
            return MemoryDisk(swap_page(self.text(f"swappt-{one.name}.info"), room)) if room >= 64 * KiB else None
        if source is None:
            return None
        self.placed.add(one.name)
        if source.size > room:
            self.warnings.append(f"the image of {one.name} has {source.size} bytes, and its partition {room}")
        return Slice(source, 0, min(source.size, room))

    def _sectors(self, disk: str, table: Table, size: int) -> list[tuple[int, bytes]]:
        """The sectors of the table, placed in bytes, without those that a partition begins in."""
        unit = table.sector_size
        first = min(one.start for one in table.partitions) * unit
        placed: dict[int, bytes] = {}
        if table.label == "gpt":
            if self.has(f"{disk}-gpt-1st"):
                placed[0] = self.data(f"{disk}-gpt-1st")
                if self.has(f"{disk}-gpt-2nd"):
                    second = self.data(f"{disk}-gpt-2nd")
                    placed[size - len(second)] = second
            elif self.has(f"{disk}-gpt.gdisk"):
                backup = gdisk_sectors(self.data(f"{disk}-gpt.gdisk"), unit)
                placed = {at * unit: data for at, data in backup}
            else:
                self.warnings.append(f"the GPT of {disk} was not saved: its partitions are there without a table")
        else:
            if self.has(f"{disk}-mbr"):
                placed[0] = self.data(f"{disk}-mbr")[:512]
            else:
                placed[0] = master_boot_record(table)
                self.warnings.append(f"the MBR of {disk} was not saved; one without code to boot is made")
            if self.has(f"{disk}-hidden-data-after-mbr"):
                placed[512] = self.data(f"{disk}-hidden-data-after-mbr")
            placed |= {at * unit: data for at, data in boot_records(table)}
        begun = [(at, data[: first - at] if at < first else data) for at, data in placed.items()]
        if not inside(begun, size):
            raise InvalidImage(f"the saved table of {disk} lies outside the disk")
        return begun


def _saved(names: list[str]) -> dict[str, Saved]:
    """The images of partitions among the files of a folder."""
    found: dict[str, Saved] = {}
    for name in names:
        match = _IMAGE.fullmatch(name)
        if match is None:
            continue
        compression = match["compression"] or ""
        if compression == "lrz":
            raise UnsupportedError(f"{name}: lrzip cannot be read as a stream")
        compression = "" if compression == "uncomp" else compression
        saved = found.setdefault(match["part"], Saved(match["program"], match["kind"], compression))
        suffix = match["split"] or ""
        if saved.compression != compression or saved.program != match["program"] or suffix in saved.files:
            raise InvalidImage(f"{match['part']} has two images in the folder")
        saved.files[suffix] = name
    return found


def _head(joined: Source, compression: str) -> bytes:
    """The first bytes of a stream: enough for the header of any image."""
    return next(_grown(unpacked(joined, compression), 8 * KiB), b"")


def _grown(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= size:
            break
    yield head[:size]
