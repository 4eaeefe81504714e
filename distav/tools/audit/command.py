"""Write a page for reviewing label issues and mismatched pairs of a run.

tools/audit.py runs/mine
tools/audit.py runs/mine --limit 5000 --out mine.html --embeddings embeddings/mine

The page needs no server: open it in a browser. It ranks the issues of the run's last label correction, each with
frames, audio and the most similar clips. Issues are accepted or rejected with keys; `Save decisions` writes a CSV file.
tools/make_shards.py clean SHARDS OUT --decisions FILE creates a cleaned dataset from it; data.label_overrides=FILE
applies its labels in training.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf

from distav.config.cli import CommandParser, check_minimums, exit_with_error, name_arguments
from distav.config.errors import UserError
from distav.data.dataset import ShardedDataset, Split
from distav.evaluation.embedding import Embedder, Embeddings
from distav.tools.audit.issues import describe_no_issues, label_issues, last_correction, neighbors_of, pair_issues
from distav.tools.audit.page import Audit, write_page


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    out = options.out or options.run / "audit.html"
    try:
        check_minimums(options, limit=0, neighbors=1, thumbnail_height=16, batch_size=1)
        audit = _audit(options)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_page(audit, out, options.thumbnail_height)
        except OSError as error:
            raise UserError(f"--out={out}: {error.strerror}; choose another file.") from None
    except UserError as error:
        return exit_with_error(error, "audit")
    counts = ", ".join(f"{len(issues.ids)} {issues.kind} issues" for issues in audit.issues)
    print(f"{out}: {counts}, {len(audit.clip_ids())} clips, {out.stat().st_size / 2**20:.1f} MiB; open it in a browser")
    has_signal = bool(audit.correction["label_noise_rate_by_class"])
    empty = [issues.kind for issues in audit.issues if not issues.total]
    for text in dict.fromkeys(describe_no_issues(kind, has_signal) for kind in empty):
        print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="audit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="directory of a finished run with a phase of kind: label_correction")
    add("--out", type=Path, metavar="FILE", help="page to write (RUN/audit.html)")
    add("--shards", default="", metavar="SHARDS", help="training dataset of the run, if it was moved")
    add("--limit", type=int, default=1000, metavar="N", help="issues per list; 0: all (%(default)s)")
    add("--neighbors", type=int, default=8, metavar="K", help="similar clips shown for each issue (%(default)s)")
    add("--embeddings", type=Path, metavar="DIR", help="output of tools/embed.py for the dataset, to skip embedding it")
    add("--thumbnail-height", type=int, default=96, metavar="PIXELS", help="largest height of a frame (%(default)s)")
    add("--batch-size", type=int, default=32, help="clips embedded at a time (%(default)s)")
    return parser


def _audit(options: argparse.Namespace) -> Audit:
    run: Path = options.run
    if not (run / "report.json").is_file():
        raise UserError(f"{run}: no report.json; specify the directory of a finished run, runs/NAME.")
    config = OmegaConf.load(run / "config.yaml")  # Not validated: the allowed keys may have changed since the run.
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    shards = _open_dataset(options.shards, config.data.root, run)
    split = shards.split(config.data.train_split)
    table = last_correction(run, report, split)
    issues = [label_issues(table), pair_issues(table)]
    facts = {
        "run": f"{config.run.name} ({', '.join(config.phases)})",
        "dataset": f"{shards.location}, split {split.name}",
        "clips": f"{len(split)} in {len(shards.classes)} classes",
        "label issues": f"{issues[0].total}",
        "pair issues": f"{issues[1].total}",
        "quarantined clips": f"{len(report['quarantined_samples'])}",
    }
    issues = [ranked.first(options.limit) for ranked in issues]
    embeddings = _embeddings(options, split)
    neighbors = [neighbors_of(embeddings, split, ranked.ids, options.neighbors) for ranked in issues]
    title = f"{config.run.name} · audit"
    return Audit(title, split, shards.classes, table, report["corrections"][-1], issues, neighbors, facts)


def _open_dataset(specified: str, recorded: str, run: Path) -> ShardedDataset:
    """Open the dataset that --shards specifies, or else the one that the run records."""
    try:
        return ShardedDataset.open(specified or recorded)
    except UserError as error:
        if specified:
            raise UserError(name_arguments(error, {"data.root": "--shards"})) from None
        raise UserError(f"{run / 'config.yaml'}: {error} If the dataset was moved, specify it with --shards.") from None


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
