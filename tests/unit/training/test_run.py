import time
from pathlib import Path

import pytest
import torch

from distav.config import loading
from distav.config.errors import UserError
from distav.config.schema import Config
from distav.distributed.process_group import World
from distav.training.engine.deepspeed_engine import deepspeed_config
from distav.training.run import DataModule, Run
from distav.training.run_state import RunState
from tests.helpers.launch import tiny_config

TWO_RANKS = World(0, 2, 0, torch.device("cpu"))


@pytest.fixture
def settings(tiny_shards: Path, tmp_path: Path):
    def load(*overrides: str) -> Config:
        return loading.load(tiny_config(tmp_path), [f"data.root={tiny_shards}", *overrides])

    return load


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.global_batch=200", "optim.global_batch=200: the training split has 96 samples"),
        (
            "phases.correction.num_neighbors=[96]",
            r"phases.correction.num_neighbors=\[96\]: every value is too large .* at most 95",
        ),
        ("data.train_split=tran", "Did you mean 'train'"),
        ("data.test_split=tset", "data.test_split=tset .* Did you mean 'test'"),
        ("data.root=nowhere", "no manifest.json"),
        ("data.label_overrides=gone.csv", "data.label_overrides=gone.csv: no such file"),
    ],
)
def test_settings_that_the_data_make_impossible_are_named(settings, override: str, told: str):
    with pytest.raises(UserError, match=told):
        DataModule.open(settings(override))


def test_deepspeeds_dictionary_follows_from_the_settings(settings):
    extra = "deepspeed.extra={zero_optimization: {overlap_comm: true}, wall_clock_breakdown: true}"
    chosen = settings("optim.gradient_accumulation_steps=3", "deepspeed.zero_stage=2", extra)
    found = deepspeed_config(chosen, TWO_RANKS)
    assert found["train_micro_batch_size_per_gpu"] == 4 and found["gradient_accumulation_steps"] == 3
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True} and found["wall_clock_breakdown"]
    assert found["bf16"] == {"enabled": False}
    assert deepspeed_config(settings("deepspeed.precision=bf16"), TWO_RANKS)["bf16"] == {"enabled": True}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.global_batch=25", r"optim.global_batch=25 cannot be divided among 2 ranks .* e.g. 24 or 26"),
        ("deepspeed.extra={train_batch_size: 4}", "deepspeed.extra.train_batch_size follows from `optim`"),
    ],
)
def test_batches_that_cannot_be_divided_are_named(settings, override: str, told: str):
    with pytest.raises(UserError, match=told):
        deepspeed_config(settings(override), TWO_RANKS)


def test_the_clock_of_a_phase_goes_on_after_a_kill_but_not_into_the_next(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    run = Run.__new__(Run)
    run.state = RunState(seconds_in_phase=30.0)  # as a checkpoint inside the phase left it
    run.start_phase_timer()
    now = 105.0
    assert run.seconds_in_phase() == 35.0
    run.state.seconds_in_phase = run.seconds_in_phase()  # the last checkpoint before the phase ended
    run.start_phase_timer(reset=True)
    now = 107.0
    assert run.seconds_in_phase() == 2.0 and run.state.seconds_in_phase == 0.0
