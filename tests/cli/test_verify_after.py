"""``--verify-after`` of ``restore`` and ``convert``: what does not read back as it was written is an error."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import ferrotype as api
from ferrotype.block import device, file
from ferrotype.errors import WriteError
from ferrotype.job import NullJob
from ferrotype.units import MiB
from tests.cli.program import ferrotype
from tests.machine import loop, run

SIZE = 12 * MiB
WRONG = 5 * MiB + 300_001  # a byte that is not stored as it was written


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 MiB of which some are zeros, and some of these holes."""
    path = tmp_path_factory.mktemp("plain") / "disk.img"
    content = bytearray(random.Random(5).randbytes(SIZE))
    content[2 * MiB : 4 * MiB] = bytes(2 * MiB)
    content[-MiB:] = bytes(MiB)
    path.write_bytes(content[:-MiB])
    os.truncate(path, SIZE)
    return path


@pytest.fixture(scope="module")
def backup(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    path = tmp_path_factory.mktemp("backup") / "disk.ferro"
    ferrotype("backup", plain, path)
    return path


class Phases(NullJob):
    """Remembers what was begun, and how far it came."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[int | None]] = {}
        self._now: list[int | None] = []

    def begin(self, phase: str, total: int | None = None, /) -> None:
        self._now = self.seen.setdefault(phase, [total, 0])

    def advance(self, count: int, /) -> None:
        self._now[1] = (self._now[1] or 0) + count


FORMATS: list[tuple[str, tuple[str, ...]]] = [
    ("raw", ()),
    ("raw", ("-o", "split=4MiB")),
    ("qcow2", ()),
    ("qcow2", ("-c",)),
    ("vhd", ()),
    ("vhd", ("-o", "subformat=fixed")),
    ("vhdx", ()),
    ("vmdk", ()),
    ("vmdk", ("-c",)),
    ("vmdk", ("-o", "subformat=twoGbMaxExtentFlat")),
    ("vmdk", ("-o", "subformat=twoGbMaxExtentSparse")),
    ("vdi", ()),
    ("E01", ()),
    ("E01", ("-o", "segment_size=3MiB")),
    ("ferro", ()),
]


@pytest.mark.parametrize(("suffix", "words"), FORMATS, ids="".join)
def test_every_format_reads_back(suffix: str, words: tuple[str, ...], plain: Path, tmp_path: Path) -> None:
    out = tmp_path / f"new.{suffix}"
    for force in ((), ("--force",)):
        done = ferrotype("convert", plain, out, "--verify-after", "--json", *words, *force).document
        assert done["verified"] is True
    made = out if out.exists() else out.with_name(out.name + ".001")
    assert ferrotype("compare", plain, made, "--json").document["identical"] is True
    assert "read back and proven" in ferrotype("convert", plain, out, "--verify-after", "--force", *words).out
    assert ferrotype("convert", plain, out, "--force", "--json", *words).document["verified"] is False


def test_over_a_backing_file(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    changed = bytearray(plain.read_bytes())
    changed[3 * MiB : 3 * MiB + 9] = b"different"
    (tmp_path / "base.img").write_bytes(changed)
    out = folder / "top.qcow2"
    words = ("-B", "../base.img", "--backing-format", "raw", "--verify-after", "--json")
    assert ferrotype("convert", plain, out, *words).document["verified"] is True
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", plain, out)


@pytest.mark.parametrize("words", [(), ("--delta",), ("-O", "qcow2")], ids=" ".join)
def test_a_restored_file_reads_back(words: tuple[str, ...], plain: Path, backup: Path, tmp_path: Path) -> None:
    target = tmp_path / "back"
    target.write_bytes(b"\xee" * SIZE)
    done = ferrotype("restore", backup, target, "--force", "--verify-after", "--json", *words).document
    assert done["verified"] is True
    ferrotype("compare", plain, target)
    assert ferrotype("restore", backup, target, "--force", "--json", *words).document["verified"] is False


def test_progress_shows_it(plain: Path, backup: Path, tmp_path: Path) -> None:
    for verb in (
        lambda job: api.restore(backup, tmp_path / "a.img", verify_after=True, job=job),
        lambda job: api.convert(plain, tmp_path / "a.qcow2", verify_after=True, job=job),
    ):
        job = Phases()
        assert verb(job).verified
        assert job.seen["reading back"] == [SIZE, SIZE]


@pytest.mark.parametrize("verb", ["restore", "convert"])
def test_a_larger_device_whose_table_moves(verb: str, disk: Path, image: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\xee" * 30 * MiB)
    source = image if verb == "restore" else disk
    with loop(target) as loop_device:
        done = ferrotype(verb, source, loop_device, "--force", "--verify-after", "--json").document
    assert (done["verified"], done["table_moved"]) == (True, True)
    run("sfdisk", "--verify", target)


def test_a_partition(image: Path, tmp_path: Path) -> None:
    done = ferrotype("restore", f"{image}#2", tmp_path / "part.img", "--verify-after", "--json").document
    assert done["verified"] is True


# ---------------------------------------------------------------------- what is not stored as it was written


def spoils(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Every write that passes the byte stores another one there, and says nothing; where these writes began."""
    write, struck = file.write_fully, list[int]()

    def spoiling(fd: int, offset: int, parts: Sequence[memoryview]) -> None:
        write(fd, offset, parts)
        if offset <= at < offset + sum(map(len, parts)):
            struck.append(offset)
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)  # a descriptor that takes single bytes
            os.pwrite(again, bytes([os.pread(again, 1, at)[0] ^ 0x10]), at)
            os.fsync(again)
            os.close(again)

    monkeypatch.setattr(file, "write_fully", spoiling)
    monkeypatch.setattr(device, "write_fully", spoiling)
    return struck


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    struck = spoils(monkeypatch, WRONG)
    yield
    assert struck


