"""What else may stand on a volume: things recognised by their magic and imaged whole, for want of a map of theirs.

A table says for each kind, named as blkid names it, where its superblock may stand (``bases``), which of ``magics``
it holds ``at`` which byte of that, and where label and UUID are, counted from the superblock too:

    volume   0                 base                                     size
             |- - - - - - - - -|--------- superblock --------|- - - - - -|
                               +at  magic   +label   +uuid

A base is a byte of the volume, or ``Tail(back, align)``: ``back`` bytes before the end, the volume's size rounded
down to ``align`` first.  RAID metadata stands there, and a file system that begins at byte 0 is then a member's and
must not be taken for the whole; so such containers (``MEMBERS``) are looked for before anything else.

Offsets are those of each project's published on-disk format.
"""

from __future__ import annotations

import hashlib
import uuid as _uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

from ferrotype.block import Source, read
from ferrotype.errors import DeviceError
from ferrotype.units import KiB, MiB

__all__ = ["Found", "Mark", "Peek", "Signature", "found", "marks", "member"]


class Peek:
    """The few places of a volume where signatures stand, read once; zeros for what cannot be read."""

    HEAD: Final = 272 * KiB
    TAIL: Final = 136 * KiB

    def __init__(self, source: Source) -> None:
        self._source = source
        self.size = source.size
        self._tail_at = max(self.size - self.TAIL, 0)
        self._head = self._read(0, min(self.size, self.HEAD))
        self._tail = self._read(self._tail_at, self.size - self._tail_at) if self.size > self.HEAD else b""

    def _read(self, offset: int, length: int) -> bytes:
        try:
            return read(self._source, offset, length)
        except DeviceError:
            if length <= 4 * KiB:
                return bytes(length)
            half = length // 2
            return self._read(offset, half) + self._read(offset + half, length - half)

    def at(self, offset: int, length: int) -> bytes:
        """The bytes there, fewer or none where the volume is too short or unreadable."""
        if offset + length <= self.HEAD or self.size <= self.HEAD:
            return self._head[offset : offset + length] if offset >= 0 else b""
        if offset >= self._tail_at:
            return self._tail[offset - self._tail_at :][:length]
        return self._read(offset, max(min(length, self.size - offset), 0))

    def integer(self, offset: int, length: int, order: str = "<") -> int:
        return int.from_bytes(self.at(offset, length), "little" if order == "<" else "big")


class Tail(NamedTuple):
    """A place counted from the end of the volume."""

    back: int
    align: int = 512


@dataclass(frozen=True, slots=True)
class Field:
    """Where a label or UUID is, and how its bytes become text."""

    offset: int
    length: int
    decode: Callable[[bytes], str | None]


@dataclass(frozen=True, slots=True)
class Signature:
    kind: str
    bases: tuple[int | Tail, ...]
    at: int
    magics: tuple[bytes, ...]
    label: Field | None = None
    uuid: Field | None = None
    check: Callable[[Peek, int], bool] | None = None  # for magics too short to be sure of
    weak: bool = False  # seen by chance or left behind often: counts only where there is nothing else
    spread: tuple[int, int] = (0, 4 * KiB)  # bytes before and after its base without which it is not found again


class Found(NamedTuple):
    """A signature that is there."""

    kind: str
    label: str | None
    uuid: str | None
    weak: bool


class Mark(NamedTuple):
    """Where a signature stands: without these bytes nothing finds it again."""

    kind: str
    start: int  # bytes of the volume
    length: int


# ---------------------------------------------------------------------- text


def _utf8(raw: bytes) -> str | None:
    return raw.split(b"\0")[0].decode("utf-8", "replace").strip() or None


def _utf16(raw: bytes) -> str | None:
    return raw.decode("utf-16-le", "replace").split("\0")[0] or None


def _pascal(raw: bytes) -> str | None:
    return raw[1 : 1 + raw[0]].decode("mac-roman") or None if raw else None


def _dashed(raw: bytes) -> str | None:
    return str(_uuid.UUID(bytes=raw)) if len(raw) == 16 and any(raw) else None


def _plain_hex(raw: bytes) -> str | None:
    return raw.hex() if any(raw) else None


def _number(raw: bytes) -> str | None:
    return str(int.from_bytes(raw, "big"))


def _serial(raw: bytes) -> str | None:
    return f"{raw[3]:02X}{raw[2]:02X}-{raw[1]:02X}{raw[0]:02X}" if len(raw) == 4 and any(raw) else None


def _lvm(raw: bytes) -> str | None:
    text, cuts = raw.decode("ascii", "replace"), (0, 6, 10, 14, 18, 22, 26, 32)
    return "-".join(text[a:b] for a, b in pairwise(cuts))


