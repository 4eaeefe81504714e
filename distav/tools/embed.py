"""Embed clips by an exported network, into Parquet.

tools/embed.py runs/mine/export shards/mine --out embeddings/mine
tools/embed.py runs/mine/export ~/new_videos --out embeddings/new
deepspeed --num_gpus 8 tools/embed.py runs/mine/export shards/mine --out embeddings/mine

A folder of media files is cut into clips of the length that the network learnt from; of arrays, give an .npz file with
`frames` [n, T, H, W, 3] uint8 and `sound` [n, N] float32. OUT gets files of some clips each, the same for any number of
ranks: read them together, as by pyarrow.parquet.read_table(OUT). Columns: key, source, start_s, split; visual and
audio, the features of the towers; visual_embedding and audio_embedding, unit vectors that can be compared with each
other. A clip that cannot be read has null there. The same command goes on after a kill.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distav.config.cli import add_rank_options, exit_with_error
from distav.config.errors import UserError
from distav.data.annotations.teacher_scores import manifest_digest
from distav.data.dataset import ShardedDataset, Split
from distav.data.files import write_atomically, write_table
from distav.data.preparation.builder import BuildConfig, build_dataset
from distav.data.preparation.encoding import Encoding
from distav.data.preparation.sources import MediaFiles
from distav.data.storage.object_store import is_url
from distav.distributed.collectives import barrier, broadcast, run_on_main_rank
from distav.distributed.process_group import World, process_group
from distav.evaluation.embedding import Embedder, Embeddings, to_table

CHUNK = 1024
"""Clips of one file."""
WORK = ".work"
"""Folder in OUT for what is not finished."""

Rows = tuple[dict[str, Any], Embeddings]
"""Columns that name clips, and what the network makes of them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        with process_group(options.device, options.timeout_s, options.threads) as world:
            encoders = Embedder.open(options.export, world.device, options.batch_size)
            work = options.out / WORK
            path = Path(options.input).expanduser()
            if path.suffix == ".npz":
                frames, sound = _arrays(path)
                facts = {"input": hashlib.sha256(path.read_bytes()).hexdigest()}
                run_on_main_rank(lambda: _claim(options, facts))
                chunks = [("arrays", len(frames), lambda ids: _of_arrays(encoders, frames, sound, ids))]
            else:
                is_set = is_url(options.input) or (path / "manifest.json").is_file()
                if not is_set:
                    run_on_main_rank(lambda: _cut(path, work / "clips", encoders.description, options.workers))
                shards = ShardedDataset.open(options.input if is_set else work / "clips")
                splits = [shards.split(name, "--splits") for name in options.splits or shards.manifest["splits"]]
                run_on_main_rank(lambda: _claim(options, {"input": manifest_digest(shards)}))
                chunks = [(each.name, len(each), _of_split(encoders, each)) for each in splits]
            _embed(options.out, chunks, world)
            run_on_main_rank(lambda: shutil.rmtree(work, ignore_errors=True))
            if world.is_main:
                print(f"{options.out}: {sum(count for _, count, _ in chunks)} clips embedded")
    except UserError as error:
        return exit_with_error(error, "embed")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="embed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("export", type=Path, metavar="EXPORT", help="the export/ folder of a run")
    add("input", metavar="INPUT", help="a set of shards or its URL, a folder of media files, or an .npz file")
    add("--out", type=Path, required=True, metavar="OUT", help="folder for the tables")
    add("--splits", nargs="+", default=[], metavar="NAME", help="splits of a set; all of them")
    workers = os.cpu_count() or 1
    add("--workers", type=int, default=workers, help="processes that cut media files, while ranks wait (%(default)s)")
    add_rank_options(parser, 32, "embedded")
    return parser


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            frames, sound = file["frames"], file["sound"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: needs arrays `frames` and `sound`, as numpy.savez writes them ({error}).") from None
    if frames.ndim != 5 or sound.ndim != 2 or len(frames) != len(sound):
        raise UserError(
            f"{path}: `frames` {frames.shape} and `sound` {sound.shape}; allowed: [n, T, H, W, 3] and [n, N], n alike."
        )
    return frames, sound


def _cut(folder: Path, out: Path, description: dict[str, Any], workers: int) -> None:
    """Bring media files into the form of the clips that the network learnt from."""
    takes, stored = description["input"], description.get("stored")
    if not stored:
        raise UserError("this network was exported without the form of its clips; make shards of the files first.")
    encoding = Encoding(stored["codec"], takes["fps"], stored["short_side"], stored["clip_s"], takes["sample_rate_hz"])
    made = build_dataset(MediaFiles(folder), out, BuildConfig(encoding), workers)
    if made.rejected:
        told = out.parents[1] / "_rejected.csv"
        shutil.copy(out / "rejected.csv", told)
        print(f"{made.rejected} files cannot be used; {told} says why", file=sys.stderr)


def _claim(options: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Make sure that the tables in a folder, if any, are of this network and these clips."""
    weights = hashlib.sha256((options.export / "model.safetensors").read_bytes()).hexdigest()
    text = json.dumps({"weights": weights, "batch": options.batch_size, **facts}, indent=1, sort_keys=True)
    path = options.out / "_embed.json"
    if path.exists() and path.read_text() != text:
        raise UserError(
            f"{options.out} holds embeddings by another network, of other clips or with another --batch; choose "
            "another --out or delete it."
        )
    (options.out / WORK).mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def _of_arrays(encoders: Embedder, frames: np.ndarray, sound: np.ndarray, ids: np.ndarray) -> Rows:
    keys = np.array([f"arrays-{number:09d}" for number in ids], dtype=object)
    columns = {"key": keys, "source": keys, "start_s": np.zeros(len(ids)), "split": ["arrays"] * len(ids)}
    return columns, encoders.embed_arrays(frames[ids], sound[ids])


def _of_split(encoders: Embedder, split: Split) -> Callable[[np.ndarray], Rows]:
    def rows(ids: np.ndarray) -> Rows:
        columns = {name: split.columns[name][ids] for name in ("key", "source", "start_s")}
        return {**columns, "split": [split.name] * len(ids)}, encoders.embed_clips(split, ids)

    return rows


def _embed(out: Path, parts: list[tuple[str, int, Callable[[np.ndarray], Rows]]], world: World) -> None:
    """Write the tables that are missing; ranks take them in turn."""
    files = [
        (out / f"{name}-{chunk:06d}.parquet", np.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, count)), rows)
        for name, count, rows in parts
        for chunk in range(-(-count // CHUNK))
    ]
    missing = broadcast([not path.exists() for path, _, _ in files])
    todo = [each for each, wanted in zip(files, missing, strict=True) if wanted]
    bar = tqdm(
        total=len(todo), unit="file", desc=f"embedding, {CHUNK} clips each", disable=not world.is_main, mininterval=1
    )
    unread = 0
    for number, (path, ids, rows) in enumerate(todo):
        if number % world.world_size == world.rank:
            columns, found = rows(ids)
            unread += int((~found.valid).sum())
            write_table(path, to_table(found, columns), scratch=out / WORK)
        bar.update()
    bar.close()
    if unread:
        print(f"{unread} clips could not be read; they have null in place of embeddings", file=sys.stderr)
    barrier()
