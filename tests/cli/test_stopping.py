"""Two writers, Ctrl-C, and a cut backup taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ferrotype.units import MiB
from tests.cli.program import TIMEOUT, environment, ferrotype, started, terminal

SLOW = ("--level", "19", "--pack-size", "1MiB", "--progress", "json")


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """Bytes that take a while: half of them compress."""
    path = tmp_path / "noise.img"
    path.write_bytes(b"".join(os.urandom(MiB // 2).hex().encode() for _ in range(64)))
    return path


def spent(pid: int) -> float:
    """Seconds of processor time (proc(5): utime and stime, in ticks)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(process: subprocess.Popen[bytes], done: int) -> None:
    """Read progress until that many bytes of the disk are backed up."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(b"{"):
            progress = json.loads(line)
            if progress["phase"].startswith("backing up") and progress["done"] >= done:
                return
    raise AssertionError("the backup ended before it could be stopped")


def test_a_second_writer_and_ctrl_c_and_going_on(noise: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.ferro"
    (tmp_path / "small.img").write_bytes(b"small" * 1000 + bytes(120))
    ferrotype("backup", tmp_path / "small.img", image, "--pack-size", "1MiB", "-q")
    slow = (*SLOW[:2], *SLOW[4:])
    with started("backup", noise, image, *slow) as process:
        wait_for(process, 8 * MiB)
        process.send_signal(signal.SIGSTOP)
        for words in (["backup", tmp_path / "small.img"], ["prune"], ["forget"], ["compact"]):
            done = ferrotype(*words, image, *(["--keep-last", "1"] if words == ["forget"] else []), code=7)
            assert f"process {process.pid} " in done.err
        assert len(ferrotype("list", image, "--json").document["snapshots"]) == 1  # reading goes on meanwhile
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        before = spent(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 130
        assert usage.ru_utime + usage.ru_stime - before < 1  # what it still did, however busy the machine is
        assert process.stdout is not None
        assert process.stdout.read() == b""
    assert len(ferrotype("list", image, "--json").document["snapshots"]) == 1
    done = ferrotype("backup", noise, image, "--json", "-q")
    assert done.document["deduplicated_bytes"] >= 4 * MiB
    assert ferrotype("checksum", image).out.split()[0] == ferrotype("checksum", noise).out.split()[0]
    assert ferrotype("verify", image, "--deep", "--json").document["ok"] is True


def test_ctrl_c_at_a_terminal_under_a_bar(noise: Path, tmp_path: Path) -> None:
    with terminal("backup", noise, tmp_path / "a.ferro", "--level", "19", "--pack-size", "1MiB") as at:
        at.expect("█")
        at.expect("MiB/s")
        os.write(at.fd, b"\x03")
        screen = at.end(130)
    assert "backing up noise.img" in screen
    assert "%" in screen
    assert screen.rstrip().endswith("ferrotype: stopped")


def test_a_stopped_restore_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source.img"
    source.write_bytes(os.urandom(MiB) * 96)
    ferrotype("backup", source, tmp_path / "a.ferro")
    source.unlink()
    with started("restore", tmp_path / "a.ferro", tmp_path / "out.img", "--progress", "json") as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        code = process.wait(TIMEOUT)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert (code, names) in [(130, ["a.ferro"]), (0, ["a.ferro", "out.img"])]


LATE = """
import os, sys, threading, time
def late():
    time.sleep({seconds})
    os.write(3, b"ended")
threading.Thread(target=late, name="ferrotype-late", daemon=True).start()
sys.argv = ["ferrotype", "--version"]
from ferrotype.cli import main
main()
"""


@pytest.mark.parametrize(("seconds", "ended"), [(0.3, b"ended"), (60, b"")])
def test_threads_end_before_the_program_does(seconds: float, ended: bytes) -> None:
    """One that works to the end is waited for; one that is stuck keeps nobody waiting."""
    read_end, write_end = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", f"import os; os.dup2({write_end}, 3)" + LATE.format(seconds=seconds)],
        pass_fds=[write_end],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        os.close(write_end)
        _, errors = process.communicate(timeout=40)
    assert (process.returncode, errors) == (0, b"")
    assert os.read(read_end, 10) == ended
    os.close(read_end)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_a_verb_begins_is_a_stop(number: signal.Signals) -> None:
    """Sent while the command line is being read."""
    code = (
        "import os, sys; from ferrotype import cli; import ferrotype.cli.program as program\n"
        f"program.run = lambda: os.kill(os.getpid(), {int(number)}); cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (130, b"")
