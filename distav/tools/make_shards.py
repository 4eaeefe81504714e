"""The command line of tools/make_shards.py."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from distav.config.cli import (
    CommandParser,
    check_minimums,
    command,
    name_arguments,
    raise_parse_errors,
)
from distav.config.errors import UserError, format_list
from distav.data.files import report_os_errors
from distav.data.preparation.build_config import BuildConfig
from distav.data.preparation.builder import build_dataset
from distav.data.preparation.cleaning import CLEANED_SPLIT, CleaningConfig, clean_dataset
from distav.data.preparation.encoding import ANY_HINT, Encoding
from distav.data.preparation.multi_label_noise import ClassRates
from distav.data.preparation.noise_injection import LabelNoise
from distav.data.preparation.output_dir import BuildResult, format_reasons
from distav.data.preparation.registry import SOURCES
from distav.data.preparation.reviewers import REVIEW, format_review, review_from_json
from distav.data.preparation.shared_work import Part
from distav.data.storage.object_store import is_url
from distav.tools.make_shards_options import add_build_options, add_clean_options

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
    try:
        options = _parser().parse_args(arguments)
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
    if others := [name for name in result.clips if name != CLEANED_SPLIT]:
        print(f"labels of the split {format_list(others)} are unchanged")
    manifest = json.loads((options.out / "manifest.json").read_text())
    if REVIEW in manifest:
        print()
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
        add_build_options(command, source.default_encoding)
    description = "Copy a dataset with corrected labels and without clips whose pair is mismatched."
    add_clean_options(add_command("clean", description, _CLEAN_EXAMPLE, _CLEAN_EPILOG))
    return parser


if __name__ == "__main__":
    sys.exit(main())
