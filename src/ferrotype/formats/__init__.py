"""Virtual-disk containers, recognised by their content.

What ferrotype reads today is the raw disk; the others are known by name, so that a container is never imaged as if
its bytes were a disk.
"""

from __future__ import annotations

from typing import Final

from ferrotype.block import Source, read

RAW_SUFFIXES: Final = frozenset({".raw", ".img", ".dd", ".iso", ".bin"})

# (offset, magic, name); a negative offset counts from the end of the file
_SIGNATURES: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vhd"),
    (-512, b"conectix", "vhd"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"EVF\x09\x0d\x0a\xff\x00", "ewf"),
    (0, b"EVF2\x0d\x0a\x81\x00", "ewf2"),
    (0, b"LVF\x09\x0d\x0a\xff\x00", "ewf"),
    (-512, b"koly", "dmg"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"MSWIM\0\0\0", "wim"),
    (0, b"partclone-image", "partclone"),
    (0, b"\0ntfsclone-image", "ntfsclone"),
    (0, b"\x89FERRO\r\n", "ferro"),
)


def recognise(file: Source) -> str | None:
    """Name of the container a file holds, or None where it shows no sign of one.  Never guesses ``raw``."""
    head = read(file, 0, min(file.size, 512))
    tail = read(file, max(0, file.size - 512), min(file.size, 512))
    for offset, magic, name in _SIGNATURES:
        where = head[offset:] if offset >= 0 else tail if len(tail) == 512 else b""
        if where.startswith(magic):
            return name
    return None
