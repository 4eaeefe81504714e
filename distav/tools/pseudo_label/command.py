"""Harvest labels: what is heard and what is seen in each second, by a teacher for each modality (VALOR, Lai et al. 2023).

tools/pseudo_label.py shards/llp_clips --prompts configs/teachers/llp.yaml --out labels/llp
deepspeed --num_gpus 8 tools/pseudo_label.py shards/llp_clips --prompts configs/teachers/llp.yaml --out labels/llp

Teachers score every second once, and scores are kept in OUT/scores; the same command goes on after a kill, and with
other thresholds in the file of prompts it makes the tables anew without asking them again. An event is told where the
score is above its threshold and the clip's own label has the class. OUT goes into
phases.NAME.harvested; OUT/quality.json says how right it is where people watched and listened.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from distav.config.cli import add_rank_options, exit_with_error
from distav.config.errors import UserError, format_list
from distav.config.schema import DataConfig
from distav.data.annotations.events import events_table, load_events, num_segments
from distav.data.annotations.teacher_scores import (
    CHUNK,
    metadata_file,
    manifest_digest,
    read_scores,
    score_file,
    score_files,
    write_scores,
)
from distav.data.dataset import ShardedDataset, Split
from distav.data.files import write_atomically, write_table
from distav.data.modalities import MODALITIES
from distav.data.pipeline.loader import Loader
from distav.data.pipeline.sampler import padded_batches
from distav.distributed.collectives import barrier, broadcast, run_on_main_rank
from distav.distributed.process_group import World, process_group
from distav.evaluation.event_metrics import event_metrics
from distav.tools.pseudo_label.prompts import Prompts, read_prompts
from distav.tools.pseudo_label.teachers import CLAPTeacher, CLIPTeacher, Teacher


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.batch_size < 1:
            raise UserError(f"--batch-size={options.batch_size}: allowed: from 1 up.")
        shards = ShardedDataset.open(options.shards, cache_mib=DataConfig().cache_mib)
        prompts = read_prompts(options.prompts)
        order = _check(shards, prompts, options.prompts)
        splits = [shards.split(name, "--splits") for name in options.splits or shards.manifest["splits"]]
        with process_group(options.device, options.timeout_s, options.threads) as world:
            out = options.out
            run_on_main_rank(lambda: _claim(out, shards, prompts))
            for split in splits:
                _score(split, prompts, out, options.batch_size, world)
            barrier()
            run_on_main_rank(lambda: _tell(shards, prompts, order, out))
    except UserError as error:
        return exit_with_error(error, "pseudo_label")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pseudo_label.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("shards", metavar="SHARDS", help="the folder or URL of a set of clips")
    add("--prompts", type=Path, required=True, metavar="FILE", help="teachers, captions and thresholds of each class")
    add("--out", type=Path, required=True, metavar="OUT", help="folder for scores and tables")
    add("--splits", nargs="+", default=[], metavar="NAME", help="splits to label; all of them")
    add_rank_options(parser, 8, "scored")
    return parser


def _check(shards: ShardedDataset, prompts: dict[str, Prompts], path: Path) -> list[int]:
    """Return the place of each of the set's classes among the prompts."""
    if shards.streams:
        raise UserError(f"{shards.location} holds features; teachers look at clips and listen to them.")
    fps = float(shards.manifest["fps"])
    if fps != max(1, round(fps)):
        raise UserError(
            f"{shards.location} stores {fps:g} frames a second, so that seconds have no frame of their own; make it with "
            "a whole number of --fps."
        )
    asked = prompts[MODALITIES[0]].classes
    missing = [name for name in shards.classes if name not in asked]
    if missing:
        raise UserError(
            f"{path}: has no prompts for {format_list(missing)} of {shards.location}; add them under classes, with a caption "
            "and a threshold for each modality."
        )
    return [asked.index(name) for name in shards.classes]


