"""All issues of a dataset: labels, pairs, duplicates, leaks, off-topic clips, and media without content.

Legend: N training clips, M test clips, R = N + M rows, I issues.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from distav.data.dataset import MEMBERS, Split
from distav.evaluation.embedding import Embeddings
from distav.tools.audit.duplicates import (
    Leaks,
    Matches,
    duplicate_groups,
    find_leaks,
    find_matches,
)
from distav.tools.audit.issues import Issues, label_issues, pair_issues, rank_issues
from distav.tools.audit.media_check import MediaCheck
from distav.tools.audit.neighborhoods import find_neighborhoods
from distav.tools.audit.off_topic import is_supported, num_neighbors, off_topic_scores


@dataclass(frozen=True)
class DataIssues:
    """Issues of the training clips of a dataset, and what they were found from.

    Attributes:
        train, test: the splits; `test` is None if the run has no test split.
        table: labels table of the last label correction.
        test_labels: given labels of the test clips.
        matches: clips that duplicate a training clip.
        leaks: clips that occur in both splits.
        off_topic_scores: [N] float32.
        is_off_topic: [N] bool.
        media: properties of the decoded training clips.
    """

    train: Split
    test: Split | None
    table: pa.Table
    test_labels: list[str]
    matches: Matches
    leaks: Leaks
    off_topic_scores: np.ndarray
    is_off_topic: np.ndarray
    media: MediaCheck

    @cached_property
    def keys(self) -> list[str]:
        """Keys of all rows."""
        return self.train.keys.tolist() + (self.test.keys.tolist() if self.test else [])

    @cached_property
    def sources(self) -> list[str]:
        """Sources of all rows."""
        splits = [split for split in (self.train, self.test) if split]
        return [str(source) for split in splits for source in split.sources]

    @cached_property
    def given_labels(self) -> list[str]:
        """Given labels of all rows."""
        return self.table.column("given_label").to_pylist() + self.test_labels

    @cached_property
    def duplicate_groups(self) -> np.ndarray:
        """Group of duplicates of each training clip, [N] int64; -1 without one."""
        return duplicate_groups(self.matches.ids[: len(self.train)])

    @cached_property
    def issues(self) -> list[Issues]:
        """Ranked issues of each type."""
        return [
            label_issues(self.table),
            pair_issues(self.table),
            self._duplicates(),
            self._leaks(),
            rank_issues("off_topic", self.off_topic_scores.astype(np.float64), self.is_off_topic),
            self._media(),
        ]

    def _duplicates(self) -> Issues:
        """Return the clips that duplicate another clip; the first clip of each group is not listed.

        Duplicates in the audio alone come last, since videos share music.
        """
        num_train = len(self.train)
        scores = self.matches.cosines[:num_train].astype(np.float64)
        is_listed = (self.duplicate_groups >= 0) & (self.duplicate_groups != np.arange(num_train))
        ranked = rank_issues("duplicate", scores, is_listed & (self.matches.ids[:num_train] >= 0))
        audio_alone = self.matches.modalities[ranked.ids] == MEMBERS["audio"]
        order = np.argsort(audio_alone, kind="stable")
        ranked = replace(ranked, ids=ranked.ids[order], scores=ranked.scores[order])
        notes = []
        for clip in ranked.ids.tolist():
            match = int(self.matches.ids[clip])
            relation = "Exact copy" if self.matches.exact[clip] else "Near-duplicate"
            same_source = "the same source" if self.sources[clip] == self.sources[match] else "another source"
            labels = "" if self.given_labels[clip] == self.given_labels[match] else "; the given labels differ"
            notes.append(
                f"{relation} of {self.keys[match]} of {same_source} in its {self.matches.modalities[clip]}{labels}"
            )
        return ranked.with_notes(notes, self.matches.ids[ranked.ids])

    def _leaks(self) -> Issues:
        num_train = len(self.train)
        partners = self.leaks.partners[:num_train]
        ranked = rank_issues("leak", self.leaks.scores[:num_train].astype(np.float64), partners >= 0)
        notes = []
        for clip in ranked.ids.tolist():
            key, reason = self.keys[partners[clip]], self.leaks.reasons[clip]
            relation = (
                f"Of the same source as test clip {key}"
                if reason == "same source"
                else f"{str(reason).capitalize()} of {key}"
            )
            notes.append(relation)
        return ranked.with_notes(notes, partners[ranked.ids])

    def _media(self) -> Issues:
        is_listed, texts = self.media.issues()
        ranked = rank_issues("media", is_listed.astype(np.float64), is_listed)
        if not self.media.measured:
            return replace(ranked, total=None)
        return ranked.with_notes([texts[clip].capitalize() for clip in ranked.ids])


def find_data_issues(
    train: Split,
    test: Split | None,
    table: pa.Table,
    test_labels: list[str],
    embeddings: Embeddings,
    test_embeddings: Embeddings | None,
    media: MediaCheck,
) -> DataIssues:
    """Search all types of issues.

    Args:
        train: training split.
        test: test split; None without one.
        table: labels table of the last label correction.
        test_labels: given labels of the test clips.
        embeddings: embeddings of the training clips.
        test_embeddings: embeddings of the test clips.
        media: result of the media check.
    """
    excluded = media.without_content
    neighborhoods = find_neighborhoods(embeddings, train.source_codes, test_embeddings, excluded)
    matches = find_matches(neighborhoods, train, test, excluded)
    given, knn = (np.array(table.column(name).to_pylist()) for name in ("given_label", "knn_label"))
    supported = is_supported(table.column("self_confidence").to_numpy(), given == knn)
    neighborhoods = find_neighborhoods(
        embeddings, train.source_codes, excluded=excluded, candidates=supported, k=num_neighbors(given, supported)
    )
    scores, is_off_topic = off_topic_scores(neighborhoods, supported)
    leaks = find_leaks(matches, train, test)
    return DataIssues(train, test, table, test_labels, matches, leaks, scores, is_off_topic, media)
