"""The command line of tools/make_shards.py."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from distav.config.errors import UserError
from distav.data.preparation.annotated_videos import EventSource, parse_features
from distav.data.preparation.builder import BuildConfig, build_dataset
from distav.data.preparation.cleaning import CleaningConfig, clean_dataset
from distav.data.preparation.digits import DigitsSource
from distav.data.preparation.encode_workers import ChunkSubset
from distav.data.preparation.encoding import CODECS, Encoding
from distav.data.preparation.noise_injection import LabelNoise
from distav.data.preparation.output_dir import BuildResult
from distav.data.preparation.sources import ClipList, Source, VideoFolder
from distav.data.preparation.synthetic import SyntheticSource
from distav.data.storage.object_store import is_url

_EPILOG = """exit status: 0 every candidate was used; 3 some were rejected, see OUT/rejected.csv, the rest is ready;
1 nothing could be used or an argument is wrong; 2 the command line could not be understood.
A run that was killed goes on when the same command is given again; the result has the same bytes.
So it has when machines that share OUT encode parts of it first: give each the same command with --part 0/N, 1/N, ...
(3 says there that the part had to reject some), then once the command itself, which encodes what is missing."""

_CLEANED_EPILOG = """exit status: 0 every clip was kept; 3 some were left out, see OUT/rejected.csv, the rest is ready;
1 an argument, a table or the set is wrong; 2 the command line could not be understood.
In FILE an empty label leaves the clip's as it would be without, and a clip that FILE names stays unless its pair is
wrong. A run that was killed goes on when the same command is given again; the result has the same bytes."""

_EXAMPLES = {
    "videos": "example: make_shards.py videos ~/clips shards/mine --short-side 256 --clip-s 2 --workers 8",
    "csv": "example: make_shards.py csv clips.csv shards/mine --codec h264 --fps 16",
    "digits": "example: make_shards.py digits shards/digits --images t10k-images-idx3-ubyte.gz "
    "--image-labels t10k-labels-idx1-ubyte.gz --recordings recordings/ --label-noise symmetric:0.6",
    "llp": "example: make_shards.py llp AVVP/data shards/llp --features audio:vggish=feats/vggish "
    "--features visual:res152=feats/res152 --features visual:r2plus1d_18=feats/r2plus1d_18",
    "ave": "example: make_shards.py ave AVE_Dataset shards/ave --videos AVE_Dataset/AVE --codec h264",
    "clean": "example: make_shards.py clean shards/mine shards/mine-cleaned --decisions decisions.csv "
    "--labels runs/first/labels/labels.parquet --min-confidence 0.95",
    "synthetic": "example: make_shards.py synthetic shards/quickstart --train-clips 1200 --label-noise symmetric:0.4",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a set of shards; returns the exit status."""
    # webdataset then opens nothing by name, runs no command that a URL may hold, and unpickles nothing.
    os.environ.setdefault("WDS_SECURE", "1")
    options = _parser().parse_args(arguments)
    try:
        if options.workers < 1:
            raise UserError(f"--workers={options.workers}: allowed: from 1 up.")
        if options.command == "clean":
            return _clean(options)
        part = ChunkSubset.parse(options.part) if options.part else None
        outcome = build_dataset(_source(options), options.out, _plan(options), options.workers, part)
    except UserError as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 1
    _tell(outcome, options.out, part)
    finished_before = part and not outcome.chunks
    return 3 if outcome.rejected and not finished_before else 0


def _clean(options: argparse.Namespace) -> int:
    if is_url(options.shards):
        raise UserError(f"{options.shards}: `cleaned` copies files; take the folder home first.")
    cleaning = CleaningConfig(
        Path(options.shards),
        options.decisions,
        options.labels,
        options.min_confidence,
        options.min_correspondence,
        options.shard_samples,
    )
    outcome = clean_dataset(cleaning, options.out, options.workers)
    clips = ", ".join(f"{count} {name}" for name, count in outcome.clips.items())
    tail = f"; reasons in {options.out / 'rejected.csv'}" if outcome.rejected else ""
    changed = f"{outcome.num_relabeled} with another label"
    print(f"{options.out}: {clips} clips copied, {changed}; {outcome.rejected} left out{tail}")
    return 3 if outcome.rejected else 0


def _plan(options: argparse.Namespace) -> BuildConfig:
    if options.seed < 0:
        raise UserError(f"--seed={options.seed}: allowed: from 0 up.")
    return BuildConfig(
        Encoding(options.codec, options.fps, options.short_side, options.clip_s, options.sample_rate),
        options.seed,
        options.shard_samples,
        LabelNoise.parse(options.label_noise),
        options.correspondence_noise,
        options.cross_class_only,
    )


def _tell(outcome: BuildResult, out: Path, part: ChunkSubset | None) -> None:
    rate = f", {sum(outcome.clips.values()) / outcome.seconds:.1f} clips/s" if outcome.seconds else ""
    clips = ", ".join(f"{count} {name}" for name, count in outcome.clips.items())
    if part and outcome.chunks:
        done, every = outcome.chunks
        then = "; the same command without --part makes the set of them" if done == every else ""
        print(
            f"{out}: part {part.number}/{part.of} is done, {clips or 'no'} clips{rate}; {outcome.rejected} candidates "
            f"rejected; {done} of all {every} chunks are done{then}"
        )
        return
    tail = f"; reasons in {out / 'rejected.csv'}" if outcome.rejected else ""
    already = "the set is finished, " if part else ""
    print(f"{out}: {already}{clips} clips written{rate}; {outcome.rejected} candidates rejected{tail}")


