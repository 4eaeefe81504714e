"""Training from object storage equals training from a local directory."""

import math
import os
from pathlib import Path

import pytest

from tests.helpers.launch import TINY, losses, tiny_config
from tests.helpers.rank_group import RankGroup
from tests.helpers.stores import bucket, bytes_in

SHORT = TINY.partition("  hybrid:")[0].replace("epochs: 3", "epochs: 2")


class Environment(dict[str, str]):
    """Environment variables that are set in a rank before it starts."""

    def __call__(self, rank: int) -> None:
        os.environ.update(self)


@pytest.mark.parametrize("compare", [False, pytest.param(True, marks=pytest.mark.long)])
def test_two_ranks_train_from_s3_and_share_a_cache(tiny_shards: Path, tmp_path: Path, compare: bool):
    def train(name: str, *overrides: str, ranks: int, environment: dict[str, str]) -> tuple[list[float], str]:
        config = ["--config", str(tiny_config(tmp_path, SHORT)), f"run.root={tmp_path}", f"run.name={name}"]
        group = RankGroup(ranks, [*config, *overrides], tmp_path / f"logs-{name}", Environment(environment))
        assert group.wait(240) == [0] * ranks, group.output()[-6000:]
        return losses(tmp_path / name), group.output()

    with bucket() as store:
        root = f"data.root={store.put(tiny_shards, 'tiny')}"
        cache = f"data.cache={tmp_path / 'cache'}"
        synthetic = "data.synthetic.enabled=true"
        remote, output = train("remote", root, cache, synthetic, ranks=2, environment=store.environment)
    assert len(remote) == 8 and all(map(math.isfinite, remote))
    if compare:
        local, _ = train("local", f"data.root={tiny_shards}", ranks=2, environment={})
        assert remote == local
    assert "caching is paused" not in output and bytes_in(tmp_path / "cache") > 100_000


@pytest.fixture(autouse=True)
def stop_ranks():
    yield
    RankGroup.kill_all()
