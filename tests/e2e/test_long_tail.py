"""Training on long-tailed classes with balanced sampling and logit adjustment: resuming, ranks, report and summary."""

import ast
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distav.config.errors import UserError
from distav.config.loading import load
from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset
from distav.data.pipeline.class_balance import ClassBalance
from distav.data.pipeline.sampler import GlobalBatchSampler
from distav.data.preparation.noise_injection import LabelNoise
from distav.evaluate import main as evaluate
from tests.helpers.launch import TINY, arguments, losses, losses_by_step, tiny_config
from tests.helpers.long_tail import LongTailedSource, long_tailed_shards
from tests.helpers.rank_group import RankGroup, fingerprint, run_to_completion

PHASES = """phases:
  correction: {kind: label_correction, num_neighbors: [6, 12], second_round_neighbors: [0], min_log_likelihood_gain: 0}
  hybrid: {kind: supervised, epochs: 3, targets: hybrid, class_balance: 1.0, logit_adjustment: 1.0}
  given: {kind: supervised, epochs: 2, targets: given, loss: elr, class_balance: 0.5, logit_adjustment: 1.0}
"""
CONFIG = TINY[: TINY.index("phases:")] + PHASES


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = LongTailedSource(test_clips=22)
    return long_tailed_shards(tmp_path_factory.mktemp("long_tailed") / "shards", source, LabelNoise("symmetric", 0.1))


def options(folder: Path, shards: Path, *overrides: str) -> list[str]:
    words = arguments(folder, shards, "run.checkpoint_every=3", *overrides)
    tiny_config(folder, CONFIG)
    return words


