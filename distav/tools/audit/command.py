"""Write a page to judge labels and pairs that look wrong.

tools/audit.py runs/mine
tools/audit.py runs/mine --most 5000 --out mine.html --embeddings embeddings/mine

The page needs no server: open it in a browser. It ranks what the run's last correction found wrong, each with frames,
sound, and the clips that it looks and sounds like; keys accept or reject, `Save decisions` writes a CSV file, which
tools/make_shards.py clean SHARDS OUT --decisions FILE makes a clean set of, and data.label_overrides=FILE trains on.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf

from distav.config.cli import exit_with_error
from distav.config.errors import UserError
from distav.data.dataset import ShardedDataset, Split
from distav.evaluation.embedding import Embeddings, Encoders
from distav.tools.audit.issues import corrections_of, label_issues, neighbors_of, pair_issues
from distav.tools.audit.page import Audit, write_page


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    out = options.out or options.run / "audit.html"
    try:
        for name, least in (("limit", 0), ("neighbors", 1), ("thumbnail_height", 16)):
            value = getattr(options, name)
            if value < least:
                raise UserError(f"--{name.replace('_', '-')}={value}: allowed: from {least} up.")
        audit = _audit(options)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_page(audit, out, options.thumbnail_height)
        except OSError as error:
            raise UserError(f"--out={out}: {error.strerror}; choose another file.") from None
    except UserError as error:
        return exit_with_error(error, "audit")
    counts = ", ".join(f"{len(each.ids)} {each.kind} problems" for each in audit.issues)
    print(f"{out}: {counts}, {len(audit.shown())} clips, {out.stat().st_size / 2**20:.1f} MiB; open it in a browser")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="audit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of a finished run with a phase of kind correction")
    add("--out", type=Path, metavar="FILE", help="the page (RUN/audit.html)")
    add("--shards", default="", metavar="SHARDS", help="the set that the run learnt from, where it has moved")
    add("--limit", type=int, default=1000, metavar="N", help="problems of each list; 0: all (%(default)s)")
    add("--neighbors", type=int, default=8, metavar="K", help="clips shown beside each problem (%(default)s)")
    add("--embeddings", type=Path, metavar="DIR", help="what tools/embed.py wrote of the set, in place of embedding it")
    add("--thumbnail-height", type=int, default=96, metavar="PIXELS", help="largest height of a frame (%(default)s)")
    add("--batch-size", type=int, default=32, help="clips embedded at a time (%(default)s)")
    return parser


def _audit(options: argparse.Namespace) -> Audit:
    run: Path = options.run
    if not (run / "report.json").is_file():
        raise UserError(f"{run}: no report.json there; give the folder of a finished run, runs/NAME.")
    settings = OmegaConf.load(run / "config.yaml")  # As it was: what distav allows may have changed since.
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    shards = ShardedDataset.open(options.shards or settings.data.root)
    split = shards.split(settings.data.train_split)
    table = corrections_of(run, report, split)
    problems = [label_issues(table), pair_issues(table)]
    facts = {
        "run": f"{settings.run.name} ({', '.join(settings.phases)})",
        "set": f"{shards.location}, split {split.name}",
        "clips": f"{len(split)} in {len(shards.classes)} classes",
        "labels that look wrong": f"{problems[0].total}",
        "pairs that look wrong": f"{problems[1].total}",
        "clips that could not be read": f"{len(report['skipped_samples'])}",
    }
    problems = [each.first(options.limit) for each in problems]
    embeddings = _embeddings(options, split)
    near = [neighbors_of(embeddings, split, each.ids, options.neighbors) for each in problems]
    found = report["corrections"][-1]
    return Audit(f"{settings.run.name} · audit", split, shards.classes, table, found, problems, near, facts)


def _embeddings(options: argparse.Namespace, split: Split) -> Embeddings:
    if not options.embeddings:
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        return Encoders.open(options.run / "export", device, options.batch_size).of_clips(split)
    files = sorted(options.embeddings.glob(f"{split.name}-*.parquet"))
    tables = [pq.read_table(each) for each in files]
    keys = [key for each in tables for key in each.column("key").to_pylist()]
    if keys != split.keys.tolist():
        raise UserError(
            f"--embeddings={options.embeddings}: holds {len(keys)} clips of split {split.name}, not those of "
            f"{split.root}; run tools/embed.py on this set, or leave the option out."
        )
    return Embeddings.joined(Embeddings.of_table(each) for each in tables)
