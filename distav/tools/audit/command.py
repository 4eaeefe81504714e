"""Find label issues, mismatched pairs, duplicates, leaks, off-topic and silent or black clips of a run's dataset.

tools/audit.py runs/mine
tools/audit.py runs/mine --limit 5000 --out mine.html --embeddings embeddings/mine
tools/audit.py runs/mine --export labelstudio

The page needs no server: open it in a browser. It ranks the issues, each with frames, audio and the most similar clips.
Labels and pairs are those of the run's last label correction. Issues are accepted or rejected with keys; `Save
decisions` writes a CSV file. tools/make_shards.py clean SHARDS OUT --decisions FILE creates a cleaned dataset from it;
data.label_overrides=FILE applies its labels in training. issues.parquet and issues.csv, beside the page, have a row per
clip. With several labels per clip, the issues are missing and wrong labels, one row for each clip and class; only
`clean` reads their decisions. --export writes the listed clips as files for FiftyOne or Label Studio, or with a CSV
table.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf

from distav.config.cli import CommandParser, check_minimums, command, exit_with_error, name_arguments
from distav.config.errors import UserError
from distav.console import format_table, show_progress
from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset, Split
from distav.evaluation.embedding import Embedder, Embeddings
from distav.memory.neighbor_search import MAX_K
from distav.tools.audit.data_issues import DataIssues, find_data_issues
from distav.tools.audit.exports import EXPORT_FORMATS, Export, write_export
from distav.tools.audit.issue_table import issue_table, write_issue_table
from distav.tools.audit.issues import check_corrected, describe_no_issues, last_correction, neighbors_of
from distav.tools.audit.list_audit import audit_lists, list_summary, write_list_audit
from distav.tools.audit.list_exports import write_list_export
from distav.tools.audit.media_check import MediaCheck
from distav.tools.audit.page import Audit, write_page

_NEIGHBORS = 8
"""Default of `--neighbors`; a smaller dataset has fewer."""


@dataclass(frozen=True)
class _AuditedRun:
    """A finished run and its dataset.

    Attributes:
        name: its name and its phases.
        short_name: its name.
        shards: the dataset.
        split: its training split.
        test_split: name of its test split; empty without one.
        report: its report.json.
    """

    name: str
    short_name: str
    shards: ShardedDataset
    split: Split
    test_split: str
    report: dict[str, Any]


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    out = options.out or options.run / "audit.html"
    try:
        check_minimums(options, limit=0, neighbors=1, thumbnail_height=16, batch_size=1, workers=1)
        if options.export_dir and not options.export:
            raise UserError(f"--export-dir={options.export_dir}: also give --export FORMAT.")
        run = _open_run(options)
        if run.shards.multi_label:
            _audit_lists(options, run, out)
        else:
            _audit_classes(options, run, out)
    except UserError as error:
        return exit_with_error(error, "audit")
    return 0


def _audit_classes(options: argparse.Namespace, run: _AuditedRun, out: Path) -> None:
    """Write page, issue table and exports of a dataset with one label per clip."""
    data, audit = _audit(options, run)
    table = issue_table(data)
    with _report_write_errors(out):
        write_page(audit, out, options.thumbnail_height)
        tables = write_issue_table(table, out.parent)
    _print_summary(audit, out, tables)
    if options.export:
        write_export(options.export, Export(audit, data, table), _export_dir(options, out))


def _audit_lists(options: argparse.Namespace, run: _AuditedRun, out: Path) -> None:
    """Write page, issue table and exports of a multi-label dataset."""
    check_corrected(options.run, run.report)
    audit = audit_lists(options, run.shards, run.split, run.report, run.name, _embeddings(options, run.split))
    with _report_write_errors(out):
        tables = write_list_audit(audit, out, options.thumbnail_height)
    print("\n".join(list_summary(audit, out, tables)))
    if run.test_split:
        print(_describe_unchecked(run.shards.split(run.test_split)))
    if options.export:
        write_list_export(options.export, audit, _export_dir(options, out))


def _export_dir(options: argparse.Namespace, out: Path) -> Path:
    return options.export_dir or out.parent / f"audit-{options.export}"


@contextmanager
def _report_write_errors(out: Path) -> Iterator[None]:
    """Create the directory of the page; raises a UserError if a file cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror}; choose another file.") from None


