"""The audit of a multi-label run: its page, issue table and exports."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distav.console import format_table, show_progress
from distav.data.dataset import ShardedDataset, Split
from distav.tools.audit.issue_table import write_issue_table
from distav.tools.audit.issues import neighbors_of
from distav.tools.audit.list_issues import (
    LIST_KINDS,
    ListIssues,
    ListTable,
    describe_no_list_issues,
    find_list_issues,
    list_issue_table,
)
from distav.tools.audit.page import Neighbors, PageLayout, digest_of, encode_media, neighbor_columns, write_document

LIST_LAYOUT = PageLayout(
    {"missing": "Missing labels", "wrong": "Wrong labels"}, {"class": "Class"}, ("list_decisions.js", "list_page.js")
)


@dataclass(frozen=True)
class ListAudit:
    """Content of the page of a multi-label run.

    Attributes:
        title: title of the page.
        split: the clips.
        classes: class names.
        table: labels table of the last label correction.
        correction: summary of that correction in report.json.
        issues: listed issues of each type.
        neighbors: neighbors of the clips of each list of issues.
        facts: additional lines of the overview.
        all_issues: all issues as a table.
    """

    title: str
    split: Split
    classes: list[str]
    table: ListTable
    correction: dict[str, Any]
    issues: list[ListIssues]
    neighbors: list[Neighbors]
    facts: dict[str, str]
    all_issues: pa.Table

    def clip_ids(self) -> np.ndarray:
        """Return the sorted ids of all clips on the page."""
        neighbor_ids = [ids.ravel() for neighbors in self.neighbors for ids, _ in neighbors.values()]
        ids = np.unique(np.concatenate([np.zeros(0, np.int64), *(ranked.ids for ranked in self.issues), *neighbor_ids]))
        return ids[ids >= 0]


def audit_lists(
    options: Any, shards: ShardedDataset, split: Split, report: dict[str, Any], run_name: str, embeddings: Any
) -> ListAudit:
    """Find the label issues of a multi-label run.

    Args:
        options: parsed options of audit.py.
        shards: the dataset.
        split: its training split.
        report: report.json of the run, with a correction.
        run_name: name and phases of the run.
        embeddings: embeddings of the clips.

    Raises:
        UserError: if the labels table does not belong to the dataset.
    """
    correction = report["corrections"][-1]
    path = options.run / "labels" / f"{correction['phase']}.parquet"
    table = ListTable.read(path, split, shards.classes)
    issues = find_list_issues(table)
    listed = [ranked.first(options.limit) for ranked in issues]
    with show_progress(None, "clips", "searching similar clips"):
        neighbors = [neighbors_of(embeddings, split, ranked.ids, options.neighbors) for ranked in listed]
    facts = {
        "run": run_name,
        "dataset": f"{shards.location}, split {split.name}",
        "clips": f"{len(split)} in {len(shards.classes)} classes, {table.given.sum(1).mean():.2f} labels per clip",
        **{f"{ranked.kind} labels": f"{ranked.total}" for ranked in issues},
        "quarantined clips": f"{len(report['quarantined_samples'])}",
    }
    title = f"{options.run.name} · audit"
    all_issues = list_issue_table(issues, table, split, shards.classes)
    return ListAudit(title, split, shards.classes, table, correction, listed, neighbors, facts, all_issues)


def write_list_audit(audit: ListAudit, out: Path, height: int) -> list[Path]:
    """Write the page and the issue table; returns the paths of the table."""
    media = encode_media([(audit.split, audit.clip_ids())], height)
    write_document(out, LIST_LAYOUT, list_page_data(audit), media)
    return write_issue_table(audit.all_issues, out.parent)


def list_summary(audit: ListAudit, out: Path, tables: list[Path]) -> list[str]:
    """Return the lines that the command prints."""
    rows = [(f"{ranked.kind} labels", ranked.total, len(ranked.ids)) for ranked in audit.issues]
    lines = [
        format_table(("issues", "found", "listed"), rows),
        "",
        f"{out}: {len(audit.clip_ids())} clips, {out.stat().st_size / 2**20:.1f} MiB; open it in a browser",
        f"{' and '.join(map(str, tables))}: all issues, one row for each clip and class",
    ]
    empty = [ranked.kind for ranked in audit.issues if not ranked.total]
    return lines + list(dict.fromkeys(describe_no_list_issues(kind, audit.correction["has_signal"]) for kind in empty))


def list_page_data(audit: ListAudit) -> dict[str, Any]:
    """Return the JSON object of the page; clips are referred to by their index among those shown."""
    clip_ids, split, correction = audit.clip_ids(), audit.split, audit.correction
    has_signal = correction["has_signal"]
    columns: dict[str, list[Any]] = {name: [] for name in ("kind", "clip", "class", "score", "visual", "audio")}
    for ranked, neighbors in zip(audit.issues, audit.neighbors, strict=True):
        columns["kind"] += [ranked.kind] * len(ranked.ids)
        columns["clip"] += np.searchsorted(clip_ids, ranked.ids).tolist()
        columns["class"] += ranked.columns.tolist()
        columns["score"] += ranked.scores.tolist()
        for modality, rows in neighbor_columns(neighbors, clip_ids).items():
            columns[modality] += rows

    def lists(matrix: np.ndarray) -> list[list[int]]:
        return [np.flatnonzero(row).tolist() for row in matrix[clip_ids]]

    return {
        "title": audit.title,
        "digest": digest_of(audit.table.table, ("key", "given_label", "posterior")),
        "classes": audit.classes,
        "totals": {ranked.kind: ranked.total for ranked in audit.issues},
        "no_issues": {kind: describe_no_list_issues(kind, has_signal) for kind in LIST_KINDS},
        "facts": list(audit.facts.items()),
        "rates": {
            kind: {
                "overall": correction[f"{kind}_label_rate"] if has_signal else None,
                "classes": correction[f"{kind}_label_rate_by_class"],
            }
            for kind in LIST_KINDS
        },
        "counts": {
            "given": audit.table.given.sum(0).tolist(),
            "corrected": audit.table.corrected.sum(0).tolist(),
        },
        "clips": {
            "key": split.keys[clip_ids].tolist(),
            "source": [str(source) for source in split.sources[clip_ids]],
            "start_s": split.columns["start_s"][clip_ids].tolist(),
            "given": lists(audit.table.given),
            "corrected": lists(audit.table.corrected),
            "has_frames": split.has_modality("visual")[clip_ids].tolist(),
            "has_audio": split.has_modality("audio")[clip_ids].tolist(),
        },
        "issues": columns,
    }
