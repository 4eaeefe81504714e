"""Evaluate an exported network on a dataset: k-NN, linear probe, retrieval, fine-tuning.

python distav/evaluate.py runs/mine/export shards/mine
python distav/evaluate.py runs/mine/export shards/mine --tasks linear_probe --labels runs/mine/labels/correct_2.parquet
deepspeed --num_gpus 8 distav/evaluate.py runs/mine/export shards/other --tasks fine_tune --out runs/fine_tuned

knn and linear_probe train on frozen features of the training split: visual, audio and both. fine_tune trains towers and
classifiers, as `train.py` does with model.pretrained. All metrics are computed on the test split; those of a modality
on the clips that have it. A balanced accuracy is the mean recall of the classes. On datasets with several labels per
clip, the metrics are mAP (macro), F1 at a probability of 0.5, and d-prime; retrieval compares complete label lists.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Python puts the directory of a script first in sys.path, where `data` or `models` would hide other packages.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import numpy as np

from distav.config.cli import (
    RANK_ARGUMENTS,
    CommandParser,
    add_rank_options,
    check_minimums,
    check_parent_dirs,
    exit_with_error,
    finite_float,
    run_command,
)
from distav.config.errors import UserError
from distav.config.phases import SupervisedPhase, Targets
from distav.config.schema import Config, Device, OptimConfig, RunConfig
from distav.data.annotations.labels import load_labels
from distav.data.annotations.multi_labels import load_multi_labels
from distav.data.dataset import ShardedDataset, Split
from distav.data.files import write_atomically
from distav.distributed.collectives import broadcast, local_shard
from distav.distributed.process_group import World, process_group
from distav.distributed.signals import EXIT_INTERRUPTED, Interrupted
from distav.evaluation.embedding import Embedder
from distav.evaluation.frozen_tasks import embed_split, knn_metrics, probe_metrics
from distav.evaluation.metrics import retrieval
from distav.models.pretrained import input_config, model_config

FROZEN_TASKS = ("knn", "linear_probe", "retrieval")
TASKS = (*FROZEN_TASKS, "fine_tune")
FINE_TUNE_TOWER_LR_SCALE = 0.3
ARGUMENTS = {
    "data.root": "SHARDS",
    "data.label_overrides": "--labels",
    "data.train_split": "--train-split",
    "data.test_split": "--test-split",
    "model.pretrained": "EXPORT",
    "optim.global_batch": "--global-batch",
    "optim.lr": "--lr",
    "phases.fine_tune.epochs": "--epochs",
    "run.name": "--out",
    "run.root": "--out",
    **RANK_ARGUMENTS,
}
"""Arguments by the setting of a run that they correspond to, for error messages."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        check_minimums(options, neighbors=1, batch_size=1, threads=0)
        check_parent_dirs(options, "json")
        with process_group(options.device, options.timeout_s, options.threads) as world:
            metrics = _evaluate(options, world)
            if world.is_main:
                _print_metrics(metrics)
                if options.json:
                    write_atomically(options.json, (json.dumps(metrics, indent=1) + "\n").encode())
    except UserError as error:
        return exit_with_error(error, "evaluate", ARGUMENTS)
    except Interrupted as interruption:
        print(f"evaluate: {interruption}; the same command resumes the run", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("export", type=Path, metavar="EXPORT", help="export/ directory of a run")
    add("shards", metavar="SHARDS", help="dataset: a directory of shards or its URL")
    add("--tasks", nargs="+", choices=TASKS, default=list(FROZEN_TASKS), help="tasks to run (all but fine_tune)")
    add("--train-split", default="train", metavar="NAME", help="split for training (%(default)s)")
    add("--test-split", default="test", metavar="NAME", help="split for testing (%(default)s)")
    add("--labels", default="", metavar="TABLE", help="training labels that replace those of the dataset")
    add("--json", type=Path, metavar="FILE", help="also write the metrics to this file")
    add("--neighbors", type=int, default=20, metavar="K", help="neighbors of knn (%(default)s)")
    add("--out", type=Path, default=Path("runs/fine_tuned"), help="run directory of fine_tune (%(default)s)")
    add("--epochs", type=int, default=12, help="epochs of fine_tune (%(default)s)")
    add(
        "--lr",
        type=finite_float,
        default=1e-3,
        help="learning rate of the classifiers in fine_tune; the towers use this rate times "
        f"{FINE_TUNE_TOWER_LR_SCALE:g} (%(default)s)",
    )
    add("--global-batch", type=int, default=128, help="samples per step of fine_tune over all ranks (%(default)s)")
    add_rank_options(parser, 32, "embedded")
    return parser


def _evaluate(options: argparse.Namespace, world: World) -> dict[str, Any]:
    shards = ShardedDataset.open(options.shards)
    embedder = Embedder.open(options.export, world.device, options.batch_size)
    train_split = shards.split(options.train_split, "--train-split")
    test_split = shards.split(options.test_split, "--test-split")
    train_labels = _labels(shards, train_split, options.labels, evaluated=False)
    test_labels = _labels(shards, test_split, "", evaluated=True)
    metrics: dict[str, Any] = {}
    frozen_tasks = [task for task in options.tasks if task in FROZEN_TASKS]
    if frozen_tasks:
        num_classes = len(shards.classes)
        test = embed_split(embedder, test_split, *test_labels)
        train = test
        if set(frozen_tasks) != {"retrieval"}:
            train = embed_split(embedder, train_split, *train_labels)
        for task in frozen_tasks:
            if task == "knn":
                metrics[task] = knn_metrics(train, test, num_classes, options.neighbors)
            elif task == "linear_probe":
                metrics[task] = probe_metrics(train, test, num_classes)
            else:
                rows = local_shard(test.visual_embedding), local_shard(test.audio_embedding)
                metrics[task] = retrieval(*rows, local_shard(test.paired_classes))
    if "fine_tune" in options.tasks:
        metrics["fine_tune"] = _fine_tune(options, embedder.description, world, shards.multi_label)
    return metrics


def _labels(shards: ShardedDataset, split: Split, override: str, evaluated: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels of a split, [N] or [N, C] bool, and the classes or combinations of classes, [N].

    Args:
        shards: the dataset.
        split: its split.
        override: table of labels that replace those of the dataset; empty for none.
        evaluated: whether to use the true labels, if the dataset stores them.
    """
    labels = load_labels(shards, split, override)
    classes = labels.true if evaluated and labels.true is not None else labels.given
    if not shards.multi_label:
        return classes, classes
    lists = load_multi_labels(shards, split, override)
    return (lists.reference if evaluated else lists.given), classes


def _fine_tune(
    options: argparse.Namespace, description: dict[str, Any], world: World, multi_label: bool
) -> dict[str, Any]:
    """Train towers and classifiers in a run of its own; return the test metrics of its report."""
    # Imported late, since importing DeepSpeed takes seconds.
    from distav.config.validation import validate
    from distav.training.phases.registry import run_remaining
    from distav.training.report import write_report
    from distav.training.run_setup import open_run

    phase = SupervisedPhase(
        epochs=options.epochs,
        targets=Targets.given,
        tower_lr_scale=FINE_TUNE_TOWER_LR_SCALE,
        loss="bce" if multi_label else "ce",
    )
    config = Config(
        run=RunConfig(
            name=options.out.name,
            root=str(options.out.parent),
            device=Device[options.device],
            timeout_s=options.timeout_s,
            threads_per_rank=options.threads,
        ),
        data=replace(
            input_config(description),
            root=options.shards,
            train_split=options.train_split,
            test_split=options.test_split,
            label_overrides=options.labels,
        ),
        model=replace(model_config(description), pretrained=str(options.export)),
        optim=OptimConfig(global_batch=options.global_batch, lr=options.lr),
        phases={"fine_tune": phase},
    )
    validate(config)
    with open_run(config, world) as run:
        run_remaining(run)
        write_report(run)
        report = run.folder / "report.json"
    return broadcast(json.loads(report.read_text())["test"] if world.is_main else None)


def _print_metrics(metrics: dict[str, Any]) -> None:
    for task, values in metrics.items():
        if not values:
            print(f"{task}: not possible, since no test clip has both modalities")
            continue
        rates = {name: value for name, value in values.items() if name not in ("rsum", "by_class")}
        texts = [
            f"{name} {value:.2f}" if name.startswith("d_prime") else f"{name} {100 * value:.1f} %"
            for name, value in rates.items()
        ]
        if "rsum" in values:
            texts.append(f"rSum {values['rsum']:.1f} of 600")
        print(f"{task}: {', '.join(texts)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
