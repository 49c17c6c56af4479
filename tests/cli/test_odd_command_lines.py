"""Odd command lines end in a sentence and an exit code, never in a traceback.

One process imports the program and forks for each line, so that hundreds of them cost little.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cli.program import Done, attempt, check_words, environment

FORKS = """
import io, json, os, sys, tempfile
import ferrotype.engine.backup, ferrotype.engine.restore, ferrotype.engine.verify, ferrotype.cli.drawing
from ferrotype.cli import main
for line in json.load(sys.stdin):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = ["ferrotype", *line]
            code = 99
            try:
                main()
            except SystemExit as end:
                code = end.code
            except BaseException:
                import traceback
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        print(json.dumps([code, out.read().decode(errors="replace"), err.read().decode(errors="replace")]))
"""


def forked(lines: Sequence[Sequence[str]], cwd: Path) -> list[Done]:
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ended = [Done(*json.loads(line)) for line in done.stdout.splitlines()]
    assert len(ended) == len(lines)
    for line, one in zip(lines, ended, strict=True):
        try:
            check_words(one)
        except AssertionError as error:
            raise AssertionError(f"{line}: {error}") from error
    return ended


NINES = "9" * 5000
LINES = [
    [],
    [""],
    ["--"],
    ["-"],
    ["--json"],
    ["list"],
    ["list", ""],
    ["list", "-"],
    ["list", "a.ferro", "a.ferro"],
    ["list", "a.ferro", "--progress", "loud"],
    ["list", "a.ferro", "--password-file", ""],
    ["list", "a.ferro", "--password-file", "/"],
    ["list", "a.ferro", "--key-file", "/dev/zero/x"],
    ["list", "a.ferro", "--password-command", ""],
    ["list", "/dev/null"],
    ["list", "/dev/zero"],
    ["list", "x" * 5000],
    ["list", "a.ferro/x"],
    ["info", "::"],
    ["info", "#"],
    ["info", "::#"],
    ["info", "a.ferro::::"],
    ["info", "a.ferro::latest::latest"],
    ["info", "a.ferro::latest~"],
    ["info", "a.ferro::latest~-1"],
    ["info", "a.ferro::latest~²"],
    ["info", f"a.ferro::latest~{'9' * 100}"],
    ["info", "a.ferro::~1"],
    ["info", "a.ferro::latest//"],
    ["info", "a.ferro::latest/../.."],
    ["info", "a.ferro::[red]"],
    ["info", "a.ferro##"],
    ["info", "a.ferro#0"],
    ["info", "a.ferro#-1"],
    ["info", f"a.ferro#{'9' * 100}"],
    ["info", "/dev/null"],
    ["info", "/dev/zero"],
    ["info", "/dev/tty"],
    ["info", "/"],
    ["info", "pipe"],
    ["info", "loop"],
    ["info", "empty.img"],
    ["info", "one.img"],
    ["map", "one.img", "--json"],
    ["map", "empty.img"],
    ["checksum", "empty.img"],
    ["checksum", "odd.img"],
    ["checksum", "odd.img", "--sector-size", "0"],
    ["checksum", "odd.img", "--sector-size", "-512"],
    ["checksum", "odd.img", "--sector-size", "64KiB"],
    ["info", "odd.img", "--sector-size", "4KiB"],
    ["backup"],
    ["backup", "odd.img"],
    ["backup", "odd.img", ""],
    ["backup", "odd.img", "/"],
    ["backup", "odd.img", "/dev/null"],
    ["backup", "odd.img", "/proc/x.ferro"],
    ["backup", "odd.img", "y" * 300],
    ["backup", "empty.img", "empty.ferro"],
    ["backup", "empty.img", "odd.img", "two.ferro", "--dry-run"],
    ["backup", "odd.img", "odd.img", "same.ferro"],
    ["backup", "odd.img", "new1.ferro", "--split", NINES],
    ["backup", "odd.img", "new2.ferro", "--split", "0"],
    ["backup", "odd.img", "new3.ferro", "--split", "7EiB"],
    ["backup", "odd.img", "new4.ferro", "--chunk-size", "0"],
    ["backup", "odd.img", "new5.ferro", "--chunk-size", "1EiB"],
    ["backup", "odd.img", "new6.ferro", "--pack-size", "1"],
    ["backup", "odd.img", "new7.ferro", "--chunk-size", "16MiB", "--pack-size", "1MiB"],
    ["backup", "odd.img", "new8.ferro", "--level", "-7", "--name", "", "--tag", ""],
    ["backup", "odd.img", "new9.ferro", "--name", "n" * 100000],
    ["backup", "odd.img", "newa.ferro", "--name", "\x1b[2J\u202e[/b]:smile:"],
    ["list", "newa.ferro"],
    ["list", "new9.ferro", "-q"],
    ["backup", "a.ferro", "newb.ferro", "--encrypt"],
    ["backup", "one.img", "newc.ferro", "--all-sectors"],
    ["restore", "a.ferro"],
    ["restore", "a.ferro", ""],
    ["restore", "a.ferro", "/nowhere/at/all"],
    ["restore", "a.ferro", "/proc/version", "--force"],
    ["restore", "a.ferro", "/", "--force"],
    ["restore", "a.ferro", "a.ferro/x"],
    ["restore", "a.ferro", "one.img", "--force", "--delta"],
    ["restore", "a.ferro", "loop", "--force"],
    ["restore", "empty.ferro", "empty.out"],
    ["restore", "a.ferro#1", "z" * 255],
    ["verify", "a.ferro", "--sample", "nan"],
    ["verify", "a.ferro", "--sample", "inf%"],
    ["verify", "a.ferro", "--sample", "1e-300"],
    ["verify", "a.ferro", "--sample", "%"],
    ["forget", "a.ferro", "-n", "--keep-last", "-1"],
    ["forget", "a.ferro", "-n", "--keep-last", NINES],
    ["forget", "a.ferro", "-n", "--keep-last", "9" * 30],
    ["forget", "a.ferro", "-n", "--keep-tag", ""],
    ["forget", "a.ferro", "-n", ""],
    ["forget", "a.ferro", "-n", "latest~0", "latest"],
    ["prune", "odd.img"],
    ["compact", "/"],
    ["compact", "empty.img"],
    ["key"],
    ["key", "frob"],
    ["key", "remove", "a.ferro", ""],
    ["key", "remove", "a.ferro", "00"],
    ["key", "add", "a.ferro"],
    ["key", "list", "odd.img"],
]


@pytest.fixture
def place(image: Path, tmp_path: Path) -> Path:
    """A folder with an image and some poor files."""
    shutil.copy(image, tmp_path / "a.ferro")
    (tmp_path / "empty.img").touch()
    (tmp_path / "one.img").write_bytes(b"1")
    (tmp_path / "odd.img").write_bytes(b"odd" * 7001)
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def test_odd_lines(place: Path) -> None:
    ended = forked(LINES, place)
    assert {done.code for done in ended} >= {0, 2, 3, 4, 5, 6}
    listing = ended[LINES.index(["list", "newa.ferro"])].out
    assert "\x1b" not in listing
    assert "[/b]:smile:" in listing


def test_words_at_random(place: Path) -> None:
    """Verbs with options, values and references that do not belong to them."""
    rng = random.Random(11)
    words = [
        "list",
        "info",
        "map",
        "verify",
        "checksum",
        "restore",
        "forget",
        "prune",
        "key",
        "backup",
        "-n",
        "--json",
    ]
    words += [
        "-q",
        "-v",
        "--force",
        "--delta",
        "--deep",
        "--prune",
        "--keep-last",
        "3",
        "-1",
        "64KiB",
        "raw",
        "--format",
    ]
    words += ["a.ferro", "a.ferro::first", "a.ferro#1", "odd.img", "one.img", "pipe", "out", "--sample", "50%", "--"]
    lines = [
        [rng.choice(words[:10]), *rng.choices(words, k=rng.randrange(1, 6)), "--progress", "none"] for _ in range(150)
    ]
    for line, done in zip(lines, forked(lines, place), strict=True):
        if "--json" in line and done.code != 2 and "--" not in line and "--help" not in line:
            assert isinstance(json.loads(done.out)["warnings"], list), line
    shutil.copy(place / "a.ferro", place / "b.ferro")


def test_an_odd_environment(image: Path) -> None:
    for env in ({"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"COLUMNS": "0"}, {"COLUMNS": "99999"}, {"TERM": ""}):
        for words in (("info", image), ("list", image, "--json")):
            assert attempt(*words, env=env).code == 0