def _vmfs(raw: bytes) -> str | None:
    return (
        f"{raw[3::-1].hex()}-{raw[7:3:-1].hex()}-{raw[9:7:-1].hex()}-{raw[10:16].hex()}" if len(raw) == 16 else None
    )


def _md_old(raw: bytes) -> str | None:
    """0.90 keeps the first word of its UUID apart from the other three, all of them numbers."""
    if len(raw) < 48:
        return None
    return _dashed(b"".join(raw[a : a + 4][::-1] for a in (0, 32, 36, 40)))


def _iso_date(raw: bytes) -> str | None:
    """Modification date of a volume, the creation date where there is none (ECMA-119, 8.4.26.1)."""
    for date in (raw[17:33], raw[0:16]):
        if len(date) == 16 and date.isdigit() and date.strip(b"0"):
            text = date.decode("ascii")
            return "-".join((text[:4], *(text[at : at + 2] for at in range(4, 16, 2))))
    return None


def _hfs(raw: bytes) -> str | None:
    """The volume's id hashed in Apple's name space, as macOS shows it: a UUID of version 3."""
    digest = hashlib.md5(bytes.fromhex("b3e20f39f29211d697a400306543ecac") + raw, usedforsecurity=False).digest()
    return str(_uuid.UUID(bytes=digest, version=3)) if any(raw) else None


# ---------------------------------------------------------------------- checks


def _is_jbd(peek: Peek, base: int) -> bool:
    return bool(peek.integer(base + 96, 4) & 8)  # s_feature_incompat: a journal device


def _is_hfsplus(peek: Peek, base: int) -> bool:
    size = peek.integer(base + 40, 4, ">")
    return peek.integer(base + 2, 2, ">") in (4, 5) and size >= 512 and size & (size - 1) == 0


def _wraps_hfsplus(peek: Peek, base: int) -> bool:
    return peek.at(base + 0x7C, 2) in (b"H+", b"HX")


def _is_hfs(peek: Peek, base: int) -> bool:
    size = peek.integer(base + 20, 4, ">")
    return size > 0 and size % 512 == 0 and not _wraps_hfsplus(peek, base)


def _is_udf(peek: Peek, base: int) -> bool:
    """An NSR descriptor among the volume structure descriptors, which follow each other (ECMA-167 2/9)."""
    for step in (2048, 4096):
        for at in range(base, base + 64 * KiB, step):
            name = peek.at(at + 1, 5)
            if name in (b"NSR02", b"NSR03"):
                return True
            if name not in (b"CD001", b"BEA01", b"BOOT2", b"CDW02"):
                break
    return False


def _is_zfs(peek: Peek, base: int) -> bool:
    """An uberblock in one of the 128 slots of a label, in either byte order; a young pool has but a few."""
    magics = (bytes.fromhex("0cb1ba0000000000"), bytes.fromhex("0000000000bab10c"))
    slots = peek.at(base, 128 * KiB)
    return any(slots.startswith(magics, at) for at in range(0, len(slots), KiB))


def _is_squashfs4(peek: Peek, base: int) -> bool:
    return peek.at(base, 4) == b"hsqs" and peek.integer(base + 28, 2) >= 4


def _is_squashfs3(peek: Peek, base: int) -> bool:
    return not _is_squashfs4(peek, base)


def _is_minix(peek: Peek, base: int) -> bool:
    """Inodes, map blocks and the first data zone of any version 1 or 2, in either byte order."""
    for order in "<>":
        inodes, maps = peek.integer(base, 2, order), peek.at(base + 4, 4)
        first, shift = peek.integer(base + 8, 2, order), peek.integer(base + 10, 2, order)
        blocks = sum(peek.integer(base + at, 2, order) for at in (4, 6))
        if inodes and any(maps[:2]) and any(maps[2:]) and 2 + blocks < first < 1 << 14 and shift == 0:
            return True
    return False


def _is_nilfs(peek: Peek, base: int) -> bool:
    return peek.integer(base, 4) == 2 and 0 < peek.integer(base + 8, 2) <= KiB


def _is_xfs_log(peek: Peek, base: int) -> bool:
    return peek.integer(base + 8, 4, ">") in (1, 2) and peek.integer(base + 300, 4, ">") in (1, 2, 3)


def _is_jmicron(peek: Peek, base: int) -> bool:
    words = peek.at(base, 128)
    return sum(int.from_bytes(words[at : at + 2], "little") for at in range(0, 128, 2)) & 0xFFFF in (0, 1)


