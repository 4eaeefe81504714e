from collections.abc import Iterator

import pytest

from tests.helpers.rank_group import RankGroup


@pytest.fixture(autouse=True)
def no_rank_outlives_its_test() -> Iterator[None]:
    yield
    RankGroup.kill_all()
