"""The Python interface, and the examples its documentation gives."""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ferrotype
from ferrotype import linux
from ferrotype.errors import Cancelled, InvalidImage, KeyRefused, NotAllowed, Refused, UsageError
from ferrotype.job import NullJob
from ferrotype.units import MiB
from tests.machine import loop, run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """8 MiB: an MBR and a FAT volume with one file.  The current folder is the one it is in."""
    monkeypatch.chdir(tmp_path)
    part = tmp_path / "part"
    part.write_bytes(bytes(6 * MiB))
    run("mkfs.vfat", "-n", "STICK", part)
    (tmp_path / "file").write_bytes(os.urandom(MiB))
    run("mcopy", "-i", part, tmp_path / "file", "::/")
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MiB) + part.read_bytes() + bytes(MiB))
    run("sfdisk", "-q", path, text_in="label: dos\nstart=2048, size=12288, type=e\n")
    part.unlink()
    (tmp_path / "file").unlink()
    return path


def test_the_documentation_runs(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)  # noqa: S102  the documentation's own words
    said = capsys.readouterr().out
    assert "1 vfat STICK" in said
    assert "boot signature 55aa" in said
    assert "restored.img exists" in said
    assert "backing up disk.img of" in said
    assert names["job"].warnings == []
    assert len(ferrotype.list_snapshots("laptop.ferro", password="correct horse")) == 2
    run("cmp", "-n", str(MiB), disk, "restored.img")
    run("fsck.vfat", "-n", f"{cut_out('restored.img')}")


def cut_out(path: str) -> str:
    Path("part").write_bytes(Path(path).read_bytes()[MiB : 7 * MiB])
    return "part"


def test_a_round_trip(disk: Path) -> None:
    snapshot = ferrotype.backup(disk, "a.ferro", all_sectors=True, name="mine", tags=["x"])
    assert (snapshot.name, snapshot.tags, snapshot.statistics.disk_bytes) == ("mine", ("x",), 8 * MiB)
    (listed,) = ferrotype.list_snapshots(Path("a.ferro"))
    assert listed == snapshot
    content = disk.read_bytes()
    with ferrotype.open_disk("a.ferro::mine#1") as source:
        read = bytearray(6 * MiB)
        source.read_into(0, memoryview(read))
    assert hashlib.sha256(read).digest() == hashlib.sha256(content[MiB : 7 * MiB]).digest()
    done = ferrotype.restore("a.ferro", "out.img")
    assert done.disk_bytes == 8 * MiB
    assert Path("out.img").read_bytes() == content
    assert ferrotype.checksum("out.img") == ferrotype.checksum(disk) == ferrotype.checksum("a.ferro::x")
    assert ferrotype.verify("a.ferro", deep=True).ok
    assert ferrotype.info(disk).as_json()["table"] == "mbr"
    again = ferrotype.restore("a.ferro", "out.img", overwrite=True, delta=True)
    assert again.written_bytes == again.zeroed_bytes == 0


def test_several_disks(disk: Path) -> None:
    Path("other.img").write_bytes(b"other" * 2000 + bytes(240))
    snapshot = ferrotype.backup([disk, "other.img"], "a.ferro")
    assert [record.name for record in snapshot.disks] == ["disk.img", "other.img"]
    with pytest.raises(UsageError, match="several disks"):
        ferrotype.checksum("a.ferro")
    assert ferrotype.checksum("a.ferro::latest/other.img") == ferrotype.checksum("other.img")


def test_disk_images_of_other_programs(disk: Path) -> None:
    Path("vm").mkdir()
    Path("base.raw").write_bytes(disk.read_bytes())
    done = ferrotype.convert(disk, "vm/vm.qcow2", compress=True, options={"cluster_size": "4KiB"})
    assert (done.format, done.copied.disk_bytes) == ("qcow2", 8 * MiB)
    assert ferrotype.compare(disk, "vm/vm.qcow2").identical
    assert ferrotype.info("vm/vm.qcow2").container["unit"] == 4096
    assert ferrotype.checksum("vm/vm.qcow2#1") == ferrotype.checksum(f"{disk}#1")
    with pytest.raises(Refused, match="exists"):
        ferrotype.convert(disk, "vm/vm.qcow2")
    with pytest.raises(Refused, match="converted from"):
        ferrotype.convert(disk, disk, overwrite=True)
    ferrotype.convert(disk, "new.ferro", password="secret")
    assert ferrotype.compare("new.ferro", disk, password="secret").identical
    with Path("base.raw").open("r+b") as file:
        file.seek(5 * MiB)
        file.write(b"changed")
    found = ferrotype.compare(disk, "base.raw", strict=True)
    assert found.first_difference is not None
    assert found.differences == [(5 * MiB, 512)]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "../base.raw", "-F", "raw", "vm/top.qcow2", cwd=Path.cwd())
    with pytest.raises(NotAllowed):
        ferrotype.checksum("vm/top.qcow2")
    assert ferrotype.checksum("vm/top.qcow2", related=["base.raw"]) == ferrotype.checksum("base.raw")
    assert ferrotype.checksum("vm/vm.qcow2", format="raw") != ferrotype.checksum(disk)
    ferrotype.backup("vm/top.qcow2", "a.ferro", related=["base.raw"], all_sectors=True)
    assert ferrotype.compare("a.ferro", "base.raw").identical


