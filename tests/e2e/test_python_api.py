"""Training and preparation of datasets from Python, and the examples of tools/examples."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

import distav
from distav.api import FinishedRun
from distav.config import loading
from distav.config.errors import UserError
from distav.config.schema import Config, OptimConfig
from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset
from tests.conftest import ROOT
from tests.helpers.launch import environment, slurm_task
from tools.examples import fine_tune_encoders

TRAIN = """
import sys
import distav

settings = {{"data.root": "{shards}", "data.synthetic.enabled": False, "run.root": "{root}", "run.name": "api",
            "model.visual.width": 8, "model.audio.width": 8, "optim.global_batch": 24,
            "phases.correct_1.num_neighbors": [12]}}
settings |= {{f"phases.{{name}}.epochs": 1 for name in ("contrastive", "learn_1", "learn_2")}}
for attempt in range(2):  # The second call finds the run finished.
    finished = distav.train("quickstart", settings)
    print(finished.labels().num_rows, len(finished.encoders()[1]["classes"]), finished.report["samples"])
"""


def test_datasets_are_built_and_cleaned(tmp_path: Path):
    environment_before = dict(os.environ)
    built = distav.make_shards(
        "synthetic", tmp_path / "set", train_clips=20, test_clips=8, workers=1, label_noise="symmetric:0.4", part=None
    )
    assert built.clips == {"test": 8, "train": 20} and not built.rejected
    dataset = ShardedDataset.open(tmp_path / "set")
    split = dataset.split("train")
    first, second = split.keys[:2]
    other = dataset.classes[(int(load_labels(dataset, split).given[1]) + 1) % len(dataset.classes)]
    decisions = tmp_path / "decisions.csv"
    decisions.write_text(f"key,label,action\n{first},,remove\n{second},{other},\n")
    cleaned = distav.make_shards("clean", tmp_path / "set", tmp_path / "clean", decisions=[decisions], workers=1)
    assert cleaned.clips["train"] == 19 and cleaned.rejected == 1 and cleaned.num_relabeled == 1
    assert dict(os.environ) == environment_before  # Webdataset has variables for all its users.


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("synthetik", "out"), {}, "make_shards: .*'synthetik'.*Did you mean 'synthetic'"),
        (("synthetic", "out"), {"train_clipz": 3}, "make_shards: unknown option --train-clipz"),
        (("synthetic", "out"), {"train_clips": "many"}, "make_shards: --train-clips: "),
        (("synthetic", "out"), {"workers": 0}, "--workers=0: allowed: 1 or more"),
        (("clean", "missing", "out"), {"labels": "labels.parquet"}, "SHARDS=missing: no such directory"),
    ],
)
def test_invalid_arguments_of_make_shards_are_errors(
    arguments: tuple[str, ...],
    options: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        distav.make_shards(*arguments, **options)


def test_public_names_are_those_of_their_modules():
    assert sorted(distav._MODULES) == sorted(set(distav.__all__) - {"train", "__version__"})
    assert all(getattr(distav, name).__name__ == name for name in distav._MODULES)
    assert issubclass(distav.UserError, ValueError) and callable(distav.train)


@pytest.mark.parametrize("name", ["quickstart", "multilabel", "valor_plus_plus"])
def test_the_check_of_a_config_changes_nothing(name: str):
    config = loading.load(name)
    assert loading.check(config) == config


def test_invalid_arguments_of_train_are_errors():
    with pytest.raises(UserError, match="overrides='optim.lr=1': allowed: a list of texts"):
        distav.train("quickstart", "optim.lr=1")
    with pytest.raises(UserError, match="overrides are given with a Config"):
        distav.train(Config(), ["optim.lr=1"])
    for config in (3, None):
        with pytest.raises(UserError, match=f"config={config}: allowed: the name of a configuration"):
            distav.train(cast(Any, config))
    with pytest.raises(UserError, match="'optim' is a section; give its settings by their full names: 'optim.lr'"):
        distav.train("quickstart", {"optim": {"lr": 1}})
    phases = loading.load("quickstart").phases
    with pytest.raises(UserError, match="optim.lr=-1.0: allowed"):
        distav.train(Config(phases=phases, optim=OptimConfig(lr=-1)))
    with pytest.raises(UserError, match="optim.global_batch=x: allowed"):
        distav.train(Config(phases=phases, optim=OptimConfig(global_batch=cast(Any, "x"))))
    with pytest.raises(UserError, match="phases={}: allowed: at least one phase"):
        distav.train(Config())
    with pytest.raises(UserError, match="optim.lrr"):
        distav.train("quickstart", {"optim.lrr": 1})
    with pytest.raises(UserError, match="no phase of this run corrected labels"):
        FinishedRun(Path("runs/x"), {}).labels()


def test_tasks_of_slurm_train_together(tiny_shards: Path, tmp_path: Path):
    phases = loading.load("quickstart").phases
    overrides = [
        f"data.root={tiny_shards}", f"run.root={tmp_path}", "run.name=slurm", "model.visual.width=8",
        "model.audio.width=8", "optim.global_batch=24", "phases.learn_2.epochs=1", "phases.learn_2.targets=given",
        *(f"~phases.{name}" for name in phases if name != "learn_2"),
    ]  # fmt: skip
    program = f"import distav; print(distav.train('quickstart', {overrides!r}).report['samples'])"
    processes = []
    for rank in range(2):
        variables = slurm_task(rank, 2)
        words = [sys.executable, "-c", program]
        processes.append(
            subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment() | variables, cwd=ROOT)
        )
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "2 rank(s)" in outputs[0] and [output.split()[-1] for output in outputs] == ["96", "96"]


@pytest.mark.long
def test_training_returns_labels_report_and_encoders(tiny_shards: Path, tmp_path: Path):
    program = TRAIN.format(shards=tiny_shards, root=tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line == "96 6 96"] == ["96 6 96"] * 2
    assert json.loads((tmp_path / "api" / "report.json").read_text())["samples"] == 96


@pytest.mark.long
def test_encoders_are_fine_tuned_by_the_example(
    finished: tuple[Path, str], tiny_shards: Path, capsys: pytest.CaptureFixture[str]
):
    accuracy = fine_tune_encoders.main(finished[0] / "export", tiny_shards, epochs=4)
    losses = [float(text) for text in re.findall(r"epoch \d: loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert 0 <= accuracy <= 1
