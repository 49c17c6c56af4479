"""What a start costs: counted in modules, since seconds depend on the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ferrotype.cli import VERBS
from ferrotype.objects.container import Container
from tests.cli.conftest import PASSPHRASE
from tests.cli.program import environment, ferrotype
from tests.repository.small import back_up, create, disk_content

HEAVY = {"numpy", "cryptography", "rich", "msgspec", "blake3", "xxhash", "ssl", "asyncio"}
# What each brings along: a BLAS, half of `email`, a pool of threads with `logging`, `hashlib`.
UNUSED = {
    "numpy",
    "rich",
    "importlib.metadata",
    "email",
    "concurrent.futures",
    "logging",
    "secrets",
    "ssl",
    "asyncio",
}
OURS = {
    f"ferrotype.{name}"
    for name in (
        *("api", "extents", "filesystems", "formats", "pipeline", "volumes", "block.device", "block.inventory"),
        *("repository.chunkmap", "repository.index", "repository.packs", "repository.segments", "repository.source"),
        *("repository.writer", "engine.references", "engine.restore", "engine.survey", "objects.rescue"),
    )
}

SCRIPT = """
import json, os, sys

reads, opened = [], []
pread = os.pread

def counted(fd, length, offset):
    data = pread(fd, length, offset)
    reads.append(len(data))
    return data

def heard(event, args):
    if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        opened.append(os.fsdecode(args[0]))

os.pread = counted
sys.addaudithook(heard)
from ferrotype.cli import main
try:
    main()
finally:
    print(json.dumps({"modules": list(sys.modules), "reads": reads, "opened": opened}), file=sys.stderr)
"""


@dataclass(frozen=True)
class Work:
    """What a run of the program did."""

    modules: set[str]
    reads: list[int]  # bytes that each read of the image gave
    opened: list[str]  # files, modules among them
    out: str

    def imports(self, names: set[str]) -> set[str]:
        """Those of the modules and packages that were imported."""
        return {name for name in names if any(m == name or m.startswith(name + ".") for m in self.modules)}


def work(*words: str | Path, **env: str) -> Work:
    """Run the program, and count."""
    line = [sys.executable, "-c", SCRIPT, *words]
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, env=environment(env), text=True, check=True
    )
    counted: dict[str, Any] = json.loads(done.stderr.splitlines()[-1])
    return Work(set(counted["modules"]), counted["reads"], counted["opened"], done.stdout)


def imported(*words: str | Path) -> set[str]:
    """The modules a run imports."""
    return work(*words).modules


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["backup", "--help"]])
def test_help_needs_nothing_heavy(words: list[str]) -> None:
    found = imported(*words)
    assert "ferrotype.cli" in found
    assert not found & HEAVY
    assert not {name for name in found if name.startswith(("ferrotype.engine", "ferrotype.repository"))}


def test_a_verb_imports_itself_and_no_other(image: Path) -> None:
    found = imported("list", image, "--json")
    assert "ferrotype.cli.list" in found
    others = {f"ferrotype.cli.{verb}" for verb in VERBS} - {"ferrotype.cli.list"}
    assert not found & (others | {"rich", "rich.console", "asyncio", "ssl"})
    assert not {"ferrotype.engine.backup", "ferrotype.engine.prune", "ferrotype.engine.verify"} & found


@pytest.mark.parametrize("words", [("list",), ("list", "--json"), ("key", "list")])
def test_listing_imports_neither_columns_nor_ciphers(image: Path, words: tuple[str, ...]) -> None:
    assert not work(*words, image).imports(UNUSED | OURS | {"cryptography"})


def test_an_encrypted_image_takes_ciphers_and_still_no_columns(locked: Path) -> None:
    done = work("list", locked, FERROTYPE_PASSWORD=PASSPHRASE)
    assert done.imports({"cryptography"})
    assert not done.imports(UNUSED | OURS)
    assert not work("key", "list", locked).imports(UNUSED | OURS | {"cryptography"})


def test_other_verbs_import_no_more_than_they_use(image: Path, disk: Path, tmp_path: Path) -> None:
    never = {"cryptography", "rich", "importlib.metadata", "secrets", "ssl", "asyncio"}
    for words in (
        ("info", disk),
        ("map", disk),
        ("backup", disk, tmp_path / "new.ferro"),
        ("verify", image),
        ("restore", image, tmp_path / "out.img"),
    ):
        done = work(*words)
        assert not done.imports(never), words
        others = {f"ferrotype.cli.{verb}" for verb in VERBS} - {f"ferrotype.cli.{words[0]}"}
        assert not done.imports(others), words
    for verb in ("info", "map"):
        assert not work(verb, disk).imports({"concurrent.futures", "logging", "ferrotype.engine.restore"})


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with 100 snapshots, each with a chunk or so of its own."""
    path = tmp_path_factory.mktemp("hundred") / "many.ferro"
    with create(Container.create(path)) as repository:
        for day in range(100):
            back_up(repository, disk_content(16, seed=day), f"day {day}", day=day)
    return path


# Of CPython 3.11 with today's libraries: 128 modules for --help, 207 for a list, of which 28 and 61 are ours.
@pytest.mark.parametrize(("words", "modules", "ours"), [(("--help",), 170, 20), (("list",), 270, 60)])
def test_modules_and_files_are_few(hundred: Path, words: tuple[str, ...], modules: int, ours: int) -> None:
    done = work(*words, *([hundred] if words != ("--help",) else []))
    assert len(done.modules) <= modules
    assert len(done.imports({name for name in done.modules if name.startswith("ferrotype.")})) <= ours
    assert len(done.opened) <= modules + 20  # each module is one file at most


def test_a_list_reads_each_snapshot_once_and_nothing_else(hundred: Path) -> None:
    done = work("list", hundred, "--json")
    assert len(json.loads(done.out)["snapshots"]) == 100
    assert done.opened.count(str(hundred)) == 1
    records = 100
    heads = 60  # the volume's header, the anchors, catalogs, the configuration and what surrounds it
    assert records <= len(done.reads) <= records + heads
    assert sum(done.reads) < hundred.stat().st_size // 4


def test_numpy_starts_no_threads_for_a_blas(disk: Path) -> None:
    """One for each processor would stand by for nothing."""
    script = "import os; from ferrotype.cli import main\ntry: main()\nfinally: os.write(2, b'%d' % THREADS)"
    script = script.replace("THREADS", "len(os.listdir('/proc/self/task'))")
    done = subprocess.run(
        [sys.executable, "-c", script, "info", disk], capture_output=True, env=environment(), text=True, check=True
    )
    assert done.stderr.splitlines()[-1][-1] == "1"


def test_the_help_lists_every_verb_with_every_common_option() -> None:
    text = ferrotype("--help").out
    for verb in VERBS:
        assert f"\n  {verb} " in text
    common = ferrotype("list", "--help").out
    for option in (
        "--json",
        "--progress",
        "--quiet",
        "--verbose",
        "--password-file",
        "--password-command",
        "--key-file",
    ):
        assert option in common
