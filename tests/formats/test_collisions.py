"""Tables that say two things of the same bytes of an image: one of the two was overwritten, and it is said so."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

import pytest

from ferrotype.engine.references import Access, open_disk
from ferrotype.formats.mapped import collisions
from ferrotype.job import NullJob
from ferrotype.units import KiB, MiB
from tests.cli.program import attempt, ferrotype
from tests.machine import run

SIZE = 16 * MiB
FORMATS = {"qcow2": "qcow2", "vdi": "vdi", "vpc": "vhd", "vhdx": "vhdx", "vmdk": "vmdk", "qed": "qed", "qcow": "qcow"}


def made(path: Path, format: str = "qcow2", *options: str) -> Path:
    """An image with four stretches of data, far apart."""
    run("qemu-img", "create", "-q", "-f", format, *options, path, str(SIZE))
    run("qemu-io", "-f", format, *(w for n in range(4) for w in ("-c", f"write -P {n + 1} {n * 4}M 64k")), path)
    return path


def told(path: Path) -> list[str]:
    with open_disk(str(path), Access(), NullJob()) as disk:
        return list(collisions(disk.source))


def l2_entries(path: Path) -> dict[int, int]:
    """Place of each L2 entry in use, and what it says."""
    raw = path.read_bytes()
    l1 = struct.unpack_from(">Q", raw, 40)[0]
    l2 = struct.unpack_from(">Q", raw, l1)[0] & 0x00FF_FFFF_FFFF_FE00
    entries = struct.unpack_from(">8192Q", raw, l2)
    return {l2 + 8 * number: entry for number, entry in enumerate(entries) if entry}


def put(path: Path, at: int, word: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(word)


def qemu_calls_it_corrupt(path: Path) -> bool:
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", "-f", "qcow2", str(path)], capture_output=True, check=False
    )
    return bool(json.loads(done.stdout).get("corruptions"))


@pytest.mark.parametrize("format", FORMATS)
def test_whole_images_have_none(format: str, tmp_path: Path) -> None:
    assert told(made(tmp_path / f"a.{FORMATS[format]}", format)) == []


@pytest.mark.parametrize("options", ["compat=0.10", "extended_l2=on", "cluster_size=4k", "preallocation=metadata"])
def test_qcow2_of_other_shapes_has_none(options: str, tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2", "qcow2", "-o", options)
    run("qemu-img", "snapshot", "-c", "before", path)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 4M 64k", "-c", "write -z 8M 64k", path)
    assert told(path) == []
    run("qemu-img", "check", "-q", path)
    packed = tmp_path / "packed.qcow2"
    run("qemu-img", "convert", "-c", "-O", "qcow2", path, packed)
    assert told(packed) == []


@pytest.mark.parametrize("what", ["another cluster", "the L1 table", "the reference counts", "an L2 table"])
def test_a_cluster_that_stands_where_something_else_does(what: str, tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2")
    entries = l2_entries(path)
    (_, first), (at, _), *_ = entries.items()
    raw = path.read_bytes()
    place = {
        "another cluster": first,
        "the L1 table": struct.unpack_from(">Q", raw, 40)[0],
        "the reference counts": struct.unpack_from(">Q", raw, 48)[0],
        "an L2 table": min(entries) // (64 * KiB) * (64 * KiB),
    }[what]
    put(path, at, struct.pack(">Q", place & ~(1 << 63) | 1 << 63))
    assert qemu_calls_it_corrupt(path)
    for verb in ("convert", "backup"):
        done = ferrotype(verb, path, tmp_path / f"{verb}.{'img' if verb == 'convert' else 'ferro'}", code=8)
        assert "its tables are damaged" in done.err
    assert "its tables are damaged" in ferrotype("info", path, code=8).err


@pytest.mark.parametrize("format", ["vdi", "vpc", "vhdx"])
def test_blocks_of_other_formats_that_stand_in_the_same_place(format: str, tmp_path: Path) -> None:
    path = made(tmp_path / f"a.{FORMATS[format]}", format)
    raw = path.read_bytes()
    if format == "vdi":
        table = struct.unpack_from("<I", raw, 0x154)[0]
        put(path, table + 4 * 4, raw[table : table + 4])  # blocks of 1 MiB: 0, 4, 8, 12
    elif format == "vpc":
        table = struct.unpack_from(">Q", raw, 512 + 16)[0]
        put(path, table + 2 * 4, raw[table : table + 4])  # blocks of 2 MiB: 0, 2, 4, 6
    else:
        table = next(
            struct.unpack_from("<Q", raw, at + 16)[0]
            for at in range(192 * KiB + 16, 192 * KiB + 512, 32)
            if raw[at : at + 4] == bytes.fromhex("6677c22d")
        )
        used = [table + 8 * n for n in range(2) if struct.unpack_from("<Q", raw, table + 8 * n)[0]]
        if len(used) < 2:
            pytest.skip("all of the disk is one block")
        put(path, used[1], raw[used[0] : used[0] + 8])
    done = attempt("convert", path, tmp_path / "out.img")  # some are refused
    assert (done.code, "twice" in done.err) == (4, True) or (done.code, "its tables are damaged" in done.err) == (
        8,
        True,
    )
