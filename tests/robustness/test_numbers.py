"""Numbers gone wrong: steps are skipped on all ranks, nothing that lasts is poisoned, spikes are rolled back."""

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.helpers.launch import arguments, losses_by_step, records
from tests.helpers.team import Team, last_checkpoint, run_whole


def _poison(steps: range, where: str) -> None:
    """From here on rank 1 (or the only one) computes nonsense in some steps."""
    from distav.training.engine.deepspeed_engine import Engine

    plain_call, plain_backward, calls = Engine.__call__, Engine.backward, [0]

    def call(self: Engine, batch):
        outputs = plain_call(self, batch)
        if torch.is_grad_enabled():
            calls[0] += 1
            if calls[0] in steps and where == "outputs":
                outputs = {name: values * torch.nan for name, values in outputs.items()}
        return outputs

    def backward(self: Engine, loss):
        if calls[0] in steps and where == "gradient":
            self.model.get_parameter("visual.net.project.weight").register_hook(lambda grad: grad * torch.inf)
        plain_backward(self, loss * 1000 if calls[0] in steps and where == "spike" else loss)

    Engine.__call__, Engine.backward = call, backward


def nan_at_3_and_14(rank: int) -> None:
    if rank == 1:
        _poison(range(3, 15, 11), "outputs")


def nan_from_3_on(rank: int) -> None:
    if rank == 1:
        _poison(range(3, 99), "outputs")


@pytest.mark.parametrize("stage", [0, *(pytest.param(each, marks=pytest.mark.long) for each in (2, 3))])
def test_a_step_that_is_not_finite_is_skipped_and_leaves_nothing(tiny_shards: Path, tmp_path: Path, stage: int):
    given = arguments(tmp_path, tiny_shards, f"deepspeed.zero_stage={stage}")
    team = Team(2, given, tmp_path / "logs", nan_at_3_and_14)
    assert team.end() == [0, 0], team.said()[-6000:]
    said = team.logs[0].read_text()
    assert re.search(r"phase=contrastive step 3 skipped: the loss is not finite on 24 clips, \w+", said)
    assert "phase=hybrid step 2 skipped" in said
    assert sorted(losses_by_step(tmp_path / "tiny")) == [step for step in range(1, 21) if step not in (3, 14)]
    for path in last_checkpoint(tmp_path / "tiny").glob("*.safetensors"):
        for name, values in safetensors.torch.load_file(path).items():
            assert torch.isfinite(values.float()).all(), name
    assert [each["train/skipped_steps"] for each in records(tmp_path / "tiny") if "train/skipped_steps" in each] == [
        1,
        2,
    ]


@pytest.mark.long
def test_too_many_steps_in_a_row_stop_the_run_with_the_reason(tiny_shards: Path, tmp_path: Path):
    given = arguments(tmp_path, tiny_shards, "run.max_consecutive_skipped_steps=3")
    team = Team(2, given, tmp_path / "logs", nan_from_3_on)
    assert team.end() == [1, 1]
    assert (
        "3 steps in a row of phase contrastive were skipped, the limit run.max_consecutive_skipped_steps" in team.said()
    )
    run_whole(2, given, tmp_path / "again")  # The last checkpoint is sound.


def jump_after_30(rank: int) -> None:
    from distav.training import loop

    plain = loop.train

    def train(run, name, epochs, rates, losses_of, begin_epoch=None, **more):
        calls = [0]

        def spiked(batch, progress):
            losses = losses_of(batch, progress)
            calls[0] += 1
            print("learns", batch.ids.tolist())
            return {key: value * 50 if calls[0] == 30 else value for key, value in losses.items()}

        plain(run, name, epochs, rates, spiked, begin_epoch, **more)

    from distav.training.phases import contrastive

    contrastive.train = train


@pytest.mark.long
def test_a_spike_rolls_the_run_back_and_leaves_batches_out(tiny_shards: Path, tmp_path: Path):
    given = arguments(
        tmp_path,
        tiny_shards,
        "run.checkpoint_every=8",
        "phases.contrastive.epochs=10",
        "optim.loss_spike_factor=5",
        "optim.loss_spike_skip_batches=4",
    )
    team = Team(2, given, tmp_path / "logs", jump_after_30)
    assert team.end() == [0, 0], team.said()[-6000:]
    said = team.logs[0].read_text()
    assert "step 30: loss" in said and "exceeds optim.loss_spike_factor=5 times the median" in said
    assert "rolled back to step 24; 10 batches of this phase skipped so far" in said
    steps = [each["phase_step"] for each in records(tmp_path / "tiny") if each.get("phase") == "contrastive"
             and "phase_step" in each]  # fmt: skip
    assert steps == [*range(1, 30), *range(25, 41)]
    batches = re.findall(r"^learns (.*)$", said, re.MULTILINE)
    assert len(batches) == 30 + 16
    assert len(set(batches)) == len(batches), "a batch that was left out is learnt after all"


def test_any_number_of_ranks_cuts_the_same_global_batch(tiny_shards: Path):
    from distav.data.dataset import ShardedDataset
    from distav.data.pipeline.sampler import GlobalBatchSampler

    sizes = ShardedDataset.open(tiny_shards).split("train").shard_sizes
    order = GlobalBatchSampler(sizes, 0, 64, 24, 1)
    for ranks in (1, 2, 3, 4, 6):
        for step in (0, 5, 11):
            cut = [order.micro_batches(step, rank, ranks)[0] for rank in range(ranks)]
            assert [each for part in cut for each in part.tolist()] == order.batch(step).tolist()
