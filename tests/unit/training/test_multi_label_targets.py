"""Targets, sampling and class priors of supervised phases on label lists."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distav.config import loading
from distav.config.phases import Targets
from distav.data.preparation.multi_label_noise import ClassRates
from distav.distributed.collectives import get_rank, get_world_size, shard_range
from distav.distributed.process_group import World
from distav.training.phases.multi_label_targets import MultiLabelTargets, make_targets
from distav.training.run_setup import open_run
from tests.helpers.launch import TINY, tiny_config
from tests.helpers.multi_label import multi_label_shards
from tests.helpers.spawn import on_ranks

CONFIG = TINY[: TINY.index("phases:")] + "phases:\n  learn: {kind: supervised, targets: given, loss: bce}\n"


def targets_and_priors(file: Path, overrides: list[str]) -> dict[str, tuple[Any, Any]]:
    """Return targets, sampled classes and log-odds of each kind of targets, next to those of a formula in numpy."""
    world = World(get_rank(), get_world_size(), 0, torch.device("cpu"))
    results: dict[str, tuple[Any, Any]] = {}
    with open_run(loading.load(file, overrides), world) as run:
        labels, num_clips = run.data.multi_labels, len(run.data.train)
        generator = torch.Generator().manual_seed(3)
        stored = {name: torch.rand(num_clips, 6, generator=generator) for name in ("posterior", "held_out")}
        for name, column in stored.items():
            run.bank.store_column(name, column[run.bank.rows.start : run.bank.rows.stop])
        assert labels.true is not None
        expected = {"given": labels.given.astype(float), "oracle": labels.true.astype(float)}
        expected |= {name: column.double().numpy() for name, column in stored.items()}
        ids = torch.arange(num_clips)[shard_range(num_clips).start :][: num_clips // get_world_size()]
        all_ids = torch.arange(num_clips)[: len(ids) * get_world_size()]
        for name, probs in expected.items():
            targets = make_targets(run, Targets[name])
            assert isinstance(targets, MultiLabelTargets)
            heads, pair_weights = targets.of_batch(ids, all_ids)
            assert torch.equal(pair_weights, torch.ones(len(ids))) and len(heads) == 3
            results[f"{name} targets"] = heads[2].numpy(), probs[ids.numpy()]
            has_class = probs >= 0.5
            counts = np.where(has_class, has_class.sum(0), num_clips + 1)
            rarest = np.where(has_class.any(1), counts.argmin(1), 6)
            balance = targets.balance(0.5)
            results[f"{name} classes"] = balance.classes, rarest
            for sampling in (None, balance):
                draws = np.ones(num_clips) if sampling is None else sampling.rates
                present = np.clip(draws @ probs, 1, draws.sum() - 1)
                log_odds = np.log(present / (draws.sum() - present))
                priors = targets.log_priors(sampling).numpy()
                results[f"{name} {'balanced' if sampling else 'plain'}"] = priors, np.tile(log_odds, (3, 1))
    return results


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_targets_sampling_and_priors_follow_the_lists(tmp_path: Path, num_ranks: int):
    shards = multi_label_shards(tmp_path / "shards", 48, 0, ClassRates(0.4, 0.4), ClassRates(0.1, 0.1))
    overrides = [f"data.root={shards}", f"run.root={tmp_path}", "data.test_split="]
    for results in on_ranks(num_ranks, targets_and_priors, tiny_config(tmp_path, CONFIG), overrides):
        assert len(results) == 16
        for name, (result, expected) in results.items():
            np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6, err_msg=name)
