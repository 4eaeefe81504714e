"""No training step waits for the GPU: nothing in it reads values back or copies them from the host."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import distav
from distav.config import loading
from distav.data.annotations.events import events_table
from distav.data.dataset import ShardedDataset
from distav.distributed.process_group import World
from distav.training.phases.registry import PHASES
from distav.training.run import Run, open_run
from distav.training.run_state import CorrectionState
from tests.helpers.events import llp_shards, write_llp
from tests.helpers.launch import ROOT, TINY, tiny_config
from tests.helpers.spawn import on_ranks
from tests.helpers.synchronizations import Synchronizations

PACKAGE = Path(distav.__file__).parent
ALLOWED = ("engine.py", "world.py")
"""The engine reads the gradient norm where no ZeRO optimizer does, on a CPU; ranks agree by tensors of the CPU."""


def synchronizations(file: Path, *overrides: str) -> list[str]:
    """Train the last phase of a configuration; returns what waits in its third and fourth step, which log nothing."""
    quiet = ["run.log_every=1000", "monitor.media_every=1000", "run.checkpoint_every=1000"]
    settings = loading.load(file, [*overrides, *quiet])
    with open_run(settings, World(0, 1, 0, torch.device("cpu"))) as run:
        _correct(run)
        name, phase = list(settings.phases.items())[-1]
        with Synchronizations(lambda: run.progress.step in (2, 3)) as waits:
            PHASES[type(phase)](run, name, phase)
    return waits.found


def _correct(run: Run) -> None:
    """Put corrected labels where a supervised phase looks for them."""
    size, classes = len(run.bank.rows), len(run.data.shards.classes)
    for name in ("posterior", "audio_posterior", "held_out", "audio_held_out"):
        run.bank.store_column(name, torch.full((size, classes), 1 / classes))
    run.state.correction = CorrectionState(has_signal=True)


def waiting_lines(file: Path, *overrides: str) -> list[str]:
    """Return those of this package; in a process of its own, since DeepSpeed keeps its first process group."""
    found = on_ranks(1, synchronizations, file, *overrides)[0]
    own = {each for each in found if f" at {PACKAGE}/" in each}
    return sorted(each for each in own if not each.partition(f" at {PACKAGE}/")[2].startswith(ALLOWED))


CONTRASTIVE = ["loss: xid", "within_modal_weight: 1.0", "loss: acl, negatives_source: batch, correspondence_estimator: scc, soft_targets: none",
               "num_negatives: 8, soft_targets: none"]  # fmt: skip
SUPERVISED = ["targets: given", "targets: posterior, instance_weight: 0.1", "targets: hybrid, loss: gce", "loss: elr"]


@pytest.mark.parametrize(
    ("phase", "towers"),
    [*((f"kind: contrastive, epochs: 2, pair_weighting_start: 0, {each}", "small_conv") for each in CONTRASTIVE),
     *((f"kind: supervised, epochs: 2, {each}", "small_conv") for each in SUPERVISED),
     ("kind: contrastive, epochs: 1, pair_weighting_start: 0", "vit_tiny")],
)  # fmt: skip
def test_no_step_of_contrastive_or_supervised_training_waits(
    phase: str, towers: str, tiny_shards: Path, tmp_path: Path
):
    first = TINY[: TINY.index("phases:")] + "phases:\n  correction: {kind: label_correction, num_neighbors: [6]}\n"
    file = tiny_config(tmp_path, first + f"  last: {{{phase}}}\n")
    given = [f"data.root={tiny_shards}", f"run.root={tmp_path}", f"model.visual.name={towers}",
             f"model.audio.name={towers}", "model.activation_checkpointing=true"]  # fmt: skip
    assert not waiting_lines(file, *given)


def test_no_step_of_event_parsing_waits(tmp_path: Path):
    truth = write_llp(tmp_path / "raw")
    llp_shards(tmp_path / "raw", tmp_path / "shards")
    shards = ShardedDataset.open(tmp_path / "shards")
    split = shards.split("train")
    events = np.stack([truth[source] for source in split.columns["source"]])
    table = events_table("train", split.keys, split.columns["source"], shards.classes, events)
    pq.write_table(table, tmp_path / "events.parquet")
    given = [f"data.root={tmp_path}/shards", f"run.root={tmp_path}", "run.device=cpu", "optim.global_batch=8",
             f"phases.parse.pseudo_labels={tmp_path}/events.parquet", "phases.parse.epochs=1",
             "phases.parse.modality_weight=1.0", "model.parser.width=32", "model.parser.heads=2"]  # fmt: skip
    assert not waiting_lines(ROOT / "configs" / "valor.yaml", *given)
