"""The command line of tools/make_shards.py."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from distav.config.cli import (
    CommandParser,
    check_minimums,
    command,
    finite_float,
    name_arguments,
    raise_parse_errors,
)
from distav.config.errors import UserError
from distav.data.files import report_os_errors
from distav.data.preparation.build_config import BuildConfig
from distav.data.preparation.builder import build_dataset
from distav.data.preparation.cleaning import CleaningConfig, clean_dataset
from distav.data.preparation.encoding import ANY_HINT, CODECS, MODALITY_CHOICES, Encoding
from distav.data.preparation.multi_label_noise import ClassRates
from distav.data.preparation.noise_injection import LabelNoise
from distav.data.preparation.output_dir import BuildResult, format_reasons
from distav.data.preparation.registry import SOURCES
from distav.data.preparation.reviewers import REVIEW, format_review, review_from_json
from distav.data.preparation.shared_work import Part
from distav.data.storage.object_store import is_url

_EPILOG = """exit status:
  0  all candidates were used
  1  no candidate could be used, or an argument is invalid
  2  the command line could not be parsed
  3  some candidates were rejected, see OUT/rejected.csv; the dataset is complete without them

Rerun the same command to resume an interrupted build; the resulting files have the same bytes. On several machines that
share OUT, run the command on each with --part any: they share the work, and each ends when the dataset is complete. Or
divide it with --part 0/N, 1/N, ... (exit status 3: the part has rejected candidates), once to encode clips and, if you
like, once more to write shards; then once without --part: it does what is missing and writes the dataset."""

_CLEAN_EPILOG = """exit status:
  0  all clips were kept
  1  an argument, a table or the dataset is invalid, or no training clip would be kept
  2  the command line could not be parsed
  3  some clips were removed, see OUT/rejected.csv; the dataset is complete

An empty label in the decisions FILE leaves the label unchanged. A clip in FILE is kept unless its pair is mismatched or
its action is remove. With several FILES, the majority of the reviewers who decided a clip is applied; a tie keeps the
clip and its given label, also with --labels. Their conflicts and agreement are printed, and stored in
OUT/manifest.json.
Rerun the same command to resume an interrupted run; the resulting files have the same bytes."""

_CLEAN_EXAMPLE = (
    "make_shards.py clean shards/mine shards/mine-cleaned --decisions decisions.csv "
    "--labels runs/first/labels/labels.parquet --min-confidence 0.95"
)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        result = _run(options)
    except UserError as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 1
    already_complete = options.command != "clean" and options.part not in ("", "any") and not result.num_chunks
    return 3 if result.rejected and not already_complete else 0


def run(arguments: Sequence[str]) -> BuildResult:
    """Run the command and return its result.

    Raises:
        UserError: for an invalid command line or invalid data.
    """
    with raise_parse_errors("make_shards"):
        options = _parser().parse_args(arguments)
    return _run(options)


def _run(options: argparse.Namespace) -> BuildResult:
    # Makes webdataset refuse to open other files by name, to run commands from URLs, and to unpickle.
    os.environ.setdefault("WDS_SECURE", "1")
    try:
        check_minimums(options, workers=1)
        return _clean(options) if options.command == "clean" else _build(options)
    except UserError as error:
        raise UserError(name_arguments(error, {"data.root": "SHARDS"})) from None


def _build(options: argparse.Namespace) -> BuildResult:
    check_minimums(options, seed=0)
    part = Part.parse(options.part) if options.part else None
    config = BuildConfig(
        Encoding(
            options.codec, options.fps, options.short_side, options.clip_s, options.sample_rate, options.modalities
        ),
        options.seed,
        options.shard_samples,
        LabelNoise.parse(options.label_noise),
        options.correspondence_noise,
        options.cross_class_only,
        ClassRates.parse(options.missing_labels, "--missing-labels"),
        ClassRates.parse(options.wrong_labels, "--wrong-labels"),
    )
    source = SOURCES[options.command].from_options(options)
    result = build_dataset(source, options.out, config, options.workers, part)
    _print_summary(result, options.out, part, options.modalities)
    return result


def _clean(options: argparse.Namespace) -> BuildResult:
    if is_url(options.shards):
        raise UserError(f"{options.shards}: `clean` copies local files; download the dataset first.")
    config = CleaningConfig(
        Path(options.shards),
        tuple(options.decisions),
        options.labels,
        options.min_confidence,
        options.min_correspondence,
        options.shard_samples,
    )
    with report_os_errors(options.out):
        result = clean_dataset(config, options.out, options.workers)
    details = f"; reasons in {options.out / 'rejected.csv'}" if result.rejected else ""
    print(
        f"{options.out}: {_clip_counts(result)} clips copied, {result.num_relabeled} relabeled, "
        f"{result.rejected} removed{details}"
    )
    manifest = json.loads((options.out / "manifest.json").read_text())
    if REVIEW in manifest:
        print(format_review(review_from_json(manifest[REVIEW]), len(options.decisions)))
    return result


def _print_summary(result: BuildResult, out: Path, part: Part | None, modalities: str) -> None:
    rate = f" ({sum(result.clips.values()) / result.seconds:.1f} clips/s)" if result.seconds else ""
    clips = _clip_counts(result)
    if part and result.num_chunks:
        complete = result.encoded_chunks == result.num_chunks
        next_step = "; rerun without --part to write the dataset" if complete else ""
        print(
            f"{out}: part {part.index}/{part.count} complete, {clips or 'no'} clips encoded{rate}, "
            f"{result.rejected} candidates rejected{_reasons(result)}; {result.encoded_chunks} of {result.num_chunks} "
            f"chunks of all parts complete{next_step}"
        )
        return
    details = f"; reasons in {out / 'rejected.csv'}" if result.rejected else ""
    if modalities == "both" and set(result.reasons) & {"no video", "no audio"}:
        details += f"; {ANY_HINT}"
    already_complete = "the dataset is already complete, " if part and not part.leased else ""
    print(
        f"{out}: {already_complete}{clips} clips written{rate}, "
        f"{result.rejected} candidates rejected{_reasons(result)}{details}"
    )


def _reasons(result: BuildResult) -> str:
    """Return the most frequent reasons of rejection in parentheses; empty if there are none."""
    return f" ({format_reasons(result.reasons)})" if result.reasons else ""


def _clip_counts(result: BuildResult) -> str:
    return ", ".join(f"{count} {split}" for split, count in result.clips.items())


def _parser() -> argparse.ArgumentParser:
    """Return the parser, with a command for each registered source."""
    parser = CommandParser(
        script="make_shards.py",
        description="Write a distav dataset: WebDataset shards with index, labels and manifest.",
        epilog=f"example: {SOURCES['videos'].example}\n\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name: str, description: str, example: str, epilog: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=description,
            description=description,
            epilog=f"example: {example}\n\n{epilog}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    for name, source in SOURCES.items():
        command = add_command(name, source.description, source.example, _EPILOG)
        source.add_arguments(command)
        _add_build_options(command, source.default_encoding)
    description = "Copy a dataset with corrected labels and without clips whose pair is mismatched."
    _add_clean_options(add_command("clean", description, _CLEAN_EXAMPLE, _CLEAN_EPILOG))
    return parser


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


def _add_build_options(parser: argparse.ArgumentParser, default: Encoding) -> None:
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


def _add_clean_options(parser: argparse.ArgumentParser) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
