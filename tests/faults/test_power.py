"""The power goes at any operation, and before the next sync any part of what was written may be lost.

pytest tests/faults/test_power.py -k 'any_operation and prune-plain' -s       one scenario, with its counts
"""

from __future__ import annotations

import itertools

import pytest

from ferrotype.testing.recording import power_cuts
from tests.faults.runs import SEED, Theatre, casts
from tests.faults.scenarios import RECOVERY

_AFTER = 12  # operations behind a held one: it has long come to its end
_SAMPLED = 5  # of so many cuts of a recovery one is tried


@pytest.mark.parametrize("theatre", casts(), indirect=True)
def test_the_power_may_go_at_any_operation(theatre: Theatre) -> None:
    recording, told = theatre.record()
    for cut in power_cuts(recording, seed=SEED):
        theatre.check(cut.files, told.until(cut.number), cut.words)
    assert theatre.points.points > 8 * len(recording.operations)


@pytest.mark.parametrize("theatre", casts("first-backup", "increment", "take-over", "copy"), indirect=True)
def test_a_pack_may_be_stored_late(theatre: Theatre) -> None:
    """What the second thread does takes its time: the first one goes on, and waits for it where it must."""
    recording, _ = theatre.record()
    assert recording.others
    for held in sorted(recording.others):
        late, told = theatre.record(held=held)
        for cut in power_cuts(late, seed=SEED, first=held):
            if cut.number > held + _AFTER:
                break
            theatre.check(cut.files, told.until(cut.number), f"operation {held} held back, {cut.words}")


@pytest.mark.parametrize(
    "theatre",
    casts("take-over", "prune", "compact-scattered", "compact-volumes", "key-remove", "copy"),
    indirect=True,
)
def test_the_power_may_go_while_a_cut_is_recovered_from(theatre: Theatre) -> None:
    recording, told = theatre.record()
    sample = list(power_cuts(recording, seed=SEED))
    for first in sample[len(sample) // 3 :: len(sample) // 3 + 1]:
        again = theatre.after(first.files, told.until(first.number), RECOVERY)
        recovery, promised = again.record()
        for second in itertools.islice(power_cuts(recovery, seed=SEED), 0, None, _SAMPLED):
            again.check(second.files, promised.until(second.number), f"{first.words}; its recovery {second.words}")
