"""Checksums made right again after a change, as an attacker would: a wrong one hides what lies behind it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Final

import numpy as np

from ferrotype.errors import FerrotypeError
from ferrotype.filesystems.exfat import _checksum
from ferrotype.filesystems.ext_checksums import CRC32C, LARGE, crc, row
from ferrotype.filesystems.ext_records import BLOCK_UNINIT, SUPERBLOCK, Geometry, Incompat, RoCompat, Superblock
from ferrotype.objects.layout import RECORD_MAGIC, checksum
from tests.fuzz.sparse import BLOCK, Sparse

_SECTORS: Final = (512, 4096)


def gpt(disk: Sparse) -> None:
    """Both copies: the array's CRC, then the header's."""
    for sector in _SECTORS:
        for at in (sector, disk.size // sector * sector - sector):
            header = bytearray(disk.read(max(at, 0), 512))
            if header[:8] != b"EFI PART":
                continue
            lba, count, size = struct.unpack_from("<QII", header, 72)
            if count * size <= 1 << 20 and 0 <= lba * sector + count * size <= disk.size:
                struct.pack_into("<I", header, 88, zlib.crc32(disk.read(lba * sector, count * size)))
            length = min(int.from_bytes(header[12:16], "little"), 512)
            header[16:20] = bytes(4)
            struct.pack_into("<I", header, 16, zlib.crc32(header[:length]))
            disk.write(at, bytes(header))


def exfat(disk: Sparse) -> None:
    """The boot region's checksum sector, for the sector size that the boot sector names."""
    shift = disk.read(108, 1)[0]
    if not 9 <= shift <= 12:
        return
    sector = 1 << shift
    for start in (0, 12 * sector):
        region = disk.read(start, 11 * sector)
        if region[3:11] == b"EXFAT   ":
            disk.write(start + 11 * sector, _checksum(region).to_bytes(4, "little") * (sector // 4))


def ext(disk: Sparse) -> None:
    """metadata_csum: bitmaps, descriptors and superblock of a small file system."""
    raw = disk.read(SUPERBLOCK, Superblock.SIZE)
    try:
        sb = Superblock.unpack(raw)
        geo = Geometry.of(sb)
    except (FerrotypeError, ZeroDivisionError, ValueError):
        return
    if not sb.s_feature_ro_compat & RoCompat.METADATA_CSUM:
        return
    seed = np.array([sb.s_checksum_seed], np.uint32)
    if not sb.s_feature_incompat & Incompat.CSUM_SEED:
        seed = crc(CRC32C, LARGE, row(sb.s_uuid))
    table = (geo.super_block + 1) * geo.block_size
    for group in range(min(geo.groups, 16) if not sb.s_feature_incompat & Incompat.META_BG else 0):
        at = table + group * geo.desc_size
        entry = bytearray(disk.read(at, geo.desc_size))
        wide = geo.desc_size >= 64
        bitmap = int.from_bytes(entry[:4], "little") | (int.from_bytes(entry[32:36], "little") << 32 if wide else 0)
        flags = int.from_bytes(entry[0x12:0x14], "little")
        if not flags & BLOCK_UNINIT and bitmap < geo.blocks:
            content = disk.read(bitmap * geo.block_size, geo.group_clusters // 8)
            check = int(crc(CRC32C, seed, row(content))[0])
            entry[0x18:0x1A] = (check & 0xFFFF).to_bytes(2, "little")
            if wide:
                entry[0x38:0x3A] = (check >> 16).to_bytes(2, "little")
        entry[0x1E:0x20] = bytes(2)
        check = int(crc(CRC32C, seed, row(group.to_bytes(4, "little") + bytes(entry)))[0])
        entry[0x1E:0x20] = (check & 0xFFFF).to_bytes(2, "little")
        disk.write(at, bytes(entry))
    raw = disk.read(SUPERBLOCK, Superblock.SIZE)
    disk.write(SUPERBLOCK + len(raw) - 4, int(crc(CRC32C, LARGE, row(raw[:-4]))[0]).to_bytes(4, "little"))


def ntfs(disk: Sparse) -> None:
    """Fix-ups of all that has them: the last two bytes of each sector are the number in the array."""
    for run in [r for r in disk.runs if bytes(r.data[:4]) in (b"FILE", b"INDX", b"RSTR") and r.repeats == 1]:
        at, count = struct.unpack_from("<HH", run.data, 4)
        if at % 2 or at + 2 > BLOCK - 2 or not 1 < count <= 129:
            continue
        mark = bytes(run.data[at : at + 2])
        for number in range(run.number, run.number + count - 1):
            block = disk.block(number)
            if block is not None:
                block[-2:] = mark


def container(image: Sparse) -> None:
    """Volume header, anchors and records of an image: every checksum, payloads included."""
    uuid = image.read(16, 16)
    for run in list(image.runs):
        head, at = run.data, run.number * BLOCK
        if at == 0 or bytes(head[:8]) == b"FERROANC":
            if at:
                head[16:32] = uuid
            head[64:80] = checksum(bytes(head[:64]))
        elif bytes(head[:8]) == RECORD_MAGIC:
            head[16:32] = uuid
            length = int.from_bytes(head[40:48], "little")
            if int.from_bytes(head[8:10], "little") != 3 and length <= 1 << 20:
                head[48:64] = checksum(image.read(at + 128, length))
            head[112:128] = checksum(bytes(head[:112]))


MENDS: Final[dict[str, Callable[[Sparse], None]]] = {"exfat": exfat, "ext": ext, "ntfs": ntfs}
