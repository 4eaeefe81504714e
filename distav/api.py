"""Python interface to training and to the preparation of datasets; see `distav.train` and `distav.make_shards`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from distav.config import loading
from distav.config.errors import UserError
from distav.config.schema import Config
from distav.data.preparation.output_dir import BuildResult
from distav.distributed.launch import set_rank_variables
from distav.models.av_model import AVModel
from distav.models.pretrained import load_encoders
from distav.tools.make_shards import run as run_make_shards
from distav.training.all_phases import train_all_phases
from distav.training.validation import validate_names

Overrides = Sequence[str] | Mapping[str, Any]
"""Settings that replace those of a configuration: `["optim.lr=5e-4"]` or `{"optim.lr": 5e-4}`."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished training run.

    Attributes:
        folder: its directory, with labels/, export/, checkpoints/ and tensorboard/.
        report: content of report.json: noise rates, corrections, scores on the test split.
    """

    folder: Path
    report: dict[str, Any]

    @property
    def export(self) -> Path:
        """Directory of the exported network."""
        return self.folder / "export"

    def labels(self) -> pa.Table:
        """Return the table of the last label correction, with a row per training clip.

        Columns, among others: `key` of the clip, `given_label`, `corrected_label`, `confidence` (probability of the
        corrected label), `self_confidence` (held-out probability of the given one).

        Raises:
            UserError: if no phase of the run corrected labels.
        """
        corrections = self.report.get("corrections")
        if not corrections:
            raise UserError(
                f"{self.folder}: no phase of this run corrected labels; add a phase of kind label_correction."
            )
        return pq.read_table(self.folder / "labels" / f"{corrections[-1]['phase']}.parquet")

    def encoders(self) -> tuple[AVModel, dict[str, Any]]:
        """Return the trained network and its description, see `load_encoders`."""
        return load_encoders(self.export)


def train(config: str | Path | Config, overrides: Overrides = ()) -> FinishedRun:
    """Train with a configuration in this process, and wait for the end.

    A run that was interrupted resumes. To train with several ranks, start the program with `torchrun` or `srun`: each
    rank calls this function with the same settings, and all of them see the directory `run.root`.

    Args:
        config: name of a configuration of distav such as "quickstart", a YAML file, or settings.
        overrides: settings that replace those of the configuration, with their full names; not with `Config`.

    Returns:
        The finished run, on every rank.

    Raises:
        UserError: naming the setting, its value, what is allowed and what to do; if a process group exists already.
        Interrupted: after a signal, when the checkpoint is on disk; the same call resumes the run.

    Example:
        >>> finished = distav.train("quickstart", {"data.root": "shards/mine", "run.name": "mine"})
        >>> finished.report["corrections"][-1]["label_noise_rate"]
    """
    if isinstance(config, Config):
        if overrides:
            raise UserError("overrides are given with a Config; change its fields instead, or give the path of a file.")
        settings = loading.check(config)
    elif isinstance(config, str | Path):
        settings = loading.load(config, _as_words(overrides))
    else:
        raise UserError(
            f"config={config!r}: allowed: the name of a configuration such as 'quickstart', a YAML file, or a "
            "distav.config.schema.Config."
        )
    set_rank_variables()
    if dist.is_initialized():
        raise UserError(
            "this process has a process group already; call torch.distributed.destroy_process_group() before "
            "distav.train, which creates its own."
        )
    validate_names(settings)
    if interruption := train_all_phases(settings):
        raise interruption
    folder = Path(settings.run.root) / settings.run.name
    return FinishedRun(folder, json.loads((folder / "report.json").read_text()))


def make_shards(source: str, *paths: str | Path, **options: Any) -> BuildResult:
    """Build a dataset, or clean one, as the command `make_shards.py SOURCE PATH... OUT --OPTION VALUE` does.

    Args:
        source: command, such as "videos", "csv" or "clean"; `make_shards.py --help` lists them.
        paths: positional arguments of the command; the last one is the directory of the dataset.
        options: options of the command, with underscores: `clip_s=2`, `cross_class_only=True`, `decisions=["a.csv"]`;
            None omits an option.

    Returns:
        Numbers of clips and of rejected candidates, with their reasons.

    Raises:
        UserError: for invalid arguments or data.

    Example:
        >>> if __name__ == "__main__":  # Clips are encoded in processes that import the main module.
        ...     distav.make_shards("videos", "clips", "shards/mine", workers=2)
    """
    words = [source, *map(str, paths)]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [option] * value
        elif isinstance(value, list | tuple):
            words += [option, *map(str, value)]
        elif value is not None:
            words.append(f"{option}={value}")
    return run_make_shards(words)


def _as_words(overrides: Overrides) -> list[str]:
    if isinstance(overrides, str):
        raise UserError(f"overrides={overrides!r}: allowed: a list of texts such as ['{overrides}'], or a mapping.")
    if not isinstance(overrides, Mapping):
        return list(overrides)
    for key, value in overrides.items():
        if isinstance(value, Mapping) and "." not in key and key != "phases":
            names = ", ".join(f"'{key}.{name}'" for name in value) or f"'{key}.NAME'"
            raise UserError(f"overrides: '{key}' is a section; give its settings by their full names: {names}.")
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in overrides.items()
    }
    return [f"{key}={text}" for key, text in texts.items()]
