"""Datasets of the noise benchmark: digits, and natural sets of `tools.bench.natural`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from distav.config.errors import UserError
from tools.bench.natural import clip_lists

DIGIT_FILES = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", "fsdd-recordings.tar.gz")
DIGITS = {
    "easy": (),
    "cross-class audio": ("--cross-class-only",),
    "hard": ("--degrade",),
    "held-out speaker": ("--hold-out-speaker", "theo"),
}
"""Options of make_shards.py digits for each dataset of digits."""


@dataclass(frozen=True)
class NaturalSet:
    """A natural dataset.

    Attributes:
        make_clips: writes its clips, see `tools.bench.natural.clip_lists`.
        encoding: options of make_shards.py csv.
        overrides: settings of every training.
    """

    make_clips: Callable[[Path, Path], Iterator[clip_lists.Clip]]
    encoding: tuple[str, ...]
    overrides: tuple[str, ...]


_PHOTO = ("--fps", "10", "--short-side", "64", "--sample-rate", "16000")
_ONE_FRAME = ("data.num_frames=1", "data.frame_size=48", "augment.flip_prob=0.5")
NATURAL = {
    "grid words": NaturalSet(
        clip_lists.grid_words,
        ("--clip-s", f"{clip_lists.WORD_S}", "--fps", "25", "--short-side", "64", "--sample-rate", "16000"),
        ("data.num_frames=5", "data.frame_stride=2", "data.frame_size=48", f"data.audio_s={clip_lists.WORD_S}"),
    ),
    "photos and digits": NaturalSet(
        clip_lists.photos_digits, ("--clip-s", f"{clip_lists.SPEECH_S}", *_PHOTO), (*_ONE_FRAME, "data.audio_s=0.6")
    ),
    "photos and sounds": NaturalSet(
        clip_lists.photos_sounds, ("--clip-s", f"{clip_lists.SOUND_S}", *_PHOTO), (*_ONE_FRAME, "data.audio_s=1.0")
    ),
}
"""Natural datasets by name."""
PRETRAINED = ", pretrained"
"""Suffix of a natural dataset whose visual tower has constant weights of EfficientNet-Lite0 (Tan and Le 2019)."""
DATASETS = (*DIGITS, *NATURAL, *(f"{name}{PRETRAINED}" for name in NATURAL))
"""All datasets, in the order of tables."""


@dataclass(frozen=True)
class BenchDataset:
    """What the benchmark needs of a dataset.

    Attributes:
        source: words of make_shards.py before the directory of the dataset: the command, and a list of clips.
        options: words after it.
        overrides: settings of every training.
    """

    source: tuple[str, ...]
    options: tuple[str, ...]
    overrides: tuple[str, ...] = ()


def digit_datasets(folder: Path) -> Mapping[str, BenchDataset]:
    """Return the datasets of digits.

    Args:
        folder: directory with MNIST's test files and FSDD's tar file.

    Raises:
        UserError: if a file is missing.
    """
    for name in DIGIT_FILES:
        if not (folder / name).is_file():
            raise UserError(f"--digits={folder}: {name} is missing; download MNIST's test files and FSDD.")
    images, labels, recordings = (str(folder / name) for name in DIGIT_FILES)
    files = ("--images", images, "--image-labels", labels, "--recordings", recordings, "--label-noise", "symmetric:0")
    return {name: BenchDataset(("digits",), (*files, *options)) for name, options in DIGITS.items()}


def natural_datasets(
    sources: Path, work: Path, names: Iterable[str], visual_weights: Path | None
) -> Mapping[str, BenchDataset]:
    """Return natural datasets, after writing their clips unless they exist.

    Args:
        sources: directory with clones of the repositories.
        work: directory for the clips.
        names: names in `NATURAL`, or with the suffix `PRETRAINED`.
        visual_weights: file with ImageNet weights of EfficientNet-Lite0, for the latter.

    Raises:
        UserError: if a repository is missing.
    """
    datasets = {}
    for name in names:
        base = name.removesuffix(PRETRAINED)
        natural, overrides = NATURAL[base], NATURAL[base].overrides
        if base != name:
            if visual_weights is None or not visual_weights.is_file():
                raise UserError(f"--visual-weights={visual_weights}: no such file; {name} needs ImageNet weights.")
            tower = ("timm:tf_efficientnet_lite0", f"model.visual.weights={visual_weights}", "model.visual.freeze=-1")
            overrides += (f"model.visual.name={tower[0]}", *tower[1:], "model.visual.batch_norm=running")
            overrides += ("data.frame_size=64",)  # A smaller one would leave a single position in the last layers.
        table = clip_lists.write_clips(natural.make_clips, sources, work / "clips" / base.replace(" ", "-"))
        options = (*natural.encoding, "--label-noise", "symmetric:0")  # Stores the labels as the true ones.
        datasets[name] = BenchDataset(("csv", str(table)), options, overrides)
    return datasets
