"""Non-finite steps are skipped on all ranks and leave no trace; loss spikes are rolled back."""

import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from distav.data.dataset import ShardedDataset
from distav.data.pipeline.loader import Batch
from distav.data.pipeline.sampler import GlobalBatchSampler
from tests.helpers.launch import arguments, losses_by_step, read_metrics
from tests.helpers.rank_group import RankGroup, last_checkpoint, run_to_completion


def make_outputs_nan(steps: range) -> None:
    """Make the outputs of this rank NaN in some training steps."""
    from distav.training.engine.deepspeed_engine import Engine

    original, calls = Engine.__call__, [0]

    def call(self: Engine, batch: Batch, **options: bool) -> dict[str, torch.Tensor]:
        outputs = original(self, batch, **options)
        if torch.is_grad_enabled():
            calls[0] += 1
            if calls[0] in steps:
                outputs = {name: values * torch.nan for name, values in outputs.items()}
        return outputs

    Engine.__call__ = call


def nan_at_steps_3_and_14(rank: int) -> None:
    if rank == 1:
        make_outputs_nan(range(3, 15, 11))


def nan_from_step_3(rank: int) -> None:
    if rank == 1:
        make_outputs_nan(range(3, 99))


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.long) for stage in (2, 3))])
def test_non_finite_step_is_skipped_and_leaves_no_trace(tiny_shards: Path, tmp_path: Path, stage: int):
    options = arguments(tmp_path, tiny_shards, f"deepspeed.zero_stage={stage}")
    group = RankGroup(2, options, tmp_path / "logs", nan_at_steps_3_and_14)
    assert group.wait() == [0, 0], group.output()[-6000:]
    output = group.logs[0].read_text()
    assert re.search(r"phase=contrastive step 3 skipped: the loss is not finite on 24 clips, \w+", output)
    assert "phase=hybrid step 2 skipped" in output
    assert sorted(losses_by_step(tmp_path / "tiny")) == [step for step in range(1, 21) if step not in (3, 14)]
    for path in last_checkpoint(tmp_path / "tiny").glob("*.safetensors"):
        for name, values in safetensors.torch.load_file(path).items():
            assert torch.isfinite(values.float()).all(), name
    key = "train/skipped_steps"
    assert [record[key] for record in read_metrics(tmp_path / "tiny") if key in record] == [1, 2]


@pytest.mark.long
def test_too_many_consecutive_skipped_steps_end_the_run(tiny_shards: Path, tmp_path: Path):
    options = arguments(tmp_path, tiny_shards, "run.max_consecutive_skipped_steps=3")
    group = RankGroup(2, options, tmp_path / "logs", nan_from_step_3)
    assert group.wait() == [1, 1]
    message = "3 steps in a row of phase contrastive were skipped, the limit run.max_consecutive_skipped_steps"
    assert message in group.output()
    run_to_completion(2, options, tmp_path / "again")  # The last checkpoint is valid.


def spike_at_step_30(rank: int) -> None:
    from distav.training import loop

    original = loop.train

    def train(run, name, epochs, rates, losses_of, begin_epoch=None, **options):
        calls = [0]

        def losses_with_spike(batch, progress):
            losses = losses_of(batch, progress)
            calls[0] += 1
            print("trains on", batch.ids.tolist())
            return {key: value * 50 if calls[0] == 30 else value for key, value in losses.items()}

        original(run, name, epochs, rates, losses_with_spike, begin_epoch, **options)

    from distav.training.phases import contrastive

    contrastive.train = train


@pytest.mark.long
def test_loss_spike_rolls_the_run_back_and_skips_batches(tiny_shards: Path, tmp_path: Path):
    options = arguments(
        tmp_path,
        tiny_shards,
        "run.checkpoint_every=8",
        "phases.contrastive.epochs=10",
        "optim.loss_spike_factor=5",
        "optim.loss_spike_skip_batches=4",
    )
    group = RankGroup(2, options, tmp_path / "logs", spike_at_step_30)
    assert group.wait() == [0, 0], group.output()[-6000:]
    output = group.logs[0].read_text()
    assert "step 30: loss" in output and "exceeds optim.loss_spike_factor=5 times the median" in output
    assert "rolled back to step 24; 10 batches of this phase skipped so far" in output
    logged = [record for record in read_metrics(tmp_path / "tiny") if record.get("phase") == "contrastive"]
    steps = [record["phase_step"] for record in logged if "phase_step" in record]
    assert steps == [*range(1, 30), *range(25, 41)]
    batches = re.findall(r"^trains on (.*)$", output, re.MULTILINE)
    assert len(batches) == 30 + 16
    assert len(set(batches)) == len(batches), "a skipped batch was used"


def test_global_batch_does_not_depend_on_the_number_of_ranks(tiny_shards: Path):
    sizes = ShardedDataset.open(tiny_shards).split("train").shard_sizes
    sampler = GlobalBatchSampler(sizes, 0, 64, 24, 1)
    for ranks in (1, 2, 3, 4, 6):
        for step in (0, 5, 11):
            micro_batches = [sampler.micro_batches(step, rank, ranks)[0][0] for rank in range(ranks)]
            assert np.concatenate(micro_batches).tolist() == sampler.batch(step).tolist()
