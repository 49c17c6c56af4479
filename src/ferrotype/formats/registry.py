"""Which formats there are, and which one a file is in.

Adding one: a module with ``probe`` and ``open``, and ``OPTIONS`` and ``create`` where it can be written; a row here.
"""

from __future__ import annotations

import contextlib
import glob
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Final

from ferrotype.block import Source, read
from ferrotype.errors import DeviceError, FormatError, UnsupportedError, UsageError
from ferrotype.formats import Folder, Format, Image, Tree, TreeFormat, Writable
from ferrotype.formats.related import Related
from ferrotype.formats.signs import is_vmdk_text, unpadded_tail
from ferrotype.formats.split import SplitFile, joined

__all__ = [
    "ENTRY_POINTS",
    "FORMATS",
    "RAW_SUFFIXES",
    "Row",
    "format_called",
    "format_of_suffix",
    "is_packed",
    "open_file",
    "open_folder",
    "open_tree",
    "recognise",
    "recognise_folder",
    "writer",
]

ENTRY_POINTS: Final = "ferrotype.formats"


@dataclass(frozen=True, slots=True)
class Row:
    """A format: how its files are recognised without importing anything, and where its code is."""

    module: str  # "" where it is only known by name; ``module:name`` where several are in one
    magics: tuple[tuple[int, bytes], ...]  # (offset, bytes); a negative offset counts from the end of the file
    suffixes: tuple[str, ...] = ()
    writable: bool = False
    tree: bool = False  # it holds files and no disk: ``open_tree``
    trailer: bytes = b""  # how the last 512 bytes begin, whatever zeros stand behind them
    text: Callable[[bytes], bool] | None = None  # whether these first bytes are those of its texts
    sectors: tuple[int, ...] | None = (512,)  # sizes that a new image can say its disk has; None: it says none
    wraps: bool = False  # a disk image of any format, or several, packed: a disk made of it as it is would be none


FORMATS: Final[dict[str, Row]] = {
    "raw": Row("ferrotype.formats.raw", (), (".raw", ".img", ".dd", ".iso", ".bin"), writable=True, sectors=None),
    "qcow2": Row("ferrotype.formats.qcow2", ((0, b"QFI\xfb\0\0\0\2"), (0, b"QFI\xfb\0\0\0\3")), (".qcow2",), True),
    "qcow": Row("ferrotype.formats.qcow", ((0, b"QFI\xfb\0\0\0\1"),), (".qcow",)),
    "qed": Row("ferrotype.formats.qed", ((0, b"QED\0"),), (".qed",)),
    "vhdx": Row("ferrotype.formats.vhdx", ((0, b"vhdxfile"),), (".vhdx",), True, sectors=(512, 4096)),
    "vhd": Row(
        "ferrotype.formats.vhd", ((0, b"conectix"), (-511, b"conectix")), (".vhd",), True, trailer=b"conectix"
    ),
    "vmdk": Row(
        "ferrotype.formats.vmdk",
        ((0, b"KDMV"), (0, b"COWD"), (0, b"\xbe\xba\xfe\xca\0\0\0\0")),
        (".vmdk",),
        True,
        text=is_vmdk_text,
    ),
    "vdi": Row("ferrotype.formats.vdi", ((0x40, b"\x7f\x10\xda\xbe"),), (".vdi",), True),
    "ewf": Row(
        "ferrotype.formats.ewf",
        (
            (0, b"EVF\x09\x0d\x0a\xff\x00"),
            (0, b"LVF\x09\x0d\x0a\xff\x00"),
            (0, b"EVF2\x0d\x0a\x81\x00"),
            (0, b"LEF2\x0d\x0a\x81\x00"),
            (0, b"ADCRYPT\0"),
        ),
        (".e01", ".s01", ".ex01"),
        True,
        sectors=(512, 4096),
    ),
    "dmg": Row(
        "ferrotype.formats.dmg",
        ((0, b"koly"), (0, b"encrcdsa"), (-8, b"cdsaencr"), (0, b"sprs")),
        (".dmg",),
        trailer=b"koly",
    ),
    "aff4": Row("ferrotype.formats.aff4", ((0, b"PK\x03\x04"), (0, b"PK\x05\x06")), (".aff4",)),
    "parallels": Row(
        "ferrotype.formats.parallels", ((0, b"WithoutFreeSpace"), (0, b"WithouFreSpacExt")), (".hdd", ".hds")
    ),
    "bochs": Row("ferrotype.formats.bochs", ((0, b"Bochs Virtual HD Image"),)),
    "cloop": Row("ferrotype.formats.cloop", ((0, b"#!/bin/sh\n#V2.0 Format"),), (".cloop",)),
    "partclone": Row("ferrotype.formats.partclone", ((0, b"partclone-image"),), (".pcl",)),
    "ntfsclone": Row("ferrotype.formats.ntfsclone", ((0, b"\0ntfsclone-image"),)),
    "clonezilla": Row("ferrotype.formats.clonezilla", ()),  # a folder
    "wim": Row(
        "ferrotype.formats.wim", ((0, b"MSWIM\0\0\0"), (0, b"WLPWM\0\0\0")), (".wim", ".esd", ".swm"), tree=True
    ),
    "simg": Row("ferrotype.formats.simg", ((0, b"\x3a\xff\x26\xed"),), (".simg",), wraps=True),
    "ova": Row("ferrotype.formats.ova", ((257, b"ustar"),), (".ova", ".tar"), wraps=True),
    "zip": Row("ferrotype.formats.zipped", ((0, b"PK\3\4"), (0, b"PK\5\6")), (".zip", ".zipx"), wraps=True),
    "gzip": Row("ferrotype.formats.compressed:GZIP", ((0, b"\x1f\x8b\x08"),), (".gz", ".tgz"), wraps=True),
    "xz": Row("ferrotype.formats.compressed:XZ", ((0, b"\xfd7zXZ\0"),), (".xz", ".txz"), wraps=True),
    "zstd": Row(
        "ferrotype.formats.compressed:ZSTD",
        ((0, b"\x28\xb5\x2f\xfd"), (1, b"*M\x18")),
        (".zst", ".zstd", ".tzst"),
        wraps=True,
    ),
    "bzip2": Row("ferrotype.formats.compressed:BZIP2", ((4, b"1AY&SY"),), (".bz2", ".tbz", ".tbz2"), wraps=True),
    "ferro": Row("", ((0, b"\x89FERRO\r\n"),), (".ferro",), True, sectors=None),
}

