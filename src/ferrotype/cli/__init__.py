"""The command line: one module a verb.

A verb's module is imported only when the verb is used, so ``ferrotype --help`` stays quick.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import Final, NoReturn

import click

from ferrotype.cli import apart, exits, output
from ferrotype.version import VERSION

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

EPILOG: Final = """\b
Exit codes: 0 done; 1 the answer is no; 2 wrong command; 3 refused; 4 damaged or unsupported input;
5 wrong or missing key; 6 reading or writing failed; 7 locked; 8 done with warnings; 130 stopped."""


class Verbs(click.Group):
    """A group whose commands are modules of this package, imported when they are wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"ferrotype.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=Verbs, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(VERSION, prog_name="ferrotype")
def cli() -> None:
    """Disk imaging: whole disks into one portable, compressed, deduplicated, encrypted, incremental file, and back.

    \b
    ferrotype backup /dev/sda laptop.ferro
    ferrotype list laptop.ferro
    ferrotype restore laptop.ferro /dev/sdb
    """


def main() -> NoReturn:
    """Run the command line; ends the process with the exit code the interface promises."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, which nothing calls: it would start a thread a core
    apart.go_apart(sys.argv[1:])
    try:
        done = cli.main(prog_name="ferrotype", standalone_mode=False)
        code = done if isinstance(done, int) else exits.OK
        output.flush()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = exits.STOPPED
    except SystemExit:  # click's way of saying that nobody reads on; verbs end with click's Exit
        code = output.lost(BrokenPipeError())
    except OSError as error:
        code = output.lost(error)
    apart.say(code)
    sys.exit(code)