def _is_silicon(peek: Peek, base: int) -> bool:
    """Silicon Image Medley: all words up to the first checksum add up to zero with it; at most eight disks."""
    words = peek.at(base, 0x140)
    total = sum(int.from_bytes(words[at : at + 2], "little") for at in range(0, 0x140, 2))
    return len(words) == 0x140 and total & 0xFFFF == 0 and words[0x116] < 8


def _is_via(peek: Peek, base: int) -> bool:
    """VIA: a magic that ends boot sectors, too, but a version and the sum of 50 bytes behind it."""
    head = peek.at(base, 51)
    return len(head) == 51 and head[2] <= 2 and sum(head[:50]) & 0xFF == head[50] and any(head[3:50])


def _is_adaptec(peek: Peek, base: int) -> bool:
    return peek.at(base + 256, 4) == b"DPTM"


def _is_md(peek: Peek, base: int) -> bool:
    """Version 1, at the place that it names itself, if any: the one of a partition is not the disk's."""
    return peek.integer(base + 4, 4) == 1 and peek.integer(base + 144, 8) * 512 in (0, base)


def _is_privhead(peek: Peek, base: int) -> bool:
    """The private header of a Windows dynamic disk, version 2."""
    return peek.integer(base + 12, 2, ">") == 2


def _is_lvm(peek: Peek, base: int) -> bool:
    return peek.at(base + 24, 4) == b"LVM2"


_h = bytes.fromhex
_S = Signature
_SECTORS: Final = (0, 512, 1024, 1536)
_MD_MAGIC: Final = (_h("fc4e2ba9"),)
_BCACHE: Final = _h("c68573f64e1a45ca8265f57f48ba6d81")
_LAST: Final = (Tail(512),)

MEMBERS: Final[tuple[Signature, ...]] = (
    _S("linux_raid_member", (Tail(64 * KiB, 64 * KiB),), 0, _MD_MAGIC, uuid=Field(20, 48, _md_old)),
    _S(
        "linux_raid_member",
        (Tail(8 * KiB, 4 * KiB), 0, 4 * KiB),
        0,
        _MD_MAGIC,
        Field(32, 32, _utf8),
        Field(16, 16, _dashed),
        _is_md,
    ),
    _S("ddf_raid_member", (Tail(512), Tail(257 * 512)), 0, (_h("de11de11"), _h("11de11de"))),
    _S("isw_raid_member", (Tail(1024),), 0, (b"Intel Raid ISM Cfg Sig. ",)),
    _S("lsi_mega_raid_member", _LAST, 0, (b"$XIDE$",)),
    _S("nvidia_raid_member", (Tail(1024),), 0, (b"NVIDIA  ",)),
    _S(
        "promise_fasttrack_raid_member",
        tuple(Tail(n * 512) for n in (16, 63, 255, 256)),
        0,
        (b"Promise Technology, Inc.",),
    ),
    _S("hpt45x_raid_member", (Tail(11 * 512),), 0, (_h("f316785a"), _h("fd16785a"))),
    _S("hpt37x_raid_member", (9 * 512,), 32, (_h("f016785a"), _h("fd16785a"))),
    _S("adaptec_raid_member", _LAST, 0, (_h("37fc4d1e"),), check=_is_adaptec),
    _S("jmicron_raid_member", _LAST, 0, (b"JM",), check=_is_jmicron),
    _S("silicon_medley_raid_member", _LAST, 0x60, (_h("0000002f"),), check=_is_silicon),
    _S("via_raid_member", _LAST, 0, (_h("55aa"),), check=_is_via),
    _S("geom", _LAST, 0, (b"GEOM::",)),  # FreeBSD: mirrors, stripes, encryption ...
    _S("bcache", (4 * KiB,), 24, (_BCACHE,), uuid=Field(40, 16, _dashed)),
    _S("ceph_bluestore", (0,), 0, (b"bluestore block device",)),
    _S(
        "drbd", (Tail(4096, 1), Tail(4096, 4096)), 60, (_h("83740267"), _h("8374026b")), uuid=Field(40, 8, _plain_hex)
    ),
    _S("drbd", (Tail(4096, 1), Tail(4096, 4096)), 60, (_h("8374026d"),), uuid=Field(48, 8, _plain_hex)),
    _S("LVM2_member", _SECTORS, 0, (b"LABELONE",), uuid=Field(32, 32, _lvm), check=_is_lvm),
    _S("LVM1_member", (0,), 0, (b"HM\1\0", b"HM\2\0")),
    _S("DM_snapshot_cow", (0,), 0, (b"SnAp",)),
    _S("DM_verity_hash", (0,), 0, (b"verity\0\0",), uuid=Field(16, 16, _dashed)),
    _S("DM_integrity", (0,), 0, (b"integrt\0",)),
    _S("DM_thin_or_cache", (0,), 32, tuple(n.to_bytes(8, "little") for n in (27022010, 6142003, 2126579579))),
    _S("DM_zoned", (0,), 0, (b"DBZD",)),
    _S("crypto_LUKS", (0,), 0, (b"LUKS\xba\xbe\0\2",), Field(24, 48, _utf8), Field(168, 40, _utf8)),
    _S("crypto_LUKS", (0,), 0, (b"LUKS\xba\xbe",), uuid=Field(168, 40, _utf8)),
    _S("crypto_LUKS", (16 * KiB, 32 * KiB, 64 * KiB, 128 * KiB), 0, (b"SKUL\xba\xbe",), uuid=Field(168, 40, _utf8)),
    _S("BitLocker", (0,), 3, (b"-FVE-FS-",)),
    _S("BitLocker", (0,), 424, (_h("3bd66749292ed84a8399f6a339e3d001"), _h("3b4da89280dd0e4d9e4eb1e3284eaed8"))),
    _S("VMFS_volume_member", (MiB,), 0, (_h("0dd001c0"),)),
    _S("ubi", (0,), 0, (b"UBI#",), uuid=Field(24, 4, _number)),
    _S("vdo", (0,), 0, (b"dmvdo001",), uuid=Field(40, 16, _dashed)),
    _S("stratis", (512, 9 * 512), 4, (b"!Stra0tis\x86\xff\x02^\x41rh",)),
    # four labels of 256 KiB, two at either end; their second halves hold the uberblocks
    _S(
        "zfs_member",
        (128 * KiB, 384 * KiB, Tail(384 * KiB, 256 * KiB), Tail(128 * KiB, 256 * KiB)),
        0,
        (b"",),
        check=_is_zfs,
        spread=(128 * KiB, 128 * KiB),
    ),
    _S("LDM", (6 * 512, Tail(512)), 0, (b"PRIVHEAD",), check=_is_privhead),
    _S("oracleasm", (0,), 32, (b"ORCLDISK",)),
    _S("jbd", (1024,), 56, (b"\x53\xef",), Field(120, 16, _utf8), Field(104, 16, _dashed), _is_jbd),
)

