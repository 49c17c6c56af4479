"""Marks of what owns whole disks: members of RAID and the like, put where their own tools put them."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable
from functools import reduce
from operator import xor

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


def md_090(disk: bytearray) -> None:
    """A superblock of version 0.90, of 1024 words, as mdp_superblock_s in md_p.h lays it out."""
    at = (len(disk) // 65536 - 1) * 65536
    disk[at : at + 4096] = bytes(4096)
    struct.pack_into("<12I", disk, at, 0xA92B4EFC, 0, 90, 0, 0, 1, 0, 1, len(disk) // 1024 - 64, 2, 2, 0)
    words = sum(struct.unpack_from("<1024I", disk, at))
    struct.pack_into("<I", disk, at + 38 * 4, ((words & 0xFFFFFFFF) + (words >> 32)) & 0xFFFFFFFF)


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


def _xor(disk: bytearray, start: int, length: int, at: int, code: str) -> None:
    """Put the word at ``at`` that makes all words XOR to zero."""
    words = struct.unpack_from(code[0] + str(length // 2) + code[1], disk, start)
    struct.pack_into(code, disk, at, reduce(xor, words))


def _sum(disk: bytearray, start: int, length: int, at: int) -> None:
    """Put the big-endian word at ``at`` that makes all words add up to zero."""
    words = struct.unpack_from(f">{length // 4}I", disk, start)
    struct.pack_into(">I", disk, at, -sum(words) & 0xFFFFFFFF)


def _bsd(at: int, order: str) -> Owner:
    def put(disk: bytearray) -> None:
        disk[at : at + 148 + 8 * 16] = bytes(148 + 8 * 16)
        struct.pack_into(order + "I", disk, at, 0x82564557)
        struct.pack_into(order + "IHH", disk, at + 132, 0x82564557, 0, 8)
        struct.pack_into(order + "II", disk, at + 148, 4096, 64)
        _xor(disk, at, 148 + 8 * 16, at + 136, "<H")

    return put


def _sun(disk: bytearray) -> None:
    struct.pack_into(">HH", disk, 508, 0xDABE, 0)
    _xor(disk, 0, 512, 510, ">H")


def _sgi(disk: bytearray) -> None:
    struct.pack_into(">I", disk, 0, 0x0BE5A941)
    struct.pack_into(">I", disk, 504, 0)
    _sum(disk, 0, 512, 504)


def _amiga(disk: bytearray) -> None:
    disk[512:768] = (b"RDSK" + struct.pack(">III", 64, 0, 7)).ljust(256, b"\0")
    _sum(disk, 512, 256, 520)


def _solaris(disk: bytearray) -> None:
    struct.pack_into("<II8sHH", disk, 512 + 12, 0x600DDEEE, 1, b"", 512, 16)


LABELS: dict[str, Owner] = {
    "BSD": _bsd(512, "<"),
    "BSD, big-endian, in sector 0": _bsd(64, ">"),
    "Sun": _sun,
    "SGI": _sgi,
    "Amiga": _amiga,
    "Solaris": _solaris,
    "AIX": _bytes_at(0, b"\xc9\xc2\xd4\xc1"),
    "System/390": _bytes_at(8192, b"\xe5\xd6\xd3\xf1"),
}
"""Tables of other systems, as their own tools lay them out."""


def _silicon(disk: bytearray) -> None:
    at = len(disk) - 512
    disk[at:] = bytes(512)
    disk[at + 0x60 : at + 0x64] = bytes.fromhex("0000002f")
    disk[at + 0x116] = 1
    words = sum(struct.unpack_from("<159H", disk, at))
    struct.pack_into("<H", disk, at + 0x13E, -words & 0xFFFF)


def _via(disk: bytearray) -> None:
    at = len(disk) - 512
    disk[at:] = b"\x55\xaa\1\7\0\1".ljust(512, b"\0")
    disk[at + 50] = sum(disk[at : at + 50]) & 0xFF


OWNERS: dict[str, Owner] = {
    "md 1.0": md_1(-1),
    "md 1.2": md_1(4096),
    "md 0.90": md_090,
    "Intel RAID": _bytes_at(-1024, b"Intel Raid ISM Cfg Sig. 1.1.00"),
    "DDF": _bytes_at(-512, bytes.fromhex("de11de11")),
    "Silicon Image": _silicon,
    "VIA": _via,
    "GEOM": _bytes_at(-512, b"GEOM::ELI\0"),
    "LVM": _lvm,
    "bcache": _bytes_at(4096 + 24, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")),
    "ZFS, first label": _zfs_label(0, 3),
    "ZFS, last label": _zfs_label(3, 1),
    "DRBD": _bytes_at(-4096 + 60, bytes.fromhex("8374026d")),
    "dynamic disk": _bytes_at(6 * 512, b"PRIVHEAD\0\0\0\0\0\2\0\x0c"),
    "btrfs": _bytes_at(65536 + 64, b"_BHRfS_M"),
}