def _claim(out: Path, shards: ShardedDataset, prompts: dict[str, Prompts]) -> None:
    """Make sure that the scores in a folder, if any, are of this set and these captions."""
    asked = {modality: [each.checkpoint, each.classes, each.captions] for modality, each in prompts.items()}
    text = json.dumps({"set": manifest_digest(shards), "asked": asked}, indent=1, sort_keys=True)
    path = metadata_file(out)
    if path.exists() and path.read_text() != text:
        raise UserError(f"{out} holds scores of another set, or for other captions; choose another --out or delete it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def _score(split: Split, prompts: dict[str, Prompts], out: Path, batch: int, world: World) -> None:
    """Let teachers score what they have not scored yet; ranks take chunks in turn."""
    todo = broadcast([chunk for chunk, path in enumerate(score_files(out, split)) if not path.exists()])
    if todo:
        segments = num_segments(split)
        audio = CLAPTeacher(prompts["audio"], world.device, split.sample_rate_hz, segments)
        visual = CLIPTeacher(prompts["visual"], world.device)
        data = DataConfig(
            num_frames=segments, frame_stride=round(split.fps), frame_size=visual.frame_size, squash=True,
            audio_s=float(segments),
        )  # fmt: skip
        loader = Loader(split, data, None, 0, batch, world.device)
        bar = tqdm(total=len(todo), unit="chunk", desc=f"{split.name}, {CHUNK} clips each", disable=not world.is_main)
        for number, chunk in enumerate(todo):
            if number % world.world_size == world.rank:
                ids = np.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, len(split)))
                _score_chunk(loader, ids, {"audio": audio, "visual": visual}, out, chunk)
            bar.update()
        bar.close()
        loader.close()


def _score_chunk(loader: Loader, ids: np.ndarray, teachers: dict[str, Teacher], out: Path, chunk: int) -> None:
    """Score some samples and write their file; NaN where one could not be read."""
    found: dict[str, list[np.ndarray]] = {modality: [] for modality in MODALITIES}
    size = loader.pipeline.batch
    plan = padded_batches(ids, size, -(-len(ids) // size))
    for batch in loader.batches((some, 0) for some in plan):
        media = {"audio": batch.media["audio"], "visual": batch.media["frames"]}
        for modality, teacher in teachers.items():
            scores = teacher.scores(media[modality])
            found[modality].append(scores.masked_fill(~batch.valid[:, None, None], torch.nan).cpu().numpy())
    whole = {modality: np.concatenate(parts)[: len(ids)] for modality, parts in found.items()}
    write_scores(score_file(out, loader.split.name, chunk), whole["audio"], whole["visual"])


def _tell(shards: ShardedDataset, prompts: dict[str, Prompts], order: list[int], out: Path) -> None:
    """Write the events that pass their thresholds and the clips' own labels, and how right they are.

    Splits are told of that were scored in this call or in an earlier one.
    """
    thresholds = np.stack([prompts[modality].thresholds[order] for modality in MODALITIES])[None, :, None, :]
    tables, quality = [], dict[str, Any]()
    for name in shards.manifest["splits"]:
        split = shards.split(name, "--splits")
        if not all(path.exists() for path in score_files(out, split)):
            continue
        known = load_events(shards, split)
        scores = read_scores(out, "--out", shards, split)
        looked_at = np.isfinite(scores).all(axis=(1, 2, 3)).reshape(-1)
        if missed := int((~looked_at).sum()):
            print(f"{split.name}: {missed} clips could not be read; no event is told of them", file=sys.stderr)
        told = (scores > thresholds) & known.weak[:, None, None]
        sources = split.columns["source"]
        tables.append(events_table(split.name, split.keys, sources, shards.classes, told, looked_at))
        share = 100 * told.any(axis=2).mean(axis=(0, 2)) / max(1e-9, known.weak.mean())
        line = f"{split.name}: of the classes of {len(split)} clips {share[0]:.1f} % are heard, {share[1]:.1f} % seen"
        if known.events is not None:
            quality[split.name] = event_metrics(told, known.events)
            seconds = quality[split.name]["segment"]
            line += f"; beside what people say: A {seconds['audio']:.1f}, V {seconds['visual']:.1f}, "
            line += f"Type@AV {seconds['type']:.1f}, Event@AV {seconds['event']:.1f}"
        print(line)
    write_table(out / "events.parquet", pa.concat_tables(tables))
    write_atomically(out / "quality.json", (json.dumps(quality, indent=1) + "\n").encode())
    count = sum(len(each) - each.column("label").null_count for each in tables)
    print(f"{out / 'events.parquet'}: {count} events")