FOLDERS: Final = ("parallels", "clonezilla", "dmg")  # formats whose images may be folders

RAW_SUFFIXES: Final = frozenset(FORMATS["raw"].suffixes)


def format_of_suffix(path: Path) -> str | None:
    """The format that a name's ending stands for."""
    suffix = path.suffix.lower()
    return next((name for name, row in FORMATS.items() if suffix in row.suffixes), None)


def format_called(name: str) -> str:
    """The format that a user means by ``name``: its own name, or a suffix of its files, such as ``E01``."""
    return name if name in FORMATS else format_of_suffix(Path(f"disk.{name}")) or name


def is_packed(format: str | None) -> bool:
    """Whether files of a format hold disk images rather than a disk: archives and compressed streams."""
    return format is not None and format in FORMATS and FORMATS[format].wraps


def recognise(file: Source) -> str | None:
    """Name of the format a file is in, or None where it shows no sign of one.  Never guesses ``raw``."""
    found = next(_candidates(file), None)
    return found[0] if found else None


def open_file(file: Source, related: Related, format: str | None = None, *, headers_only: bool = False) -> Image:
    """Open a container in the format named, or in the one its content shows.

    Of a part of a split file, all parts are opened as one.  The image owns ``file``; where this raises, the caller
    still does.  Raises UnsupportedError where no format is recognised, or only one that is known by name, and what is
    ``Image.missing`` unless ``headers_only`` are wanted.
    """
    whole = joined(file, related)
    try:
        image = _opened(whole, related, format)
        if isinstance(whole, SplitFile):
            image.warnings += whole.warnings
        return _whole(image, headers_only=headers_only)
    except BaseException:
        if isinstance(whole, SplitFile) and whole is not file:
            whole.close_rest()
        raise


def _opened(file: Source, related: Related, format: str | None) -> Image:
    if format is not None:
        return _module(format).open(file, related)
    for name, module in _candidates(file):
        return (module or _module(name)).open(file, related)
    raise UnsupportedError("this is no disk image that ferrotype knows; say --format raw if it is a raw disk")