def print_batches(_rank: int) -> None:
    from distav.training.loop import TrainingLoop

    original = TrainingLoop._accumulate

    def accumulate(self, step, batches):
        micro_batches, grad_norm = original(self, step, batches)
        print(self.name, "trains on", micro_batches[0][0].ids.tolist(), flush=True)
        return micro_batches, grad_norm

    TrainingLoop._accumulate = accumulate


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a finished run, and its output."""
    folder = tmp_path_factory.mktemp("run")
    group = RankGroup(1, options(folder, shards), folder / "logs", print_batches)
    assert group.wait() == [0], group.output()[-6000:]
    return folder / "tiny", group.output()


def kill_in_step_11(_rank: int) -> None:
    from distav.training.loop import TrainingLoop

    original = TrainingLoop._step

    def kill_or_step(self, step, batches):
        if self.run.progress.total_steps == 10:
            self.run.finish_saving()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, step, batches)

    TrainingLoop._step = kill_or_step


@pytest.mark.long
def test_run_killed_within_a_balanced_epoch_resumes_to_the_same_bytes(
    finished: tuple[Path, str], shards: Path, tmp_path: Path
):
    words = options(tmp_path, shards)
    assert RankGroup(1, words, tmp_path / "killed", kill_in_step_11).wait() == [-signal.SIGKILL]
    output = run_to_completion(1, words, tmp_path / "resumed").output()
    assert "resuming in phase hybrid after step 9" in output
    assert losses_by_step(tmp_path / "tiny") == losses_by_step(finished[0])
    assert fingerprint(tmp_path / "tiny") == fingerprint(finished[0])


@pytest.mark.long
def test_two_ranks_train_on_the_same_balanced_batches(finished: tuple[Path, str], shards: Path, tmp_path: Path):
    run_to_completion(2, options(tmp_path, shards), tmp_path / "logs")
    alone, together = losses(finished[0]), losses(tmp_path / "tiny")
    assert len(alone) == len(together) == 20
    np.testing.assert_allclose(together, alone, rtol=1e-3)


def test_report_and_summary_give_the_scores_of_each_class(finished: tuple[Path, str], shards: Path):
    run, output = finished
    report = json.loads((run / "report.json").read_text())
    table = pq.read_table(shards / "labels.parquet").to_pylist()
    train_labels, test_labels = ([row["label"] for row in table if row["split"] == name] for name in ("train", "test"))
    assert report["given_labels_by_class"] == {name: train_labels.count(name) for name in sorted(set(train_labels))}
    test, suffixes = report["test"], {"both": "", "visual": "_visual", "audio": "_audio"}
    assert test["by_class"].keys() == suffixes.keys()
    for name, scores in test["by_class"].items():
        assert {label: values["clips"] for label, values in scores.items()} == {
            label: test_labels.count(label) for label in sorted(set(test_labels))
        }
        recalls, clips = ([values[key] for values in scores.values()] for key in ("recall", "clips"))
        assert test[f"balanced_accuracy{suffixes[name]}"] == pytest.approx(np.mean(recalls))
        assert test[f"top1{suffixes[name]}"] == pytest.approx(np.average(recalls, weights=clips))
    line = next(line for line in output.splitlines() if line.startswith("  Classes:"))
    accuracy = f"balanced accuracy {100 * test['balanced_accuracy']:.1f} % (video and audio)"
    assert accuracy in line and line.endswith("training clips per class")
    assert (
        "no label signal" not in output
        and "phase=hybrid class_balance=1: a clip of the largest class is drawn 0." in output
    )
    card = (run / "export" / "README.md").read_text()
    assert '"balanced_accuracy"' in card and "by_class" not in card
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["test/balanced_accuracy"] == test["balanced_accuracy"] and "test/by_class" not in logged[-1]


def test_frozen_features_are_evaluated_with_balanced_accuracy(
    finished: tuple[Path, str], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [str(finished[0] / "export"), str(shards), "--tasks", "knn", "linear_probe", "--device", "cpu"]
    assert evaluate([*words, "--threads", "1", "--json", str(tmp_path / "metrics.json")]) == 0
    metrics, output = json.loads((tmp_path / "metrics.json").read_text())["metrics"], capsys.readouterr().out
    for task in ("knn", "linear_probe"):
        assert {f"balanced_{name}" for name in ("visual", "audio", "both")} <= metrics[task].keys()
        titles, *rows = (re.split(r"  +", line.strip()) for line in output.splitlines() if line.strip())
        (row,) = (row for row in rows if row[:2] == [task, "both"])
        assert row[titles.index("balanced, %")] == f"{100 * metrics[task]['balanced_both']:.1f}"


def test_phase_trains_on_the_draws_of_the_balanced_sampler(finished: tuple[Path, str], shards: Path):
    _, output = finished
    trained = [ast.literal_eval(ids) for ids in re.findall(r"^given trains on (.*)$", output, re.MULTILINE)]
    dataset = ShardedDataset.open(shards)
    given = load_labels(dataset, dataset.split("train")).given
    sampler = GlobalBatchSampler(dataset.split("train").shard_sizes, 2, 64, 24, 1, ClassBalance(given, 0.5))
    assert trained == [sampler.batch(step).tolist() for step in range(8)]
    largest = np.bincount(given).argmax()
    drawn = np.mean(given[np.concatenate(trained)] == largest)
    assert drawn < 0.8 * np.mean(given == largest)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phases.given.class_balance=1.5", "phases.given.class_balance=1.5: allowed: 0 to 1"),
        ("phases.given.class_balance=-0.1", "phases.given.class_balance=-0.1: allowed: 0 to 1"),
        ("phases.given.class_balance=sqrt", "phases.given.class_balance=sqrt: allowed: a number, 0 to 1"),
        ("phases.given.logit_adjustment=-1", "phases.given.logit_adjustment=-1.0: allowed: 0 or more"),
        ("phases.given.logit_adjustment=nan", "phases.given.logit_adjustment=nan: allowed: 0 or more"),
        ("phases.given.class_balanced=1", "Did you mean 'phases.given.class_balance'?"),
    ],
)
def test_invalid_settings_are_rejected(tmp_path: Path, override: str, message: str):
    with pytest.raises(UserError) as error:
        load(tiny_config(tmp_path, CONFIG), [override])
    assert message in str(error.value)
