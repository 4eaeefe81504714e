"""Class priors, balanced sampling and adjusted logits of a supervised phase."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distav.config import loading
from distav.config.phases import Targets
from distav.data.pipeline.class_balance import ClassBalance
from distav.distributed.collectives import get_rank, get_world_size
from distav.distributed.process_group import World
from distav.losses.classification import (
    ClassificationLoss,
    early_learning_regularization,
    generalized_cross_entropy,
    hybrid_targets,
    soft_cross_entropy,
)
from distav.losses.reduction import weighted_mean
from distav.training.final_evaluation import evaluate_clips
from distav.training.phases import supervised
from distav.training.phases.classifier_targets import ClassifierTargets
from distav.training.run import Run
from distav.training.run_setup import open_run
from distav.training.run_state import CorrectionState
from tests.helpers.launch import TINY, tiny_config
from tests.helpers.spawn import on_ranks

HEADS = ("logits", "visual_logits", "audio_logits")


def store_correction(run: Run) -> dict[str, torch.Tensor]:
    """Store a random correction in the memory bank, the same for any number of ranks, and return it."""
    generator = torch.Generator().manual_seed(3)
    shape = (len(run.data.train), len(run.data.shards.classes))
    names = ("posterior", "visual_posterior", "audio_posterior", "held_out", "visual_held_out", "audio_held_out")
    columns = {name: (3 * torch.randn(shape, generator=generator)).softmax(1) for name in names}
    columns["correspondence"] = torch.rand(shape[0], generator=generator)
    for name, column in columns.items():
        run.bank.store_column(name, column[run.bank.rows.start : run.bank.rows.stop])
    run.state.correction = CorrectionState(has_signal=True)
    return columns


def hide_modalities(run: Run) -> dict[str, np.ndarray]:
    """Make every fifth clip lack its video and every seventh its audio; return which clips have each modality."""
    ids = np.arange(len(run.data.train))
    has = {"visual": ids % 5 > 0, "audio": (ids % 7 > 0) | (ids % 5 == 0)}
    for name, column in (("visual", "video_bytes"), ("audio", "audio_bytes")):
        run.data.train.columns[column] = run.data.train.columns[column] * has[name]
    return has


def expected_targets(run: Run, kind: Targets, columns: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    given = torch.from_numpy(run.data.labels.given)
    if kind is Targets.given:
        return [F.one_hot(given, 6).float()] * 3
    if kind is Targets.hybrid:
        votes = columns["held_out"]
        return [hybrid_targets(given, votes, votes.amax(1))] * 2 + [columns["audio_posterior"]]
    visual, audio = (columns[f"{role}_{kind.name}"] for role in ("visual", "audio"))
    return [(visual * audio).sqrt() / (visual * audio).sqrt().sum(1, keepdim=True), visual, audio]


def priors_differ(file: Path, root: Path, shards: Path) -> dict[str, tuple[Any, Any]]:
    """Return priors and draws of each kind of targets, next to those of a formula in numpy."""
    overrides = [f"data.root={shards}", f"run.root={root}"]
    world = World(get_rank(), get_world_size(), 0, torch.device("cpu"))
    results: dict[str, tuple[Any, Any]] = {}
    with open_run(loading.load(file, overrides), world) as run:
        columns, has = store_correction(run), hide_modalities(run)
        for kind in (Targets.given, Targets.posterior, Targets.held_out, Targets.hybrid):
            targets = ClassifierTargets(run, kind)
            expected = [head.double().numpy() for head in expected_targets(run, kind, columns)]
            balance = targets.balance(0.5)
            results[f"{kind.name} classes"] = balance.classes, expected[0].argmax(1)
            pair_weights = 1.0 if kind is Targets.given else columns["correspondence"].double().numpy()
            weights = [has["visual"] * has["audio"] * pair_weights, has["visual"], has["audio"]]
            for name, sampling in (("", None), (" balanced", balance)):
                draws = np.ones(len(balance.classes)) if sampling is None else sampling.rates
                sums = [(draws * weight) @ head for weight, head in zip(weights, expected, strict=True)]
                priors = [np.maximum(total, 1) / np.maximum(total, 1).sum() for total in sums]
                results[f"{kind.name} priors{name}"] = targets.log_priors(sampling).numpy(), np.log(priors)
    return results


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_class_priors_follow_targets_modalities_and_draws(tiny_shards: Path, tmp_path: Path, num_ranks: int):
    for results in on_ranks(num_ranks, priors_differ, tiny_config(tmp_path), tmp_path, tiny_shards):
        assert len(results) == 12
        for name, (result, expected) in results.items():
            np.testing.assert_allclose(result, expected, rtol=1e-5, err_msg=name)


def losses_of_a_batch(file: Path, overrides: list[str]) -> dict[str, tuple[float, float]]:
    """Return the losses of a batch in a supervised phase, and those of the formulas for adjusted logits."""
    with open_run(loading.load(file, overrides), World(0, 1, 0, torch.device("cpu"))) as run:
        config: Any = run.config.phases["last"]
        with mock.patch.object(supervised, "train") as train, mock.patch.object(ClassificationLoss, "end_phase"):
            supervised.run_supervised(run, "last", config)
        run.engine.train()
        batch = run.loader.load(run.sampler(0).batch(0), 0)
        losses = train.call_args.args[4](batch, 0.0)
        outputs = run.engine(batch)
        counts = np.bincount(run.data.labels.given, minlength=6)
        offsets = torch.from_numpy(config.logit_adjustment * np.log(counts / counts.sum())).float()
        targets = F.one_hot(torch.from_numpy(run.data.labels.given)[batch.ids], 6).float()
        results = {}
        for name, head in zip(("both", "visual", "audio"), HEADS, strict=True):
            adjusted = outputs[head] + offsets
            if config.loss == "gce":
                expected = generalized_cross_entropy(adjusted, targets, config.gce_q)
            else:
                expected = soft_cross_entropy(adjusted, targets)
            if config.loss == "elr":
                averages = (1 - config.elr_momentum) * adjusted.softmax(1).clamp(1e-4, 1 - 1e-4)
                regularization = early_learning_regularization(adjusted, averages.detach())
                expected = expected + config.elr_weight * regularization
            results[name] = float(losses[name]), float(weighted_mean(expected, torch.ones(len(batch.ids))))
    return results


@pytest.mark.parametrize("loss", ["ce", "gce", "elr"])
def test_losses_are_those_of_adjusted_logits(tiny_shards: Path, tmp_path: Path, loss: str):
    phase = f"  last: {{kind: supervised, targets: given, loss: {loss}, logit_adjustment: 1.5}}\n"
    file = tiny_config(tmp_path, TINY[: TINY.index("phases:")] + "phases:\n" + phase)
    overrides = [f"data.root={tiny_shards}", f"run.root={tmp_path}"]
    for name, (result, expected) in on_ranks(1, losses_of_a_batch, file, overrides)[0].items():
        assert result == pytest.approx(expected, rel=1e-4), name


def test_frequencies_of_less_than_one_clip_count_as_one(tiny_shards: Path, tmp_path: Path):
    (log_priors,) = on_ranks(1, priors_of_two_classes, tiny_config(tmp_path), tmp_path, tiny_shards)
    np.testing.assert_allclose(np.exp(log_priors), [[90 / 100, 6 / 100, *[1 / 100] * 4]] * 3, rtol=1e-5)


def priors_of_two_classes(file: Path, root: Path, shards: Path) -> np.ndarray:
    overrides = [f"data.root={shards}", f"run.root={root}"]
    with open_run(loading.load(file, overrides), World(0, 1, 0, torch.device("cpu"))) as run:
        run.data.labels.given[:] = np.arange(96) < 6
        return ClassifierTargets(run, Targets.given).log_priors(None).numpy()


def evaluated(file: Path, root: Path, shards: Path, hide_audio: bool) -> tuple[Any, dict[str, Any]]:
    """Return the metrics of an untrained network on clips with one modality, and the labels by classifier."""
    overrides = [f"data.root={shards}", f"run.root={root}"]
    world = World(get_rank(), get_world_size(), 0, torch.device("cpu"))
    with open_run(loading.load(file, overrides), world) as run:
        test, labels = run.data.test, run.data.test_labels
        assert test is not None and labels is not None and labels.true is not None
        labels.true[labels.true == 4] = 3  # A class without test clips.
        has = {"visual": np.arange(len(test)) % 4 > 0, "audio": (np.arange(len(test)) % 4 < 2) & (not hide_audio)}
        for name, column in (("visual", "video_bytes"), ("audio", "audio_bytes")):
            test.columns[column] = test.columns[column] * has[name]
        metrics = evaluate_clips(run)
        return metrics, {name: labels.true[present] for name, present in has.items()} | {"both": labels.true}


@pytest.mark.parametrize(("num_ranks", "hide_audio"), [(1, False), (2, False), (1, True)])
def test_clips_with_one_modality_and_classes_without_clips_are_scored(
    tiny_shards: Path, tmp_path: Path, num_ranks: int, hide_audio: bool
):
    results = on_ranks(num_ranks, evaluated, tiny_config(tmp_path), tmp_path, tiny_shards, hide_audio)
    metrics, labels = results[0]
    assert metrics["by_class"].keys() == {"both", "visual"} if hide_audio else {"both", "visual", "audio"}
    assert ("balanced_accuracy_audio" in metrics) == ("top1_audio" in metrics) == (not hide_audio)
    for name, scores in metrics["by_class"].items():
        suffix = "" if name == "both" else f"_{name}"
        clips = np.bincount(labels[name], minlength=6)
        assert [values["clips"] for values in scores.values()] == clips.tolist() and clips[4] == 0
        assert [values["recall"] is None for values in scores.values()] == (clips == 0).tolist()
        recalls = [values["recall"] for values in scores.values() if values["clips"]]
        assert metrics[f"balanced_accuracy{suffix}"] == pytest.approx(np.mean(recalls))
        assert metrics[f"top1{suffix}"] == pytest.approx(np.average(recalls, weights=clips[clips > 0]))


def test_balance_of_one_class_draws_every_clip_once():
    assert ClassBalance(np.full(10, 3), 1.0).draw(np.random.default_rng(0)).tolist() == [1] * 10