def test_a_restored_file_is_not_named(spoiled: None, backup: Path, tmp_path: Path) -> None:
    target = tmp_path / "back.img"
    target.write_bytes(b"old")
    with pytest.raises(WriteError, match="do not read back as they were written") as caught:
        api.restore(backup, target, overwrite=True, verify_after=True)
    assert str(caught.value).startswith(f"{target}: 512 bytes at {WRONG // 512 * 512} do not read back")
    assert os.listdir(tmp_path) == ["back.img"]
    assert target.read_bytes() == b"old"


def test_a_file_that_is_restored_in_place(spoiled: None, backup: Path, tmp_path: Path) -> None:
    target = tmp_path / "back.img"
    target.write_bytes(bytes(SIZE))
    with pytest.raises(WriteError, match=f"512 bytes at {WRONG // 512 * 512} do not read back"):
        api.restore(backup, target, overwrite=True, delta=True, verify_after=True)


@pytest.mark.parametrize("verb", ["restore", "convert"])
def test_a_device(spoiled: None, verb: str, plain: Path, backup: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\xee" * SIZE)
    wrong = f"512 bytes at {WRONG // 512 * 512} do not read back as they were written"
    with loop(target) as loop_device, pytest.raises(WriteError, match=wrong):
        if verb == "restore":
            api.restore(backup, loop_device, overwrite=True, verify_after=True)
        else:
            api.convert(plain, loop_device, overwrite=True, verify_after=True)


@pytest.mark.parametrize("suffix", ["raw", "qcow2", "vhd", "vhdx", "vmdk", "vdi", "E01"])
def test_a_new_image_is_not_named(spoiled: None, suffix: str, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / f"new.{suffix}"
    out.write_bytes(b"old")
    with pytest.raises(WriteError, match=r"as (it|they) w(as|ere) written"):
        api.convert(plain, out, overwrite=True, verify_after=True)
    assert os.listdir(tmp_path) == [out.name]
    assert out.read_bytes() == b"old"


def test_an_image_of_several_files(spoiled: None, plain: Path, tmp_path: Path) -> None:
    """They have their names when they can be read, since they name each other; the user is told what they are."""
    out = tmp_path / "new.vmdk"
    with pytest.raises(
        WriteError, match=f"{out}: 512 bytes at {WRONG // 512 * 512} do not read back .* do not rely on"
    ):
        api.convert(plain, out, options={"subformat": "twoGbMaxExtentFlat"}, verify_after=True)


def test_zeros_that_were_not_stored(
    plain: Path, backup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that says it has discarded, and still has what was there."""
    monkeypatch.setattr(device.DeviceSink, "write_zeros", lambda *_: None)
    verbs: list[Callable[[Path], object]] = [
        lambda target: api.restore(backup, target, overwrite=True, verify_after=True),
        lambda target: api.convert(plain, target, overwrite=True, verify_after=True),
    ]
    for verb in verbs:
        target = tmp_path / "target"
        target.write_bytes(bytes(3 * MiB) + b"\xee" * (SIZE - 3 * MiB))
        with loop(target) as loop_device, pytest.raises(WriteError, match=r"bytes at 3145728 do not read back"):
            verb(loop_device)


def test_a_moved_table(disk: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written last is read back, too."""
    target = tmp_path / "target"
    target.write_bytes(bytes(30 * MiB))
    struck = spoils(monkeypatch, 30 * MiB - 100)
    wrong = r"512 bytes at 31456768 do not read back"
    with loop(target) as loop_device:
        with pytest.raises(WriteError, match=wrong):
            api.convert(disk, loop_device, overwrite=True, verify_after=True)
        with pytest.raises(WriteError, match=wrong):
            api.restore(image, loop_device, overwrite=True, verify_after=True)
    assert len(struck) >= 2


def test_a_medium_that_changes_what_it_stored(
    plain: Path, backup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page cache would give back what was written: it is not asked."""
    target = tmp_path / "target"
    target.write_bytes(b"\xee" * SIZE)
    flush = device.DeviceSink.flush

    def decays(sink: device.DeviceSink) -> None:
        flush(sink)
        with target.open("r+b") as medium:
            medium.seek(WRONG)
            medium.write(b"decay")

    monkeypatch.setattr(device.DeviceSink, "flush", decays)
    with loop(target) as loop_device, pytest.raises(WriteError, match="do not read back as they were written"):
        api.restore(backup, loop_device, overwrite=True, verify_after=True)


def test_the_program_ends_with_6(backup: Path, tmp_path: Path) -> None:
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "from ferrotype.block import file\n"
        "write = file.write_fully\n"
        "def spoiling(fd, offset, parts):\n"
        "    data = bytearray(b''.join(parts))\n"
        "    data[len(data) // 2] ^= 1\n"
        "    write(fd, offset, [memoryview(data)])\n"
        "file.write_fully = spoiling\n"
    )
    source = str(Path(file.__file__).parents[2])
    env = {"PYTHONPATH": f"{tmp_path}:{source}"}
    target = tmp_path / "out.img"
    done = ferrotype("restore", backup, target, "--verify-after", code=6, env=env)
    assert f"ferrotype: {target}: " in done.err
    assert "do not read back as they were written" in done.err
    done = ferrotype("restore", backup, target, "--verify-after", "--json", code=6, env=env)
    assert json.loads(done.out)["kind"] == "WriteError"
    assert not target.exists()
    ferrotype("restore", backup, target, env=env)  # nobody looked
