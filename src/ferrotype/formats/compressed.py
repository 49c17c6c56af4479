"""A disk, or a disk image, that was compressed as a whole: ``raspios.img.xz``, ``vm.vmdk.gz``, ``disk.qcow2.zst``.

    stream  --unpacked once-->  an unnamed file with holes  --its own format-->  the disk

All of the stream is unpacked, and its checksums proven, before the first byte of the disk is handed out: a card that
is written from it is not left half-written by a download that was cut short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Final

from ferrotype.block import Source, read
from ferrotype.formats import Image
from ferrotype.formats.registry import FORMATS
from ferrotype.formats.related import Related
from ferrotype.formats.split import SplitFile
from ferrotype.formats.spool import Scratch
from ferrotype.formats.streams import unpacked
from ferrotype.formats.wrapping import check_unpacked, open_inner, wrapped_image
from ferrotype.job import Job
from ferrotype.units import format_size

__all__ = ["BZIP2", "GZIP", "XZ", "ZSTD", "Compressed", "unpack"]


@dataclass(frozen=True, slots=True)
class Compressed:
    """The format of one compression."""

    name: str
    compression: str  # of ``streams``
    advice: str  # what else unpacks it
    tarred: tuple[str, ...] = ()  # suffixes that stand for a tar archive within

    def probe(self, file: Source, /) -> bool:
        """Whether a stream begins here."""
        head = read(file, 0, min(file.size, 16))
        if self.compression == "gz":
            return head[:3] == b"\x1f\x8b\x08" and len(head) > 10 and not head[3] & 0xE0
        if self.compression == "xz":
            return head[:6] == b"\xfd7zXZ\0"
        if self.compression == "bz2":
            return head[:3] == b"BZh" and head[3:4] in b"123456789" and head[4:10] == b"1AY&SY"
        return head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"*M\x18" and head[0] >> 4 == 5)

    def open(self, file: Source, related: Related, /) -> Image:
        """The disk inside, unpacked; a damaged stream is refused."""
        path = PurePath(related.called) if related.called else None
        if path is not None and isinstance(file, SplitFile):
            path = path.with_suffix("")  # .aa
        warnings: list[str] = []
        scratch = unpack(file, self.compression, related, self.advice, told=warnings.append)
        name = self._inner(path)
        try:
            image = open_inner(
                scratch, name, related.within(name if related.path else None, packed=file.size, called=name)
            )
        except BaseException:
            scratch.close()
            raise
        row = {"format": self.name, "packed_bytes": file.size, "unpacked_bytes": scratch.size}
        return wrapped_image(
            image, row, close=file.close, warnings=tuple(warnings), check=lambda job: _proven(file, job)
        )

    def _inner(self, path: PurePath | None) -> str:
        """What the file within is called."""
        if path is None:
            return ""
        suffix = path.suffix.lower()
        if suffix in self.tarred:
            return f"{path.stem}.tar"
        packed = any(suffix in row.suffixes for row in FORMATS.values() if row.wraps)
        return path.stem if packed and path.stem.strip(".") else path.name


def _proven(file: Source, job: Job) -> list[str]:
    """No damage: what the stream itself keeps was proven when it was unpacked."""
    job.advance(file.size)
    return []


def unpack(
    file: Source,
    compression: str,
    related: Related,
    advice: str,
    *,
    told: Callable[[str], None] | None = None,
    heard: Callable[[bytes], None] = lambda _: None,
) -> Scratch:
    """All that a stream holds.  Raises InvalidImage, UnsupportedError where it is a bomb, DeviceError without room.

    ``heard`` gets every piece of it.
    """
    job = related.job
    job.begin(f"unpacking {related.called or 'a stream'}", file.size)
    scratch = Scratch()
    try:
        for piece in unpacked(file, compression, passed=job.advance, told=told):
            scratch.add(memoryview(piece))
            heard(piece)
            check_unpacked(scratch.size, min(related.packed or file.size, file.size), advice)
    except BaseException:
        scratch.close()
        raise
    job.note(
        f"{related.path or related.called or 'a stream'} was unpacked into an unnamed file in {scratch.folder}, "
        f"which takes {format_size(scratch.stored)} there until the end"
    )
    return scratch


GZIP: Final = Compressed("gzip", "gz", "unpack it with gzip -dk", (".tgz",))
XZ: Final = Compressed("xz", "xz", "unpack it with xz -dk", (".txz",))
ZSTD: Final = Compressed("zstd", "zst", "unpack it with zstd -d", (".tzst",))
BZIP2: Final = Compressed("bzip2", "bz2", "unpack it with bzip2 -dk", (".tbz", ".tbz2"))
