"""The output directory of a build: its recipe, its result, and the files that are written last.

Incomplete files are in the work directory `.work` under unique names, so that processes on several machines do not
interfere. The manifest is the last file of a dataset; a directory with a manifest is complete.
"""

import csv
import dataclasses
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from distav.config.errors import UserError
from distav.config.version import __version__
from distav.data.dataset import TABLES, index_schema
from distav.data.files import claim_dir, first_difference, write_atomically, write_table
from distav.data.integrity import file_entry
from distav.data.preparation.encoding import OMIT_DEFAULT
from distav.data.preparation.registry import SOURCES

WORK = ".work"
"""Name of the work directory."""
_NUM_REASONS = 3
"""Types of reasons for rejection that a message names."""
_ARGUMENT_NAMES = {
    "distav": "version of distav",
    "COMMAND": "COMMAND",
    "file": "FILE",
    "folder": "DIR",
    "annotations": "DIR",
    "root": "SHARDS",
    "sample_rate_hz": "--sample-rate",
    "source_content": "content of the source",
}
"""Arguments of make_shards.py whose names differ from the keys of a recipe."""


@dataclass(frozen=True)
class BuildResult:
    """The result of a build, or of encoding one part of it.

    Attributes:
        clips: number of clips by split.
        rejected: number of rejected candidates.
        seconds: duration of encoding; 0 if nothing was encoded.
        encoded_chunks: complete chunks of all parts, after encoding one part.
        num_chunks: chunks of all parts, after encoding one part; None if the dataset is complete.
        num_relabeled: clips of a cleaned dataset whose label differs from that in the original.
        reasons: number of rejected candidates by type of reason, the most frequent first.
    """

    clips: dict[str, int]
    rejected: int
    seconds: float
    encoded_chunks: int | None = None
    num_chunks: int | None = None
    num_relabeled: int | None = None
    reasons: dict[str, int] = field(default_factory=dict[str, int])


def make_recipe(source: Any, config: Any, content: str = "") -> dict[str, Any]:
    """Return everything that determines the bytes of a dataset, as JSON values.

    Args:
        source: the source.
        config: the configuration.
        content: description of the candidates, see `describe_candidates`; empty if `config` identifies them.
    """
    recipe = {"distav": __version__, "source": _to_json(source), "config": _to_json(config)}
    return recipe | {"source_content": content} if content else recipe


def read_result(out: Path, recipe: dict[str, Any]) -> BuildResult | None:
    """Return the result of a complete build, or None if the directory has no manifest.

    Raises:
        UserError: if the manifest has another recipe; the message gives the first difference.
    """
    path = out / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); choose another directory or delete it.") from None
    recorded = manifest.get("recipe")
    if recorded != recipe:
        raise UserError(
            f"{out} contains a dataset that was made with other arguments "
            f"({describe_difference(recorded, recipe)}); choose another directory, or delete it if you do not need "
            "that dataset."
        )
    shutil.rmtree(out / WORK, ignore_errors=True)
    clips = {name: split["clips"] for name, split in manifest["splits"].items()}
    return BuildResult(
        clips, manifest["rejected"], 0.0, num_relabeled=manifest.get("num_relabeled"), reasons=_read_reasons(out)
    )


def argument_name(key: str) -> str:
    """Return the argument of make_shards.py for a key of a recipe, e.g. `--fps` for `config.encoding.fps`."""
    parts = [part for part in key.split(".") if part not in ("config", "encoding", "source")]
    name = parts[0] if parts else key
    if name.startswith("--") or name == "SHARDS":
        return f"content of {name}"
    return _ARGUMENT_NAMES.get(name, f"--{name.replace('_', '-')}")


def describe_difference(recorded: Any, requested: Any) -> str:
    """Return the first difference of two recipes as on the command line; another command comes first."""
    return first_difference(_displayed(recorded), _displayed(requested), argument_name)


def _displayed(recipe: Any) -> Any:
    """Return the values of a recipe as on the command line, with the command that it belongs to."""
    if not isinstance(recipe, dict):
        return recipe
    kind = recipe.get("source", {}).get("type")
    names = {source.__name__: name for name, source in SOURCES.items()}
    return {"COMMAND": names.get(kind, "clean" if kind == "CleaningConfig" else kind), **_as_arguments(recipe)}


