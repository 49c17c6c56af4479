"""What a file says that it is, by its name and first bytes, where no format here reads it.

    disk.qcow2   whose first sector is lost      named like an image, and its content shows none
    vm.vmx                                       named like what stands beside disks
    disk.img     that is a 7z archive            content that is no disk, whatever it is called

Such a file is not taken for a raw disk in silence: only the user can say that its bytes are the disk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

from ferrotype.block import Source, read
from ferrotype.errors import FormatError, InvalidImage, UnsupportedError
from ferrotype.formats.registry import FORMATS, RAW_SUFFIXES, format_of_suffix
from ferrotype.formats.split import name_of_whole

__all__ = ["no_raw_disk", "other_format"]


@dataclass(frozen=True, slots=True)
class Foreign:
    """A kind of file that no format here reads."""

    what: str  # with its article
    advice: str  # what to do with it
    suffixes: str = ""  # of the names of such files, divided by blanks
    magics: tuple[tuple[int, bytes], ...] = ()  # (offset, bytes)


def _unpack(command: str) -> str:
    return f"unpack it with {command}"


_ARCHIVE: Final = "take the disk out of it first"
_DESCRIBES: Final = "name the disk that it describes"
_PROGRAM: Final = "let the program that made it write the disk as a plain image"
_HEAD: Final = 512  # bytes in which every magic lies

FOREIGN: Final = (
    Foreign("a 7z archive", _unpack("7z x"), ".7z", ((0, b"7z\xbc\xaf\x27\x1c"),)),
    Foreign("a RAR archive", _unpack("unrar x"), ".rar", ((0, b"Rar!\x1a\x07"),)),
    Foreign("an lz4 stream", _unpack("lz4 -d"), ".lz4", ((0, b"\x04\x22\x4d\x18"), (0, b"\x02\x21\x4c\x18"))),
    Foreign("an lzma stream", _unpack("xz -dk --format=lzma"), ".lzma", ((0, b"\x5d\0\0\x80\0\xff"),)),
    Foreign("an lzip stream", _unpack("lzip -dk"), ".lz .tlz", ((0, b"LZIP\1"),)),
    Foreign("an lzop stream", _unpack("lzop -d"), ".lzo .lzop", ((0, b"\x89LZO\0\r\n\x1a\n"),)),
    Foreign("an lrzip stream", _unpack("lrzip -d"), ".lrz", ((0, b"LRZI"),)),
    Foreign("a stream of compress", _unpack("gzip -d"), ".z .taz", ((0, b"\x1f\x9d\x90"),)),
    Foreign("a brotli stream", _unpack("brotli -d"), ".br"),
    Foreign("a snappy stream", _unpack("snzip -d"), ".sz", ((0, b"\xff\x06\0\0sNaPpY"),)),
    Foreign("a cabinet", _unpack("7z x"), ".cab", ((0, b"MSCF\0\0\0\0"),)),
    Foreign("a cpio archive", _unpack("cpio -id"), ".cpio", ((0, b"070701"), (0, b"070702"), (0, b"070707"))),
    Foreign("an ar archive", _unpack("ar x"), ".ar .deb", ((0, b"!<arch>\n"),)),
    Foreign("an archive", _ARCHIVE, ".ace .arj .lha .lzh .xva"),
    Foreign("a description of a virtual machine", _DESCRIBES, ".ovf .vmx .vmxf .vbox .vmcx .pvs"),
    Foreign("a list of checksums or blocks", _DESCRIBES, ".mf .sha256 .sha1 .md5 .bmap"),
    Foreign("the memory of a virtual machine", _DESCRIBES, ".vmem .vmsn .vmss .nvram .vsv .vmrs"),
    Foreign("a differencing disk of Hyper-V", _PROGRAM, ".avhd .avhdx .vhds"),
    Foreign("logical evidence", _PROGRAM, ".ad1 .l01 .lx01", ((0, b"ADSEGMENTEDFILE"),)),
    Foreign(
        "a backup of another program",
        _PROGRAM,
        ".tib .tibx .gho .ghs .mrimg .mrbak .v2i .adi .vbk .vib .vrb .vma .fsa .spf .pqi .pbd .redo",
        (
            (0, b"PaRtImAgE-VoLuMe"),
            (0, b"VMA\0"),
            (0, b"FsA0"),
            (0, b"rbd diff v"),
            (0, b"rbd image v"),
            (0, b"btrfs-stream\0"),
            (8, b"\xac\xcb\xba\xf5\2\0\0\0"),  # zfs send
            (8, b"\0\0\0\2\xf5\xba\xcb\xac"),
            (0, b"xFSdump0"),
        ),
    ),
    Foreign("an image of AFFLIB", _PROGRAM, ".aff .afd .afm", ((0, b"AFF10\r\n\0"),)),
    Foreign(
        "an encrypted file",
        "decrypt it first",
        ".gpg .pgp .age .enc",
        ((0, b"Salted__"), (0, b"age-encryption.org/v"), (0, b"-----BEGIN PGP MESSAGE-----")),
    ),
    Foreign("a disk image of a Mac", _PROGRAM, ".sparseimage .sparsebundle .smi .toast"),
    Foreign("an optical disc in another format", _PROGRAM, ".nrg .mdf .mds .cdi .ccd .cue .cso .ecm"),
    Foreign("a compressed disk of MAME", _unpack("chdman extracthd"), ".chd", ((0, b"MComprHD"),)),
)

_SEGMENT: Final = re.compile(r"\.(ex|lx|e|s|l)(\d\d|[a-z]{2})")  # of EWF images: .E02, .Ex01, .EAB
_FLAT: Final = re.compile(r".*-flat\.vmdk", re.IGNORECASE | re.DOTALL)  # all of the disk; the descriptor only says so
_PUT_ASIDE: Final = frozenset((".bak", ".old", ".orig", ".part", ".partial", ".tmp", ".crdownload", ".download"))


_WAY_OUT: Final = "or say --format raw if its bytes, as they are, are the disk"


def no_raw_disk(path: PurePath, file: Source, way_out: str = _WAY_OUT) -> FormatError | None:
    """Why a file whose content shows no format here is not to be taken for a raw disk; None: nothing speaks against.

    ``path`` is only looked at for its name.
    """
    head = read(file, 0, min(file.size, _HEAD))
    for foreign in FOREIGN:
        if any(head[offset : offset + len(magic)] == magic for offset, magic in foreign.magics):
            return UnsupportedError(f"{path} is {foreign.what}, and no disk: {foreign.advice}, {way_out}")
    if _FLAT.fullmatch(path.name):
        return None
    whole = name_of_whole(Path(path))
    suffix = _suffix(whole)
    if (like := _named_like(suffix)) is not None:
        return UnsupportedError(
            f"{path} is named like {like.what}, and is no disk image that ferrotype knows: {like.advice}, {way_out}"
        )
    named = next((name for name, row in FORMATS.items() if suffix in row.suffixes and suffix not in RAW_SUFFIXES), "")
    if not named and _SEGMENT.fullmatch(suffix):
        named = "ewf"
    if named == "ewf" and whole.name != path.name:
        return None  # EWF has segments of its own: parts of a name like case.E01.001 are those of a raw disk
    if named:
        return InvalidImage(
            f"{path} is named like a disk image in the format {named}, and its content shows none: it is "
            f"damaged, cut short or something else, so name another copy, {way_out}"
        )
    return None


def other_format(path: PurePath) -> str | None:
    """What the name of a new raw disk would say that it is, if that is something else."""
    suffix = path.suffix.lower()
    if suffix in RAW_SUFFIXES:
        return None
    if (foreign := _named_like(suffix)) is not None:
        return foreign.what
    format = format_of_suffix(Path(path))
    return None if format is None else f"an image in the format {format}"


def _named_like(suffix: str) -> Foreign | None:
    return next((foreign for foreign in FOREIGN if suffix in foreign.suffixes.split()), None)


def _suffix(path: PurePath) -> str:
    """The ending of a name, in small letters, without what is put behind it when a file is put aside."""
    while (suffix := path.suffix.lower()) in _PUT_ASIDE:
        path = path.with_suffix("")
    return suffix