def test_a_disk_onto_a_device(disk: Path) -> None:
    ferrotype.convert(disk, "vm.qcow2")
    Path("target").write_bytes(b"old" * (3 * MiB))
    with loop(Path("target")) as device:
        with pytest.raises(Refused, match="would be overwritten"):
            ferrotype.convert("vm.qcow2", device)
        with pytest.raises(UsageError, match="is a device"):
            ferrotype.convert("vm.qcow2", device, output_format="vhdx", overwrite=True)
        done = ferrotype.convert("vm.qcow2", device, overwrite=True)
        assert (done.format, done.copied.disk_bytes, done.table_moved) == ("raw", 8 * MiB, False)
        assert done.copied.written_bytes + done.zeroed_bytes == 8 * MiB
    assert Path("target").read_bytes()[: 8 * MiB] == disk.read_bytes()


def test_what_goes_wrong(disk: Path) -> None:
    ferrotype.backup(f"{disk}#1", "plain.ferro")
    with pytest.raises(KeyRefused, match="not encrypted"):
        ferrotype.list_snapshots("plain.ferro", password="x")
    with pytest.raises(KeyRefused, match="not encrypted"):
        ferrotype.backup(disk, "plain.ferro", password="x")
    with pytest.raises(UsageError, match="does not exist"):
        ferrotype.verify("nowhere.ferro")
    with pytest.raises(InvalidImage):
        ferrotype.list_snapshots(disk)
    with pytest.raises(Refused, match="is the source"):
        ferrotype.backup(disk, disk)
    before = disk.read_bytes()
    with pytest.raises(Refused, match="exists"):
        ferrotype.restore("plain.ferro", disk)
    with pytest.raises(Refused, match="restored from"):
        ferrotype.restore("plain.ferro", "plain.ferro", overwrite=True)
    assert disk.read_bytes() == before


def test_a_job_stops_the_work_and_hears_of_it(disk: Path) -> None:
    with pytest.raises(Cancelled):
        ferrotype.backup(disk, "a.ferro", job=NullJob(stop=True))
    assert not Path("a.ferro").exists() or ferrotype.list_snapshots("a.ferro") == []
    ferrotype.backup(disk, "a.ferro")
    with pytest.raises(Cancelled):
        ferrotype.restore("a.ferro", "out.img", job=NullJob(stop=True))
    assert not Path("out.img").exists()
    assert not list(Path().glob(".out*"))
    disk.rename("unnamed")
    job = NullJob()
    ferrotype.checksum("unnamed", job=job)
    assert job.notes == ["unnamed is read as a raw disk"]


def test_importing_the_package_costs_nothing() -> None:
    script = (
        "import sys, ferrotype; print(sorted({n.split('.')[0] for n in sys.modules} & {'numpy', 'rich', 'click'}))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    assert run(sys.executable, "-c", script, env=env) == "[]\n"
    with pytest.raises(AttributeError, match="no_such_name"):
        ferrotype.no_such_name  # noqa: B018


def test_every_public_name_is_there_and_documented() -> None:
    text = (ROOT / "docs/python.md").read_text()
    for name in ferrotype.__all__:
        assert getattr(ferrotype, name) is not None
        assert name == "__version__" or f"ferrotype.{name}(" in text, name
    script = "from ferrotype import *; print(backup, restore)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, check=False
    )
    assert done.returncode == 0


@pytest.mark.parametrize("kind", ["raw", "parts", "backing file"])
def test_all_sectors_does_not_believe_in_holes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that calls data a hole, as some did of what was not stored yet."""
    content = random.Random(3).randbytes(2 * MiB)
    source = tmp_path / "disk.raw"
    source.write_bytes(content)
    if kind == "parts":
        source = tmp_path / "disk.001"
        source.write_bytes(content[:MiB])
        (tmp_path / "disk.002").write_bytes(content[MiB:])
    elif kind == "backing file":
        source = tmp_path / "top.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", source)
    image = tmp_path / "disk.ferro"
    with monkeypatch.context() as patch:
        patch.setattr(linux, "data_runs", lambda *_: (np.array([], np.int64), np.array([], np.int64)))
        ferrotype.backup(source, image, all_sectors=True)
    ferrotype.restore(image, tmp_path / "back.raw")
    assert (tmp_path / "back.raw").read_bytes() == content


def test_a_text_where_several_may_stand_is_one_of_them(tmp_path: Path) -> None:
    disk, image = tmp_path / "disk.img", tmp_path / "a.ferro"
    disk.write_bytes(bytes(4096) + b"x" * 4096)
    snapshot = ferrotype.backup(disk, image, tags="monthly")
    assert snapshot.tags == ("monthly",)
    ferrotype.copy(image, tmp_path / "b.ferro", snapshots=snapshot.id)
    assert [one.tags for one in ferrotype.list_snapshots(tmp_path / "b.ferro")] == [("monthly",)]
    ferrotype.info(disk, related=tmp_path)


def test_a_backup_of_nothing_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        ferrotype.backup([], tmp_path / "a.ferro")
    assert not (tmp_path / "a.ferro").exists()


def test_the_public_names_can_be_listed() -> None:
    """In a process that has used none of them: they are loaded when they are."""
    code = "import ferrotype, sys; print(*dir(ferrotype)); print('ferrotype.api' in sys.modules)"
    out = run(sys.executable, "-c", code, env={"PYTHONPATH": str(ROOT / "src")})
    names, loaded = out.splitlines()
    assert set(ferrotype.__all__) <= set(names.split())
    assert loaded == "False"
