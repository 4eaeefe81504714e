"""No training step waits for the GPU: it does not read values back and does not copy values from the host."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import distav
from distav.config import loading
from distav.data.annotations.events import events_table
from distav.data.dataset import ShardedDataset
from distav.distributed.delayed_vote import DelayedVote
from distav.distributed.process_group import World
from distav.training.engine.deepspeed_engine import Engine, _AdamW
from distav.training.phases.registry import phase_function
from distav.training.run import Run
from distav.training.run_setup import open_run
from distav.training.run_state import CorrectionState
from tests.helpers.events import llp_shards, write_llp
from tests.helpers.launch import ROOT, TINY, tiny_config
from tests.helpers.spawn import on_ranks
from tests.helpers.synchronizations import Synchronizations

PACKAGE = Path(distav.__file__).parent
ALLOWED = (DelayedVote.__call__, Engine.step, _AdamW.step)
"""Functions that synchronize on a CPU only: ranks agree on a shutdown by CPU tensors, and without a ZeRO optimizer,
which a GPU always has, the engine reads the gradient norm."""


def synchronizations(file: Path, *overrides: str) -> list[str]:
    """Train the last phase of a configuration; return the synchronizations of its steps 3 and 4, which log nothing."""
    quiet = ["run.log_every=1000", "monitor.media_every=1000", "run.checkpoint_every=1000"]
    config = loading.load(file, [*overrides, *quiet])
    with open_run(config, World(0, 1, 0, torch.device("cpu"))) as run:
        _store_correction(run)
        name, phase = list(config.phases.items())[-1]
        with Synchronizations(lambda: run.progress.step in (2, 3)) as waits:
            phase_function(name, phase)(run, name, phase)
    return waits.found


def _store_correction(run: Run) -> None:
    """Store corrected labels where a supervised phase reads them."""
    size, classes = len(run.bank.rows), len(run.data.shards.classes)
    for name in ("posterior", "visual_posterior", "audio_posterior", "held_out", "visual_held_out", "audio_held_out"):
        run.bank.store_column(name, torch.full((size, classes), 1 / classes))
    run.state.correction = CorrectionState(has_signal=True)


def _source_lines(function: Callable[..., Any]) -> set[str]:
    """Return the lines of a function as `file:line`."""
    lines, first = inspect.getsourcelines(function)
    return {f"{inspect.getsourcefile(function)}:{first + number}" for number in range(len(lines))}


def waiting_lines(file: Path, *overrides: str) -> list[str]:
    """Return the synchronizations in this package."""
    # In a process of its own, since DeepSpeed keeps its first process group.
    found = on_ranks(1, synchronizations, file, *overrides)[0]
    allowed = set().union(*(_source_lines(function) for function in ALLOWED))
    in_package = {entry for entry in found if f" at {PACKAGE}/" in entry}
    return sorted(entry for entry in in_package if entry.rpartition(" at ")[2] not in allowed)


CONTRASTIVE = [
    "loss: xid",
    "within_modal_weight: 1.0",
    "loss: acl, negatives_source: batch, correspondence_estimator: scc, soft_targets: none",
    "num_negatives: 8, soft_targets: none",
]
SUPERVISED = ["targets: given", "targets: posterior, instance_weight: 0.1", "targets: hybrid, loss: gce, mixup: 1.0",
              "loss: elr, class_balance: 0.5, logit_adjustment: 1.0"]  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "tower"),
    [
        *(
            (f"kind: contrastive, epochs: 2, pair_weighting_start: 0, {options}", "small_conv")
            for options in CONTRASTIVE
        ),
        *((f"kind: supervised, epochs: 2, {options}", "small_conv") for options in SUPERVISED),
        ("kind: contrastive, epochs: 1, pair_weighting_start: 0", "vit_tiny"),
    ],
)
def test_contrastive_and_supervised_steps_do_not_wait(phase: str, tower: str, tiny_shards: Path, tmp_path: Path):
    first = TINY[: TINY.index("phases:")] + "phases:\n  correction: {kind: label_correction, num_neighbors: [6]}\n"
    file = tiny_config(tmp_path, first + f"  last: {{{phase}}}\n")
    overrides = [f"data.root={tiny_shards}", f"run.root={tmp_path}", f"model.visual.name={tower}",
                 f"model.audio.name={tower}", "model.activation_checkpointing=true"]  # fmt: skip
    assert not waiting_lines(file, *overrides)


def test_event_parsing_steps_do_not_wait(tmp_path: Path):
    truth = write_llp(tmp_path / "raw")
    llp_shards(tmp_path / "raw", tmp_path / "shards")
    shards = ShardedDataset.open(tmp_path / "shards")
    split = shards.split("train")
    events = np.stack([truth[source] for source in split.sources])
    table = events_table("train", split.keys, split.sources, shards.classes, events)
    pq.write_table(table, tmp_path / "events.parquet")
    overrides = [f"data.root={tmp_path}/shards", f"run.root={tmp_path}", "run.device=cpu", "optim.global_batch=8",
                 f"phases.parse.pseudo_labels={tmp_path}/events.parquet", "phases.parse.epochs=1",
                 "phases.parse.modality_weight=1.0", "model.parser.width=32", "model.parser.heads=2"]  # fmt: skip
    assert not waiting_lines(ROOT / "configs" / "valor.yaml", *overrides)