def _as_arguments(value: Any) -> Any:
    """Return a value of a recipe as on the command line, such as `0.2:0.4` for the rates of classes."""
    if isinstance(value, dict) and value.get("type") in ("LabelNoise", "ClassRates"):
        return ":".join(dict.fromkeys(str(value[name]) for name in sorted(value) if name != "type"))
    if isinstance(value, dict):
        return {name: _as_arguments(item) for name, item in value.items()}
    is_text = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    return " ".join(value) if is_text else value


def _to_json(value: Any) -> Any:
    """Return JSON values for a source or configuration: its type and its fields.

    Fields with the metadata `OMIT_DEFAULT` are left out if they have their default.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: _to_json(getattr(value, item.name)) for item in dataclasses.fields(value)}
        for item in dataclasses.fields(value):
            if OMIT_DEFAULT in item.metadata and getattr(value, item.name) == item.default:
                del fields[item.name]
        return {"type": type(value).__name__} | fields
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def claim_work_dir(work_dir: Path, recipe: dict[str, Any]) -> None:
    """Create the work directory with a recipe, or check that an existing one has the same recipe.

    Raises:
        UserError: if it has another recipe, or if the output directory contains shards of an unknown dataset.
    """
    path, out = work_dir / "recipe.json", work_dir.parent
    if not path.exists() and (shard := next(out.glob("*.tar"), None)):
        raise UserError(
            f"{shard} belongs to another dataset, whose manifest.json is missing; choose another directory."
        )
    claim_dir(
        path,
        recipe,
        f"{out} contains an unfinished dataset that was made with other arguments",
        f"repeat those arguments, choose another directory, or delete {out}",
        describe_difference,
    )


def count_reasons(rejected: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the number of rejected candidates by type of reason, the text before the colon; most frequent first."""
    counts = Counter(str(row["reason"]).partition(":")[0] for row in rejected)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def format_reasons(reasons: Mapping[str, int]) -> str:
    """Return the most frequent types of reasons with their numbers, such as `9 not a video, 3 no audio`."""
    frequent = [f"{count} {reason}" for reason, count in list(reasons.items())[:_NUM_REASONS]]
    others = sum(list(reasons.values())[_NUM_REASONS:])
    return ", ".join(frequent + ([f"{others} other"] if others else []))


def _read_reasons(out: Path) -> dict[str, int]:
    """Return `count_reasons` of the rejected.csv of a complete dataset; empty if the file is missing."""
    try:
        with open(out / "rejected.csv", encoding="utf-8", newline="") as file:
            return count_reasons(csv.DictReader(file))
    except (OSError, ValueError, KeyError, csv.Error):
        return {}


def write_rejected(out: Path, rejected: list[dict[str, Any]]) -> None:
    """Write rejected.csv: path, start_s, end_s, label and reason of each rejected candidate."""
    _write_list(out / "rejected.csv", "reason", rejected, out / WORK)


def write_clip_list(out: Path, clips: list[dict[str, Any]]) -> None:
    """Write clips.csv: path, start_s, end_s, label and split of each clip of a dataset."""
    _write_list(out / "clips.csv", "split", clips, out / WORK)


def _write_list(path: Path, last_column: str, rows: list[dict[str, Any]], scratch: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["path", "start_s", "end_s", "label", last_column], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode(errors="backslashreplace"), scratch)


def write_index(out: Path, rows: list[dict[str, Any]], members: Iterable[str]) -> None:
    """Write index.parquet from the rows that `SplitWriter.write` returns."""
    schema = index_schema(members)
    table = pa.table({name: [row[name] for row in rows] for name in schema.names}, schema)
    write_table(out / "index.parquet", table, out / WORK)


def write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, with size and digest of the tables, and delete the work directory."""
    manifest |= {"tables": {name: file_entry(out / name) for name in TABLES if (out / name).exists()}}
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    write_atomically(out / "manifest.json", text.encode(), out / WORK)
    shutil.rmtree(out / WORK, ignore_errors=True)
