"""Marks of what owns whole disks: members of RAID and the like, put where their own tools put them."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable

from ferrotype.units import KiB

Owner = Callable[[bytearray], None]


def md_1(at: int) -> Owner:
    """A superblock of version 1.x as Documentation/driver-api/md and mdadm's md_p.h lay it out."""

    def put(disk: bytearray) -> None:
        place = at if at >= 0 else (len(disk) // 512 - 16) // 8 * 8 * 512
        sb = bytearray(1024)
        struct.pack_into("<IIII", sb, 0, 0xA92B4EFC, 1, 0, 0)
        sb[16:32] = uuid.UUID(int=5).bytes
        sb[32:64] = b"host:0".ljust(32, b"\0")
        struct.pack_into("<QIIQIIII", sb, 64, 1, 1, 0, len(disk) // 512 - 64, 0, 2, 0, 0)
        struct.pack_into("<QQQQI", sb, 128, 0, len(disk) // 512 - 64, place // 512, 0, 0)
        struct.pack_into("<QQQII", sb, 192, 1, 1, (1 << 64) - 1, 0, 128)
        words = sum(struct.unpack("<128I", sb[:512]))
        struct.pack_into("<I", sb, 216, ((words & 0xFFFFFFFF) + (words >> 32)) & 0xFFFFFFFF)
        disk[place : place + 1024] = sb

    return put


def _md_090(disk: bytearray) -> None:
    at = (len(disk) // 65536 - 1) * 65536
    struct.pack_into("<IIII", disk, at, 0xA92B4EFC, 0, 90, 0)


def _bytes_at(at: int, magic: bytes) -> Owner:
    def put(disk: bytearray) -> None:
        place = at if at >= 0 else len(disk) + at
        disk[place : place + len(magic)] = magic

    return put


def _lvm(disk: bytearray) -> None:
    disk[1024 : 1024 + 64] = (b"LABELONE" + struct.pack("<QII", 2, 0, 32) + b"LVM2 001" + b"a" * 32).ljust(64, b"\0")


def _zfs_label(label: int, uberblocks: int) -> Owner:
    def put(disk: bytearray) -> None:
        ends = len(disk) // (256 * KiB) * (256 * KiB)
        base = (0, 256 * KiB, ends - 512 * KiB, ends - 256 * KiB)[label] + 128 * KiB
        for slot in range(uberblocks):
            struct.pack_into("<QQQ", disk, base + slot * KiB, 0xBAB10C, 5000, slot + 1)

    return put


OWNERS: dict[str, Owner] = {
    "md 1.0": md_1(-1),
    "md 1.2": md_1(4096),
    "md 0.90": _md_090,
    "Intel RAID": _bytes_at(-1024, b"Intel Raid ISM Cfg Sig. 1.1.00"),
    "DDF": _bytes_at(-512, bytes.fromhex("de11de11")),
    "LVM": _lvm,
    "bcache": _bytes_at(4096 + 24, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")),
    "ZFS, first label": _zfs_label(0, 3),
    "ZFS, last label": _zfs_label(3, 1),
    "DRBD": _bytes_at(-4096 + 60, bytes.fromhex("8374026d")),
    "dynamic disk": _bytes_at(6 * 512, b"PRIVHEAD\0\0\0\0\0\2\0\x0c"),
    "btrfs": _bytes_at(65536 + 64, b"_BHRfS_M"),
}
