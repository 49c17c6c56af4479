"""Partition tables of other systems, known by sight: a disk or partition that has one belongs to what it names.

    sector 0    Sun, SGI, AIX, Motorola; a BSD label of other machines, 64 or 128 bytes into it
    sector 1    BSD (i386), DragonFly, Solaris (x86), System/390 of 512-byte blocks
    behind      Amiga (any of 16 sectors), UnixWare (29), Ultrix (16 KiB), System/390 (block 1 or 2)

They are not followed.  Each has a checksum or two marks, so that a stretch of data is not taken for one.

Sources: the header files of each system that lay its label out (sys/disklabel.h, sys/disklabel64.h, sys/dklabel.h,
sys/vtoc.h, devices/hardblocks.h, dvh.h); IBM's "Device Support Facilities User's Guide" for volume labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from ferrotype.block import Source, read
from ferrotype.errors import DeviceError

__all__ = ["labels"]

_SECTOR: Final = 512  # bytes
_HEAD: Final = 16 * 1024  # bytes; all labels lie there
_BSD_MAGIC: Final = 0x82564557
_BSD_PARTITIONS: Final = 148  # offset of the entries in a BSD label; each has 16 bytes
_SANE: Final = 0x600DDEEE  # of a volume table of contents, on all descendants of System V
_MOST_SLICES: Final = 64


def labels(source: Source) -> list[str]:
    """What tables stand at the start of the source, by the names of their systems.  Never raises."""
    try:
        head = read(source, 0, min(source.size, _HEAD))
    except DeviceError:
        return []  # where it cannot be read, no file system is believed either
    head = head.ljust(_HEAD, b"\0")
    return [name for name, stands in _LABELS.items() if stands(head)]


def _number(head: bytes, at: int, length: int = 4, order: str = "little") -> int:
    return int.from_bytes(head[at : at + length], "big" if order == "big" else "little")


def _words(head: bytes, at: int, length: int, code: str) -> np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]:
    return np.frombuffer(head, code, length // np.dtype(code).itemsize, at)


def _is_bsd(head: bytes) -> bool:
    """Two magics and the XOR of all its words, which is zero; in either byte order."""
    return any(_is_bsd_at(head, at, order) for at in (_SECTOR, 64, 128, _SECTOR + 64) for order in ("little", "big"))


def _is_bsd_at(head: bytes, at: int, order: str) -> bool:
    if _number(head, at, 4, order) != _BSD_MAGIC or _number(head, at + 132, 4, order) != _BSD_MAGIC:
        return False
    count = _number(head, at + 138, 2, order)
    if not 0 < count <= _MOST_SLICES:
        return False
    return not np.bitwise_xor.reduce(_words(head, at, _BSD_PARTITIONS + 16 * count, "<u2"))


def _is_dragonfly(head: bytes) -> bool:
    """disklabel64: 512 bytes for booting, the magic, a checksum that is not looked at, 16 entries at most."""
    return _number(head, _SECTOR) == 0xC4464C59 and 0 < _number(head, _SECTOR + 16) <= _MOST_SLICES


def _is_sun(head: bytes) -> bool:
    return _number(head, 508, 2, "big") == 0xDABE and not np.bitwise_xor.reduce(_words(head, 0, _SECTOR, ">u2"))


def _is_sgi(head: bytes) -> bool:
    return _number(head, 0, 4, "big") == 0x0BE5A941 and not int(_words(head, 0, _SECTOR, ">u4").sum()) & 0xFFFFFFFF


def _is_solaris(head: bytes) -> bool:
    """The table of contents in the second sector of a Solaris partition on a PC."""
    at = _SECTOR
    return _number(head, at + 12) == _SANE and _number(head, at + 16) in (1, 2) and _number(head, at + 30, 2) <= 64


def _is_unixware(head: bytes) -> bool:
    return _number(head, 29 * _SECTOR + 4) == 0xCA5E600D


def _is_amiga(head: bytes) -> bool:
    """A rigid disk block: its length in words, all of which add up to zero."""
    for at in range(0, 16 * _SECTOR, _SECTOR):
        words = _number(head, at + 4, 4, "big")
        if head[at : at + 4] == b"RDSK" and 16 <= words <= 128:
            return not int(_words(head, at, words * 4, ">u4").sum()) & 0xFFFFFFFF
    return False


def _is_aix(head: bytes) -> bool:
    return head.startswith("IBMA".encode("cp037"))


def _is_ultrix(head: bytes) -> bool:
    return _number(head, _HEAD - 72) == 0x032957 and _number(head, _HEAD - 68) == 1


def _is_sysv68(head: bytes) -> bool:
    return head[248:256] == b"MOTOROLA"


def _is_dasd(head: bytes) -> bool:
    """The label of a volume, in the second block or, where tracks have keys, the third."""
    names = tuple(name.encode("cp037") for name in ("VOL1", "LNX1", "CMS1"))
    return any(head.startswith(names, at) for at in (512, 1024, 2048, 4096, 8192))


_LABELS: Final[dict[str, Callable[[bytes], bool]]] = {
    "BSD": _is_bsd,
    "DragonFly": _is_dragonfly,
    "Sun": _is_sun,
    "SGI": _is_sgi,
    "Solaris": _is_solaris,
    "UnixWare": _is_unixware,
    "Amiga": _is_amiga,
    "AIX": _is_aix,
    "Ultrix": _is_ultrix,
    "Motorola": _is_sysv68,
    "System/390": _is_dasd,
}
