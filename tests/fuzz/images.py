"""Disk images of other programs as fuzzers want them: small ones made by qemu-img and by our own writers."""

from __future__ import annotations

import bz2
import functools
import gzip
import hashlib
import io
import lzma
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Final
from unittest import mock

from ferrotype.errors import FerrotypeError
from ferrotype.formats import Image, wrapping
from ferrotype.formats.codecs import zstd_frame
from ferrotype.formats.crc32c import crc32c
from ferrotype.formats.registry import open_file, open_tree, recognise
from ferrotype.formats.related import Related
from ferrotype.job import NullJob
from tests.formats.judges import KiB, MiB, make_image, random_disk, scattered
from tests.fuzz.mutate import MOST_SIZE
from tests.fuzz.sparse import BLOCK, Sparse, SparseDisk
from tests.machine import CORPUS, corpus

_MOST_BLOCKS: Final = 600  # of a seed: a larger one makes all its children slow
_FILES: Final = 200  # of a tree that are read
_PIECES: Final = 50  # of each of them
_MOST_PACKED: Final = 4 * MiB  # of what is unpacked as a whole, and unpacks to a thousand times as much
_MOST_UNPACKED: Final = 64 * MiB
_READ: Final = 300 * KiB  # bytes read at each of a few places

# format of qemu-img and its options, for images with a little data strewn over them
_BY_QEMU: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "qcow2": (
        ("qcow2", "cluster_size=4096"),
        ("qcow2", "compat=0.10,cluster_size=512"),
        ("qcow2", "cluster_size=16384,extended_l2=on"),
    ),
    "qcow": (("qcow", ""),),
    "qed": (("qed", "cluster_size=4096"),),
    "vhdx": (("vhdx", "block_size=1048576"), ("vhdx", "subformat=fixed")),
    "vhd": (("vpc", ""), ("vpc", "subformat=fixed")),
    "vmdk": (("vmdk", ""),),
    "vdi": (("vdi", ""), ("vdi", "static=on")),
    "parallels": (("parallels", ""),),
}

# our own writers: options, and whether compressed
_BY_US: Final[dict[str, tuple[tuple[tuple[str, ...], bool], ...]]] = {
    "qcow2": ((("compression_type=zlib",), True), (("compression_type=zstd",), True)),
    "vmdk": (((), True),),
    "ewf": (((), False),),
}

# what the corpus calls the formats that no tool here makes
_IN_CORPUS: Final[dict[str, tuple[str, ...]]] = {
    "ewf": ("ewf", "ewf2"),
    "dmg": ("dmg",),
    "aff4": ("aff4",),
    "bochs": ("bochs",),
    "partclone": ("partclone",),
    "ntfsclone": ("ntfsclone",),
    "parallels": ("parallels",),
    "wim": ("wim",),
}
# descriptors, which nothing of the above is
_TEXTS: Final[dict[str, tuple[bytes, ...]]] = {
    "vmdk": (
        b'\xef\xbb\xbf# Disk Descriptor File\r\nversion=1\r\ncreateType="custom"\r\nRW 99 ZERO\r\nRW 9 ZERO x\r\n',
        b'\n#\nversion=1\nCID=1\nparentCID=2\nparentFileNameHint="y"\ncreateType=x\nRW 9 FLAT "a-flat.vmdk" 0 4e9e',
    )
}

# bytes by which images are made longer or shorter: padding behind a trailer, clusters that are not all there
_LENGTHS: Final[dict[str, int]] = {"vhd": 4 * KiB, "dmg": 4 * KiB, "qcow2": -700, "qed": -700, "vdi": -700}


def _tar(content: bytes) -> bytes:
    """A tar archive with a descriptor, a disk, a manifest and long names of both kinds."""
    made = io.BytesIO()
    text = b'<Envelope><File id="f" href="a.disk"/><Disk fileRef="f"/></Envelope>'
    manifest = b"SHA256(a.disk)= " + hashlib.sha256(content).hexdigest().encode()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (("a.ovf", text), ("a.disk", content), ("a.mf", manifest), ("n" * 200, b"x")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return made.getvalue()


def _zip(content: bytes, method: int) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        archive.writestr("a.img", content)
        archive.writestr("words.txt", b"words")
    return made.getvalue()


def _simg(content: bytes) -> bytes:
    """An Android sparse image with every kind of chunk."""
    blocks = len(content) // 4096
    chunks = [(0xCAC1, blocks, content), (0xCAC2, 9, b"abcd"), (0xCAC3, 5, b""), (0xCAC4, 0, b"1234")]
    head = struct.pack("<IHHHHIIII", 0xED26FF3A, 1, 0, 28, 12, 4096, blocks + 14, len(chunks), 1)
    return head + b"".join(struct.pack("<HHII", k, 0, n, 12 + len(data)) + data for k, n, data in chunks)


# what holds disks, or other files that do
_BY_HAND: Final[dict[str, tuple[Callable[[bytes], bytes], ...]]] = {
    "gzip": (gzip.compress, lambda data: gzip.compress(_tar(data))),
    "xz": (lzma.compress,),
    "zstd": (zstd_frame,),
    "bzip2": (bz2.compress,),
    "ova": (_tar, lambda data: _tar(gzip.compress(data))),
    "zip": (lambda data: _zip(data, zipfile.ZIP_STORED), lambda data: _zip(data, zipfile.ZIP_DEFLATED)),
    "simg": (_simg,),
}
NAMES: Final = tuple(sorted({*_BY_QEMU, *_BY_US, *_IN_CORPUS, *_BY_HAND}))


@functools.cache
def seeds(name: str) -> tuple[bytes, ...]:
    """Images of a format, trimmed to what a fuzzer can change often."""
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, options) in enumerate(_BY_QEMU.get(name, ())):
            path = scattered(Path(folder) / f"q{number}", kind, 2 * MiB, options, seed=number, writes=6)
            made.append(_trimmed(Sparse.load(path)).encode())
        content = bytearray(random_disk(256 * KiB, seed=5))
        made += [_trimmed(Sparse.of(make(bytes(content)))).encode() for make in _BY_HAND.get(name, ())]
        for number, (texts, compress) in enumerate(_BY_US.get(name, ())):
            path = make_image(Path(folder) / f"u{number}.E01", name, bytes(content), *texts, compress=compress)
            made.append(_trimmed(Sparse.load(path)).encode())
    made += [Sparse.of(text).encode() for text in _TEXTS.get(name, ())]
    if made and name in _LENGTHS:
        last = Sparse.decode(made[-1])
        last.size += _LENGTHS[name]
        made.append(last.encode())
    return (*made, *from_corpus(name))


