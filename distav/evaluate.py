"""Evaluate an exported network on datasets: k-NN, linear probe, SVM, retrieval, zero-shot, fine-tuning.

python distav/evaluate.py runs/mine/export shards/mine
python distav/evaluate.py runs/mine/export shards/esc50-1 shards/esc50-2 shards/esc50-3 --protocol esc50
deepspeed --num_gpus 8 distav/evaluate.py runs/mine/export shards/ucf101-1 --protocol ucf101 --out runs/ucf101

knn, linear_probe and svm train on frozen features of the training split: visual, audio and both. fine_tune trains
towers and classifiers, as `train.py` does with model.pretrained. zero_shot compares the features of towers from a
pretrained checkpoint with texts that name the classes, by the text network of that checkpoint. Metrics are those of the
test split: accuracies (top1, top5), mean recall (balanced), F1 (f1_macro) and average precision (map) of the classes;
those of a modality on the clips that have it. On datasets with several labels per clip: mAP, F1 at a probability of 0.5
and d-prime; retrieval compares complete label lists. Several datasets are folds, over which the metrics are averaged. A
protocol is a YAML file of options, or the name of one in configs/protocols; options on the command line replace its
values.
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
    command,
    exit_with_error,
    finite_float,
)
from distav.config.errors import UserError
from distav.config.schema import Device, RunConfig
from distav.data.annotations.labels import load_labels
from distav.data.annotations.multi_labels import load_multi_labels
from distav.data.dataset import ShardedDataset, Split
from distav.data.files import write_atomically
from distav.distributed.collectives import broadcast, local_shard
from distav.distributed.launch import set_rank_variables
from distav.distributed.process_group import World, process_group
from distav.distributed.signals import EXIT_INTERRUPTED, Interrupted
from distav.evaluation.embedding import Embedder
from distav.evaluation.frozen_tasks import PROBES, classifier_metrics, embed_split, knn_metrics, probe_metrics
from distav.evaluation.metrics import retrieval
from distav.evaluation.protocols import parse_with_protocol
from distav.evaluation.summary import format_metrics, over_folds, record
from distav.evaluation.zero_shot import OPTION as TEXT_NETWORKS
from distav.evaluation.zero_shot import ZeroShot
from distav.models.families.text_networks import TextNetwork
from distav.models.hub import export_folder
from distav.models.pretrained import input_config

FROZEN_TASKS = ("knn", *PROBES, "retrieval", "zero_shot")
UNTRAINED = ("retrieval", "zero_shot")
"""Tasks that need no training split."""
TASKS = (*FROZEN_TASKS, "fine_tune")
ARGUMENTS = {
    "data.root": "SHARDS",
    "data.label_overrides": "--labels",
    "data.train_split": "--train-split",
    "data.test_split": "--test-split",
    "model.pretrained": "EXPORT",
    "optim.global_batch": "--global-batch",
    "optim.lr": "--lr",
    "phases.fine_tune.epochs": "--epochs",
    "phases.fine_tune.tower_lr_scale": "--tower-lr-scale",
    "run.name": "--out",
    "run.root": "--out",
    **RANK_ARGUMENTS,
}
"""Arguments by the setting of a run that they correspond to, for error messages."""


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    set_rank_variables()
    try:
        options = parse_with_protocol(_parser(), arguments)
        check_minimums(options, neighbors=1, batch_size=1, threads=0, views=1, epochs=1, warmup_epochs=0)
        check_parent_dirs(options, "json")
        for folder in options.shards:
            if options.shards.count(folder) > 1:
                raise UserError(f"SHARDS: {folder} is listed more than once; list each fold once.")
        with process_group(options.device, options.timeout_s, options.threads) as world:
            options.export = export_folder(options.export)
            zero_shot = _zero_shot(options, world) if "zero_shot" in options.tasks else None
            folds = [_evaluate(options, folder, world, zero_shot) for folder in options.shards]
            if world.is_main:
                results = over_folds(folds)
                print(format_metrics(results))
                if options.json:
                    results |= record(options)
                    write_atomically(options.json, (json.dumps(results, indent=1) + "\n").encode())
    except UserError as error:
        return exit_with_error(error, "evaluate", ARGUMENTS)
    except Interrupted as interruption:
        print(f"evaluate: {interruption}; the same command resumes the run", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        script="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("export", metavar="EXPORT", help="export/ directory of a run, or hf://USER/NAME[@REVISION] on the hub")
    add("shards", nargs="+", metavar="SHARDS", help="dataset, or one for each fold: directories of shards or URLs")
    add("--protocol", default="", metavar="FILE", help="YAML file of options, or the name of one in configs/protocols")
    add("--tasks", nargs="+", choices=TASKS, default=["knn", "linear_probe", "retrieval"],
        help="tasks to run (knn, linear_probe, retrieval)")  # fmt: skip
    add("--train-split", default="train", metavar="NAME", help="split for training (%(default)s)")
    add("--test-split", default="test", metavar="NAME", help="split for testing (%(default)s)")
    add("--labels", default="", metavar="TABLE", help="training labels that replace those of the dataset")
    add("--views", type=int, default=1, metavar="V",
        help="evenly spaced parts of each clip whose scores are averaged (%(default)s: its middle)")  # fmt: skip
    add("--by-video", action="store_true", help="average the scores of all clips of a video, which counts once")
    add("--json", type=Path, metavar="FILE", help="also write the metrics to this file")
    add("--neighbors", type=int, default=20, metavar="K", help="neighbors of knn (%(default)s)")
    add(TEXT_NETWORKS, nargs="+", default=[], metavar="NAME",
        help="checkpoints of the towers for zero_shot, such as hf:openai/clip-vit-base-patch16")  # fmt: skip
    add("--visual-prompts", nargs="+", default=[], metavar="TEXT",
        help="texts for zero_shot by frames, with {} for the class (a photo of {}.)")  # fmt: skip
    add("--audio-prompts", nargs="+", default=[], metavar="TEXT",
        help="texts for zero_shot by audio (This is a sound of {}.)")  # fmt: skip
    add("--out", type=Path, default=Path("runs/fine_tuned"),
        help="run directory of fine_tune (%(default)s); of several folds, with -1, -2 and so on appended")  # fmt: skip
    add("--epochs", type=int, default=12, help="epochs of fine_tune (%(default)s)")
    add("--warmup-epochs", type=int, default=0, help="epochs of the classifiers alone before them (%(default)s)")
    add("--lr", type=finite_float, default=1e-3, help="learning rate of the classifiers in fine_tune (%(default)s)")
    add("--tower-lr-scale", type=finite_float, default=0.3, help="factor on it for the towers (%(default)s)")
    add("--global-batch", type=int, default=128, help="samples per step of fine_tune over all ranks (%(default)s)")
    add_rank_options(parser, 32, "embedded")
    return parser


def _evaluate(options: argparse.Namespace, folder: str, world: World, zero_shot: ZeroShot | None) -> dict[str, Any]:
    """Evaluate on one dataset; returns its description, and the metrics by task."""
    shards = ShardedDataset.open(folder)
    embedder = Embedder.open(options.export, world.device, options.batch_size)
    if zero_shot:
        zero_shot.check_towers(embedder.description)
    train_split = shards.split(options.train_split, "--train-split")
    test_split = shards.split(options.test_split, "--test-split")
    train_labels = _labels(shards, train_split, options.labels, evaluated=False)
    test_labels = _labels(shards, test_split, "", evaluated=True)
    metrics: dict[str, Any] = {}
    if world.is_main:
        print(f"{folder}: {len(train_split)} training and {len(test_split)} test clips", file=sys.stderr)
    frozen_tasks = [task for task in options.tasks if task in FROZEN_TASKS]
    if frozen_tasks:
        num_classes = len(shards.classes)
        test = embed_split(embedder, test_split, *test_labels, options.views)
        train = test
        if not set(frozen_tasks) <= set(UNTRAINED):
            train = embed_split(embedder, train_split, *train_labels, options.views)
        for task in frozen_tasks:
            if task == "knn":
                metrics[task] = knn_metrics(train, test, num_classes, options.neighbors, options.by_video)
            elif task in PROBES:
                metrics[task] = probe_metrics(train, test, num_classes, task, options.by_video)
            elif task == "zero_shot":
                assert zero_shot
                metrics[task] = zero_shot.metrics(test, shards.classes, options.by_video)
            else:
                rows = local_shard(test.visual_embedding), local_shard(test.audio_embedding)
                metrics[task] = retrieval(*rows, local_shard(test.paired_classes))
    if "fine_tune" in options.tasks:
        export = _fine_tune(options, folder, embedder.description, world, shards.multi_label)
        tuned = Embedder.open(export, world.device, options.batch_size)
        metrics["fine_tune"] = classifier_metrics(tuned, test_split, test_labels[0], options.views, options.by_video)
    return {
        "data": folder,
        "source": shards.manifest.get("recipe", {}).get("source"),  # With the fold of an official list.
        "train_split": train_split.name,
        "test_split": test_split.name,
        "train_clips": len(train_split),
        "test_clips": len(test_split),
        "test_videos": len(set(test_split.sources.tolist())),
        "classes": len(shards.classes),
        "metrics": metrics,
    }


def _zero_shot(options: argparse.Namespace, world: World) -> ZeroShot:
    """Load the text networks.

    Raises:
        UserError: if there are none, or one cannot be loaded.
    """
    if not options.text_networks:
        raise UserError(
            f"--tasks zero_shot: {TEXT_NETWORKS} is missing; give the checkpoint that a tower was made from, such as "
            "hf:openai/clip-vit-base-patch16."
        )
    networks = [TextNetwork(TEXT_NETWORKS, name, world.device) for name in options.text_networks]
    return ZeroShot.of(networks, {"visual": options.visual_prompts, "audio": options.audio_prompts})


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
    options: argparse.Namespace, folder: str, description: dict[str, Any], world: World, multi_label: bool
) -> Path:
    """Train towers and classifiers in a run of its own; return its `export/` directory."""
    # Imported late, since importing DeepSpeed takes seconds.
    from distav.training.fine_tuning import FineTuning, fine_tune

    out: Path = options.out
    suffix = f"-{options.shards.index(folder) + 1}" if len(options.shards) > 1 else ""
    run = RunConfig(
        name=out.name + suffix,
        root=str(out.parent),
        device=Device[options.device],
        timeout_s=options.timeout_s,
        threads_per_rank=options.threads,
    )
    data = replace(
        input_config(description),
        root=folder,
        train_split=options.train_split,
        test_split=options.test_split,
        label_overrides=options.labels,
    )
    settings = FineTuning(
        options.epochs, options.warmup_epochs, options.lr, options.tower_lr_scale, options.global_batch
    )
    export = fine_tune(settings, run, data, options.export, description, multi_label, world)
    return broadcast(export if world.is_main else None)  # All ranks wait until rank 0 has written it.


if __name__ == "__main__":
    sys.exit(main())
