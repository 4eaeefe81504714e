"""The folder of a set in the making: whose it is, whether it is finished, and the files that come last.

What is not whole yet lies in `.work` under a name of its own, so that processes on any machines do not meet. The
manifest is the last file of a set; what has one is finished.
"""

import csv
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from distav.config.errors import UserError
from distav.config.version import __version__
from distav.data.dataset import TABLES, index_schema
from distav.data.files import temporary_path, write_atomically, write_table
from distav.data.integrity import file_entry

WORK = ".work"


@dataclass(frozen=True)
class BuildResult:
    """What came of it: clips by split, of a whole set; chunks that are encoded and those of all, of a part."""

    clips: dict[str, int]
    rejected: int
    seconds: float
    chunks: tuple[int, int] | None = None
    num_relabeled: int | None = None
    """Clips of a cleaned set with another label than before."""


def recipe_of(source: Any, plan: Any) -> dict[str, Any]:
    """Return all that decides the bytes of a set, as JSON values."""
    return {"distav": __version__, "source": _described(source), "plan": _described(plan)}


def read_result(out: Path, recipe: dict[str, Any]) -> BuildResult | None:
    """Return what came of a set that is finished, None where it is not.

    Raises:
        UserError: where the folder holds another one.
    """
    if not (out / "manifest.json").exists():
        return None
    made = json.loads((out / "manifest.json").read_text())
    if made.get("recipe") != recipe:
        raise UserError(f"{out} holds a set made with other arguments; choose another folder or delete it.")
    shutil.rmtree(out / WORK, ignore_errors=True)
    clips = {name: split["clips"] for name, split in made["splits"].items()}
    return BuildResult(clips, made["rejected"], 0.0, num_relabeled=made.get("num_relabeled"))


def _described(thing: Any) -> Any:
    """Return a source or plan as JSON values, with its type."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {each.name: _described(getattr(thing, each.name)) for each in dataclasses.fields(thing)}
        return {"type": type(thing).__name__} | fields
    if isinstance(thing, tuple):
        return [_described(each) for each in thing]
    return str(thing) if isinstance(thing, Path) else thing


def claim_work_dir(work: Path, recipe: dict[str, Any]) -> None:
    """Take the work folder, or make sure that it belongs to the same recipe.

    Raises:
        UserError: where it belongs to another, or the folder around it to a set without manifest.
    """
    path = work / "recipe.json"
    text = json.dumps(recipe, indent=1, sort_keys=True)
    if not path.exists():
        strange = next(work.parent.glob("*.tar"), None)
        if strange:
            raise UserError(f"{strange} is of another set, whose manifest.json is missing; choose another folder.")
        work.mkdir(parents=True, exist_ok=True)
        _write_first(path, text.encode())
    if path.read_text() != text:
        raise UserError(
            f"{work.parent} holds an unfinished set made with other arguments; repeat those, choose another folder, "
            f"or delete {work.parent}."
        )


def _write_first(path: Path, content: bytes) -> None:
    """Write a file whole, unless somebody else did so at the same instant."""
    mine = temporary_path(path)
    write_atomically(mine, content)
    try:
        os.link(mine, path)
        mine.unlink()
    except FileExistsError:
        mine.unlink()
    except OSError:  # A file system without links.
        os.replace(mine, path)


def write_rejected(out: Path, rejected: list[dict[str, Any]]) -> None:
    """Write what could not be used, and why: path, start_s, end_s, label and reason of each."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["path", "start_s", "end_s", "label", "reason"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rejected)
    write_atomically(out / "rejected.csv", text.getvalue().encode(), out / WORK)


def write_index(out: Path, rows: list[dict[str, Any]], members: Iterable[str]) -> None:
    """Write index.parquet from the rows that `Samples.write` returned."""
    schema = index_schema(members)
    table = pa.table({each: [row[each] for row in rows] for each in schema.names}, schema)
    write_table(out / "index.parquet", table, out / WORK)


def write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, the last of a set's files, with what its tables are."""
    manifest |= {"tables": {name: file_entry(out / name) for name in TABLES if (out / name).exists()}}
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    write_atomically(out / "manifest.json", text.encode(), out / WORK)
    shutil.rmtree(out / WORK, ignore_errors=True)