SIGNATURES: Final[tuple[Signature, ...]] = (
    _S("xfs", (0,), 0, (b"XFSB",), Field(108, 12, _utf8), Field(32, 16, _dashed)),
    _S("exfs", (0,), 0, (b"EXFS",), Field(108, 12, _utf8), Field(32, 16, _dashed)),
    _S("btrfs", (64 * KiB,), 64, (b"_BHRfS_M",), Field(299, 256, _utf8), Field(32, 16, _dashed)),
    _S(
        "bcachefs",
        (4 * KiB,),
        24,
        (_h("c68573f666ce90a9d96a60cf803df7ef"), _BCACHE),
        Field(72, 32, _utf8),
        Field(56, 16, _dashed),
    ),
    _S("f2fs", (1024,), 0, (_h("1020f5f2"),), Field(124, 1024, _utf16), Field(108, 16, _dashed)),
    _S("apfs", (0,), 32, (b"NXSB",), uuid=Field(72, 16, _dashed)),
    # before HFS: a disc that holds both is a disc
    _S("udf", (32 * KiB,), 1, (b"BEA01", b"CD001"), check=_is_udf),
    _S("iso9660", (32 * KiB,), 1, (b"CD001",), Field(40, 32, _utf8), Field(813, 34, _iso_date)),
    _S("iso9660", (32 * KiB,), 9, (b"CDROM",)),
    _S("hfsplus", (1024,), 0, (b"H+", b"HX"), uuid=Field(104, 8, _hfs), check=_is_hfsplus),
    _S("hfsplus", (1024,), 0, (b"BD",), check=_wraps_hfsplus),
    _S("hfs", (1024,), 0, (b"BD",), Field(36, 28, _pascal), check=_is_hfs),
    _S(
        "reiserfs",
        (64 * KiB, 8 * KiB),
        52,
        (b"ReIsErFs", b"ReIsEr2Fs", b"ReIsEr3Fs"),
        Field(100, 16, _utf8),
        Field(84, 16, _dashed),
    ),
    _S("reiser4", (64 * KiB,), 0, (b"ReIsEr4",)),
    _S("jfs", (32 * KiB,), 0, (b"JFS1",), Field(152, 16, _utf8), Field(136, 16, _dashed)),
    _S("squashfs", (0,), 0, (b"hsqs",), check=_is_squashfs4),
    _S("squashfs3", (0,), 0, (b"hsqs", b"sqsh"), check=_is_squashfs3),
    _S("erofs", (1024,), 0, (_h("e2e1f5e0"),), Field(64, 16, _utf8), Field(48, 16, _dashed)),
    _S("cramfs", (0,), 0, (_h("453dcd28"), _h("28cd3d45")), Field(48, 16, _utf8)),
    _S("romfs", (0,), 0, (b"-rom1fs-",), Field(16, 16, _utf8)),
    _S("hpfs", (8 * KiB,), 0, (_h("49e895f9"),), Field(43 - 8 * KiB, 11, _utf8), Field(39 - 8 * KiB, 4, _serial)),
    _S("ReFS", (0,), 0, (b"\0\0\0ReFS\0",)),
    _S("ocfs", (0,), 8, (b"OracleCFS",)),
    _S("ocfs2", (1024, 2048, 4096, 8192), 0, (b"OCFSV2",), Field(272, 64, _utf8), Field(336, 16, _dashed)),
    _S("gfs2", (64 * KiB,), 0, (_h("0116197000000001"),), Field(160, 64, _utf8), Field(256, 16, _dashed)),
    _S("nilfs2", (1024,), 6, (_h("3434"),), Field(168, 80, _utf8), Field(152, 16, _dashed), _is_nilfs),
    _S("vxfs", (1024, 8192), 0, (_h("f5fc01a5"), _h("a501fcf5"))),
    _S("nss", (4096,), 0, (b"SPB5",), uuid=Field(348, 16, _dashed)),
    _S("ubifs", (0,), 0, (_h("31181006"),)),
    _S("befs", (512, 0), 32, (b"BFS1", b"1SFB"), Field(0, 32, _utf8)),
    _S("bfs", (0,), 0, (_h("cefaad1b"),)),
    _S("VMFS", (2 * MiB,), 0, (_h("5ef1ab2f"),), Field(29, 128, _utf8), Field(9, 16, _vmfs)),
    _S("zonefs", (0,), 0, (b"SFOZ",), Field(8, 64, _utf8), Field(72, 16, _dashed)),
    _S(
        "ufs",
        (8 * KiB, 64 * KiB, 256 * KiB, 0),
        1372,
        (_h("54190100"), _h("00011954"), _h("19015419"), _h("19540119")),
    ),
    _S("xfs_external_log", tuple(range(0, 256 * KiB, 512)), 0, (_h("feedbabe"),), check=_is_xfs_log),
    _S(
        "minix",
        (1024,),
        16,
        tuple(map(_h, ("7f13", "8f13", "6824", "7824", "137f", "138f", "2468", "2478"))),
        check=_is_minix,
        weak=True,
    ),
    _S("minix", (1024,), 24, (_h("5a4d"), _h("4d5a")), check=_is_minix, weak=True),
)


