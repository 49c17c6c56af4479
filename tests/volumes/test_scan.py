"""Tables of disks made by other software, and hostile bytes."""

from __future__ import annotations

import re
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import FormatError, UsageError
from ferrotype.units import MiB
from ferrotype.volumes import Table
from ferrotype.volumes.relocate import moved_backup
from ferrotype.volumes.scan import scan
from tests.machine import corpus, run, unpack
from tests.volumes.disks import FileDisk, by_sfdisk, rows, sfdisk_row
from tests.volumes.test_apm import MAP, apm_disk
from tests.volumes.test_gpt import gpt_disk
from tests.volumes.test_mbr import chain, sector

QEMU = {"vhd": "vpc", "vhdx": "vhdx", "vmdk": "vmdk", "dmg": "dmg"}
RAW = ("raw", "iso9660")


def claims(entry: dict[str, Any], by: str) -> list[dict[str, Any]]:
    return [t["value"] for t in entry["truth"] if t["claim"] == "partitions" and t["by"] == by]


def within_reach(entry: dict[str, Any]) -> bool:
    """Raw, or a container that any build of qemu-img unpacks; not so large that it takes long."""
    by_qemu = entry["format"] in QEMU and entry.get("disk_tools") is None
    return bool(entry["decompressed_size"] <= 300 * MiB) and (entry["format"] in RAW or by_qemu)


TABLED = [e for e in corpus() if claims(e, "sfdisk -J") and within_reach(e)]


def raw_disk(entry: dict[str, Any], tmp_path: Path) -> Path:
    primary = unpack(entry, tmp_path / "image")
    if entry["format"] in RAW:
        return primary
    run("qemu-img", "convert", "-f", QEMU[entry["format"]], "-O", "raw", primary, tmp_path / "disk.raw")
    return tmp_path / "disk.raw"


def plain(found: list[Any]) -> list[Any]:
    """Rows without numbers, which the manifest does not state."""
    return sorted((start, size, kind, label, (uuid or "")[:8]) for _, start, size, kind, label, uuid in found)


def invariants(table: Table | None, size: int) -> None:
    """What everything above relies on, whatever the bytes."""
    if table is None:
        return
    end = 0
    for partition in table.partitions:
        assert end <= partition.start < partition.end <= size
        end = partition.end
    assert all(0 <= start < start + length <= size for start, length in table.metadata)


@pytest.mark.parametrize("entry", TABLED, ids=lambda entry: entry["id"])
def test_corpus_agrees_with_sfdisk(entry: dict[str, Any], tmp_path: Path) -> None:
    value = claims(entry, "sfdisk -J")[0]
    disk = raw_disk(entry, tmp_path)
    size = disk.stat().st_size
    given_rows = [sfdisk_row(p, 0, value["unit"], value["id"] or "") for p in value["partitions"]]
    listed = [row for row in given_rows if row is not None]
    head = max((start + length for _, start, length, *_ in listed), default=0)
    cut_short = entry["validity"] == "valid" and head > size and value["label"] in ("dos", "gpt")
    if cut_short:
        as_it_is = scan(FileDisk(disk))
        assert as_it_is is not None
        assert as_it_is.warnings
    # the head of a larger disk: what is missing reads as zeros, so that every entry lies on the disk
    source = FileDisk(disk, size=head + MiB if cut_short else size)
    table = scan(source, sector_size=entry.get("sector_size"))
    invariants(table, source.size)
    if value["label"] not in ("dos", "gpt"):
        assert table is None
    elif value["label"] == "dos" and "gpt" in entry["holds"]:
        # sfdisk refuses a GPT that reaches beyond the file; on a disk that is large enough it reads it
        with disk.open("r+b") as file:
            file.truncate(head + 64 * MiB)
        assert table is not None
        assert rows(table) == by_sfdisk(disk)
    elif not listed and value["label"] == "dos":
        assert table is None or table.partitions == ()
    else:
        assert table is not None
        assert {"dos": "mbr"}.get(value["label"], value["label"]) == table.kind
        assert table.disk_id == value["id"].removeprefix("0x")
        inside = [row for row in listed if cut_short or row[1] + row[2] <= size]
        assert plain(rows(table)) == plain(inside)
        if not cut_short:
            assert bool(table.warnings) == (len(inside) != len(listed) or entry["validity"] != "valid")


@pytest.mark.parametrize("entry", [e for e in TABLED if e["expect"] == "read-backup"], ids=lambda entry: entry["id"])
def test_corpus_backup_tables(entry: dict[str, Any], tmp_path: Path) -> None:
    table = scan(FileDisk(raw_disk(entry, tmp_path)))
    assert table is not None
    assert any("primary GPT is damaged" in w for w in table.warnings)
    assert table.partitions


