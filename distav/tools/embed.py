"""Embed clips with an exported network and write Parquet tables.

tools/embed.py runs/mine/export shards/mine --out embeddings/mine
tools/embed.py runs/mine/export ~/new_videos --out embeddings/new
deepspeed --num_gpus 8 tools/embed.py runs/mine/export shards/mine --out embeddings/mine

INPUT is a dataset, a directory of media files, or an .npz file. Media files may have video, audio or both; they are cut
into clips of the duration that the network was trained on. An .npz file has the arrays `frames` [n, T, H, W, 3] uint8
and `audio` [n, N] float32.

OUT gets one Parquet file per 1024 clips, the same for any number of ranks; read all of them at once by
pyarrow.parquet.read_table(OUT). Columns: key, source, start_s, split; visual and audio, the features of the towers;
visual_embedding and audio_embedding, unit vectors that are comparable between the modalities. The embeddings of a clip
that cannot be read, and those of a modality that it lacks, are null. Rerun the same command to resume after an
interruption.
"""

import argparse
import hashlib
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distav.config.cli import (
    RANK_ARGUMENTS,
    CommandParser,
    add_rank_options,
    check_minimums,
    command,
    exit_with_error,
)
from distav.config.errors import UserError
from distav.console import WorkCounter
from distav.data.annotations.teacher_scores import manifest_digest
from distav.data.dataset import ShardedDataset, Split
from distav.data.files import claim_dir, write_table
from distav.data.preparation.build_config import BuildConfig
from distav.data.preparation.builder import build_dataset
from distav.data.preparation.encoding import Encoding
from distav.data.preparation.sources.files import MediaFiles
from distav.data.storage.object_store import is_url
from distav.distributed.collectives import barrier, run_on_main_rank
from distav.distributed.launch import set_rank_variables
from distav.distributed.process_group import World, process_group
from distav.evaluation.embedding import Embedder, Embeddings, to_table
from distav.models.hub import export_folder
from distav.models.pretrained import weights_digest
from distav.tools.chunks import chunk_progress, missing_chunks, rank_chunks

CHUNK = 1024
"""Clips per table."""
WORK = ".work"
"""Name of the directory in OUT for incomplete files."""
_OUT_ADVICE = "choose another --out, or fix the directory"


