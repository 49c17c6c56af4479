"""VMDK whose files were moved or renamed: sets, parents, and names that belong to another disk by now."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferrotype.errors import NotAllowed
from tests.formats import vmdk_builders as build
from tests.formats.judges import MiB, check_reader, content_of, make_image, opened, random_disk, scattered
from tests.formats.vmdk_builders import refused, warnings_of, whole
from tests.machine import need, run

CONTENT = random_disk(4 * MiB, seed=21)
OTHER = random_disk(4 * MiB, seed=22)


def qemu_set(folder: Path, name: str, content: bytes, subformat: str) -> None:
    """A set of files called after ``name``."""
    need("qemu-img")
    raw = folder / "content.raw"
    raw.write_bytes(content)
    run(
        "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", raw, folder / f"{name}.vmdk"
    )
    raw.unlink()


@pytest.mark.parametrize(("subformat", "part"), [("twoGbMaxExtentSparse", "-s001"), ("monolithicFlat", "-flat")])
def test_a_set_that_was_renamed(tmp_path: Path, subformat: str, part: str) -> None:
    qemu_set(tmp_path, "old", CONTENT, subformat)
    for name in ("", part):
        (tmp_path / f"old{name}.vmdk").rename(tmp_path / f"new{name}.vmdk")
    new = tmp_path / "new.vmdk"
    check_reader(new, CONTENT, rounds=30)
    assert f"'old{part}.vmdk', which is not there: 'new{part}.vmdk' is read" in warnings_of(new)
    # the old name now belongs to another disk, whose descriptor says so
    qemu_set(tmp_path, "old", OTHER, subformat)
    assert whole(new) == CONTENT
    assert f"'old{part}.vmdk', which belongs to 'old.vmdk'" in warnings_of(new)
    assert whole(tmp_path / "old.vmdk") == OTHER
    assert warnings_of(tmp_path / "old.vmdk") == ""
    # without its descriptor either may be meant
    (tmp_path / "old.vmdk").unlink()
    refused(new, "goes by the descriptor's own name")
    # and without the renamed one, the other disk's is not read in silence
    (tmp_path / f"new{part}.vmdk").unlink()
    assert whole(new) == OTHER
    assert warnings_of(new) == ""  # nothing says that it is another disk's
    qemu_set(tmp_path, "old", OTHER, subformat)
    assert f"'old{part}.vmdk' belongs to 'old.vmdk' too" in warnings_of(new)


def test_a_renamed_disk_in_one_file_is_itself(tmp_path: Path) -> None:
    make_image(tmp_path / "old.vmdk", "vmdk", CONTENT, "subformat=monolithicSparse")
    (tmp_path / "old.vmdk").rename(tmp_path / "new.vmdk")
    make_image(tmp_path / "old.vmdk", "vmdk", OTHER, "subformat=monolithicSparse")
    assert whole(tmp_path / "new.vmdk") == CONTENT
    assert warnings_of(tmp_path / "new.vmdk") == ""


@pytest.mark.parametrize("hint", ["/vmfs/volumes/5a/vm/base.vmdk", "C:\\VMs\\base.vmdk", "../gone/base.vmdk"])
def test_the_parent_of_a_moved_snapshot_is_found_beside_it(tmp_path: Path, hint: str) -> None:
    base = scattered(tmp_path / "base.vmdk", "vmdk", 2 * MiB, seed=3, writes=9)
    top = scattered(tmp_path / "top.vmdk", "vmdk", 2 * MiB, seed=4, writes=9, backing=(Path("base.vmdk"), "vmdk"))
    content = content_of(top, "vmdk", tmp_path)
    data = top.read_bytes()
    old = b'parentFileNameHint="base.vmdk"'
    new = f'parentFileNameHint="{hint}"'.encode()
    assert old in data
    at = data.index(old)
    end = data.index(b"\0", at)
    text = data[at:end].replace(old, new)
    assert not any(data[end : at + len(text)])
    top.write_bytes(data[:at] + text + data[at + len(text) :])
    check_reader(top, content, rounds=30)
    # of another content it is not the parent, whatever it is called
    run("qemu-img", "create", "-q", "-f", "vmdk", base, "2M")
    with pytest.raises(NotAllowed) if hint[:2] != "C:" else pytest.raises(Exception, match="cannot be used"):
        opened(top)


def test_a_parent_by_its_last_name_alone_needs_its_content(tmp_path: Path) -> None:
    (tmp_path / "f.bin").write_bytes(CONTENT)
    build.write_descriptor(tmp_path / "base.vmdk", ['RW 8192 FLAT "f.bin" 0'], "vmfs", CID="12345678")
    (tmp_path / "top-delta.vmdk").write_bytes(build.cowd(bytes(len(CONTENT)), flags=1))
    top = tmp_path / "top.vmdk"
    more = {"parentFileNameHint": '"/vmfs/base.vmdk"'}
    build.write_descriptor(top, ['RW 8192 VMFSSPARSE "top-delta.vmdk"'], "vmfsSparse", parentCID="12345678", **more)
    assert whole(top) == CONTENT
    build.write_descriptor(top, ['RW 8192 VMFSSPARSE "top-delta.vmdk"'], "vmfsSparse", parentCID="ffffffff", **more)
    with pytest.raises(NotAllowed):
        opened(top)
