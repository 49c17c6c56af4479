"""The small images that the tests of this folder damage; none of the tests changes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ferrotype.objects import heads
from tests.rot.small_image import SECRETS, SmallImage, make


@pytest.fixture(scope="session", params=list(SECRETS))
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SmallImage:
    return make(tmp_path_factory.mktemp("small") / "image.ferro", SECRETS[request.param])


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> SmallImage:
    """One that is not encrypted, for what does not depend on that."""
    return make(tmp_path_factory.mktemp("plain") / "image.ferro", None)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting() -> Iterator[None]:
    """Nobody writes to these images, so what is damaged will not be whole a moment later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "_AGAIN", 0.0)
        yield
