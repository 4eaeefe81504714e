from collections.abc import Iterator

import pytest

from tests.helpers.team import Team


@pytest.fixture(autouse=True)
def no_rank_outlives_its_test() -> Iterator[None]:
    yield
    Team.kill_all()
