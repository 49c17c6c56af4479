"""How far volumes reach that have no allocation map here, as their superblocks say.

Used for what begins inside the free space of another volume: so much of it is kept.  None stands for what does not
say how long it is; everything behind its start is then its own.

Offsets are those of each project's published on-disk format, from the start of the volume.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ferrotype.filesystems.signatures import MEMBERS, SIGNATURES, Signature
from ferrotype.units import KiB

__all__ = ["HEAD", "begins", "span"]

HEAD: Final = 68 * KiB  # bytes from the start of a volume in which its sign stands

_FILES: Final = frozenset(
    {"squashfs", "squashfs3", "erofs", "cramfs", "romfs", "iso9660", "udf", "xfs_external_log", "ubi", "ubifs"}
)
"""Kinds that are files far more often than volumes, as discs and packages are, or that stand on flash."""


def _signs(signatures: tuple[Signature, ...]) -> tuple[tuple[int, tuple[bytes, ...]], ...]:
    """(offset, magics) of what is long enough not to be met by chance, and stands near the start."""
    return tuple(
        (base + signature.at, signature.magics)
        for signature in signatures
        if not signature.weak and signature.kind not in _FILES
        if all(len(magic) >= (2 if signature.check else 4) for magic in signature.magics)
        for base in signature.bases
        if isinstance(base, int) and base + signature.at < HEAD
    )


_SIGNS: Final = _signs(MEMBERS) + _signs(SIGNATURES)


def begins(head: bytes) -> bool:
    """Whether the first ``HEAD`` bytes, or fewer, have the sign of a container or a file system without a map."""
    return any(head.startswith(magics, at) for at, magics in _SIGNS)


def span(kind: str, head: bytes, most: int) -> int | None:
    """Bytes that the volume which begins with ``head`` says that it takes up, if these are no more than ``most``.

    ``head`` has ``HEAD`` bytes, or all where there are fewer.
    """
    reader = _SPANS.get(kind)
    return size if reader is not None and 0 < (size := reader(head.ljust(HEAD, b"\0"))) <= most else None


def _number(head: bytes, at: int, length: int = 4) -> int:
    return int.from_bytes(head[at : at + length], "little")


def _big(head: bytes, at: int, length: int = 4) -> int:
    return int.from_bytes(head[at : at + length], "big")


def _xfs(head: bytes) -> int:
    return _big(head, 4) * _big(head, 8, 8)


def _btrfs(head: bytes) -> int:
    return _number(head, 64 * KiB + 209, 8)  # of this device, not of all together


def _f2fs(head: bytes) -> int:
    shift = _number(head, 1024 + 16)
    return _number(head, 1024 + 36, 8) << shift if shift <= 16 else 0


def _jfs(head: bytes) -> int:
    """What holds files, and the log and the work space of fsck behind it: extents of 24 and 40 bits."""
    at = 32 * KiB
    block = _number(head, at + 16)
    ends = (
        (_number(head, at + pxd, 3) + (head[at + pxd + 3] << 32) + _number(head, at + pxd + 4)) * block
        for pxd in (72, 80)
    )
    return max(_number(head, at + 8, 8) * _number(head, at + 24), *ends)


def _reiserfs(head: bytes) -> int:
    at = next((at for at in (64 * KiB, 8 * KiB) if head.startswith(b"ReIsEr", at + 52)), 64 * KiB)
    return _number(head, at) * _number(head, at + 44, 2)


def _hfsplus(head: bytes) -> int:
    return _big(head, 1024 + 40) * _big(head, 1024 + 44) if head[1024:1026] in (b"H+", b"HX") else 0


def _apfs(head: bytes) -> int:
    return _number(head, 36) * _number(head, 40, 8)


def _nilfs2(head: bytes) -> int:
    return _number(head, 1024 + 32, 8)


def _lvm2(head: bytes) -> int:
    """The label says where the header of the physical volume is: its UUID, then its size."""
    at = next((at for at in range(0, 2048, 512) if head.startswith(b"LABELONE", at)), 0)
    return _number(head, at + _number(head, at + 20) + 32, 8)


_SPANS: Final[dict[str, Callable[[bytes], int]]] = {
    "xfs": _xfs,
    "btrfs": _btrfs,
    "f2fs": _f2fs,
    "jfs": _jfs,
    "reiserfs": _reiserfs,
    "hfsplus": _hfsplus,
    "apfs": _apfs,
    "nilfs2": _nilfs2,
    "LVM2_member": _lvm2,
}
