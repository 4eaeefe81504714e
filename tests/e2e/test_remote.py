"""A training straight from object storage is the training from the folder."""

import math
import os
from pathlib import Path

import pytest

from tests.helpers.launch import TINY, losses, tiny_config
from tests.helpers.stores import bucket, bytes_in
from tests.helpers.team import Team

SHORT = TINY.partition("  hybrid:")[0].replace("epochs: 3", "epochs: 2")


class Environment(dict[str, str]):
    """Environment variables that a rank gets before it starts."""

    def __call__(self, rank: int) -> None:
        os.environ.update(self)


@pytest.mark.parametrize("compared", [False, pytest.param(True, marks=pytest.mark.long)])
def test_two_ranks_train_from_s3_and_share_a_cache(tiny_shards: Path, tmp_path: Path, compared: bool):
    def train(name: str, *more: str, ranks: int, environment: dict[str, str]) -> tuple[list[float], str]:
        arguments = ["--config", str(tiny_config(tmp_path, SHORT)), f"run.root={tmp_path}", f"run.name={name}", *more]
        team = Team(ranks, arguments, tmp_path / f"logs-{name}", Environment(environment))
        assert team.end(240) == [0] * ranks, team.said()[-6000:]
        return losses(tmp_path / name), team.said()

    with bucket() as store:
        root = f"data.root={store.put(tiny_shards, 'tiny')}"
        cache = f"data.cache={tmp_path / 'cache'}"
        afar, said = train("afar", root, cache, "data.synthetic.enabled=true", ranks=2, environment=store.environment)
    assert len(afar) == 8 and all(map(math.isfinite, afar))
    if compared:
        here, _ = train("here", f"data.root={tiny_shards}", ranks=2, environment={})
        assert afar == here
    assert "nothing is kept" not in said and bytes_in(tmp_path / "cache") > 100_000


@pytest.fixture(autouse=True)
def no_rank_outlives_its_test():
    yield
    Team.kill_all()
