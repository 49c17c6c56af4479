"""``ferrotype forget``."""

from __future__ import annotations

from pathlib import Path

import click

from ferrotype.cli.frame import IMAGE, Frame, options

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
            gone = [verdict.snapshot for verdict in verdicts if not verdict.kept]
            document: dict[str, object] = {
                "kept": [{"id": v.snapshot.id, "reasons": list(v.reasons)} for v in verdicts if v.kept],
                "forgotten": [snapshot.id for snapshot in gone],
                "dry_run": dry_run,
            }
            lines = [
                f"{'keep' if v.kept else 'forget':7}{v.snapshot.id[:8]}  "
                f"{v.snapshot.local_time:%Y-%m-%d %H:%M:%S}  {v.snapshot.name}"
                + (f"  ({', '.join(v.reasons)})" if v.kept else "")
                for v in verdicts
            ]
            if not dry_run:
                forget(repository, gone)
                if then_prune:
                    result = prune(repository, job)
                    document["prune"] = as_json(result)
                    lines.append(as_text(result, image, dry_run=False))
        frame.show(document, "\n".join(lines) + ("\nnothing was changed" if dry_run else ""))
