"""WebDataset tar files of other tools, such as video2dataset or img2dataset."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import ClassVar, Self

import numpy as np

from distav.config.cli import name_arguments
from distav.config.errors import UserError, format_list
from distav.data.preparation.encoding import ANY_HINT, OMIT_DEFAULT, Clip, ClipSource, Encoding, RejectedClip
from distav.data.preparation.media.embedded import AUDIO_EXTENSIONS, VIDEO_EXTENSIONS, EmbeddedFile, decode_embedded
from distav.data.preparation.source import SourceInfo
from distav.data.preparation.sources.sample_labels import (
    add_label_arguments,
    class_names_of,
    join_labels,
    parse_labels,
    source_info,
)
from distav.data.preparation.sources.split_patterns import SplitPattern
from distav.data.preparation.sources.tar_index import Member, TarSample, copy_member, read_samples
from distav.data.storage.object_store import PACKAGES, RemoteDirectory, is_url

TEXT_EXTENSIONS = ("cls", "txt")
_CONCURRENT_TARS = 8


@dataclass(frozen=True)
class _IndexedSample:
    """A sample and what was read from its members.

    Attributes:
        name: location of the tar, and key.
        split: name of its split.
        labels: its classes; empty if it cannot be used.
        in_list: whether its label is a list.
        media: tar; extension, offset and size of the video, if there is one, and of the audio if there is a separate
            file.
        fault: why it cannot be used; empty if it can.
    """

    name: str
    split: str
    labels: tuple[str, ...] = ()
    in_list: bool = False
    media: tuple[str | int, ...] = ()
    fault: str = ""


@dataclass(frozen=True)
class TarFiles:
    """`tars PATTERN...`: samples with a video, an audio file or both, and a member with the label.

    Attributes:
        patterns: the tar files; without a split their samples are in the split `train`.
        label: `cls`, `txt` or `json:KEY`.
        class_names: class names by index; empty: indices are the names.
        first_label: whether to use only the first label of a list.
        key_to_last_dot: whether a key ends at the last dot of a name instead of the first one.
        modalities: `both`: samples need a video; `any`: an audio file suffices.
        label_separator: separates the classes in a text; empty: a text is one class.
    """

    description: ClassVar[str] = "Cut the videos in WebDataset tar files of other tools into clips."
    example: ClassVar[str] = "make_shards.py tars 'set-{000..999}.tar' shards/mine --label json:category"
    default_encoding: ClassVar[Encoding] = Encoding()
    clip_seconds: ClassVar[float | None] = None

    patterns: tuple[SplitPattern, ...]
    label: str = "cls"
    class_names: tuple[str, ...] = ()
    first_label: bool = False
    key_to_last_dot: bool = False
    modalities: str = field(default="both", metadata={OMIT_DEFAULT: True})
    label_separator: str = field(default="", metadata={OMIT_DEFAULT: True})

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the patterns and how to read the label."""
        add = parser.add_argument
        add(
            "patterns",
            nargs="+",
            metavar="PATTERN",
            help="[SPLIT=]PATTERN, path or URL (s3, gs, https) with {000..999} or * (default split: train)",
        )
        add(
            "--label",
            default="cls",
            metavar="MEMBER",
            help="cls, txt or json:KEY, e.g. json:meta.category (default: cls)",
        )
        add_label_arguments(parser)
        add(
            "--key-to-last-dot",
            action="store_true",
            help="the key of a sample ends at the last dot of the member name (default: at the first one)",
        )

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Self:
        """Return the source for parsed options."""
        return cls(
            tuple(SplitPattern.parse(text) for text in options.patterns),
            options.label,
            class_names_of(options),
            options.first_label,
            options.key_to_last_dot,
            options.modalities,
            options.label_separator,
        )

    def candidates(self) -> list[ClipSource]:
        """Return all samples, also those that cannot be used.

        Raises:
            UserError: for an invalid `label` or pattern, or if no sample can be used.
        """
        candidates = []
        for sample in _index(self):
            labels = sample.labels[:1] if self.first_label else sample.labels
            label = join_labels(labels, sample.name)
            detail = ("", sample.fault) if sample.fault else sample.media
            candidates.append(ClipSource(sample.name, label, sample.split, detail=detail))
        return candidates

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Copy the video, or the audio alone, to a temporary file and cut it into clips."""
        location, *positions = candidate.detail
        if not location:
            fault = str(positions[0])
            raise RejectedClip(f"{fault}; {ANY_HINT}" if _is_audio_alone(fault) else fault)
        video = audio = None
        for start in range(0, len(positions), 3):
            extension, offset, size = positions[start : start + 3]
            file = EmbeddedFile(str(extension), partial(copy_member, str(location), Member(int(offset), int(size))))
            if extension in AUDIO_EXTENSIONS:
                audio = file
            else:
                video = file
        return decode_embedded(video, audio, candidate, encoding)

    def info(self) -> SourceInfo:
        """Return the classes, and whether labels are lists."""
        samples = _index(self)
        multi_label = not self.first_label and any(sample.in_list for sample in samples)
        labels = [sample.labels[:1] if self.first_label else sample.labels for sample in samples]
        return source_info(labels, self.class_names, multi_label)


@lru_cache(maxsize=1)
def _index(source: TarFiles) -> list[_IndexedSample]:
    """Read the headers and labels of all tar files.

    Raises:
        UserError: for an invalid `label` or pattern, or if no sample can be used.
    """
    extension, key = _parse_label_option(source.label)
    tars = [(pattern.split or "train", tar) for pattern in source.patterns for tar in pattern.files()]
    for _, location in tars:
        _check_location(location)

    def read(location: str) -> list[TarSample]:
        return read_samples(location, extension, source.key_to_last_dot)

    with ThreadPoolExecutor(_CONCURRENT_TARS) as pool:
        contents = list(pool.map(read, [tar for _, tar in tars]))
    _mark_split_samples(contents)
    samples = [
        _indexed(split, tar, sample, extension, key, source)
        for (split, tar), content in zip(tars, contents, strict=True)
        for sample in content
    ]
    faults = Counter(sample.fault.partition(":")[0] for sample in samples if sample.fault)
    reasons = ", ".join(f"{count} {reason}" for reason, count in faults.most_common())
    if faults.total() == len(samples):
        first = f" The first one: {samples[0].name}: {samples[0].fault}." if samples else ""
        if any(_is_audio_alone(sample.fault) for sample in samples):
            first += f" {ANY_HINT}."
        raise UserError(
            f"tars {format_list(pattern.pattern for pattern in source.patterns)}: no sample can be used "
            f"({reasons or 'none found'}).{first}"
        )
    if faults:
        print(f"tars: {faults.total()} of {len(samples)} samples cannot be used: {reasons}", file=sys.stderr)
    return samples


def _check_location(location: str) -> None:
    """Raise a UserError for a URL that cannot be read, without a request."""
    if not is_url(location):
        return
    if location.partition("://")[0] not in PACKAGES:
        raise UserError(f"tars {location}: allowed: paths, and URLs with {format_list(PACKAGES)}.")
    try:
        RemoteDirectory(location.rpartition("/")[0])
    except UserError as error:
        raise UserError(name_arguments(error, {"data.root": "PATTERN"})) from None


def _parse_label_option(label: str) -> tuple[str, tuple[str, ...]]:
    """Return the extension of the member with labels, and the keys that lead to the label in a JSON member."""
    extension, _, path = label.partition(":")
    keys = tuple(path.split("."))
    if label not in TEXT_EXTENSIONS and (extension != "json" or not all(keys)):
        raise UserError(f"--label={label}: allowed: cls, txt, or json:KEY, where a nested key is a.b.")
    return extension, keys


def _mark_split_samples(contents: list[list[TarSample]]) -> None:
    """Mark the last sample of a tar and the first one of the next tar if they have the same key."""
    for tar, following in zip(contents, contents[1:], strict=False):
        last = next((sample for sample in reversed(tar) if sample.key), None)
        if last is not None and following and following[0].key == last.key:
            last.repeated = following[0].repeated = True


def _indexed(
    split: str, tar: str, sample: TarSample, extension: str, key: tuple[str, ...], source: TarFiles
) -> _IndexedSample:
    """Return a sample with its labels and the positions of its media, or with its fault."""
    name = f"{tar}/{sample.key}" if sample.key else tar
    try:
        if sample.faults:
            raise RejectedClip("; ".join(sample.faults))
        value = _label_value(sample, extension, key, source.modalities)
        media = _media(sample, source.modalities)
        labels = parse_labels(value, source.class_names, source.label_separator)
    except RejectedClip as reason:
        fault = str(reason)
        if sample.repeated and fault.startswith(("no video", "no label: no member")):
            fault = f"not adjacent: other members have the same key, and this part has {_extensions(sample)}"
        return _IndexedSample(name, split, fault=fault)
    return _IndexedSample(name, split, labels, isinstance(value, list) or bool(source.label_separator), (tar, *media))


def _media(sample: TarSample, modalities: str) -> tuple[str | int, ...]:
    """Return extension, offset and size of the video, if there is one, and of the audio file, if there is one."""
    files = []
    for extensions in (VIDEO_EXTENSIONS, AUDIO_EXTENSIONS):
        extension = next((extension for extension in extensions if extension in sample.members), None)
        if extension is None and extensions is VIDEO_EXTENSIONS and modalities == "both":
            raise RejectedClip(_missing_media(sample, modalities))
        if extension is not None:
            member = sample.members[extension]
            files += [extension, member.offset, member.size]
    if not files:
        raise RejectedClip(_missing_media(sample, modalities))
    return tuple(files)


def _missing_media(sample: TarSample, modalities: str) -> str:
    """Return the fault of a sample without the media that it needs."""
    name, allowed = "no video", VIDEO_EXTENSIONS
    if modalities == "any":
        name, allowed = "no video or audio", VIDEO_EXTENSIONS + AUDIO_EXTENSIONS
    fault = f"{name}: the sample has {_extensions(sample)}; allowed: {format_list(allowed)}"
    if any(extension.rpartition(".")[2] in allowed for extension in sample.members):
        fault += "; the key ends at the first dot, use --key-to-last-dot for keys with dots"
    return fault


def _is_audio_alone(fault: str) -> bool:
    """Return whether the fault of a sample is that it has an audio file but no video."""
    extensions = fault.removeprefix("no video: the sample has ").partition(";")[0]
    return fault.startswith("no video: ") and not set(extensions.split(", ")).isdisjoint(AUDIO_EXTENSIONS)


def _extensions(sample: TarSample) -> str:
    return format_list(sample.members) or "no members"


def _label_value(sample: TarSample, extension: str, keys: tuple[str, ...], modalities: str) -> object:
    """Return the label in a text member, or the value of a key in a JSON member."""
    if sample.text is None:
        if not any(name in sample.members for name in (*VIDEO_EXTENSIONS, *AUDIO_EXTENSIONS)):
            raise RejectedClip(_missing_media(sample, modalities))
        raise RejectedClip(f"no label: no member {extension}, the sample has {_extensions(sample)}")
    try:
        text = sample.text.decode("utf-8-sig").strip()
        if extension != "json":
            return int(text) if text.isdecimal() else text
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RejectedClip(f"no label: {extension} cannot be read ({error})") from None
    for position, key in enumerate(keys):
        if not isinstance(value, dict) or key not in value:
            raise RejectedClip(f"no label: json has no key '{'.'.join(keys[: position + 1])}'")
        value = value[key]
    return value
