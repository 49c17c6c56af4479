"""The program as a user runs it: in a process of its own, without a terminal or at one."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = (sys.executable, "-m", "ferrotype")
TIMEOUT = 120  # seconds

Word = str | bytes | Path


@dataclass(frozen=True)
class Done:
    """A run that ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on standard output."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        assert isinstance(found["warnings"], list)
        return found


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with nothing in it that ferrotype heeds but what the test says."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FERROTYPE_")}
    source = Path(__file__).resolve().parents[2] / "src"
    own = {"PYTHONPATH": str(source), "COLUMNS": "100", "TERM": "xterm", "XDG_STATE_HOME": "/dev/null/none"}
    return kept | own | dict(extra or {})  # tests that put images in place of others need no memory of them


def ferrotype(*words: Word, code: int = 0, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Done:
    """Run to the end with standard input closed; it ends with ``code``, and never with a traceback."""
    done = attempt(*words, env=env, cwd=cwd)
    assert done.code == code, f"{words}: exit {done.code}, not {code}\n{done.out[-2000:]}\n{done.err[-2000:]}"
    return done


def attempt(*words: Word, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Done:
    """Run to the end, whatever the exit code."""
    run = subprocess.run(
        [*PROGRAM, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(env),
        cwd=cwd,
        timeout=TIMEOUT,
        check=False,
    )
    done = Done(run.returncode, run.stdout.decode(errors="replace"), run.stderr.decode(errors="replace"))
    check_words(done)
    return done


def check_words(done: Done) -> None:
    """No traceback, no excuse, and one sentence where something was refused."""
    for text in (done.out, done.err):
        assert "Traceback" not in text, text
        assert "a fault in ferrotype" not in text, text
    assert done.code in (0, 1, 2, 3, 4, 5, 6, 7, 8, 130), done
    if done.code in (3, 4, 5, 6, 7):
        assert len([line for line in done.err.splitlines() if line.startswith("ferrotype: ")]) == 1, done.err


@contextlib.contextmanager
def started(*words: Word, cwd: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A run that goes on meanwhile; it is ended at the end of the block, if it has not."""
    process = subprocess.Popen(
        [*PROGRAM, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=cwd,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.communicate()


class Terminal:
    """A run at a terminal of its own."""

    def __init__(self, *words: Word, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        self.screen = ""
        self.fd, slave = pty.openpty()
        setsid = shutil.which("setsid")
        assert setsid is not None
        self.process = subprocess.Popen(
            [setsid, "--ctty", *PROGRAM, *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(env),
            cwd=cwd,
        )
        os.close(slave)

    def expect(self, text: str, seconds: float = 60) -> None:
        """Read until ``text`` has come."""
        before = len(self.screen)
        end = time.monotonic() + seconds
        while text not in self.screen[before:]:
            assert time.monotonic() < end, f"no {text!r} in {self.screen!r}"
            assert self._read(0.2), f"ended without {text!r}: {self.screen!r}"

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self, code: int) -> str:
        """Read to the end; the screen."""
        while self._read(TIMEOUT):
            pass
        assert self.process.wait(TIMEOUT) == code, self.screen
        check_words(Done(code, "", self.screen.replace("\r\n", "\n")))
        return self.screen

    def _read(self, seconds: float) -> bool:
        if not select.select([self.fd], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # EIO: the last process at the terminal is gone
            return False
        self.screen += data.decode(errors="replace")
        return bool(data)


@contextlib.contextmanager
def terminal(*words: Word, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Iterator[Terminal]:
    at = Terminal(*words, env=env, cwd=cwd)
    try:
        yield at
    finally:
        at.process.kill()
        at.process.wait()
        os.close(at.fd)


def answered(
    dialogue: Sequence[tuple[str, str]], *words: Word, code: int = 0, env: Mapping[str, str] | None = None
) -> str:
    """Run at a terminal, answering each prompt that is waited for; the screen."""
    with terminal(*words, env=env) as at:
        for prompt, answer in dialogue:
            at.expect(prompt)
            at.type(answer + "\n")
        return at.end(code)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
