"""Disks in tar archives (OVA) and in zip archives, packed by tar and zip, and by hand where they are hostile."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.engine.references import Access, open_disk
from ferrotype.errors import FerrotypeError, FormatError, InvalidImage, NotAllowed, UnsupportedError, UsageError
from ferrotype.job import NullJob
from tests.cli.program import ferrotype
from tests.formats.judges import damages_of, random_disk
from tests.machine import need, run

MiB = 1 << 20
DISK = random_disk(2 * MiB, seed=8)
OTHER = random_disk(MiB, seed=9)


def disk_of(text: Path | str) -> bytes:
    with open_disk(str(text), Access(), NullJob()) as disk:
        return read(disk.source, 0, disk.source.size)


def vmdk(path: Path, content: bytes) -> Path:
    need("qemu-img")
    raw = path.with_suffix(".judge")
    raw.write_bytes(content)
    options = ("-o", "subformat=streamOptimized")
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", *options, raw, path)
    raw.unlink()
    return path


def descriptor(*names: str, attributes: str = "") -> bytes:
    files = "".join(f'<File ovf:id="f{n}" ovf:href="{name}" {attributes}/>' for n, name in enumerate(names))
    disks = "".join(f'<Disk ovf:diskId="d{n}" ovf:fileRef="f{n}" ovf:capacity="1"/>' for n in range(len(names)))
    return (
        '<?xml version="1.0"?><Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" '
        'xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"><References>'
        f'{files}<File ovf:id="iso" ovf:href="tools.iso"/></References><DiskSection>{disks}</DiskSection></Envelope>'
    ).encode()


def tarred(path: Path, files: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def test_an_ova_as_it_is_exported(tmp_path: Path) -> None:
    disk = vmdk(tmp_path / "vm-disk1.vmdk", DISK).read_bytes()
    text = descriptor("vm-disk1.vmdk")
    sums = {"vm.ovf": hashlib.sha256(text).hexdigest(), "vm-disk1.vmdk": hashlib.sha256(disk).hexdigest()}
    manifest = "".join(f"SHA256({name})= {digits}\n" for name, digits in sums.items()).encode()
    files = {"vm.ovf": text, "vm.mf": manifest, "vm-disk1.vmdk": disk, "tools.iso": bytes(4096)}
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tarred(tmp_path / "vm.ova", files, format)
        assert disk_of(path) == DISK
        assert damages_of(path) == []
    document = ferrotype("info", path, "--json").document
    assert (document["format"], document["virtual_size"]) == ("vmdk", len(DISK))
    (wrapped,) = document["container"]["wrapped"]
    assert wrapped == {"format": "ova", "member": "vm-disk1.vmdk", "packed_bytes": path.stat().st_size}
    data = path.read_bytes()
    at = data.index(disk)
    middle = at + len(disk) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    assert any("its SHA256 is not the one in the manifest" in sentence for sentence in damages_of(path))
    ferrotype("verify", path, code=1)
    path.write_bytes(data[: at + 5000])
    with pytest.raises(InvalidImage, match="cut short"):
        disk_of(path)


def test_disks_compressed_and_in_chunks(tmp_path: Path) -> None:
    disk = gzip.compress(vmdk(tmp_path / "a.vmdk", DISK).read_bytes())
    third = len(disk) // 3 + 1
    chunks = {f"a.vmdk.gz.{n:09}": disk[n * third : (n + 1) * third] for n in range(3)}
    text = descriptor("a.vmdk.gz", attributes='ovf:compression="gzip" ovf:chunkSize="1"')
    assert disk_of(tarred(tmp_path / "whole.ova", {"vm.ovf": text, "a.vmdk.gz": disk})) == DISK
    assert disk_of(tarred(tmp_path / "chunks.ova", {"vm.ovf": text, **chunks})) == DISK
    del chunks["a.vmdk.gz.000000001"]
    with pytest.raises(InvalidImage, match="chunk 1 of"):
        disk_of(tarred(tmp_path / "chunks.ova", {"vm.ovf": text, **chunks}))


@pytest.mark.parametrize("kind", ["ova", "zip"])
def test_of_several_disks_one_is_named(tmp_path: Path, kind: str) -> None:
    vmdk(tmp_path / "a.vmdk", DISK)
    vmdk(tmp_path / "b.vmdk", OTHER)
    path = tmp_path / f"vm.{kind}"
    if kind == "zip":
        need("zip")
        run("zip", "-q", path, "a.vmdk", "b.vmdk", cwd=tmp_path)
    else:
        run("tar", "-cf", path, "a.vmdk", "b.vmdk", cwd=tmp_path)
    assert disk_of(f"{path}::a.vmdk") == DISK
    assert disk_of(f"{path}::b.vmdk") == OTHER
    with pytest.raises(UsageError, match=r"several disks: name one as in FILE::NAME, of a\.vmdk, b\.vmdk"):
        disk_of(path)
    done = ferrotype("convert", path, tmp_path / "out.raw", code=2)
    assert "FILE::NAME" in done.err
    assert not (tmp_path / "out.raw").exists()


def test_a_zip_of_a_disk(tmp_path: Path) -> None:
    need("zip", "7z")
    (tmp_path / "disk.img").write_bytes(DISK)
    (tmp_path / "readme.txt").write_text("words")
    for name, options in (("plain.zip", ("-0",)), ("packed.zip", ()), ("bzip2.zip", ("-Z", "bzip2"))):
        run("zip", "-q", *options, tmp_path / name, "disk.img", "readme.txt", cwd=tmp_path)
        assert disk_of(tmp_path / name) == DISK
        assert damages_of(tmp_path / name) == []
        data = (tmp_path / name).read_bytes()
        at = len(data) // 2
        (tmp_path / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        if name == "plain.zip":
            assert damages_of(tmp_path / name) == ["disk.img: its CRC-32 is not the one in the zip archive"]
        else:
            with pytest.raises(InvalidImage, match="damaged"):
                disk_of(tmp_path / name)
    run("7z", "a", "-bso0", "-tzip", "-psecret", tmp_path / "locked.zip", tmp_path / "disk.img")
    with pytest.raises(UnsupportedError, match="encrypted"):
        disk_of(tmp_path / "locked.zip")
    run("7z", "a", "-bso0", "-tzip", "-mm=lzma", tmp_path / "lzma.zip", tmp_path / "disk.img")
    with pytest.raises(UnsupportedError, match="7z x"):
        disk_of(tmp_path / "lzma.zip")
    run("sh", "-c", "cat disk.img | zip -q streamed.zip -fz -", cwd=tmp_path)  # zip64, sizes behind the data
    assert disk_of(tmp_path / "streamed.zip") == DISK


def test_archives_without_a_disk_and_with_odd_names(tmp_path: Path) -> None:
    path = tarred(tmp_path / "words.tar", {"a.txt": b"words", "b.txt": b"words"})
    with pytest.raises(UnsupportedError, match="holds no disk image"):
        disk_of(path)
    path = tarred(tmp_path / "lost.ova", {"vm.ovf": descriptor("gone.vmdk"), "other.vmdk": b"x"})
    with pytest.raises(InvalidImage, match=r"gone\.vmdk"):
        disk_of(path)
    bomb = b'<!DOCTYPE a [<!ENTITY b "c">]>' + descriptor("a.img")
    with pytest.raises(InvalidImage, match="document type"):
        disk_of(tarred(tmp_path / "bomb.ova", {"vm.ovf": bomb, "a.img": DISK}))
    with pytest.raises(FormatError, match="shows none"):
        disk_of(tarred(tmp_path / "bad.ova", {"vm.ovf": b"<E/>", "a.vmdk": DISK}))
    long = "x" * 150 + "/../../../etc/" + "y" * 90 + ".img"
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert disk_of(tarred(tmp_path / "long.tar", {long: DISK}, format)) == DISK
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE):
            entry = tarfile.TarInfo("disk.img")
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    with pytest.raises(UnsupportedError, match="holds no disk image"):
        disk_of(tmp_path / "links.tar")
    (tmp_path / "base.img").write_bytes(DISK)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", tmp_path / "top.qcow2")
    with pytest.raises(NotAllowed, match=r"base\.img"):
        disk_of(tarred(tmp_path / "outside.tar", {"top.qcow2": (tmp_path / "top.qcow2").read_bytes()}))


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "disk.raw").open("wb") as file:
        file.truncate(MiB)
    for format in ("gnu", "posix"):
        run("tar", "-S", "--format", format, "-cf", tmp_path / "disk.tar", "disk.raw", cwd=tmp_path)
        with pytest.raises(UnsupportedError, match="sparse members"):
            disk_of(tmp_path / "disk.tar")


def test_headers_that_lie(tmp_path: Path) -> None:
    whole = tarred(tmp_path / "a.tar", {"disk.img": DISK}, tarfile.GNU_FORMAT).read_bytes()

    def changed(at: int, field: bytes) -> bytes:
        head = bytearray(whole[:512])
        head[at : at + len(field)] = field
        total = sum(head) - sum(head[148:156]) + 8 * 32
        head[148:156] = b"%06o\0 " % total
        return bytes(head) + whole[512:]

    for data in (
        changed(124, b"77777777777\0"),
        changed(124, b"\x80" + b"\xff" * 11),
        changed(124, b"not a number"),
        changed(156, b"L"),
        changed(156, b"x"),
        whole[:300] + b"?" + whole[301:],
    ):
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(FerrotypeError):
            disk_of(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(whole[: 512 + len(DISK)])
    job = NullJob()
    with open_disk(str(tmp_path / "a.tar"), Access(), job) as disk:
        assert disk.source.size == len(DISK)
    assert any("no end mark" in warning for warning in job.warnings)
