"""``ferrotype info``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from ferrotype.cli.access import Opening, access_options
from ferrotype.cli.frame import REFERENCE, Frame, options
from ferrotype.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ferrotype.engine.info import Headers
    from ferrotype.formats import Tree


@click.command("info")
@click.argument("ref", type=REFERENCE)
@access_options
@options
def command(frame: Frame, ref: str, opening: Opening) -> None:
    """Format, size, partition table, volumes, used and free, and a drawn map of REF.

    Of a disk image whose disk cannot be read, for want of a parent or a key, what its headers say.
    """
    with frame.run() as job:
        from ferrotype.cli.drawing import disk_bar, volume_rows
        from ferrotype.engine.info import disk_headers, disk_info
        from ferrotype.engine.references import open_disk
        from ferrotype.engine.trees import as_json, tree_behind
        from ferrotype.extents import State

        with tree_behind(ref, opening.access(frame)) as tree:
            if tree is not None:
                for warning in tree.warnings:
                    job.warn(f"{ref}: {warning}")
                frame.answer(as_json(tree), (f"{ref}: {tree.format}, files and no disk", *_said_of(tree)))
                return
        with open_disk(ref, replace(opening.access(frame), headers_only=True), job) as disk:
            if disk.image is not None and disk.image.missing is not None:
                known = disk_headers(disk)
                head = f"{ref}: {known.format}, {format_size(known.size)} ({known.size} bytes)"
                frame.tell(known.as_json(), (head, *_container(known)))
                raise disk.image.missing
            info = disk_info(disk, job)
        survey = info.survey
        document = info.as_json()
        if disk.snapshot is not None:
            document["snapshot"] = disk.snapshot.id
        table = {"gpt": "GPT", "mbr": "MBR", "apm": "Apple partition map"}.get(
            survey.table.kind if survey.table else "", "no partition table"
        )
        head = f"{ref}: {info.format}, {format_size(survey.size)} ({survey.size} bytes), "
        head += f"{survey.sector_size}-byte sectors, {table}"
        free, zero = survey.extents.total(State.FREE), survey.extents.total(State.ZERO)
        kept = survey.size - survey.extents.total(State.FREE | State.ZERO)
        tail = (
            f"{format_size(kept)} to keep, {format_size(free)} free in file systems, {format_size(zero)} known zeros"
        )
        rows = (head, *_container(info), disk_bar(survey), *volume_rows(survey), tail)
        frame.answer(document, rows)


def _said_of(tree: Tree) -> Iterator[str]:
    """The facts of an image that holds files; a line for each image in it."""
    for name, value in tree.facts.items():
        if isinstance(value, list):
            for row in value:
                yield f"  {_said(row)}"
        elif value not in (None, ""):
            yield f"{name}: {_said(value)}"


def _container(info: Headers) -> Iterator[str]:
    """What the files are that a disk image stands in."""
    if info.stored_size is not None and info.format != "device":
        yield f"stored in {format_size(info.stored_size)}"
    known = [(name, value) for name, value in info.container.items() if value not in (None, False, "", [], {})]
    if known:
        yield "; ".join(f"{name}: {_said(value)}" for name, value in known)
    for name, digits in info.hashes.items():
        yield f"{name} {digits} is stated for the disk"
    if info.disks:
        yield f"further disks in it: {', '.join(info.disks)}"


def _said(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(inner)}" for name, inner in value.items() if inner is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value))
    return "yes" if value is True else str(value)
