"""Score an exported network on any set of shards: nearest neighbours, linear probe, retrieval, fine-tuning.

python distav/evaluate.py runs/mine/export shards/mine
python distav/evaluate.py runs/mine/export shards/other --tasks knn probe --labels runs/other/labels/correct_2.parquet
deepspeed --num_gpus 8 distav/evaluate.py runs/mine/export shards/other --tasks fine_tune --out runs/fine_tuned

knn and probe learn from the training split, with the towers as they are, by picture, by sound and by both; fine_tune
trains towers and classifiers on (as `train.py` does with model.pretrained). All are scored on the test split.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Started as a file, Python puts this folder first, where `data` or `models` would hide other packages.
sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != Path(__file__).resolve().parent]

import torch
from torch import Tensor

from distav.config.cli import add_rank_options, exit_with_error
from distav.config.errors import UserError
from distav.config.phases import SupervisedPhase, Targets
from distav.config.schema import Config, Device, OptimConfig, RunConfig
from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset, Split
from distav.data.files import write_atomically
from distav.distributed.collectives import (
    all_gather_variable_rows,
    all_reduce_sum_,
    broadcast,
    get_rank,
    local_shard,
    shard_range,
)
from distav.distributed.process_group import World, process_group
from distav.evaluation.embedding import Embedder
from distav.evaluation.metrics import retrieval
from distav.evaluation.probing import LinearProbe, knn_class_probs
from distav.models.pretrained import input_config, model_config

KINDS = ("knn", "probe", "retrieval", "fine_tune")
INPUTS = ("visual", "audio", "both")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        with process_group(options.device, options.timeout_s, options.threads) as world:
            found = _scores(options, world)
            if world.is_main:
                _tell(found)
                if options.json:
                    write_atomically(options.json, (json.dumps(found, indent=1) + "\n").encode())
    except UserError as error:
        return exit_with_error(error, "evaluate")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("export", type=Path, metavar="EXPORT", help="the export/ folder of a run")
    add("shards", metavar="SHARDS", help="a set of shards, or its URL")
    add("--tasks", nargs="+", choices=KINDS, default=list(KINDS[:3]), help="scores wanted (all but fine_tune)")
    add("--train-split", default="train", metavar="NAME", help="split that is learnt from (%(default)s)")
    add("--test-split", default="test", metavar="NAME", help="split that is scored (%(default)s)")
    add("--labels", default="", metavar="TABLE", help="labels to learn from in place of the set's")
    add("--json", type=Path, metavar="FILE", help="write the scores there too")
    add("--neighbors", type=int, default=20, metavar="K", help="neighbours that vote (%(default)s)")
    add("--out", type=Path, default=Path("runs/fine_tuned"), help="folder of fine-tuning's run (%(default)s)")
    add("--epochs", type=int, default=12, help="of fine-tuning (%(default)s)")
    add("--lr", type=float, default=1e-3, help="of the classifiers in fine-tuning, towers 0.3 of it (%(default)s)")
    add("--global-batch", type=int, default=128, help="of fine-tuning, over all ranks (%(default)s)")
    add_rank_options(parser, 32, "embedded")
    return parser


@dataclass(frozen=True)
class Embedded:
    """A split as the network sees it: features by modality and unit vectors of all its readable clips, on every rank.

    Attributes:
        features: [n, E] by modality.
        pairs: [n, D] unit vectors by picture and by sound.
        classes: [n] what they show.
        groups: [n] the videos they come from.
    """

    features: dict[str, Tensor]
    pairs: tuple[Tensor, Tensor]
    classes: Tensor
    groups: Tensor


def _scores(options: argparse.Namespace, world: World) -> dict[str, Any]:
    if options.json and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json={options.json}: no such folder; make it first.")
    if options.neighbors < 1:
        raise UserError(f"--neighbors={options.neighbors}: allowed: from 1 up.")
    shards = ShardedDataset.open(options.shards)
    if shards.multi_label:
        raise UserError(f"{shards.location}: its clips have several classes each; these scores are for one class a clip.")
    encoders = Embedder.open(options.export, world.device, options.batch_size)
    splits = shards.split(options.train_split, "--train-split"), shards.split(options.test_split, "--test-split")
    learnt, asked = load_labels(shards, splits[0], options.labels), load_labels(shards, splits[1])
    truth = asked.given if asked.true is None else asked.true
    found: dict[str, Any] = {}
    if frozen := [each for each in options.tasks if each != "fine_tune"]:
        test = _embedded(encoders, splits[1], torch.from_numpy(truth))
        train = _embedded(encoders, splits[0], torch.from_numpy(learnt.given)) if set(frozen) != {"retrieval"} else test
        ways = {
            "knn": lambda: _knn(train, test, len(shards.classes), options.neighbors),
            "probe": lambda: _probe(train, test, len(shards.classes)),
            "retrieval": lambda: retrieval(*map(local_shard, (*test.pairs, test.classes))),
        }
        found |= {name: ways[name]() for name in frozen}
    if "fine_tune" in options.tasks:
        found["fine_tune"] = _fine_tune(options, encoders.description, world)
    return found


def _embedded(encoders: Embedder, split: Split, classes: Tensor) -> Embedded:
    rows = shard_range(len(split))
    some = encoders.embed_clips(split, torch.arange(rows.start, rows.stop).numpy())

    def whole(rows: Any) -> Tensor:
        return all_gather_variable_rows(torch.from_numpy(rows).to(encoders.device))

    there = whole(some.valid.astype("float32")) > 0
    named = {"visual": some.visual, "audio": some.audio, "both": some.joint_features()}
    groups = torch.from_numpy(split.source_codes).to(encoders.device)
    return Embedded(
        {name: whole(each)[there] for name, each in named.items()},
        (whole(some.visual_embedding)[there], whole(some.audio_embedding)[there]),
        classes.to(encoders.device)[there],
        groups[there],
    )


def _knn(train: Embedded, test: Embedded, num_classes: int, k: int) -> dict[str, float]:
    found = {}
    for modality in INPUTS:
        votes = knn_class_probs(
            train.features[modality], train.classes, local_shard(test.features[modality]), num_classes, k
        )
        right = (votes.argmax(1) == local_shard(test.classes)).sum().double()
        found[modality] = float(all_reduce_sum_(right)) / max(1, len(test.classes))
    return found


def _probe(train: Embedded, test: Embedded, num_classes: int) -> dict[str, float]:
    """Fit on the main rank alone; the others wait."""
    found: dict[str, float] = {}
    if get_rank() == 0:
        for modality in INPUTS:
            probe = LinearProbe(train.features[modality], train.classes, num_classes, train.groups)
            found[modality] = float((probe(test.features[modality]).argmax(1) == test.classes).float().mean())
    return broadcast(found)


def _fine_tune(options: argparse.Namespace, description: dict[str, Any], world: World) -> dict[str, Any]:
    # Imported late: DeepSpeed takes seconds.
    from distav.config.validation import validate
    from distav.training.phases.registry import run_remaining
    from distav.training.report import write_report
    from distav.training.run import open_run

    data = replace(
        input_config(description),
        root=options.shards,
        train_split=options.train_split,
        test_split=options.test_split,
        label_overrides=options.labels,
    )
    settings = Config(
        run=RunConfig(
            name=options.out.name,
            root=str(options.out.parent),
            device=Device[options.device],
            timeout_s=options.timeout_s,
            threads_per_rank=options.threads,
        ),
        data=data,
        model=replace(model_config(description), pretrained=str(options.export)),
        optim=OptimConfig(global_batch=options.global_batch, lr=options.lr),
        phases={"fine_tune": SupervisedPhase(epochs=options.epochs, targets=Targets.given, tower_lr_scale=0.3)},
    )
    validate(settings)
    with open_run(settings, world) as run:
        run_remaining(run)
        write_report(run)
        report = run.folder / "report.json"
    return broadcast(json.loads(report.read_text())["test"] if world.is_main else None)


def _tell(found: dict[str, Any]) -> None:
    for name, scores in found.items():
        said = ", ".join(f"{key} {100 * value:.1f} %" for key, value in scores.items() if key != "rsum")
        print(f"{name}: {said}" + (f", rSum {scores['rsum']:.1f} of 600" if "rsum" in scores else ""))


if __name__ == "__main__":
    sys.exit(main())
