"""Weights and optimiser state go on at any number of ranks and any ZeRO stage, in float32 and in bfloat16."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distav.config.schema import Config, Precision
from distav.data.pipeline.loader import Batch
from distav.distributed.collectives import all_gather_objects, get_rank, get_world_size, local_batch
from distav.distributed.process_group import World
from distav.memory.bank import Bank
from distav.models.layers import GlobalBatchNorm
from distav.training.checkpoint.manager import CheckpointManager
from distav.training.engine.deepspeed_engine import Engine
from distav.training.run_state import Progress, RunState
from tests.helpers.spawn import on_ranks

STAGES, PRECISIONS, HALF, BATCH = (0, 1, 2, 3), tuple(Precision[name] for name in ("fp32", "bf16")), 3, 12
State = dict[str, Tensor]


class Net(nn.Module):
    """Sizes that no number of ranks divides, and parts of both learning rates."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(5, 7, bias=False), GlobalBatchNorm(7), nn.ReLU())
        self.visual.lr_group = "towers"
        self.classify = nn.Linear(7, 3)

    def forward(self, frames: Tensor, audio: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        logits = self.classify(self.visual(frames.to(self.classify.weight.dtype)))
        return {"logits": logits}


def new_engine(stage: int, precision: Precision) -> Engine:
    settings = Config()
    settings.deepspeed.zero_stage, settings.deepspeed.precision = stage, precision
    settings.optim.global_batch, settings.optim.lr = BATCH, 0.01
    return Engine(Net, settings, World(get_rank(), get_world_size(), 0, torch.device("cpu")))


def learn(engine: Engine, first: int, last: int) -> None:
    for number in range(first, last):
        x = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(number))
        none = torch.zeros(0, dtype=torch.int64)
        out = engine(Batch(none, none.bool(), none, {"frames": local_batch(x), "audio": none.float()}))
        engine.backward((out["logits"].float() - 1).square().mean())
        engine.step()


def whole(engine: Engine) -> State:
    """Every master weight and every value of the optimiser's state, whatever rank holds it."""
    tensors, steps = engine.state()
    parts: dict[str, dict[int, Tensor]] = {}
    for each in all_gather_objects(tensors):
        for name, values in each.items():
            key, _, start = name.rpartition("/")
            parts.setdefault(key, {})[int(start)] = values
    joined = {key: torch.cat([each[start] for start in sorted(each)]) for key, each in parts.items()}
    return joined | {"steps": torch.tensor(steps)}


def place(folder: str, stage: int, precision: Precision) -> tuple[CheckpointManager, Bank]:
    return CheckpointManager(Path(folder) / f"{stage}-{precision.name}", 2), Bank(10, 4, 0.5, torch.device("cpu"))


def save_at_half(folder: str) -> dict[tuple, tuple[State, State]]:
    """Return the states at the half and at the end, by stage and precision."""
    found = {}
    for stage, precision in itertools.product(STAGES, PRECISIONS):
        engine = new_engine(stage, precision)
        learn(engine, 0, HALF)
        checkpoints, bank = place(folder, stage, precision)
        assert not checkpoints.save(Progress(total_steps=HALF), engine, bank, RunState())
        assert not checkpoints.wait()
        half = whole(engine)
        learn(engine, HALF, 2 * HALF)
        found[stage, precision] = half, whole(engine)
    return found


def go_on(folder: str, pairs: list[tuple[int, int]]) -> dict[tuple, tuple[State, State]]:
    """Take up what `save_at_half` saved; return the states at once and at the end, by stages and precision."""
    found = {}
    for (saved, stage), precision in itertools.product(pairs, PRECISIONS):
        engine = new_engine(stage, precision)
        checkpoints, bank = place(folder, saved, precision)
        assert checkpoints.restore(engine, bank, print)
        half = whole(engine)
        learn(engine, HALF, 2 * HALF)
        found[saved, stage, precision] = half, whole(engine)
    return found


def learn_again() -> dict[tuple, tuple[State, State]]:
    """Return the states after learning from a restart, and from a new engine that begins with the same weights."""
    found = {}
    for stage, precision in itertools.product(STAGES, PRECISIONS):
        engine = new_engine(stage, precision)
        learn(engine, 0, HALF)
        engine.reinitialize(0)
        restarted = whole(engine)
        untaught = new_engine(stage, precision)
        untaught.reinitialize(0)
        for name, value in whole(untaught).items():
            assert torch.equal(restarted[name], value), name
        learn(engine, 0, HALF)
        afresh = new_engine(stage, precision)
        afresh.restore(lambda name, start, size, of=restarted: of[name][start : start + size], 0, [])
        learn(afresh, 0, HALF)
        found[stage, precision] = whole(engine), whole(afresh)
    return found


@pytest.mark.long
def test_a_restart_leaves_nothing_of_what_was_learnt():
    for (stage, precision), (again, afresh) in on_ranks(2, learn_again, timeout_s=120)[0].items():
        assert again.keys() == afresh.keys() and again["steps"] == HALF
        for name, value in afresh.items():
            assert torch.equal(again[name], value), f"{name} at stage {stage}, {precision.name}"


def test_states_go_on_at_any_number_of_ranks_and_any_zero_stage(tmp_path: Path):
    reference = on_ranks(2, save_at_half, str(tmp_path), timeout_s=120)[0]
    same = [(stage, stage) for stage in STAGES]
    others = [(stage, (stage + 1) % len(STAGES)) for stage in STAGES]
    for ranks, pairs in ((1, same), (2, same + others), (3, same)):
        found = on_ranks(ranks, go_on, str(tmp_path), pairs, timeout_s=120)[0]
        for (saved, stage, precision), (half, end) in found.items():
            where = f"saved on 2 ranks at stage {saved}, taken up on {ranks} at {stage}, {precision.name}"
            expected_half, expected_end = reference[saved, precision]
            assert half.keys() == expected_half.keys(), where
            assert {"weight/visual.0.weight", "exp_avg_sq/classify.bias", "buffer/visual.1.running_var"} < half.keys()
            for name, value in expected_half.items():
                assert torch.equal(half[name], value), f"{name}, {where}"
            for name, value in expected_end.items():
                if ranks == 2 and saved == stage:
                    assert torch.equal(end[name], value), f"{name} at the end, {where}"
                else:  # Sums over ranks round differently, in bfloat16 to 8 bits.
                    close = 1e-6 if precision is Precision.fp32 else 3e-2
                    off = (end[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-3)
                    assert off < close, f"{name} at the end is off by {off}, {where}"
