"""Disks in hundreds of files, by processes that may open few."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from ferrotype.units import KiB, MiB
from tests.cli.program import PROGRAM, TIMEOUT, Word, environment

SEGMENTS = 300

# Segments of 100 KiB, so that many of them are made of little; the program itself makes none below 1 MiB.
WRITE = """
import resource, sys
import ferrotype
from ferrotype.formats.ewf import writer

resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
writer._LEAST = 100 << 10
options = {"level": "none", "segment_size": "100KiB", "sectors_per_chunk": "16"}
ferrotype.convert(sys.argv[1], sys.argv[2], options=options)
"""


def limited(limit: str, *words: Word) -> str:
    """What the program says that may open so many files: a number for good, or ``-S`` and one to begin with."""
    line = ["bash", "-c", f'ulimit -n {limit}; exec "$@"', "-", *PROGRAM, *words]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=TIMEOUT, check=False)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def test_an_image_of_hundreds_of_segments(tmp_path: Path) -> None:
    raw, image = tmp_path / "disk.raw", tmp_path / "disk.E01"
    raw.write_bytes(random.Random(1).randbytes(SEGMENTS * 98 * KiB))
    subprocess.run([sys.executable, "-c", WRITE, raw, image], env=environment(), timeout=TIMEOUT, check=True)
    assert len(list(tmp_path.glob("disk.E*")) + list(tmp_path.glob("disk.F*"))) >= SEGMENTS
    assert "identical" in limited("128", "compare", raw, image)
    assert "no damage" in limited("128", "verify", image)


def test_a_raw_disk_in_hundreds_of_parts(tmp_path: Path) -> None:
    content = random.Random(2).randbytes(SEGMENTS * 2 * KiB)
    whole = tmp_path / "whole.raw"
    whole.write_bytes(content)
    for number in range(SEGMENTS):
        (tmp_path / f"disk.{number + 1:03}").write_bytes(content[number * 2 * KiB :][: 2 * KiB])
    assert "identical" in limited("128", "compare", tmp_path / "disk.001", whole, "--format", "raw")


def test_hundreds_of_parts_are_written(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    with raw.open("wb") as file:
        for number in (0, 3, 449):
            file.seek(number * MiB + 5000)
            file.write(b"here")
        file.truncate(450 * MiB)
    limited("128", "convert", raw, tmp_path / "more", "-O", "raw", "-o", "split=1MiB")
    assert len(list(tmp_path.glob("more.*"))) == 450
    assert "identical" in limited("128", "compare", raw, tmp_path / "more.001", "--format", "raw")
    for part in tmp_path.glob("more.*"):
        part.unlink()
    # as many at the same time as the process may open, once it has asked for all it may
    os.truncate(raw, 200 * MiB)
    limited("-S 100", "convert", raw, tmp_path / "more", "-O", "raw", "-o", "split=1MiB")
    assert len(list(tmp_path.glob("more.*"))) == 200
