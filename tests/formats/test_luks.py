"""LUKS inside qcow2, as QEMU makes it."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from ferrotype.block.file import FileSource
from ferrotype.block.views import Slice
from ferrotype.errors import FormatError, KeyRefused
from ferrotype.formats import Image
from ferrotype.formats.registry import open_file
from ferrotype.formats.related import Related
from ferrotype.testing.sources import check_source
from tests.machine import run

SECRET = "open sesame"
CIPHERS = {
    "aes-xts-plain64 sha256": "",
    "aes-cbc-essiv:sha256 sha1": ",encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256"
    ",encrypt.hash-alg=sha1,encrypt.cipher-alg=aes-128",
    "aes-cbc-plain64 sha512": ",encrypt.cipher-mode=cbc,encrypt.ivgen-alg=plain64,encrypt.hash-alg=sha512",
}


@functools.cache
def encrypted(folder: Path, options: str = "") -> tuple[Path, bytes]:
    """An encrypted image with data over it, and the disk."""
    path, key = folder / f"{len(list(folder.iterdir()))}.qcow2", ["--object", f"secret,id=key,data={SECRET}"]
    every = f"encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10{options}"
    for attempt in range(20):  # it gives up where the machine's clocks were not even while it measured how fast it is
        try:
            run("qemu-img", "create", "-q", *key, "-f", "qcow2", "-o", every, path, "3M")
            break
        except AssertionError as error:
            if attempt == 19 or "accurate CPU usage" not in str(error):
                raise
    opts = f"driver=qcow2,file.filename={path},encrypt.format=luks,encrypt.key-secret=key"
    commands = "write -P 1 0 70000\nwrite -P 2 1000448 300544\nwrite -z 1M 64k\nwrite -P 3 2096640 1024\nquit\n"
    run("qemu-io", *key, "--image-opts", opts, text_in=commands)
    raw = path.with_suffix(".raw")
    run("qemu-img", "convert", *key, "--image-opts", opts, "-O", "raw", raw)
    return path, raw.read_bytes()


def unlocked(path: Path, passphrase: bytes | None) -> Image:
    file = FileSource(path)
    try:
        return open_file(file, Related(path, passphrase=lambda: passphrase))
    except BaseException:
        file.close()
        raise


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where images are made once: making a key takes seconds."""
    return tmp_path_factory.mktemp("luks")


@pytest.mark.parametrize("cipher", CIPHERS)
def test_luks_is_read_with_its_passphrase(folder: Path, cipher: str) -> None:
    path, content = encrypted(folder, CIPHERS[cipher])
    image = unlocked(path, SECRET.encode())
    check_source(lambda: Slice(image.source, 0, image.source.size), content, rounds=60)
    assert image.facts["encrypted"] is True
    name, maker = cipher.split()
    assert image.facts["encryption"] == {"format": "luks", "cipher": name, "hash": maker}
    image.close()


def test_luks_is_refused_without_its_passphrase(folder: Path) -> None:
    path, _ = encrypted(folder)
    with pytest.raises(KeyRefused, match="give its passphrase"):
        unlocked(path, None)
    with pytest.raises(KeyRefused, match="opens no key slot"):
        unlocked(path, b"open says me")


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"X"),  # magic
        (6, b"\0\2"),  # version
        (8, b"serpent\0"),
        (40, b"ecb\0"),
        (40, b"xts-essiv:sha256\0"),
        (40, b"cbc-essiv:md5\0"),
        (72, b"md5\0"),
        (108, b"\xff\xff\xff\xff"),  # key-bytes
        (108, b"\0\0\0\x10"),  # half of which is none for AES
        (164, b"\xff\xff\xff\xff"),  # iterations of the digest
        (164, b"\0\0\0\0"),
        (208 + 4, b"\xff\xff\xff\xff"),  # of the slot
        (208 + 40, b"\xff\xff\xff\xff"),  # where its material is
        (208 + 44, b"\xff\xff\xff\xff"),  # stripes
        (208 + 44, b"\0\0\0\0"),
    ],
)
def test_a_hostile_luks_header(folder: Path, tmp_path: Path, at: int, value: bytes) -> None:
    data = encrypted(folder)[0].read_bytes()
    start = data.index(b"LUKS\xba\xbe")
    path = tmp_path / "a.qcow2"
    path.write_bytes(data[: start + at] + value + data[start + at + len(value) :])
    with pytest.raises(FormatError):
        unlocked(path, SECRET.encode())