def _places(signature: Signature, peek: Peek) -> Iterator[int]:
    """The bases at which a signature stands."""
    for base in signature.bases:
        if isinstance(base, Tail):
            base = peek.size // base.align * base.align - base.back
        if base < 0 or not any(peek.at(base + signature.at, len(m)) == m for m in signature.magics):
            continue
        if signature.check is None or signature.check(peek, base):
            yield base


def _matches(signature: Signature, peek: Peek) -> Found | None:
    base = next(_places(signature, peek), None)
    if base is None:
        return None
    fields = (signature.label, signature.uuid)
    label, uuid = (f.decode(peek.at(base + f.offset, f.length)) if f else None for f in fields)
    return Found(signature.kind, label, uuid, signature.weak)


def marks(peek: Peek, start: int) -> list[Mark]:
    """All signatures, of containers and file systems, that stand at or behind ``start``, ascending."""
    found = []
    for signature in (*MEMBERS, *SIGNATURES):
        before, after = signature.spread
        for base in _places(signature, peek):
            if base >= start:
                first, end = max(base - before, start), min(base + after, peek.size)
                found.append(Mark(signature.kind, first, end - first))
    return sorted(set(found), key=lambda mark: mark.start)


def member(peek: Peek) -> Found | None:
    """The container that the volume is part of, or that it is enclosed by."""
    return next(_all(MEMBERS, peek), None)


def found(peek: Peek) -> list[Found]:
    """All file systems without a map whose magic is there."""
    return list(_all(SIGNATURES, peek))


def _all(signatures: tuple[Signature, ...], peek: Peek) -> Iterator[Found]:
    return (hit for signature in signatures if (hit := _matches(signature, peek)) is not None)
