"""The samples of a split: their order, injected noise and tables."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from distav.config.errors import UserError
from distav.data.annotations.events import events_table
from distav.data.annotations.multi_labels import LABEL_SEPARATOR, class_matrix, label_lists
from distav.data.preparation.build_config import BuildConfig
from distav.data.preparation.encode_workers import EncodedClip
from distav.data.preparation.multi_label_noise import corrupt_labels, multi_label_rates
from distav.data.preparation.noise_injection import flip_labels, mismatch_pairs
from distav.data.preparation.shard_writer import sample_keys
from distav.data.preparation.source import SourceInfo


@dataclass(frozen=True)
class SplitSamples:
    """The samples of one split by id, with their noise.

    Attributes:
        name: name of the split.
        keys: N keys.
        clips: N encoded clips.
        true_labels, given_labels: [N] int64; [N, C] bool for multi-label sources.
        audio_source: [N] int64, the id of the clip that the audio is from.
        complete: [N] bool, whether the clip has all members; correspondence noise concerns only these.
    """

    name: str
    keys: list[str]
    clips: list[EncodedClip]
    true_labels: np.ndarray
    given_labels: np.ndarray
    audio_source: np.ndarray
    complete: np.ndarray


def draw_samples(
    name: str,
    clips: list[EncodedClip],
    classes: list[str],
    multi_label: bool,
    members: Collection[str],
    config: BuildConfig,
    rng: np.random.Generator,
) -> SplitSamples:
    """Shuffle the clips of a split; swap audio and flip labels if it is the training split.

    Args:
        name: name of the split.
        clips: its clips in the order of the candidates.
        classes: class names.
        multi_label: whether clips may have several classes.
        members: names of the members of a complete clip; audio is swapped only between complete clips.
        config: the noise.
        rng: source of randomness.

    Raises:
        UserError: for noise that is impossible with these clips.
    """
    clips = [clips[position] for position in rng.permutation(len(clips))]
    if multi_label:
        true = class_matrix([clip.label.split(LABEL_SEPARATOR) for clip in clips], classes, "labels of the source")
    else:
        true = np.array([classes.index(clip.label) for clip in clips], dtype=np.int64)
    mismatch_rate = config.correspondence_noise if name == "train" else 0.0
    label_noise = config.label_noise if name == "train" else None
    complete = np.array([set(clip.members) >= set(members) for clip in clips], dtype=bool)
    if mismatch_rate and not complete.any():
        raise UserError(
            f"--correspondence-noise={mismatch_rate:g}: none of the {len(clips)} training clips has both video and "
            "audio; leave the option out."
        )
    ids = np.flatnonzero(complete)
    audio_source = np.arange(len(clips))
    audio_source[ids] = ids[
        mismatch_pairs(len(ids), mismatch_rate, rng, true[ids] if config.cross_class_only else None)
    ]
    given = flip_labels(true, len(classes), label_noise, rng) if label_noise else true
    if multi_label and name == "train":
        given = corrupt_labels(true, config.missing_labels, config.wrong_labels, rng)
    return SplitSamples(name, sample_keys(name, len(clips)), clips, true, given, audio_source, complete)


def noise_rates(samples: SplitSamples, multi_label: bool) -> dict[str, float]:
    """Return the exact rates of the injected noise; those of swapped audio refer to clips with video and audio."""
    true, complete = samples.true_labels, samples.complete
    if multi_label:
        rates = multi_label_rates(true, samples.given_labels)
    else:
        rates = {"label_rate": float((samples.given_labels != true).mean())}
    if complete.any():
        rates["swapped_audio_rate"] = float((samples.audio_source != np.arange(len(true)))[complete].mean())
        if not multi_label:
            rates["cross_class_audio_rate"] = float((true[samples.audio_source] != true)[complete].mean())
    return rates


def labels_table(samples: SplitSamples, classes: list[str], multi_label: bool, config: BuildConfig) -> pa.Table:
    """Return the rows of labels.parquet; true labels and audio sources are stored only if noise was injected."""
    names = np.array(classes, dtype=object)
    if multi_label:
        labels = pa.array(_stored_lists(samples, classes), pa.list_(pa.string()))
    else:
        labels = names[samples.given_labels]
    columns = {
        "split": [samples.name] * len(samples.clips),
        "id": np.arange(len(samples.clips)),
        "key": samples.keys,
        "label": labels,
    }
    if config.label_noise:
        columns["true_label"] = names[samples.true_labels]
    if config.corrupts_lists:
        columns["true_label"] = pa.array([clip.label.split(LABEL_SEPARATOR) for clip in samples.clips])
    if config.correspondence_noise:
        columns["pair_id"] = samples.audio_source
    return pa.table(columns)


def _stored_lists(samples: SplitSamples, classes: list[str]) -> list[list[str]]:
    """Return the given lists; those without noise keep the order of the source."""
    return [
        clip.label.split(LABEL_SEPARATOR) if np.array_equal(given, true) else label_lists(given[None], classes)[0]
        for clip, given, true in zip(samples.clips, samples.given_labels, samples.true_labels, strict=True)
    ]


def events_of(samples: SplitSamples, classes: list[str], info: SourceInfo) -> pa.Table | None:
    """Return the rows of events.parquet; None if a sample of the split has no annotated events."""
    by_sample = [info.events.get((samples.name, clip.source, clip.label)) for clip in samples.clips]
    annotated = [events for events in by_sample if events is not None]
    if len(annotated) < len(samples.clips):
        return None
    events = np.stack(annotated)
    events[:, 0] = events[samples.audio_source, 0]
    sources = np.array([clip.source for clip in samples.clips], dtype=object)
    return events_table(samples.name, np.array(samples.keys, dtype=object), sources, classes, events)
