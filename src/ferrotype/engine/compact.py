"""Compact: move what an image needs together, cut the file, and leave a spare copy of its keys at the far end."""

from __future__ import annotations

from ferrotype.job import Job
from ferrotype.objects.container import Container
from ferrotype.repository.config import NAME as CONFIG
from ferrotype.repository.spare import PREFIX, bring_forward, read_heads, renew


def compact(container: Container, job: Job) -> int:
    """Make an image as small as it can be, in place; the bytes it became smaller.  Needs no key.

    Records move towards the head, the spare copies of what opens the image among them.  So a fresh one is put behind
    everything, and the others go: the image is some blocks larger than the smallest it could be.
    """
    before = container.file_size
    bring_forward(container)  # while there is something in the gap that this may leave
    container.compact(job.advance)
    heads = read_heads(container)
    if CONFIG in heads.objects and (container.file_size != before or not any(container.list(PREFIX))):
        renew(container, heads)
        container.flush()
    return max(0, before - container.file_size)