def _describe_unchecked(test: Split) -> str:
    return f"labels of the {len(test)} clips of the split {test.name} are not checked"


def _print_summary(audit: Audit, out: Path, tables: list[Path]) -> None:
    rows = [
        (issues.kind.replace("_", "-"), *(["–"] * 2 if issues.total is None else [issues.total, len(issues.ids)]))
        for issues in audit.issues
    ]
    print(format_table(("issues", "found", "listed"), rows, numbers=("found", "listed")))
    print(f"\n{out}: {len(audit.clip_ids())} clips, {out.stat().st_size / 2**20:.1f} MiB; open it in a browser")
    print(f"{' and '.join(map(str, tables))}: the issues of every clip")
    if audit.test:
        print(_describe_unchecked(audit.test))
    has_signal = bool(audit.correction["label_noise_rate_by_class"])
    empty = [issues for issues in audit.issues if not issues.total]
    texts = (describe_no_issues(issues.kind, has_signal, issues.total is not None) for issues in empty)
    for text in dict.fromkeys(texts):
        print(text)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(script="audit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="directory of a finished run with a phase of kind: label_correction")
    add("--out", type=Path, metavar="FILE", help="page to write (RUN/audit.html)")
    add("--shards", default="", metavar="SHARDS", help="training dataset of the run, if it was moved")
    add("--limit", type=int, default=1000, metavar="N", help="issues per list; 0: all (%(default)s)")
    add("--neighbors", type=int, default=_NEIGHBORS, metavar="K", help="similar clips per issue (%(default)s)")
    add("--embeddings", type=Path, metavar="DIR", help="output of tools/embed.py for the dataset, to skip embedding it")
    add("--thumbnail-height", type=int, default=96, metavar="PIXELS", help="largest height of a frame (%(default)s)")
    add("--batch-size", type=int, default=32, help="clips embedded at a time (%(default)s)")
    add("--skip-media", action="store_true", help="do not decode all clips to find silent, black and still ones")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode them (%(default)s)")
    add("--export", choices=EXPORT_FORMATS, help="also write the listed clips for another tool")
    add("--export-dir", type=Path, metavar="DIR", help="directory for --export (audit-FORMAT beside the page)")
    return parser


def _open_run(options: argparse.Namespace) -> _AuditedRun:
    run: Path = options.run
    if not (run / "report.json").is_file():
        reason = "no report.json" if run.is_dir() else "no such directory"
        raise UserError(f"{run}: {reason}; specify the directory of a finished run, runs/NAME.")
    config = OmegaConf.load(run / "config.yaml")  # Not validated: the allowed keys may have changed since the run.
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    shards = _open_dataset(options.shards, config.data.root, run)
    _check_kind(shards, report, options)
    split = shards.split(config.data.train_split)
    max_neighbors = min(len(split) - 1, MAX_K)
    if options.neighbors > max(max_neighbors, _NEIGHBORS):
        raise UserError(
            f"--neighbors={options.neighbors}: allowed: 1 to {max_neighbors}, for the {len(split)} training clips of "
            f"{shards.location}."
        )
    name = f"{config.run.name} ({', '.join(config.phases)})"
    return _AuditedRun(name, config.run.name, shards, split, config.data.get("test_split") or "", report)


def _audit(options: argparse.Namespace, run: _AuditedRun) -> tuple[DataIssues, Audit]:
    shards, split, report = run.shards, run.split, run.report
    table = last_correction(options.run, report, split)
    test = shards.split(run.test_split) if run.test_split else None
    embeddings, data = _find_issues(options, shards, split, test, table)
    test_labels = data.test_labels
    facts = {
        "run": run.name,
        "dataset": f"{shards.location}, split {split.name}",
        "clips": f"{len(split)} in {len(shards.classes)} classes",
        **{f"{issues.kind.replace('_', '-')} issues": f"{issues.total}" for issues in data.issues},
        "quarantined clips": f"{len(report['quarantined_samples'])}",
    }
    if not data.media.measured:
        facts["media issues"] = "– not searched (--skip-media)"
    issues = [ranked.first(options.limit) for ranked in data.issues]
    with show_progress(len(issues), "lists", "searching similar clips") as searching:
        neighbors = []
        for ranked in issues:
            neighbors.append(neighbors_of(embeddings, split, ranked.ids, options.neighbors))
            searching.advance()
    title = f"{run.short_name} · audit"
    correction = report["corrections"][-1]
    audit = Audit(title, split, shards.classes, table, correction, issues, neighbors, facts, test, test_labels)
    return data, audit


def _find_issues(
    options: argparse.Namespace, shards: ShardedDataset, split: Split, test: Split | None, table: Any
) -> tuple[Embeddings, DataIssues]:
    """Embed the clips, check their media, and search all issues; returns the embeddings of the training clips."""
    embeddings = _embeddings(options, split)
    test_embeddings = _embeddings(options, test) if test else None
    test_labels: list[str] = []
    if test:
        labels = load_labels(shards, test)
        test_labels = [labels.classes[label] for label in labels.given]
    media = MediaCheck.skipped(len(split)) if options.skip_media else MediaCheck.measure(split, options.workers)
    with show_progress(None, "clips", "searching issues"):
        return embeddings, find_data_issues(split, test, table, test_labels, embeddings, test_embeddings, media)


def _open_dataset(specified: str, recorded: str, run: Path) -> ShardedDataset:
    """Open the dataset that --shards specifies, or else the one that the run records."""
    try:
        return ShardedDataset.open(specified or recorded)
    except UserError as error:
        if specified:
            raise UserError(name_arguments(error, {"data.root": "--shards"})) from None
        raise UserError(f"{run / 'config.yaml'}: {error} If the dataset was moved, specify it with --shards.") from None


def _check_kind(shards: ShardedDataset, report: dict[str, Any], options: argparse.Namespace) -> None:
    """Raise a UserError if the run corrected single labels and the dataset has lists of labels, or vice versa."""
    corrects_lists = ["missing_label_rate" in correction for correction in report.get("corrections", ())]
    if corrects_lists and corrects_lists[-1] != shards.multi_label:
        kinds = ("a dataset with one label per clip", "a multi-label dataset")
        raise UserError(
            f"--shards={options.shards or shards.location}: {kinds[shards.multi_label]}, but {options.run} is a run on "
            f"{kinds[not shards.multi_label]}; specify the run's dataset with --shards."
        )


def _embeddings(options: argparse.Namespace, split: Split) -> Embeddings:
    if not options.embeddings:
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        return Embedder.open(options.run / "export", device, options.batch_size).embed_clips(split)
    if not options.embeddings.is_dir():
        raise UserError(
            f"--embeddings={options.embeddings}: no such directory; it has to be the OUT of tools/embed.py."
        )
    tables = [pq.read_table(path) for path in sorted(options.embeddings.glob(f"{split.name}-*.parquet"))]
    keys = [key for table in tables for key in table.column("key").to_pylist()]
    if keys != split.keys.tolist():
        raise UserError(
            f"--embeddings={options.embeddings}: its {len(keys)} clips of split {split.name} are not those of "
            f"{split.root}; run tools/embed.py on this dataset, or omit the option."
        )
    return Embeddings.concatenate(Embeddings.from_table(table) for table in tables)
