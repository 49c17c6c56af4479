"""The command line: one module a verb.

This module imports next to nothing, so that an interrupt is heard while the rest is being imported.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # the module ``typing`` takes its time
if TYPE_CHECKING:
    from typing import Final, NoReturn

VERBS: Final[dict[str, str]] = {
    "disks": "What can be imaged here: disks, partitions, what they hold.",
    "info": "Format, size, partition table, volumes, used and free, a drawn map.",
    "map": "The allocation map of a disk.",
    "backup": "Image disks or partitions into IMAGE, new or existing.",
    "list": "The snapshots of an image.",
    "restore": "Write a disk or a partition back.",
    "verify": "Prove that every stored byte is what was written.",
    "compare": "Are two disks the same? Where not?",
    "checksum": "One content hash of a disk, the same wherever it is kept.",
    "convert": "Write a disk as a disk image of another format.",
    "forget": "Drop snapshots, by rule or by name.",
    "prune": "Give back the space of what no snapshot needs.",
    "compact": "Make an image as small as it can be, in place.",
    "copy": "Copy snapshots into another image.",
    "salvage": "Save what is left of a damaged image, and list what is not.",
    "key": "Passphrases and key files of an encrypted image.",
}

_STOPPED: Final = 130
_FAILED: Final = 6
_POOR: Final = b"ferrotype: there is not enough memory to start\n"


def main() -> NoReturn:
    """Run the command line; ends the process with the exit code the interface promises."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, _stop)  # until a verb has begun, and when it has ended, there is nothing to undo
    try:
        from ferrotype.cli.program import run

        code = run()
    except KeyboardInterrupt:
        code = _STOPPED
    except (MemoryError, ImportError, OSError, SystemError) as error:
        if not _is_poor(error):
            raise
        code = _FAILED
        _say(_POOR)
    sys.exit(code)


def _stop(_number: int, _frame: object) -> None:
    os._exit(_STOPPED)


def _is_poor(error: BaseException) -> bool:
    try:
        from ferrotype.trouble import lacks_memory
    except (MemoryError, ImportError):
        return True
    return lacks_memory(error)


def _say(words: bytes) -> None:
    try:
        os.write(2, words)
    except OSError:  # nobody hears
        return
