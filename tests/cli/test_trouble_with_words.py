"""What is said, and what secrets are read from: no full disk, hostile name or file changes what is done."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import PASSPHRASE
from tests.cli.program import PROGRAM, attempt, environment, ferrotype, started

HOSTILE = "a\x1b[31mb\x07\u202ec\nforget 00000000"
SHOWN = r"a\x1b[31mb\x07\u202ec\nforget 00000000"


def shell(line: str, *words: str | Path) -> tuple[int, str, str]:
    """Exit code and both outputs of the program, called in a line of bash as ``"$@"``."""
    done = subprocess.run(
        ["bash", "-c", line, "bash", *PROGRAM, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(),
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


# ---------------------------------------------------------------------- standard error


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", "2> >(exec true)", "2>&- <&-", "2</dev/null"])
@pytest.mark.parametrize("progress", ["json", "bar"])
def test_standard_error_that_fails_changes_nothing(disk: Path, tmp_path: Path, redirect: str, progress: str) -> None:
    image, out = tmp_path / "a.ferro", tmp_path / "out.img"
    options = ("-v", "--progress", progress)
    assert shell(f'sleep 0.1; "$@" {redirect}', "backup", disk, image, *options)[0] == 0
    assert shell(f'"$@" {redirect}', "restore", image, out, *options)[0] == 0
    assert ferrotype("compare", disk, out, "--json", code=0).document["identical"]
    assert shell(f'"$@" {redirect}', "list", tmp_path / "nothing.ferro", *options)[0] == 2
    assert shell(f'"$@" {redirect}', "list", "--frob")[0] == 2
    assert ferrotype("verify", image, "--deep").code == 0  # nobody wrote words into it


def test_work_is_done_though_its_answer_is_lost(disk: Path, tmp_path: Path) -> None:
    for number, (redirect, code) in enumerate(((">/dev/full", 6), (">&-", 6), (">/dev/full 2>&1", 6))):
        image = tmp_path / f"{number}.ferro"
        assert shell(f'"$@" {redirect}', "backup", disk, image, "--json")[0] == code
        assert len(ferrotype("list", image, "--json").document["snapshots"]) == 1


def test_what_was_done_is_said_where_its_answer_is_lost(disk: Path, tmp_path: Path) -> None:
    for number, options in enumerate(((), ("--json",))):
        image = tmp_path / f"{number}.ferro"
        code, _, error = shell('"$@" >/dev/full', "backup", disk, image, *options)
        (snapshot,) = ferrotype("list", image, "--json").document["snapshots"]
        assert code == 6
        assert "No space left" in error or "no space left" in error
        assert f"snapshot {snapshot['id'][:8]} of disk.img: read" in error


@pytest.mark.parametrize("redirect", [">&-", ">/dev/full"])
def test_a_question_whose_answer_is_lost_has_failed(disk: Path, image: Path, redirect: str, tmp_path: Path) -> None:
    for words in (
        ("list", image),
        ("checksum", disk),
        ("info", image),
        ("map", disk),
        ("key", "list", image),
        ("disks",),
        ("backup", "-n", disk, image),
        ("prune", "-n", image),
        ("restore", "-n", image, tmp_path / "out.img"),
    ):
        for options in ((), ("--json",)):
            code, out, error = shell(f'"$@" {redirect}', *words, *options)
            assert (code, out) == (6, ""), words
            assert len([line for line in error.splitlines() if line.startswith("ferrotype: standard output")]) == 1


# ---------------------------------------------------------------------- names


def test_names_are_escaped_wherever_they_are_shown(disk: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.ferro"
    words = ("--name", HOSTILE, "--tag", HOSTILE, "--password-command", f"echo {PASSPHRASE}")
    key = ("--password-command", f"echo {PASSPHRASE}")
    said = [ferrotype("backup", f"{disk}#1", image, *words)]
    said.append(ferrotype("key", "add", image, *key, "--new-key-file", disk.parent / "disk.key", "--label", HOSTILE))
    said += [ferrotype("list", image, *key), ferrotype("key", "list", image)]
    said.append(ferrotype("forget", image, "-n", "--keep-tag", HOSTILE, *key))
    for one in said:
        for text in (one.out, one.err):
            assert not [c for c in text if c != "\n" and not c.isprintable()], text
            assert "\nforget 0" not in text
    assert SHOWN in said[0].out
    assert SHOWN in said[-1].out
    for verb, path in (
        ("info", tmp_path / HOSTILE.replace("/", "")),
        ("list", os.fsencode(tmp_path) + b"/\xff\x9b31m"),
    ):
        done = attempt(verb, path)
        assert done.code == 2
        assert len(done.err.splitlines()) == 1
        assert not [c for c in done.err[:-1] if not c.isprintable()], done.err


@pytest.fixture(autouse=True)
def key(disk: Path) -> None:
    (disk.parent / "disk.key").write_bytes(b"key file")


# ---------------------------------------------------------------------- secrets


def test_a_secret_is_read_in_bounds(locked: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    long = tmp_path / "long"
    long.write_bytes(b"x" * ((1 << 20) + 1) + b"\n")
    for option in ("--password-file", "--key-file"):
        for path in ("/dev/zero", "/dev/full", "/dev/tty", tmp_path, tmp_path / "huge", tmp_path / "pipe", long):
            began = time.monotonic()
            done = ferrotype("list", locked, option, path, "--stall-limit", "1", code=5)
            assert time.monotonic() - began < 20
            assert str(path) in done.err
    done = ferrotype("list", locked, "--password-command", "cat /dev/zero", code=5)
    assert "1 MiB" in done.err


def test_a_passphrase_is_the_first_line_whatever_follows(locked: Path, tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.write_text(f"{PASSPHRASE}\r\nmore")
    os.truncate(path, 1 << 40)
    assert ferrotype("list", locked, "--password-file", path).out
    assert shell(f'"$@" --password-file <(sleep 1; echo "{PASSPHRASE}"; sleep 1)', "list", locked)[0] == 0
    os.mkfifo(tmp_path / "pipe")
    with started("list", locked, "--password-file", tmp_path / "pipe") as run:
        time.sleep(0.5)
        (tmp_path / "pipe").write_text(f"{PASSPHRASE}\n")
        assert run.wait(60) == 0


# ---------------------------------------------------------------------- memory


def limited(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (size << 20, size << 20))


@pytest.mark.parametrize("size", [60, 90, 120, 150, 180, 210, 240, 300, 400])
def test_too_little_memory_is_a_sentence(disk: Path, image: Path, tmp_path: Path, size: int) -> None:
    for number, words in enumerate(
        (("list", image), ("backup", disk, tmp_path / "a.ferro"), ("verify", "--deep", image))
    ):
        done = subprocess.run(
            [*PROGRAM, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment(),
            preexec_fn=limited(size),
            timeout=120,
            check=False,
        )
        err = done.stderr.decode()
        if err.startswith("OpenBLAS error: Memory allocation"):
            continue  # numpy's library ends the process by itself, while it is loaded
        assert done.returncode in (0, 6), (size, words, err)
        assert "Traceback" not in err
        if done.returncode:
            assert "memory" in err, (size, number, err)


# ---------------------------------------------------------------------- an interrupt while the program starts


def test_an_interrupt_while_the_program_starts_ends_it_without_a_word(image: Path) -> None:
    """As soon as this program's own code runs: here, before anything heavy is imported."""
    script = (
        "import os, signal, sys\n"
        "class Cut:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == os.environ['CUT']: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Cut())\n"
        "from ferrotype.cli import main\n"
        "main()\n"
    )
    for name in ("click", "ferrotype.cli.apart", "ferrotype.cli.list", "msgspec", "ferrotype.linux"):
        done = subprocess.run(
            [sys.executable, "-c", script, "list", image],
            capture_output=True,
            env=environment({"CUT": name}),
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) in ((130, b"", b""), (0, done.stdout, b"")), name
        assert done.returncode == 130 or name in ("msgspec", "ferrotype.linux"), name


def test_the_launcher_hears_an_interrupt_before_it_imports_anything() -> None:
    launcher = Path(__file__).resolve().parents[2] / "ferrotype"
    assert "default_int_handler" in launcher.read_text().split("import ferrotype.__main__")[0]
    assert shutil.which("sh")