@functools.cache
def from_corpus(name: str) -> tuple[bytes, ...]:
    """Images made by other programs still."""
    found = []
    for entry in corpus():
        if entry["format"] in _IN_CORPUS.get(name, ()) and len(entry["files"]) == 1 and not entry["big"]:
            file = entry["files"][0]
            found.append(_trimmed(Sparse.load(CORPUS / file["stored"], file["storage"])).encode())
    return tuple(found)


def _trimmed(image: Sparse) -> Sparse:
    """Without most of the data between the tables at the head and those at the end."""
    if len(image.runs) > _MOST_BLOCKS:
        image.runs = image.runs[: _MOST_BLOCKS // 2] + image.runs[-_MOST_BLOCKS // 2 :]
    return image


def run(name: str, data: bytes) -> None:
    """All that an image is asked, whatever the answer before was."""
    content = Sparse.decode(data)
    content.size = min(content.size, _MOST_PACKED if name in _BY_HAND else MOST_SIZE)
    file = SparseDisk(content, 512)
    recognise(file)
    with mock.patch.object(wrapping, "_FREE", _MOST_UNPACKED), mock.patch.object(wrapping, "_TIMES", 0):
        _run(name, file)


def _run(name: str, file: SparseDisk) -> None:
    if name == "wim":
        _walk(file)
        return
    image = open_file(file, Related.nothing(), name)
    try:
        _ask(image)
    finally:
        image.close()


def _walk(file: SparseDisk) -> None:
    """The files of an image that holds no disk."""
    tree = open_tree(file, Related.nothing(), "wim")
    assert tree is not None
    try:
        for path, _ in islice(tree.walk(), _FILES):
            try:
                deque(islice(tree.read(path), _PIECES), 0)
            except FerrotypeError:
                continue
    finally:
        tree.close()


def _ask(image: Image) -> None:
    source = image.source
    size = source.size
    asked: list[Callable[[], object]] = [lambda: source.extents(0, size)]
    for offset in sorted({0, size // 3, size // 2, max(0, size - _READ)}):
        view = memoryview(bytearray(min(_READ, size - offset)))
        asked.append(functools.partial(source.read_into, offset, view))
    asked += [functools.partial(image.disk, disk) for disk in list(image.disks)[:3]]
    if image.check is not None and size < 64 * MiB:
        asked.append(functools.partial(image.check, NullJob()))
    for ask in asked:
        try:
            ask()
        except FerrotypeError:
            continue


# ---------------------------------------------------------------------- checksums


def mend(name: str) -> Callable[[Sparse], None] | None:
    """What makes the checksums of a changed image right again, so that the change is met and not the checksum."""
    return {"vhd": _mend_vhd, "vhdx": _mend_vhdx, "partclone": _mend_partclone}.get(name)


def _mend_vhd(image: Sparse) -> None:
    """The sum of all bytes, inverted: of footers at 64, of the dynamic header (1024 bytes) at 36."""
    for run_ in image.runs:
        if run_.data[:8] == b"conectix":
            run_.data[64:68] = bytes(4)
            run_.data[64:68] = (~sum(run_.data) & 0xFFFFFFFF).to_bytes(4, "big")
    for first, second in zip(image.runs, image.runs[1:], strict=False):
        if first.data[:8] == b"cxsparse" and second.number == first.number + 1:
            first.data[36:40] = bytes(4)
            first.data[36:40] = (~(sum(first.data) + sum(second.data)) & 0xFFFFFFFF).to_bytes(4, "big")


def _mend_vhdx(image: Sparse) -> None:
    """CRC-32C of headers (4 KiB) and region tables (64 KiB), whose field for it is zero meanwhile."""
    for magic, size in ((b"head", 4 * KiB), (b"regi", 64 * KiB)):
        for run_ in [r for r in image.runs if r.data[:4] == magic]:
            run_.data[4:8] = bytes(4)
            whole = bytearray(size)
            for other in image.runs:
                at = (other.number - run_.number) * BLOCK
                for repeat in range(min(other.repeats, size // BLOCK)):
                    if 0 <= at + repeat * BLOCK < size:
                        whole[at + repeat * BLOCK : at + (repeat + 1) * BLOCK] = other.data
            run_.data[4:8] = crc32c(bytes(whole)).to_bytes(4, "little")


def _mend_partclone(image: Sparse) -> None:
    """CRC-32 of the first 106 bytes of a version 2 header."""
    if image.runs and image.runs[0].number == 0 and image.runs[0].data[:15] == b"partclone-image":
        head = image.runs[0].data
        head[106:110] = zlib.crc32(bytes(head[:106])).to_bytes(4, "little")
