"""The collectives that the simulator predicts for a training step are those that a step calls."""

from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from distav.config import loading
from distav.distributed.process_group import World
from distav.training.run_setup import open_run
from tests.helpers.launch import tiny_config
from tests.helpers.spawn import on_ranks
from tools.bench.scaling.collectives import shape_of, step_collectives
from tools.bench.scaling.measured_steps import CollectiveRecorder, step_of

PHASE = "phases: {contrastive: {kind: contrastive, epochs: 1, within_modal_weight: 1.0, category_memory_weight: 0.5}}"
RANKS, CLIPS = 2, 6
CASES = {
    0: ("memory_bank.replicate_below_mib=0", "model.activation_checkpointing=true"),
    1: ("phases.contrastive.within_modal_weight=0", "phases.contrastive.category_memory_weight=0"),
    2: ("memory_bank.replicate_below_mib=0", "phases.contrastive.soft_targets=none"),
    3: ("model.hidden_dim=512", "model.visual.width=32"),
}
"""Settings by ZeRO stage; at stage 3, some parameters are large enough to be partitioned."""


def recorded(file: Path, overrides: list[str]) -> tuple[Counter, Counter]:
    """Return the collectives of a step, recorded and predicted, by kind and size."""
    rank = torch.distributed.get_rank()
    config = loading.load(file, overrides)
    recorder = CollectiveRecorder()
    with recorder.installed(), open_run(config, World(rank, RANKS, rank, torch.device("cpu"))) as run:
        step = step_of(run, defaultdict(list))
        step()
        with recorder.recording():
            step()
        rows, classes = len(run.data.train), len(run.data.shards.classes)
        shape = shape_of(run.config, CLIPS, rows, classes, run.data.train.sample_rate_hz)
    predicted: Counter = Counter()
    for item in step_collectives(shape, RANKS):
        predicted[item.kind, int(item.num_bytes)] += item.count
    return recorder.counts, predicted


def rounded(counts: Counter) -> Counter:
    """Leave out what depends on the ids of a batch: how many of its samples other ranks own; and padding."""
    merged: Counter = Counter()
    for (kind, num_bytes), count in counts.items():
        merged[kind, num_bytes if num_bytes < 2**16 else round(num_bytes / 1024)] += count
    return merged


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=[pytest.mark.long] * (stage > 1)) for stage in CASES])
def test_a_step_calls_the_predicted_collectives(stage: int, tiny_shards: Path, tmp_path: Path):
    text = (tiny_config(tmp_path).read_text().partition("phases:")[0]) + PHASE + "\n"
    file = tiny_config(tmp_path, text)
    overrides = [f"data.root={tiny_shards}", f"run.root={tmp_path}", f"optim.global_batch={RANKS * CLIPS}",
                 f"deepspeed.zero_stage={stage}", *CASES[stage]]  # fmt: skip
    for actual, predicted in on_ranks(RANKS, recorded, file, overrides, timeout_s=240):
        missing, extra = rounded(predicted) - rounded(actual), rounded(actual) - rounded(predicted)
        # The owners of the samples decide how many rows a rank sends; the prediction is their mean.
        uneven = {kind for kind, _ in missing} | {kind for kind, _ in extra}
        assert uneven <= {"all_to_all"} and sum(missing.values()) == sum(extra.values()), (missing, extra)
        assert sum(actual.values()) == sum(predicted.values())
