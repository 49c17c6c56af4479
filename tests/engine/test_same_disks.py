"""Which disks are the same one: clones are two, and a disk that moved or got another name stays one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ferrotype import api
from ferrotype.engine.forget import KeepRules, judge
from ferrotype.engine.same_disks import Disks, Looks, own_serial, together
from ferrotype.linux import born
from ferrotype.repository.snapshots import DiskRecord, Snapshot
from ferrotype.units import MiB
from tests.machine import run

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
GPT = "gpt:5C0FEE-1"
UUID = "1234-ABCD"

# A laptop's disk; a reference file; a device of a virtual machine, which tells no serial number.
DISK = {"host": "laptop", "name": "sda", "source": "/dev/sda", "path": "/dev/sda", "identity": GPT, "size": 1000,
        "serial": "S3Z9NB0K", "model": "Samsung SSD", "machine": "aa-1", "uuid": UUID}  # fmt: skip
FILE = {"host": "server", "name": "vm.img", "source": "vm.img", "path": "/vms/a/vm.img", "file": "12@34",
        "identity": GPT, "size": 1000, "machine": "bb-2", "uuid": UUID}  # fmt: skip
VIRTUAL = {"host": "web", "name": "vda", "source": "/dev/vda", "path": "/dev/vda", "identity": "mbr:0badcafe",
           "size": 1000, "machine": "cc-3", "uuid": UUID}  # fmt: skip

OLD = {"path": "", "file": "", "machine": ""}  # what older versions did not record

SAME: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "the same again": (DISK, {}),
    "sda became sdb": (DISK, {"name": "sdb", "source": "/dev/sdb", "path": "/dev/sdb"}),
    "imaged from a rescue stick": (DISK, {"host": "rescue", "name": "sdc", "path": "/dev/sdc"}),
    "put into another machine": (DISK, {"host": "new", "machine": "zz-9"}),
    "a host with a new name": (DISK, {"host": "renamed"}),
    "all formatted anew in the same table": (DISK, {"uuid": "FFFF-0000"}),
    "named by its id": (DISK, {"source": "/dev/disk/by-id/ata-Samsung", "name": "ata-Samsung"}),
    "no table, a serial number": (DISK | {"identity": "serial:S3Z9NB0K"}, {"host": "rescue"}),
    "a file again": (FILE, {}),
    "a file made anew at its place": (FILE, {"file": "99@99"}),
    "a file that was renamed": (FILE, {"path": "/vms/a/old.img", "name": "old.img", "source": "old.img"}),
    "a file that was moved": (FILE, {"path": "/vms/z/vm.img"}),
    "a file that has grown": (FILE, {"size": 2000, "file": ""}),
    "a file without table or file system": (FILE | {"identity": "", "uuid": ""}, {"file": ""}),
    "a file of a file system alone": (FILE | {"identity": f"volume:{UUID}"}, {"size": 1500}),
    "a virtual device": (VIRTUAL, {}),
    "a served disk": (VIRTUAL | {"path": "nbd://h/x", "source": "nbd://h/x"}, {"size": 2000}),
    "an old record of a device": (DISK | OLD | {"serial": ""}, DISK),
    "old records of a file": (FILE | OLD, {}),
    "an old record of a file, and a new one": (FILE | OLD, FILE),
    "a path of another kind": (FILE | OLD | {"source": "./vm.img"}, {"source": "vm.img"}),
}  # fmt: skip

TWO: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "a clone, in another machine": (DISK, {"serial": "S3Z9NB1L", "host": "lab", "machine": "dd-4"}),
    "a clone, and nobody changed the name of the host": (DISK, {"serial": "S3Z9NB1L"}),
    "a clone through the same adapter": (DISK, {"size": 2000}),
    "another maker's disk with this number": (DISK, {"model": "Verbatim"}),
    "a clone behind an adapter without numbers": (DISK | {"serial": "0000"}, {"host": "lab"}),
    "every virtual disk has this number": (DISK | {"serial": "QM00001"}, {"host": "lab", "machine": "dd-4"}),
    "partitioned anew": (DISK, {"identity": "gpt:OTHER"}),
    "no table, another file system in the same dock": (DISK | {"identity": "serial:S3Z9NB0K"}, {"uuid": "FFFF-0000"}),
    "a copy of a virtual machine": (FILE, {"path": "/vms/a/vm2.img", "name": "vm2.img", "file": "13@35"}),
    "files of one name in two folders": (FILE, {"path": "/vms/b/vm.img", "file": "13@35"}),
    "files of one name on two hosts": (FILE, {"host": "other", "machine": ""}),
    "the same inode of another host": (FILE, {"host": "other", "path": "/x/vm.img", "machine": ""}),
    "a file at its place with nothing in common": (FILE, {"uuid": "FFFF-0000", "file": "13@35"}),
    "virtual machines with one host name": (VIRTUAL, {"machine": "dd-4"}),
    "a second device without a number": (VIRTUAL, {"name": "vdb", "source": "/dev/vdb", "path": "/dev/vdb"}),
    "a larger stick at the same place": (VIRTUAL, {"size": 2000}),
    "old records of files in two folders": (FILE | OLD | {"source": "/a/vm.img"}, {"source": "/b/vm.img"}),
    "old records of two hosts": (FILE | OLD, {"host": "other"}),
    "blank disks": (FILE | {"identity": "", "uuid": ""}, {"path": "/vms/b/vm.img", "file": "13@35"}),
}  # fmt: skip


def record(known: Mapping[str, Any]) -> DiskRecord:
    values = dict(known)
    values.pop("host")
    uuid = values.pop("uuid", "")
    volumes = ({"index": 1, "uuid": uuid},) if uuid else ()
    return DiskRecord(**values, volumes=volumes, sector_size=512, chunk_size=4096, regions=())


def taken(number: int, *disks: Mapping[str, Any]) -> Snapshot:
    records = tuple(record(one) for one in disks)
    when = NOON + timedelta(hours=number)
    return Snapshot(created=when, host=disks[0]["host"], name=str(number), disks=records, id=f"{number:032x}")


def kept(known: list[Snapshot]) -> list[str]:
    return [v.snapshot.name for v in judge(known, KeepRules(last=1)) if v.kept]


@pytest.mark.parametrize(("first", "changes"), SAME.values(), ids=SAME.keys())
def test_these_are_one_disk(first: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    assert kept([taken(1, first), taken(2, {**first, **changes})]) == ["2"]


@pytest.mark.parametrize(("first", "changes"), TWO.values(), ids=TWO.keys())
def test_these_are_two_disks(first: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    second = {**first, **changes}
    for one, other in ((first, second), (second, first)):
        known = [taken(1, one), taken(2, other), taken(3, one), taken(4, other)]
        assert kept(known) == ["3", "4"]


def test_disks_that_were_in_one_snapshot_are_two() -> None:
    again = {**DISK, "name": "sdb", "path": "/dev/sdb", "source": "/dev/sdb"}  # a number that two adapters have
    known = [taken(1, DISK), taken(2, again)]
    assert kept(known) == ["2"]
    known.append(taken(3, DISK, again))
    assert kept(known) == ["1", "2", "3"]


def test_snapshots_of_several_disks_are_judged_with_their_like() -> None:
    data = {
        **DISK,
        "name": "sdb",
        "path": "/dev/sdb",
        "source": "/dev/sdb",
        "identity": "gpt:DATA",
        "serial": "WD-77",
    }
    known = [taken(1, DISK, data), taken(2, data, DISK), taken(3, DISK), taken(4, data)]
    assert [[s.name for s in group.snapshots] for group in together(known)] == [["1", "2"], ["3"], ["4"]]


def test_a_new_name_and_the_old_one_by_turns_stay_one_disk() -> None:
    moved = {**DISK, "host": "rescue", "name": "sdc", "path": "/dev/sdc", "source": "/dev/sdc"}
    assert kept([taken(n, moved if n % 2 else DISK) for n in range(6)]) == ["5"]


def test_thousands_of_made_up_disks_take_no_time() -> None:
    odd = [taken(n, {**FILE, "uuid": f"{n:08x}"}) for n in range(3000)]  # one path, and nothing else in common
    began = time.process_time()
    assert len(together(odd)) == 3000
    assert time.process_time() - began < 5


@pytest.mark.parametrize("serial", ["", "QM00003", "drive-scsi0", "0000000000", "00000001", "0123456789ABCDEF", "123",
                                    "VMWARE NVME_0000", "FFFFFFFF", "1234567890"])  # fmt: skip
def test_numbers_that_many_disks_have_are_none(serial: str) -> None:
    assert own_serial(serial) == ""


@pytest.mark.parametrize("serial", ["S3Z9NB0K123456", "WD-WCC4N0123456", "VB12345678-9abcdef0", "0x1d2e3f4a"])
def test_other_numbers_are(serial: str) -> None:
    assert own_serial(serial) == serial


def test_a_parent_is_of_the_same_disk_before_it_is_of_a_clone() -> None:
    clone = {**DISK, "serial": "S3Z9NB1L", "host": "lab", "machine": "dd-4"}
    known = [taken(1, DISK), taken(2, clone)]
    found = Disks(known).find(Looks.of("laptop", record(DISK)))
    assert found is not None
    assert found.members[-1][0].name == "1"


# ---------------------------------------------------------------------- real files


@pytest.fixture
def master(tmp_path: Path) -> Path:
    path = tmp_path / "master.img"
    path.write_bytes(bytes(8 * MiB))
    run("sfdisk", "-q", path, text_in="label: gpt\nstart=2048, size=8192\n")
    part = tmp_path / "part"
    part.write_bytes(bytes(4 * MiB))
    run("mke2fs", "-q", "-F", "-t", "ext4", part)
    with path.open("r+b") as file:
        file.seek(2048 * 512)
        file.write(part.read_bytes())
    return path


def groups(image: Path) -> list[list[str]]:
    return [[s.name for s in group.snapshots] for group in together(api.list_snapshots(image))]


def test_copies_of_a_disk_image_are_two_and_a_renamed_one_stays_itself(tmp_path: Path, master: Path) -> None:
    if born(master) is None:
        pytest.skip("this file system does not tell when a file was made")
    image = tmp_path / "office.ferro"
    lab = tmp_path / "lab.img"
    shutil.copy(master, lab)
    api.backup(master, image, name="master")
    api.backup(lab, image, name="lab")
    moved = tmp_path / "elsewhere" / "renamed.img"
    moved.parent.mkdir()
    lab.rename(moved)
    api.backup(moved, image, name="renamed")
    assert groups(image) == [["master"], ["lab", "renamed"]]
    assert api.list_snapshots(image)[-1].parent == api.list_snapshots(image)[-2].id


def test_the_same_place_stays_the_same_disk_by_whatever_words(
    tmp_path: Path, master: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "office.ferro"
    monkeypatch.chdir(tmp_path)
    api.backup("master.img", image, name="one")
    api.backup("./master.img", image, name="two")
    api.backup(master, image, name="three")
    (tmp_path / "link.img").symlink_to(master)
    api.backup("link.img", image, name="four")
    assert groups(image) == [["one", "two", "three", "four"]]


def test_the_hosts_name_is_asked_for(tmp_path: Path, master: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "office.ferro"
    api.backup(master, image, name="here")
    monkeypatch.setattr("socket.gethostname", lambda: "other")
    api.backup(master, image, name="there")
    assert groups(image) == [["here"], ["there"]]