def _source(options: argparse.Namespace) -> Source:
    if options.command == "videos":
        return VideoFolder(options.folder, options.test_fraction, options.seed)
    if options.command == "csv":
        return ClipList(options.file)
    if options.command == "digits":
        return DigitsSource(
            options.images,
            options.image_labels,
            options.recordings,
            options.degrade,
            options.hold_out_speaker,
            options.seed,
        )
    if options.command in ("llp", "ave"):
        features = tuple(parse_features(text) for text in options.features)
        return EventSource(options.command, options.annotations, options.videos, features)
    return SyntheticSource(options.train_clips, options.test_clips)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make_shards.py",
        description="Make WebDataset shards for distav from raw clips.",
        epilog=f"{_EXAMPLES['videos']}\n\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str, **defaults: object) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"{_EXAMPLES[name]}\n\n{_CLEANED_EPILOG if name == 'cleaned' else _EPILOG}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name != "clean":
            _add_common(made, defaults)
        return made

    videos = command("videos", "Cut the videos of a folder into clips; one sub-folder a class.")
    videos.add_argument("folder", type=Path, metavar="DIR", help="folder with one sub-folder of videos a class")
    videos.add_argument("out", type=Path, metavar="OUT", help="folder to write the set to")
    videos.add_argument("--test-fraction", type=float, default=0.1, help="share of each class's files kept for testing")
    clips = command("csv", "Cut the videos of a list into clips.")
    clips.add_argument("file", type=Path, metavar="FILE", help="csv: path,label[,start_s,end_s][,split]")
    clips.add_argument("out", type=Path, metavar="OUT", help="folder to write the set to")
    digits = command(
        "digits", "Handwritten digits (MNIST) with spoken ones (FSDD).", short_side=32, clip_s=1.0, sample_rate=8000
    )
    digits.add_argument("out", type=Path, metavar="OUT", help="folder to write the set to")
    digits.add_argument("--images", type=Path, required=True, help="MNIST idx3 file, plain or gzipped")
    digits.add_argument("--image-labels", type=Path, required=True, help="MNIST idx1 file, plain or gzipped")
    digits.add_argument("--recordings", type=Path, required=True, help="folder or tar of DIGIT_SPEAKER_INDEX.wav")
    digits.add_argument("--degrade", action="store_true", help="occlude, fade and add noise to picture and sound")
    digits.add_argument("--hold-out-speaker", default="", metavar="NAME", help="test on this speaker alone")
    scenes = command(
        "synthetic", "Rendered scenes whose class needs both modalities.", short_side=40, clip_s=1.0, sample_rate=8000
    )
    scenes.add_argument("out", type=Path, metavar="OUT", help="folder to write the set to")
    scenes.add_argument("--train-clips", type=int, default=1200, help="clips to train on")
    scenes.add_argument("--test-clips", type=int, default=300, help="clips to test on")
    for name, about in (
        ("llp", "LLP: videos with events heard and seen, several classes each."),
        ("ave", "AVE: videos with one event each, and when it is both heard and seen."),
    ):
        events = command(name, about, clip_s=10.0)
        events.add_argument("annotations", type=Path, metavar="DIR", help="folder of the published annotations")
        events.add_argument("out", type=Path, metavar="OUT", help="folder to write the set to")
        events.add_argument("--videos", type=Path, metavar="DIR", help="folder of NAME.* or YOUTUBE_ID.*")
        events.add_argument(
            "--features",
            action="append",
            default=[],
            metavar="MODALITY:NAME=DIR",
            help="features in place of videos, a folder of .npy files [steps, dim] for each stream; repeat it",
        )
    _add_cleaned(command("clean", "Copy a set with labels decided anew, and without clips whose pair is wrong."))
    return parser


def _add_cleaned(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("shards", metavar="SHARDS", help="folder of a set with one label a clip, of clips or of features")
    add("out", type=Path, metavar="OUT", help="folder to write the new set to; only its train split differs")
    add("--decisions", type=Path, metavar="FILE", help="csv or parquet: key, label[, pair], pair being wrong or right")
    add("--labels", type=Path, metavar="TABLE", help="labels/PHASE.parquet of a run; decisions win over it")
    add("--min-confidence", type=float, default=0.9, help="that TABLE's corrected labels need (default: %(default)s)")
    add("--min-correspondence", type=float, default=0.0, help="below it, clips are left out (default: %(default)s)")
    add("--shard-samples", type=int, default=1000, help="clips of one tar (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="tars written at a time (default: %(default)s)")


def _add_common(parser: argparse.ArgumentParser, defaults: dict[str, object]) -> None:
    add = parser.add_argument
    default = Encoding()
    add("--codec", default=default.codec, help=f"{', '.join(CODECS)} (default: %(default)s)")
    add("--fps", type=float, default=default.fps, help="frames stored each second (default: %(default)s)")
    add(
        "--short-side",
        type=int,
        default=default.short_side,
        help="pixels; H.264: rounded to a multiple of 16 (default: %(default)s)",
    )
    add("--clip-s", type=float, default=default.clip_s, help="seconds of a clip (default: %(default)s)")
    add("--sample-rate", type=int, default=default.sample_rate_hz, help="of the sound, in Hz (default: %(default)s)")
    add("--label-noise", default="", metavar="KIND:RATE", help="symmetric:0.4 or asymmetric:0.4, training split only")
    add("--correspondence-noise", type=float, default=0.0, metavar="RATE", help="share of training sounds swapped")
    add("--cross-class-only", action="store_true", help="swap sounds between clips of different classes alone")
    add("--shard-samples", type=int, default=1000, help="clips of one tar (default: %(default)s)")
    add("--seed", type=int, default=0, help="of order, noise and rendering (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="encoding processes (default: %(default)s)")
    add("--part", default="", metavar="I/N", help="encode the I-th of N parts alone, from 0 on, and leave the rest")
    parser.set_defaults(**defaults)


if __name__ == "__main__":
    sys.exit(main())
