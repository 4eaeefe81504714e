"""Clips that supervised phases leave out, and the fusion that is fitted to them at the end of a run."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from distav.config import loading
from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset
from distav.distributed.collectives import get_rank, get_world_size
from distav.distributed.process_group import World
from distav.evaluation.embedding import Embedder
from distav.evaluation.fusion import Fusion
from distav.training import classifier_fusion
from distav.training.classifier_fusion import fit_run_fusion, held_out_clips
from distav.training.phases import supervised
from distav.training.report import write_report
from distav.training.run import Run
from distav.training.run_setup import open_run
from distav.training.run_state import CorrectionState
from tests.helpers.launch import TINY, tiny_config
from tests.helpers.spawn import on_ranks

HELD_OUT = ["fusion.held_out_fraction=0.25", "fusion.min_clips=10"]
FIGURES = {"estimate": 0.2, "ci95_low": 0.1, "ci95_high": 0.3}


def supervised_config(folder: Path) -> Path:
    return tiny_config(folder, TINY[: TINY.index("phases:")] + "phases:\n  learn: {kind: supervised, targets: given}\n")


def opened(file: Path, root: Path, shards: Path, overrides: list[str]) -> Any:
    world = World(get_rank(), get_world_size(), 0, torch.device("cpu"))
    return open_run(loading.load(file, [f"data.root={shards}", f"run.root={root}", *overrides]), world)


def held_out_of(file: Path, root: Path, shards: Path, overrides: list[str]) -> Any:
    """Return source videos and held-out clips of a run whose source videos have three clips each."""
    with opened(file, root, shards, overrides) as run:
        groups = np.arange(96) // 3
        with mock.patch.object(type(run.data.train), "source_codes", groups):
            return groups, held_out_clips(run)


def test_source_videos_are_held_out_as_a_unit(tiny_shards: Path, tmp_path: Path):
    file = supervised_config(tmp_path)
    groups, held_out = on_ranks(1, held_out_of, file, tmp_path, tiny_shards, HELD_OUT)[0]
    assert held_out.sum() == 24
    counts = np.bincount(groups, weights=held_out)
    assert set(counts) == {0, 3}
    other_seed = on_ranks(1, held_out_of, file, tmp_path / "seed", tiny_shards, [*HELD_OUT, "run.seed=1"])[0][1]
    assert other_seed.sum() == 24 and not np.array_equal(other_seed, held_out)


@pytest.mark.parametrize("overrides", [[], ["fusion.held_out_fraction=0"], [*HELD_OUT, "fusion.min_clips=25"]])
def test_too_few_clips_are_not_held_out(tiny_shards: Path, tmp_path: Path, overrides: list[str]):
    _, held_out = on_ranks(1, held_out_of, supervised_config(tmp_path), tmp_path, tiny_shards, overrides)[0]
    assert held_out is None


def gradients_of_labels(file: Path, root: Path, shards: Path) -> tuple[Any, float, float]:
    """Return the held-out clips, and the change of the loss if labels of held-out and of other clips change."""
    with opened(file, root, shards, HELD_OUT) as run:
        held_out = held_out_clips(run)
        assert held_out is not None
        batch = run.loader.load(np.arange(24), 0)

        def loss(changed: Any) -> float:
            labels = run.data.labels.given
            labels[changed] = (labels[changed] + 1) % 6
            with mock.patch.object(supervised, "train") as train:
                supervised.run_supervised(run, "learn", run.config.phases["learn"])
            value = float(train.call_args.args[4](batch, 0.0)["loss"])
            labels[changed] = (labels[changed] + 5) % 6
            return value

        unchanged = loss(np.zeros(96, bool))
        return held_out, abs(loss(held_out) - unchanged), abs(loss(~held_out) - unchanged)


def test_supervised_losses_ignore_the_labels_of_held_out_clips(tiny_shards: Path, tmp_path: Path):
    held_out, change_held_out, change_others = on_ranks(
        1, gradients_of_labels, supervised_config(tmp_path), tmp_path, tiny_shards
    )[0]
    assert held_out[:24].any() and change_held_out == 0.0 and change_others > 1e-4


def store_correction(run: Run) -> None:
    """Store a correction of the given labels by a fixed permutation of the classes."""
    run.state.correction = CorrectionState(has_signal=True)
    run.state.report.corrections.append({"pair_mismatch_rate": FIGURES, "visual_owner": 0.75})
    labels = torch.from_numpy(run.data.labels.given[run.bank.rows.start : run.bank.rows.stop])
    run.bank.store_column("posterior", torch.eye(6)[(labels + 1) % 6])


def fitted(file: Path, root: Path, shards: Path, corrected: bool) -> Any:
    """Return the arguments of the fit on rank 0, and the fusion on all ranks."""
    with opened(file, root, shards, HELD_OUT) as run:
        if corrected:
            store_correction(run)
        with mock.patch.object(classifier_fusion, "fit_fusion", wraps=classifier_fusion.fit_fusion) as fit:
            fusion = fit_run_fusion(run)
        held_out = held_out_clips(run)
        assert held_out is not None
        return run.data.labels.given[held_out], fit.call_args.args if get_rank() == 0 else None, fusion


@pytest.mark.parametrize("corrected", [False, True])
def test_the_fit_is_that_of_one_rank_and_uses_the_last_correction(tiny_shards: Path, tmp_path: Path, corrected: bool):
    file = supervised_config(tmp_path)
    (labels, (log_probs, given, matrix, *pairs), fusion), (_, _, other) = on_ranks(
        2, fitted, file, tmp_path / "two", tiny_shards, corrected
    )
    assert fusion == other and log_probs.shape == (3, 24, 6)
    alone = on_ranks(1, fitted, file, tmp_path / "one", tiny_shards, corrected)[0]
    torch.testing.assert_close(alone[1][0], log_probs)
    assert labels.tolist() == given.tolist() == alone[1][1].tolist()
    np.testing.assert_allclose(
        [fusion.both, fusion.visual, fusion.audio], [alone[2].both, alone[2].visual, alone[2].audio], rtol=1e-3
    )
    if corrected:
        assert matrix.argmax(1).tolist() == [5, 0, 1, 2, 3, 4] and pairs[1] == 0.75
        assert pairs[0][0] == pytest.approx(np.log(0.25))
        np.testing.assert_allclose(matrix.sum(1), 1)
        np.testing.assert_allclose(alone[1][2], matrix)
    else:
        assert matrix is None and not pairs


def reported(file: Path, root: Path, shards: Path) -> Path:
    """Write the report of an untrained network and return the run directory."""
    with opened(file, root, shards, HELD_OUT) as run:
        # Fitted weights of an untrained network barely change its classes.
        with mock.patch("distav.training.report.fit_run_fusion", return_value=Fusion(0.1, 5.0, 0.2)):
            write_report(run)
        return run.folder


def test_exported_fusion_reproduces_the_reported_accuracy(tiny_shards: Path, tmp_path: Path):
    folder = on_ranks(1, reported, supervised_config(tmp_path), tmp_path, tiny_shards)[0]
    report = json.loads((folder / "report.json").read_text())
    description = json.loads((folder / "export" / "config.json").read_text())
    assert report["fusion"] == description["fusion"] == {"both": 0.1, "visual": 5.0, "audio": 0.2}
    embedder = Embedder.open(folder / "export", torch.device("cpu"))
    shards = ShardedDataset.open(str(tiny_shards))
    labels = load_labels(shards, shards.split("test"))
    logits = embedder.embed_clips(shards.split("test")).logits
    assert (logits.argmax(1) == labels.true).mean() == pytest.approx(report["test"]["top1"])
