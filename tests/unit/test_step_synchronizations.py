"""No training step waits for the GPU: nothing in models and phases reads values back or copies them from the host."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import distav
from distav import config
from distav.data.events import events_table
from distav.data.format import ShardSet
from distav.phases.table import PHASES
from distav.run import Run, opened
from distav.world import World, any_rank
from tests.helpers.events import llp_shards, write_llp
from tests.helpers.launch import ROOT, TINY, tiny_config
from tests.helpers.spawn import on_ranks

PACKAGE = Path(distav.__file__).parent
OPERATORS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "repeat_interleave",
}  # fmt: skip
"""Operators that wait for the GPU to learn a value or the size of their result."""
FUNCTIONS = {
    torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor, Tensor.cpu, Tensor.numpy, Tensor.tolist,
}  # fmt: skip
"""Functions that copy between the host's memory and a GPU's; on a CPU some of them call no operator."""


class Synchronizations(TorchDispatchMode):
    """Lists what would make the CPU wait for a GPU, with the line of this package that calls it."""

    def __init__(self, counts: Callable[[], bool]):
        super().__init__()
        self.counts, self.found = counts, list[str]()
        self.functions = _Functions(self)

    def __enter__(self) -> "Synchronizations":
        self.functions.__enter__()
        return super().__enter__()

    def __exit__(self, *given: Any) -> None:
        super().__exit__(*given)
        self.functions.__exit__(*given)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8)
            for each in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        if name in OPERATORS or masks:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        """Note a call, where it counts."""
        frame: Any = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(str(PACKAGE)):
            frame = frame.f_back
        if frame is not None and self.counts():
            self.found.append(f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno} {what}")


class _Functions(TorchFunctionMode):
    def __init__(self, sought: Synchronizations):
        super().__init__()
        self.sought = sought

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in FUNCTIONS:
            self.sought.note(func.__name__)
        return func(*args, **(kwargs or {}))


def synchronizations(file: Path, *overrides: str) -> list[str]:
    """Train the last phase of a configuration; returns what waits in its third and fourth step, which log nothing."""
    quiet = ["run.log_every=1000", "monitor.media_every=1000", "run.checkpoint_every=1000"]
    settings = config.load(file, [*overrides, *quiet])
    with opened(settings, World(0, 1, 0, torch.device("cpu"))) as run:
        _correct(run)
        name, phase = list(settings.phases.items())[-1]
        with Synchronizations(lambda: run.position.step in (2, 3)) as sought:
            PHASES[phase.kind](run, name, phase)
    return sought.found


def _correct(run: Run) -> None:
    """Put corrected labels where a supervised phase looks for them."""
    size, classes = len(run.bank.rows), len(run.data.shards.classes)
    for name in ("posterior", "audio_posterior", "held_out", "audio_held_out"):
        run.bank.columns[name] = torch.full((size, classes), 1 / classes)
    run.notes["neighbors_have_signal"] = True


def in_phases_and_models(file: Path, *overrides: str) -> list[str]:
    """Return those of phases and models; in a process of its own, since DeepSpeed keeps its first process group."""
    found = on_ranks(1, synchronizations, file, *overrides)[0]
    return sorted({each for each in found if each.startswith(("phases/", "models/"))})


def test_waits_are_found_where_this_package_calls_them():
    with Synchronizations(lambda: True) as sought:
        any_rank(True)
        any_rank(bool(torch.ones(1)))
    assert [each.split()[1] for each in sought.found] == 2 * ["tensor", "_local_scalar_dense"]
    assert all(each.startswith("world.py:") for each in sought.found)


CONTRASTIVE = ["loss: xid", "within_weight: 1.0", "loss: acl, candidates: batch, estimator: scc, soft_targets: none",
               "negatives: 8, soft_targets: none"]  # fmt: skip
SUPERVISED = ["targets: given", "targets: posterior, instance_weight: 0.1", "targets: mixed, loss: gce", "loss: elr"]


@pytest.mark.parametrize(
    ("phase", "towers"),
    [*((f"kind: contrastive, epochs: 2, trust_after: 0, {each}", "small_conv") for each in CONTRASTIVE),
     *((f"kind: supervised, epochs: 2, {each}", "small_conv") for each in SUPERVISED),
     ("kind: contrastive, epochs: 1", "vit_tiny")],
)  # fmt: skip
def test_no_step_of_contrastive_or_supervised_training_waits(
    phase: str, towers: str, tiny_shards: Path, tmp_path: Path
):
    first = TINY[: TINY.index("phases:")] + "phases:\n  correction: {kind: correction, neighbors: [6]}\n"
    file = tiny_config(tmp_path, first + f"  last: {{{phase}}}\n")
    given = [f"data.root={tiny_shards}", f"run.root={tmp_path}", f"model.visual.name={towers}",
             f"model.audio.name={towers}", "model.activation_checkpointing=true"]  # fmt: skip
    assert not in_phases_and_models(file, *given)


def test_no_step_of_event_parsing_waits(tmp_path: Path):
    truth = write_llp(tmp_path / "raw")
    llp_shards(tmp_path / "raw", tmp_path / "shards")
    shards = ShardSet.open(tmp_path / "shards")
    split = shards.split("train")
    events = np.stack([truth[source] for source in split.columns["source"]])
    table = events_table("train", split.keys, split.columns["source"], shards.classes, events)
    pq.write_table(table, tmp_path / "events.parquet")
    given = [f"data.root={tmp_path}/shards", f"run.root={tmp_path}", "run.device=cpu", "optim.global_batch=8",
             f"phases.parse.harvested={tmp_path}/events.parquet", "phases.parse.epochs=1",
             "phases.parse.modality_weight=1.0", "model.parser.width=32", "model.parser.heads=2"]  # fmt: skip
    assert not in_phases_and_models(ROOT / "configs" / "valor.yaml", *given)