@pytest.mark.parametrize(
    "entry",
    [e for e in corpus() if "apm" in (e["holds"] or []) and e["format"] == "raw"],
    ids=lambda entry: entry["id"],
)
def test_corpus_apple_maps_agree_with_mmls(entry: dict[str, Any], tmp_path: Path) -> None:
    slots = claims(entry, "mmls")[0]["partitions"]
    listed = [(s["start"] * 512, s["length"] * 512, s["description"]) for s in slots]
    disk = raw_disk(entry, tmp_path)
    table = scan(FileDisk(disk, size=max(disk.stat().st_size, *(start + size for start, size, _ in listed))))
    assert table is not None
    assert table.kind == "apm"
    assert [(p.start, p.size, p.type) for p in table.partitions] == [
        row for row in listed if row[2] not in ("Apple_partition_map", "Apple_Free")
    ]


@pytest.mark.parametrize(
    "entry",
    [e for e in corpus() if e["format"] == "raw" and e not in TABLED and e["decompressed_size"] <= 64 * MiB],
    ids=lambda entry: entry["id"],
)
def test_no_raw_image_is_misread(entry: dict[str, Any], tmp_path: Path) -> None:
    disk = raw_disk(entry, tmp_path)
    try:
        table = scan(FileDisk(disk), sector_size=entry.get("sector_size"))
    except FormatError:
        assert entry["validity"] == "malformed"
        return
    invariants(table, disk.stat().st_size)
    if not claims(entry, "mmls"):
        assert table is None or table.partitions == ()


@pytest.mark.parametrize("sector_size", [0, 1, 511, 8192, -512])
def test_impossible_sector_sizes(sector_size: int) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{sector_size} is not a sector size")):
        scan(MemoryDisk(MiB), sector_size=sector_size)


def test_an_mbr_comes_before_an_apple_map_and_an_empty_one_after() -> None:
    disk = apm_disk(MAP)
    disk[440:512] = sector((0x83, 100, 100))[440:]
    table = scan(MemoryDisk(disk))
    assert table is not None
    assert table.kind == "mbr"
    disk[440:512] = sector()[440:]
    table = scan(MemoryDisk(disk))
    assert table is not None
    assert table.kind == "apm"


# ---------------------------------------------------------------------- hostile bytes

SEEDS = {
    "gpt": bytes(gpt_disk()),
    "gpt-4096": bytes(gpt_disk(4096, 256, 40)),
    "mbr": bytes(chain(sector((0x83, 1, 9), (0x05, 90, 60))).data),
    "apm": bytes(apm_disk(MAP)),
}


@pytest.mark.parametrize("seed", SEEDS)
@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_mutations_raise_only_format_errors(seed: str, data: st.DataObject) -> None:
    disk = bytearray(SEEDS[seed])
    near = st.one_of(
        st.integers(0, 2048),
        st.integers(100 * 512, 100 * 512 + 511),
        st.integers(0, len(disk) - 1),
        st.integers(440, 640),
    )
    values = st.one_of(
        st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, bytes(8), b"\x01", b"\x80\0\0\0"])
    )
    for at, value in data.draw(st.lists(st.tuples(near, values), max_size=12)):
        disk[at : at + len(value)] = value
    if data.draw(st.booleans()):
        for lba in (1, len(disk) // 512 - 1):
            reseal(disk, lba)
    size = data.draw(st.one_of(st.just(len(disk)), st.integers(0, len(disk))))
    source = MemoryDisk(disk[:size])
    sector_size = data.draw(st.sampled_from([None, 512, 1024, 2048, 4096]))
    source.traits = FileDisk(Path("/dev/null"), size=0).traits
    start = time.monotonic()
    try:
        invariants(scan(source, sector_size=sector_size), size)
        moved_backup(source, size + MiB, sector_size or 512)
    except FormatError:
        pass
    assert time.monotonic() - start < 5


def reseal(disk: bytearray, lba: int) -> None:
    """Make header and array checksums right, so that mutations reach what stands behind them."""
    at = lba * 512
    where, count, size = (int.from_bytes(disk[at + o : at + o + n], "little") for o, n in ((72, 8), (80, 4), (84, 4)))
    array = disk[where * 512 : where * 512 + count * size] if where < 1 << 32 and count * size < 1 << 24 else b""
    disk[at + 88 : at + 92] = zlib.crc32(array).to_bytes(4, "little")
    length = min(512, max(92, int.from_bytes(disk[at + 12 : at + 16], "little")))
    disk[at + 16 : at + 20] = bytes(4)
    disk[at + 16 : at + 20] = zlib.crc32(disk[at : at + length]).to_bytes(4, "little")
