"""Training from object storage equals training from a local directory; a run is restored from its mirror."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.helpers.launch import FREQUENT_SAVES, TINY, losses, losses_by_step, tiny_config
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


@pytest.mark.long
def test_run_is_restored_from_its_mirror_when_its_disk_is_lost(tiny_shards: Path, tmp_path: Path):
    def start(name: str, root: str, *overrides: str) -> RankGroup:
        options = [f"data.root={tiny_shards}", f"run.root={tmp_path / root}", *FREQUENT_SAVES, "run.timeout_s=20"]
        arguments = ["--config", str(tiny_config(tmp_path, SHORT)), *options, *overrides]
        return RankGroup(2, arguments, tmp_path / f"logs-{name}", Environment(store.environment))

    with bucket() as store:
        reference = start("reference", "reference")
        assert reference.wait(240) == [0, 0], reference.output()[-6000:]
        mirror = "run.mirror=s3://clips/runs"
        first = start("first", "runs", mirror)
        first.wait_for(lambda: "step 4/8 phase=contrastive" in first.output())
        first.signal(signal.SIGTERM, 1)
        assert first.wait(240) == [75, 75], first.output()[-6000:]
        shutil.rmtree(tmp_path / "runs")
        second = start("second", "runs", mirror)
        assert second.wait(240) == [0, 0], second.output()[-6000:]
        assert "restored step-" in second.output() and "from s3://clips/runs/tiny" in second.output()
        assert "resuming in phase contrastive after step" in second.output()
        assert losses_by_step(tmp_path / "runs" / "tiny") == losses_by_step(tmp_path / "reference" / "tiny")

        results = {path.relative_to(tmp_path / "runs") for path in (tmp_path / "runs" / "tiny").rglob("*.parquet")}
        report = json.loads((tmp_path / "runs" / "tiny" / "report.json").read_text())
        shutil.rmtree(tmp_path / "runs")
        third = start("third", "runs", mirror)
        assert third.wait(240) == [0, 0], third.output()[-6000:]
        assert "all phases are finished; writing the report" in third.output() and "phase=" not in third.output()
        assert losses_by_step(tmp_path / "runs" / "tiny") == losses_by_step(tmp_path / "reference" / "tiny")
        restored = {path.relative_to(tmp_path / "runs") for path in (tmp_path / "runs" / "tiny").rglob("*.parquet")}
        assert results and restored == results
        again = json.loads((tmp_path / "runs" / "tiny" / "report.json").read_text())
        assert again | {"checkpointing": 0} == report | {"checkpointing": 0}

        other = start("other", "other", mirror, "optim.lr=1")
        assert other.wait(240) == [1, 1] and "run.mirror=s3://clips/runs/tiny holds a run with other" in other.output()


@pytest.mark.long
def test_training_continues_without_its_mirror_and_ends_with_an_error(tiny_shards: Path, tmp_path: Path):
    mirror = tmp_path / "mirror"
    options = [f"data.root={tiny_shards}", f"run.root={tmp_path}", f"run.mirror={mirror}", *FREQUENT_SAVES]
    arguments = ["--config", str(tiny_config(tmp_path, SHORT)), *options]
    group = RankGroup(1, arguments, tmp_path / "logs")
    group.wait_for(lambda: "step 2/8 phase=contrastive" in group.output())
    mirror.rename(tmp_path / "lost")
    mirror.write_text("a file in place of the directory")
    assert group.wait(240) == [1], group.output()[-6000:]
    name = f"run.mirror={mirror / 'tiny'}"
    assert f"Failed to copy a checkpoint to the mirror: {name}" in group.output()
    assert f"distav: Failed to copy the run to its mirror: {name}" in group.output()
    assert (tmp_path / "tiny" / "report.json").exists()
    mirror.unlink()
    again = RankGroup(1, arguments, tmp_path / "logs-again")
    assert again.wait(240) == [0], again.output()[-6000:]
    for path in ("report.json", "export/model.safetensors", "labels/correction.parquet"):
        assert (mirror / "tiny" / path).read_bytes() == (tmp_path / "tiny" / path).read_bytes()
    names = [
        sorted(path.name for path in (root / "checkpoints").glob("step-*"))
        for root in (mirror / "tiny", tmp_path / "tiny")
    ]
    assert names[0] == names[1][-1:]


@pytest.fixture(autouse=True)
def stop_ranks():
    yield
    RankGroup.kill_all()
