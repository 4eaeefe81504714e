"""Pseudo-label events: audio and visual events of each second, predicted by teachers (VALOR, Lai et al. 2023).

tools/pseudo_label.py shards/llp_clips --prompts configs/teachers/llp.yaml --out labels/llp
deepspeed --num_gpus 8 tools/pseudo_label.py shards/llp_clips --prompts configs/teachers/llp.yaml --out labels/llp

A teacher for each modality scores every second. An event is predicted where the score exceeds the threshold of a class
that the label of the clip contains. The scores are kept in OUT/scores: rerun the same command to resume after an
interruption, or with other thresholds to write new tables without running the teachers again.

A clip without audio or without video has events of the other modality only; its missing scores are NaN.

OUT is the value of `phases.NAME.pseudo_labels`. OUT/quality.json has the accuracy on the splits with annotated events.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distav.config.cli import (
    RANK_ARGUMENTS,
    CommandParser,
    add_rank_options,
    check_minimums,
    command,
    exit_with_error,
)
from distav.config.errors import UserError, format_list
from distav.config.schema import DataConfig
from distav.console import Cell, WorkCounter, format_table
from distav.data.annotations.events import events_table, load_events, num_segments
from distav.data.annotations.teacher_scores import (
    CHUNK,
    metadata_file,
    read_scores,
    score_files,
    score_metadata,
    write_scores,
)
from distav.data.dataset import ShardedDataset, Split
from distav.data.files import claim_dir, write_atomically, write_table
from distav.data.modalities import MODALITIES
from distav.data.pipeline.loader import Batch, Loader
from distav.data.pipeline.sampler import PADDING, padded_batches
from distav.distributed.collectives import barrier, run_on_main_rank
from distav.distributed.launch import set_rank_variables
from distav.distributed.process_group import World, process_group
from distav.evaluation.event_metrics import event_metrics
from distav.evaluation.inference import iter_outputs
from distav.tools.chunks import chunk_progress, missing_chunks, rank_chunks
from distav.tools.pseudo_label.prompts import Prompts, read_prompts
from distav.tools.pseudo_label.teachers import TEACHERS, Teacher

MEDIA = {"audio": "audio", "visual": "frames"}
"""Name of each modality in the media of a batch."""

_SUMMARY_HEAD = (
    "split", "clips", "labels with audio events, %", "with visual events, %",
    "segment F-score audio", "visual", "Type@AV", "Event@AV",
)  # fmt: skip
_OUT_ADVICE = "choose another --out, or fix the directory"


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    set_rank_variables()
    options = _parser().parse_args(arguments)
    try:
        check_minimums(options, batch_size=1, threads=0)
        shards = ShardedDataset.open(options.shards, cache_mib=DataConfig().cache_mib)
        prompts = read_prompts(options.prompts)
        _check_teachers(prompts, options.prompts)
        class_indices = _class_indices(shards, prompts, options.prompts)
        splits = [shards.split(name, "--splits") for name in options.splits or shards.manifest["splits"]]
        with process_group(options.device, options.timeout_s, options.threads) as world:
            run_on_main_rank(lambda: _claim(options.out, shards, prompts), _OUT_ADVICE)
            for split in splits:
                _score(split, prompts, options.out, options.batch_size, world)
            barrier()
            run_on_main_rank(lambda: _write_events(shards, prompts, class_indices, options.out), _OUT_ADVICE)
    except UserError as error:
        return exit_with_error(error, "pseudo_label", {"data.root": "SHARDS", **RANK_ARGUMENTS})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        script="pseudo_label.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("shards", metavar="SHARDS", help="directory or URL of a dataset of clips")
    add("--prompts", type=Path, required=True, metavar="FILE", help="teachers, captions and thresholds (YAML)")
    add("--out", type=Path, required=True, metavar="OUT", help="directory of scores and tables")
    add("--splits", nargs="+", default=[], metavar="NAME", help="splits to label (default: all)")
    add_rank_options(parser, 8, "scored")
    return parser


def _check_teachers(prompts: dict[str, Prompts], path: Path) -> None:
    """Check that the prompts file names a registered teacher of each modality.

    Raises:
        UserError: if it does not.
    """
    for modality, entry in prompts.items():
        teacher = TEACHERS.select(entry.teacher, f"{path}: {modality}.teacher")
        if teacher.modality != modality:
            allowed = [name for name in TEACHERS if TEACHERS[name].modality == modality]
            raise UserError(
                f"{path}: {modality}.teacher={entry.teacher}: scores the modality '{teacher.modality}'; allowed: "
                f"{format_list(allowed)}."
            )


def _class_indices(shards: ShardedDataset, prompts: dict[str, Prompts], path: Path) -> list[int]:
    """Return the index in the prompts of each class of the dataset.

    Raises:
        UserError: if the dataset cannot be scored, or if it has a class without prompts.
    """
    if shards.streams:
        raise UserError(f"{shards.location}: a dataset of features; teachers need a dataset of clips.")
    fps = float(shards.manifest["fps"])
    if fps != max(1, round(fps)):
        raise UserError(
            f"{shards.location}: {fps:g} frames per second; teachers need an integer frame rate. Build the dataset "
            "again with another --fps."
        )
    prompt_classes = prompts[MODALITIES[0]].classes
    missing = [name for name in shards.classes if name not in prompt_classes]
    if missing:
        raise UserError(
            f"{path}: no prompts for the classes {format_list(missing)} of {shards.location}; add them under "
            "`classes`, with a caption and a threshold for each modality."
        )
    return [prompt_classes.index(name) for name in shards.classes]


def _claim(out: Path, shards: ShardedDataset, prompts: dict[str, Prompts]) -> None:
    """Check that the scores in OUT, if any, are of this dataset, these teachers and these captions."""
    entries = {modality: (entry.checkpoint, entry.classes, entry.captions) for modality, entry in prompts.items()}
    metadata = score_metadata(shards, entries)
    for modality, entry in prompts.items():
        metadata["teachers"][modality]["teacher"] = entry.teacher
    claim_dir(
        metadata_file(out),
        metadata,
        f"{out} contains scores of another dataset, by other teachers or for other captions",
        "choose another --out or delete it",
    )


def _score(split: Split, prompts: dict[str, Prompts], out: Path, batch_size: int, world: World) -> None:
    """Write the score files of a split that do not exist yet."""
    paths = score_files(out, split)
    missing = missing_chunks(paths)
    if not missing:
        return
    teachers = {
        modality: TEACHERS[entry.teacher].from_prompts(entry, split, world.device)
        for modality, entry in prompts.items()
    }
    segments = num_segments(split)
    data = DataConfig(
        num_frames=segments,
        frame_stride=round(split.fps),
        frame_size=teachers["visual"].frame_size,
        squash=True,
        audio_s=float(segments),
    )
    chunks = rank_chunks(missing, CHUNK, len(split), world)
    with (
        closing(Loader(split, data, None, 0, batch_size, world.device)) as loader,
        chunk_progress(chunks, f"scoring {split.name}", world) as counter,
    ):
        for chunk in chunks:
            scores = _score_clips(loader, chunk.ids, batch_size, teachers, counter)
            write_scores(paths[chunk.index], scores["audio"], scores["visual"])


def _score_clips(
    loader: Loader, ids: np.ndarray, batch_size: int, teachers: dict[str, Teacher], counter: WorkCounter
) -> dict[str, np.ndarray]:
    """Return the scores of clips by modality, [n, T, C] float32, and count the clips.

    They are NaN for clips that cannot be read, or lack the modality.
    """

    def forward(batch: Batch) -> dict[str, Tensor]:
        return {modality: teacher.scores(batch.media[MEDIA[modality]]) for modality, teacher in teachers.items()}

    scores: dict[str, list[np.ndarray]] = {modality: [] for modality in teachers}
    batches = padded_batches(ids, batch_size, -(-len(ids) // batch_size))
    for rows, batch, outputs in iter_outputs(forward, loader, batches):
        counter.advance(int((rows != PADDING).sum()))
        for modality, output in outputs.items():
            masked = output.masked_fill(~batch.present[modality][:, None, None], torch.nan)
            scores[modality].append(masked.cpu().numpy())
    return {modality: np.concatenate(parts)[: len(ids)] for modality, parts in scores.items()}


def _write_events(shards: ShardedDataset, prompts: dict[str, Prompts], class_indices: list[int], out: Path) -> None:
    """Write the predicted events of all splits whose scores are complete, and their accuracy."""
    thresholds = np.stack([prompts[modality].thresholds[class_indices] for modality in MODALITIES])[None, :, None, :]
    tables: list[pa.Table] = []
    quality: dict[str, dict[str, dict[str, float]]] = {}
    rows: list[tuple[Cell, ...]] = []
    for name in shards.manifest["splits"]:
        split = shards.split(name, "--splits")
        if not all(path.exists() for path in score_files(out, split)):
            continue
        labels = load_events(shards, split)
        scores = read_scores(out, "--out", shards, split)
        scored = _readable(split, scores)
        if not scored.all():
            unreadable = int((~scored).sum())
            print(f"{name}: {unreadable} clips could not be read; they get no pseudo-labels", file=sys.stderr)
        predicted = (scores > thresholds) & labels.weak[:, None, None]
        tables.append(events_table(name, split.keys, split.sources, shards.classes, predicted, annotated=scored))
        if labels.events is not None:
            quality[name] = event_metrics(predicted, labels.events)
        rows.append(_summary_row(name, predicted, labels.weak, quality.get(name)))
    write_table(out / "events.parquet", pa.concat_tables(tables))
    write_atomically(out / "quality.json", (json.dumps(quality, indent=1) + "\n").encode())
    print(format_table(_SUMMARY_HEAD, rows))
    count = sum(len(table) - table.column("label").null_count for table in tables)
    print(f"{out / 'events.parquet'}: {count} events")


def _readable(split: Split, scores: np.ndarray) -> np.ndarray:
    """Return which clips could be read, [N] bool: those with scores [N, 2, T, C] in all modalities that they have."""
    has_modality = np.stack([split.has_modality(modality) for modality in MODALITIES], axis=1)
    return np.all(np.isfinite(scores).all(axis=(2, 3)) | ~has_modality, axis=1).reshape(-1)


def _summary_row(
    split_name: str, predicted: np.ndarray, weak: np.ndarray, metrics: dict[str, dict[str, float]] | None
) -> tuple[Cell, ...]:
    """Return the cells of `_SUMMARY_HEAD`; the segment F-scores are empty where events are not annotated."""
    fractions = 100 * predicted.any(axis=2).mean(axis=(0, 2)) / max(1e-9, weak.mean())
    scores = [f"{metrics['segment'][name]:.1f}" if metrics else "" for name in ("audio", "visual", "type", "event")]
    return split_name, len(weak), *map(float, fractions), *scores
