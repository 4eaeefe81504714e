"""Options of the commands of tools/make_shards.py."""

import argparse
import os
from pathlib import Path

from distav.config.cli import finite_float
from distav.data.preparation.encoding import CODECS, MODALITY_CHOICES, Encoding
from distav.data.storage.object_store import is_url


def _local_dir(text: str) -> Path:
    """Return the path of a local directory.

    Raises:
        argparse.ArgumentTypeError: for a file, or a URL, which would become a directory with the name of its scheme.
    """
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text} is a URL; datasets are written to local directories and then copied")
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file; give a directory")
    return Path(text)


def add_build_options(parser: argparse.ArgumentParser, default: Encoding) -> None:
    """Add the options of the commands that build a dataset; `default` are the defaults of the source."""
    add = parser.add_argument
    add("out", type=_local_dir, metavar="OUT", help="directory of the dataset")
    add("--codec", default=default.codec, help=f"{', '.join(CODECS)} (default: %(default)s)")
    add("--fps", type=finite_float, default=default.fps, help="frames per second (default: %(default)s)")
    add(
        "--short-side",
        type=int,
        default=default.short_side,
        help="shorter side of the frames in pixels; H.264: rounded to a multiple of 16 (default: %(default)s)",
    )
    add(
        "--clip-s",
        type=finite_float,
        default=default.clip_s,
        help="duration of a clip in seconds (default: %(default)s)",
    )
    add(
        "--sample-rate",
        type=int,
        default=default.sample_rate_hz,
        help="audio sample rate in Hz (default: %(default)s)",
    )
    add(
        "--modalities",
        default=default.modalities,
        choices=MODALITY_CHOICES,
        help="both: clips have video and audio; any: a clip may lack one of them (default: %(default)s)",
    )
    add(
        "--label-noise",
        default="",
        metavar="KIND:RATE",
        help="fraction of wrong labels in the training split: symmetric:0.4 or asymmetric:0.4 (default: none)",
    )
    add(
        "--correspondence-noise",
        type=finite_float,
        default=0.0,
        metavar="RATE",
        help="fraction of training clips with the audio of another clip, among those with video and audio "
        "(default: %(default)s)",
    )
    for name, meaning in (
        ("missing", "labels that are removed"),
        ("wrong", "clips without a class that get its label"),
    ):
        add(
            f"--{name}-labels",
            default="",
            metavar="RATE",
            help=f"fraction of {meaning}, in the training split of a multi-label source: 0.3 for all classes, or "
            "0.1:0.5 from the first to the last class (default: none)",
        )
    add("--cross-class-only", action="store_true", help="swap audio only between clips of different classes")
    add("--shard-samples", type=int, default=1000, help="samples per shard (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the order, the noise and the rendering (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="encoding processes (default: %(default)s)")
    add("--part", default="", metavar="I/N", help="work on part I of N, 0 <= I < N; `any`: share all work")


def add_clean_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command that cleans a dataset."""
    add = parser.add_argument
    add("shards", metavar="SHARDS", help="directory of a dataset of clips or features")
    add("out", type=_local_dir, metavar="OUT", help="directory of the new dataset; only its training split differs")
    add(
        "--decisions",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="csv or parquet, one per reviewer: key, label[, pair][, action], where pair is mismatched, matched or "
        "empty, and action is remove, keep or empty; with several labels per clip: key, class, decision (add, remove, "
        "keep or empty); the majority decides, and a tie keeps the given label",
    )
    add(
        "--labels",
        type=Path,
        metavar="TABLE",
        help="corrected labels of a run, labels/PHASE.parquet; decisions take precedence",
    )
    add(
        "--min-confidence",
        type=finite_float,
        default=0.9,
        help="confidence from which a corrected label replaces the given label; with several labels per clip 0.5 or "
        "more (default: %(default)s)",
    )
    add(
        "--min-correspondence",
        type=finite_float,
        default=0.0,
        help="correspondence probability below which a clip is removed (default: %(default)s)",
    )
    add("--shard-samples", type=int, default=1000, help="samples per shard (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="shards written in parallel (default: %(default)s)")
