"""A parsing step whose probabilities are not finite is skipped like any other, and the training continues."""

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.e2e.test_parsing import arguments
from tests.helpers.events import llp_shards, write_llp
from tests.helpers.launch import losses_by_step, read_metrics
from tests.helpers.rank_group import RankGroup, last_checkpoint


def nan_at_3_and_14(rank: int) -> None:
    """Make rank 1 pool values that are not finite in two steps."""
    from distav.models.event_parser import AttentivePooling

    plain, calls = AttentivePooling.forward, [0]

    def forward(self: AttentivePooling, embedded: torch.Tensor):
        calls[0] += torch.is_grad_enabled()
        fails = torch.is_grad_enabled() and calls[0] in (3, 14)
        return plain(self, embedded * torch.nan if fails else embedded)

    if rank == 1:
        AttentivePooling.forward = forward


@pytest.mark.long
def test_a_parsing_step_that_is_not_finite_is_skipped(tmp_path: Path):
    write_llp(tmp_path / "raw")
    llp_shards(tmp_path / "raw", tmp_path / "shards")
    command_line = arguments("han", tmp_path / "shards", tmp_path, "phases.parse.epochs=6")
    group = RankGroup(2, command_line, tmp_path / "logs", nan_at_3_and_14)
    assert group.wait() == [0, 0], group.output()[-6000:]
    output = group.logs[0].read_text()
    for step in (3, 14):
        assert re.search(rf"phase=parse step {step} skipped: the loss is not finite on 8 clips, \w+", output)
    run = tmp_path / "han"
    assert sorted(losses_by_step(run)) == [step for step in range(1, 19) if step not in (3, 14)]
    assert [record["train/skipped_steps"] for record in read_metrics(run) if "train/skipped_steps" in record] == [1, 2]
    for path in last_checkpoint(run).glob("*.safetensors"):
        for name, values in safetensors.torch.load_file(path).items():
            assert torch.isfinite(values.float()).all(), name
