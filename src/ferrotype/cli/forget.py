"""``ferrotype forget``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ferrotype.cli.frame import IMAGE, Frame, options

if TYPE_CHECKING:
    from ferrotype.engine.forget import Verdict
    from ferrotype.engine.same_disks import Together

_COUNT = click.IntRange(min=0)


@click.command("forget")
@click.argument("image", type=IMAGE)
@click.argument("snapshots", nargs=-1, metavar="[SNAPSHOT]...")
@click.option("--keep-last", type=_COUNT, default=0, metavar="N", help="Keep the newest N.")
@click.option("--keep-hourly", type=_COUNT, default=0, metavar="N", help="Keep the newest of each of N hours.")
@click.option("--keep-daily", type=_COUNT, default=0, metavar="N", help="... of N days.")
@click.option("--keep-weekly", type=_COUNT, default=0, metavar="N", help="... of N weeks.")
@click.option("--keep-monthly", type=_COUNT, default=0, metavar="N", help="... of N months.")
@click.option("--keep-yearly", type=_COUNT, default=0, metavar="N", help="... of N years.")
@click.option("--keep-tag", "keep_tags", multiple=True, metavar="TAG", help="Keep all with this tag.")
@click.option("--prune", "then_prune", is_flag=True, help="Give the space back at once.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be forgotten; change nothing.")
@options
def command(
    frame: Frame,
    image: Path,
    snapshots: tuple[str, ...],
    keep_last: int,
    keep_hourly: int,
    keep_daily: int,
    keep_weekly: int,
    keep_monthly: int,
    keep_yearly: int,
    keep_tags: tuple[str, ...],
    then_prune: bool,
    dry_run: bool,
) -> None:
    """Drop the named SNAPSHOTs, or all that no rule keeps.  ``prune`` then gives their space back.

    Hours to years are those of this machine's time zone; each disk's snapshots are judged by themselves.
    """
    with frame.run() as job:
        from ferrotype.cli.prune import as_json, as_text
        from ferrotype.engine.forget import KeepRules, Verdict, forget, judge
        from ferrotype.engine.prune import prune
        from ferrotype.engine.same_disks import together
        from ferrotype.errors import UsageError
        from ferrotype.repository.snapshots import find_snapshot

        rules = KeepRules(
            keep_last, keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly, tuple(keep_tags)
        )
        if snapshots and rules.given:
            raise UsageError("name snapshots or give rules, not both")
        with frame.open_image(image, job, writable=not dry_run) as repository:
            known = repository.snapshots()
            if snapshots:
                named = {find_snapshot(known, text).id for text in snapshots}
                verdicts = [Verdict(s, () if s.id in named else ("not named",)) for s in known]
            else:
                verdicts = judge(known, rules)
            groups = together(known)
            gone = [verdict.snapshot for verdict in verdicts if not verdict.kept]
            document: dict[str, object] = {
                "kept": [{"id": v.snapshot.id, "reasons": list(v.reasons)} for v in verdicts if v.kept],
                "forgotten": [snapshot.id for snapshot in gone],
                "groups": [group.as_json() for group in groups],
                "dry_run": dry_run,
            }
            lines = _lines(verdicts, groups if rules.given else (), dry_run=dry_run)
            if not dry_run:
                forget(repository, gone)
                if then_prune:
                    result = prune(repository, job)
                    document["prune"] = as_json(result)
                    lines.append(as_text(result, image, dry_run=False))
        if dry_run:
            frame.answer(document, [*lines, "nothing was changed"])
        else:
            frame.show(document, lines)


def _lines(verdicts: Sequence[Verdict], groups: Sequence[Together], *, dry_run: bool) -> list[str]:
    """What becomes of each snapshot; with several groups, by what was judged together."""
    if len(groups) < 2:
        return [_line(verdict, dry_run=dry_run) for verdict in verdicts]
    lines = []
    for group in groups:
        ids = {snapshot.id for snapshot in group.snapshots}
        lines.append(f"judged together, group {group.number}: {group.title}")
        lines += [_line(verdict, dry_run=dry_run) for verdict in verdicts if verdict.snapshot.id in ids]
    return lines


def _line(verdict: Verdict, *, dry_run: bool) -> str:
    snapshot = verdict.snapshot
    becomes = ("would " if dry_run else "") + f"{'keep' if verdict.kept else 'forget':7}"
    return f"{becomes}{snapshot.id[:8]}  {snapshot.local_time:%Y-%m-%d %H:%M:%S}  {snapshot.name}" + (
        f"  ({', '.join(verdict.reasons)})" if verdict.kept else ""
    )
