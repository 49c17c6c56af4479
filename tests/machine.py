"""What tests need of the machine: tools run by name, loop devices, mounts, and images made by other software."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CORPUS = Path(__file__).resolve().parents[2] / "shared" / "corpus"
IN_CI = os.environ.get("CI") == "true"


def need(*tools: str) -> None:
    """Skip the test where a tool is missing; in CI, fail it."""
    missing = [
        tool for tool in tools if shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None
    ]
    if missing:
        (pytest.fail if IN_CI else pytest.skip)(f"not installed: {', '.join(missing)}")


def run(*argv: str | Path, text_in: str | None = None, ok: tuple[int, ...] = (0,), **kwargs: Any) -> str:
    """Standard output of a tool that must end with one of the codes in ``ok``."""
    need(str(argv[0]))
    env = (
        os.environ | {"LC_ALL": "C", "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"} | kwargs.pop("env", {})
    )
    done = subprocess.run(
        [str(a) for a in argv],
        input=text_in,
        capture_output=True,
        text=True,
        errors="replace",
        env=env,
        check=False,
        **kwargs,
    )
    out = str(done.stdout)
    assert done.returncode in ok, f"{argv}: exit {done.returncode}\n{out[-2000:]}\n{done.stderr[-2000:]}"
    return out


def _retry(action: Callable[[], bool], what: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not action():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.05)


def _quiet(*argv: str) -> bool:
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def loop(
    image: Path, *, offset: int = 0, size: int = 0, sector_size: int = 512, read_only: bool = False
) -> Iterator[Path]:
    """A loop device over (part of) ``image``; ``size`` 0 means to its end."""
    argv: list[str | Path] = ["losetup", "-f", "--show", "-o", str(offset), "--sector-size", str(sector_size)]
    if size:
        argv += ["--sizelimit", str(size)]
    if read_only:
        argv += ["-r"]
    device = run(*argv, image).strip()
    try:
        yield Path(device)
    finally:
        _retry(lambda: _quiet("losetup", "-d", device), f"losetup -d {device}")
        _retry(lambda: device not in run("losetup", "-a"), f"{device} stays attached")


@contextlib.contextmanager
def mounted(device: Path, kind: str, where: Path, options: str = "noatime") -> Iterator[Path]:
    """``device`` mounted at ``where``: ntfs through ntfs-3g, exfat through exfat-fuse, the rest by the kernel."""
    where.mkdir(parents=True, exist_ok=True)
    if kind == "ntfs":
        run("ntfs-3g", "-o", "big_writes,noatime", device, where)
    elif kind == "exfat":
        run("mount.exfat-fuse", device, where)
    else:
        run("mount", "-t", kind, "-o", options, device, where)
    try:
        yield where
    finally:
        os.sync()
        _retry(lambda: _quiet("umount", str(where)), f"umount {where}")
        # a FUSE umount returns before its daemon has written back and let go of the device
        _retry(lambda: not _quiet("fuser", "-s", str(device)), f"{device} stays in use")


# ---------------------------------------------------------------------- images made by other software


def corpus() -> list[dict[str, Any]]:
    """The entries of the shared corpus, none where it is not there (in CI it must be)."""
    manifest = CORPUS / "corpus.json"
    if not manifest.exists():
        if IN_CI:
            raise FileNotFoundError(manifest)
        return []
    entries: list[dict[str, Any]] = json.loads(manifest.read_text())["entries"]
    return entries


def unpack(entry: dict[str, Any], into: Path) -> Path:
    """Unpack all files of a corpus entry into a folder; the path of the primary one.  Zero blocks become holes."""
    into.mkdir(parents=True, exist_ok=True)
    primary: Path | None = None
    for file in entry["files"]:
        stored, target = CORPUS / file["stored"], into / file["name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        opener: Any = {"gz": gzip.open, "bz2": bz2.open, "plain": open}[file["storage"]]
        with opener(stored, "rb") as source, target.open("wb") as out:
            while block := source.read(1 << 20):
                if block.count(0) == len(block):
                    out.seek(len(block), os.SEEK_CUR)
                else:
                    out.write(block)
            out.truncate(file["size"])
        if file["stored"] == entry["file"]:
            primary = target
    assert primary is not None
    return primary
