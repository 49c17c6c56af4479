"""Which files an image may open besides itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ferrotype.block import Source, read
from ferrotype.block.file import FileSource
from ferrotype.errors import FormatError, InvalidImage, NotAllowed, UnsupportedError
from ferrotype.formats.related import MAX_DEPTH, Related
from tests.formats.judges import opened
from tests.machine import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """tree/images/top, tree/images/deep/near, tree/up, outside/secret."""
    for name in ("tree/images/top", "tree/images/deep/near", "tree/up", "outside/secret"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def content(source: Source) -> bytes:
    try:
        return read(source, 0, source.size)
    finally:
        source.close()


def test_what_lies_in_the_same_tree_may_be_opened(folder: Path) -> None:
    related = Related(folder / "tree/images/top")
    for name in ("deep/near", "./deep/near", "deep/../deep/near"):
        assert content(related.file(name, "parent")) == b"tree/images/deep/near"
    assert related.exists("deep/near", "parent")
    assert not related.exists("deep/none", "parent")
    with pytest.raises(InvalidImage, match="does not exist"):
        related.file("deep/none", "parent")


@pytest.mark.parametrize("name", ["../up", "deep/../../up", "../../outside/secret"])
def test_what_lies_elsewhere_must_be_allowed(folder: Path, name: str) -> None:
    top = folder / "tree/images/top"
    with pytest.raises(NotAllowed, match="--allow-related"):
        Related(top).file(name, "parent")
    with pytest.raises(NotAllowed):
        Related(top).exists(name, "parent")
    assert content(Related(top, [folder]).file(name, "parent"))


def test_an_absolute_name_must_be_allowed_even_in_the_same_tree(folder: Path) -> None:
    top, near = folder / "tree/images/top", folder / "tree/images/deep/near"
    with pytest.raises(NotAllowed):
        Related(top).file(str(near), "parent")
    assert content(Related(top, [near]).file(str(near), "parent"))
    with pytest.raises(NotAllowed):
        Related(top, [near]).file(str(folder / "tree/up"), "parent")


def test_a_link_is_judged_by_where_it_leads(folder: Path) -> None:
    images = folder / "tree/images"
    (images / "link").symlink_to(folder / "outside/secret")
    (images / "good").symlink_to(images / "deep/near")
    (images / "dir").symlink_to(folder / "outside")
    related = Related(images / "top")
    for name in ("link", "dir/secret"):
        with pytest.raises(NotAllowed):
            related.file(name, "parent")
    assert content(related.file("good", "parent"))


def test_a_link_the_user_named_has_two_homes(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    link = folder / "elsewhere/top"
    link.symlink_to(folder / "tree/images/top")
    (folder / "elsewhere/own").write_bytes(b"own")
    related = Related(link)
    assert content(related.file("deep/near", "parent")) == b"tree/images/deep/near"
    assert content(related.file("own", "parent")) == b"own"
    with pytest.raises(NotAllowed):
        related.file("../outside/secret", "parent")


@pytest.mark.parametrize("name", ["nbd:localhost:10809", "json:{}", "http://example.org/x", "fat:rw:/", "rbd:pool/x"])
def test_an_address_is_never_opened(folder: Path, name: str) -> None:
    with pytest.raises(NotAllowed, match="address"):
        Related(folder / "tree/images/top", [Path("/")]).file(name, "backing file")


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "\ud800", "x" * 300])
def test_what_is_no_name_is_refused(folder: Path, name: str) -> None:
    related = Related(folder / "tree/images/top")
    with pytest.raises(FormatError):
        related.file(name, "parent")
    assert related.sibling(name, "next part") is None


def test_only_regular_files_are_opened(folder: Path) -> None:
    os.mkfifo(folder / "tree/images/pipe")
    (folder / "tree/images/zero").symlink_to("/dev/zero")
    related = Related(folder / "tree/images/top", [Path("/dev")])
    for name in ("pipe", "deep", "zero", "/dev/zero"):
        with pytest.raises(InvalidImage, match="regular file"):
            related.file(name, "parent")


def test_an_image_that_is_no_file_opens_nothing(folder: Path) -> None:
    with pytest.raises(NotAllowed):
        Related.nothing().file("near", "parent")
    assert Related.nothing().sibling("near", "part") is None


def chain(folder: Path, layers: int) -> Path:
    """A chain of qcow2 images, each made over the one before."""
    below = folder / "0.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", below, "1M")
    for number in range(1, layers):
        top = folder / f"{number}.qcow2"
        if number == 1:
            run("qemu-img", "create", "-q", "-f", "qcow2", "-b", below.name, "-F", "qcow2", top, "1M", cwd=folder)
        else:  # the same length of name would do; qemu-img opens all layers each time, which takes ever longer
            data = (folder / f"{number - 1}.qcow2").read_bytes()
            old, new = f"{number - 2}.qcow2".encode(), f"{number - 1}.qcow2".encode()
            at = data.index(old)
            made = bytearray(data)
            made[at : at + len(new)] = new
            made[16:20] = len(new).to_bytes(4, "big")
            top.write_bytes(made)
    return folder / f"{layers - 1}.qcow2"


def test_a_chain_has_a_limit_and_no_loop(tmp_path: Path) -> None:
    top = chain(tmp_path, MAX_DEPTH + 1)
    with pytest.raises(InvalidImage, match="more than"):
        opened(top)
    opened(tmp_path / f"{MAX_DEPTH - 1}.qcow2").close()
    (tmp_path / "0.qcow2").unlink()
    (tmp_path / "0.qcow2").symlink_to(tmp_path / "50.qcow2")
    with pytest.raises(InvalidImage, match="loop"):
        opened(tmp_path / "60.qcow2")


def test_nothing_stays_open_after_a_refusal(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    run("qemu-img", "create", "-q", "-f", "qcow2", folder / "base.qcow2", "1M")
    top = folder / "tree/top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "../base.qcow2", "-F", "qcow2", top, cwd=folder / "tree")
    with pytest.raises(NotAllowed):
        opened(top)
    opened(top, allowed=[folder]).close()
    assert len(os.listdir("/proc/self/fd")) == before
    with FileSource(top) as file:
        assert file.size


def test_names_beside_an_image(tmp_path: Path) -> None:
    for name in ("b.aff4", "a.AFF4", "a.raw"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.aff4").write_bytes(b"")
    related = Related(tmp_path / "a.raw", [tmp_path / "sub"])
    assert related.siblings(".aff4", "volume", 3) == ["a.AFF4", "b.aff4", str(tmp_path / "sub" / "c.aff4")]
    with pytest.raises(UnsupportedError, match="at most 2"):
        related.siblings(".aff4", "volume", 2)
    assert Related.nothing().siblings(".aff4", "volume", 3) == []