def _whole(image: Image, *, headers_only: bool) -> Image:
    """The image, whose disk can be read unless only its headers are wanted."""
    if image.missing is not None and not headers_only:
        image.close()
        raise image.missing
    return image


def open_tree(file: Source, related: Related, format: str | None = None) -> Tree | None:
    """Open an image that holds files and no disk, such as a WIM; None: the file is none, and stays the caller's."""
    for name, row in FORMATS.items():
        if not row.tree or format not in (None, name):
            continue
        module = _module(name)
        if isinstance(module, TreeFormat) and (format is not None or _probe(module, file)):
            return module.open_tree(file, related)
    return None


def open_folder(path: Path, related: Related, format: str | None = None, *, headers_only: bool = False) -> Image:
    """Open an image that is a folder of files, such as Clonezilla's.

    Raises UsageError where it is none, and what is ``Image.missing`` unless ``headers_only`` are wanted.
    """
    name = recognise_folder(path) if format is None else format
    module: object = _module(name) if name is not None else None
    if not isinstance(module, Folder):
        raise UsageError(f"{path} is a folder, and no disk image that ferrotype knows")
    return _whole(module.open_folder(path, related), headers_only=headers_only)


def recognise_folder(path: Path) -> str | None:
    """Name of the format that a folder is an image of, or None where it shows no sign of one."""
    for name in FOLDERS:
        module: object = _module(name) if FORMATS[name].module else None
        if isinstance(module, Folder) and module.probe_folder(path):
            return name
    return None


def writer(name: str) -> Writable:
    """The module that makes images of a format.  Raises UsageError where there is none."""
    module = _module(name)
    if not isinstance(module, Writable):
        known = ", ".join(name for name, row in FORMATS.items() if row.writable)
        raise UsageError(f"{name} images cannot be written; what can be: {known}")
    return module


def _module(name: str) -> Format:
    row = FORMATS.get(format_called(name))
    if row is not None and row.module:
        place, _, part = row.module.partition(":")
        where = import_module(place)
        found: Format = getattr(where, part) if part else where
        return found
    if row is not None:
        raise UnsupportedError(f"{name} images cannot be opened as a disk here")
    for plugged, module in _plugged_in():
        if plugged == name:
            return module
    raise UsageError(f"there is no format called {name!r}")


def _candidates(file: Source) -> Iterator[tuple[str, Format | None]]:
    """The formats whose signs the file shows and that say it is theirs; plug-ins where it shows none."""
    head, tail = read(file, 0, min(file.size, 512)), read(file, max(0, file.size - 512), min(file.size, 512))
    last = unpadded_tail(file)[1]
    for name, row in FORMATS.items():
        if not (
            any(_shows(head, tail, offset, magic) for offset, magic in row.magics)
            or (row.trailer and row.trailer in last)
            or (row.text is not None and row.text(head))
        ):
            continue
        if not row.module:
            yield name, None
            continue
        module = _module(name)
        if _probe(module, file):
            yield name, module
    for name, module in _plugged_in():
        if _probe(module, file):
            yield name, module


def _shows(head: bytes, tail: bytes, offset: int, magic: bytes) -> bool:
    if offset >= 0:
        return head[offset : offset + len(magic)] == magic
    at = len(tail) + offset
    return at >= 0 and tail[at : at + len(magic)] == magic


def _plugged_in() -> Iterator[tuple[str, Format]]:
    if not _any_plugged_in():
        return
    from importlib.metadata import entry_points  # it brings half of `email` along

    for entry in entry_points(group=ENTRY_POINTS):
        yield entry.name, entry.load()


@cache
def _any_plugged_in() -> bool:
    """Whether anything installed has entry points of formats; every raw disk comes to this question."""
    wanted = f"[{ENTRY_POINTS}]".encode()
    for folder in sys.path:
        for kind in ("dist-info", "egg-info"):
            for path in glob.iglob(os.path.join(glob.escape(folder), f"*.{kind}", "entry_points.txt")):
                with contextlib.suppress(OSError), open(path, "rb") as file:
                    if wanted in file.read():
                        return True
    return False


def _probe(module: Format, file: Source) -> bool:
    try:
        return module.probe(file)
    except (FormatError, DeviceError):  # where it would have to be known by cannot be read
        return False