@dataclass(frozen=True)
class ClipGroup:
    """Clips to be embedded: a split of a dataset, or the clips of an .npz file.

    Attributes:
        name: prefix of the file names of its tables.
        count: number of clips.
        embed: returns the other columns and the embeddings of the clips with the ids [n], and counts these.
    """

    name: str
    count: int
    embed: Callable[[np.ndarray, WorkCounter], tuple[dict[str, Any], Embeddings]]


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    set_rank_variables()
    options = _parser().parse_args(arguments)
    try:
        check_minimums(options, workers=1, batch_size=1, threads=0)
        with process_group(options.device, options.timeout_s, options.threads) as world:
            options.export = export_folder(options.export)
            embedder = Embedder.open(options.export, world.device, options.batch_size)
            groups, digest = _open_input(options, embedder)
            run_on_main_rank(lambda: _claim(options, digest), _OUT_ADVICE)
            for group in groups:
                _write_tables(options.out, group, world)
            barrier()
            run_on_main_rank(lambda: shutil.rmtree(options.out / WORK, ignore_errors=True), _OUT_ADVICE)
            if world.is_main:
                print(f"{options.out}: {sum(group.count for group in groups)} clips embedded")
    except UserError as error:
        return exit_with_error(error, "embed", {"data.root": "INPUT", **RANK_ARGUMENTS})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(script="embed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("export", metavar="EXPORT", help="export/ directory of a run, or hf://USER/NAME[@REVISION] on the hub")
    add("input", metavar="INPUT", help="directory or URL of a dataset, directory of media files, or .npz file")
    add("--out", type=Path, required=True, metavar="OUT", help="directory of the tables")
    add("--splits", nargs="+", default=[], metavar="NAME", help="splits of the dataset (default: all)")
    workers = os.cpu_count() or 1
    add("--workers", type=int, default=workers, help="processes that cut media files (default: %(default)s)")
    add_rank_options(parser, 32, "embedded")
    return parser


def _open_input(options: argparse.Namespace, embedder: Embedder) -> tuple[list[ClipGroup], str]:
    """Return the clips of INPUT and a digest that identifies them."""
    path = Path(options.input).expanduser()
    if path.suffix == ".npz":
        return [_array_clips(path, embedder)], hashlib.sha256(path.read_bytes()).hexdigest()
    if not is_url(options.input) and not path.exists():
        raise UserError(f"INPUT={options.input}: no such file or directory.")
    if is_url(options.input) or (path / "manifest.json").is_file():
        shards = ShardedDataset.open(options.input)
    else:
        clips = options.out / WORK / "clips"
        run_on_main_rank(lambda: _cut_media(path, clips, embedder.description, options.workers), _OUT_ADVICE)
        shards = ShardedDataset.open(clips)
    splits = [shards.split(name, "--splits") for name in options.splits or shards.manifest["splits"]]
    return [_split_clips(split, embedder) for split in splits], manifest_digest(shards)


def _array_clips(path: Path, embedder: Embedder) -> ClipGroup:
    try:
        with np.load(path, allow_pickle=False) as file:
            frames, audio = file["frames"], file["audio"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: has to contain the arrays `frames` and `audio`, written by numpy.savez ({error})."
        ) from None
    if frames.ndim != 5 or audio.ndim != 2 or len(frames) != len(audio):
        raise UserError(
            f"{path}: `frames` {frames.shape} and `audio` {audio.shape}; allowed: [n, T, H, W, 3] and [n, N], equal n."
        )

    def embed(ids: np.ndarray, counter: WorkCounter) -> tuple[dict[str, Any], Embeddings]:
        keys = np.array([f"arrays-{number:09d}" for number in ids], dtype=object)
        columns = {"key": keys, "source": keys, "start_s": np.zeros(len(ids)), "split": ["arrays"] * len(ids)}
        embeddings = embedder.embed_arrays(frames[ids], audio[ids])
        counter.advance(len(ids))
        return columns, embeddings

    return ClipGroup("arrays", len(frames), embed)


def _split_clips(split: Split, embedder: Embedder) -> ClipGroup:
    def embed(ids: np.ndarray, counter: WorkCounter) -> tuple[dict[str, Any], Embeddings]:
        columns = {"key": split.keys[ids], "source": split.sources[ids], "start_s": split.columns["start_s"][ids]}
        return {**columns, "split": [split.name] * len(ids)}, embedder.embed_clips(split, ids, counter)

    return ClipGroup(split.name, len(split), embed)


def _cut_media(folder: Path, out: Path, description: dict[str, Any], workers: int) -> None:
    """Build a dataset of media files with the encoding of the clips that the network was trained on."""
    model_input, stored = description["input"], description.get("stored")
    if not stored:
        raise UserError(
            "the exported network does not record the encoding of its training clips; build a dataset of the media "
            "files with make_shards.py first."
        )
    encoding = Encoding(
        stored["codec"],
        model_input["fps"],
        stored["short_side"],
        stored["clip_s"],
        model_input["sample_rate_hz"],
        modalities="any",
    )
    result = build_dataset(MediaFiles(folder), out, BuildConfig(encoding), workers)
    if result.rejected:
        reasons = out.parents[1] / "_rejected.csv"
        shutil.copy(out / "rejected.csv", reasons)
        print(f"{result.rejected} files rejected; reasons in {reasons}", file=sys.stderr)


def _claim(options: argparse.Namespace, digest: str) -> None:
    """Check that the tables in OUT, if any, are of this network and these clips."""
    claim_dir(
        options.out / "_embed.json",
        {"weights": weights_digest(options.export), "batch_size": options.batch_size, "input": digest},
        f"{options.out} contains embeddings of other clips, by another network, or with another --batch-size",
        "choose another --out or delete it",
    )
    (options.out / WORK).mkdir(parents=True, exist_ok=True)


def _write_tables(out: Path, group: ClipGroup, world: World) -> None:
    """Write the tables of a group that do not exist yet."""
    paths = [out / f"{group.name}-{chunk:06d}.parquet" for chunk in range(-(-group.count // CHUNK))]
    chunks = rank_chunks(missing_chunks(paths), CHUNK, group.count, world)
    unreadable = 0
    with chunk_progress(chunks, f"embedding {group.name}", world) as counter:
        for chunk in chunks:
            columns, embeddings = group.embed(chunk.ids, counter)
            unreadable += int((~embeddings.valid).sum())
            write_table(paths[chunk.index], to_table(embeddings, columns), scratch=out / WORK)
    if unreadable:
        print(f"{group.name}: {unreadable} clips could not be read; their embeddings are null", file=sys.stderr)
