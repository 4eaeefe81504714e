"""Settings checked against the data, the DeepSpeed config, phase timers, and the stored state of a run."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distav.config import loading
from distav.config.errors import UserError
from distav.config.schema import Config
from distav.data.integrity import file_entry, write_manifest
from distav.distributed.process_group import World
from distav.training.checkpoint.manager import CheckpointManager
from distav.training.engine.deepspeed_engine import deepspeed_config
from distav.training.run import DataModule, Run
from distav.training.run_state import CorrectionState, CorrespondenceState, Progress, ReportFigures, RunState
from tests.helpers.launch import tiny_config

TWO_RANKS = World(0, 2, 0, torch.device("cpu"))


@pytest.fixture
def settings(tiny_shards: Path, tmp_path: Path):
    def load(*overrides: str) -> Config:
        return loading.load(tiny_config(tmp_path), [f"data.root={tiny_shards}", *overrides])

    return load


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.global_batch=200", "optim.global_batch=200: the training split has 96 samples"),
        (
            "phases.correction.num_neighbors=[96]",
            r"phases.correction.num_neighbors=\[96\]: every value is too large .* at most 95",
        ),
        ("data.train_split=tran", "Did you mean 'train'"),
        ("data.test_split=tset", "data.test_split=tset .* Did you mean 'test'"),
        ("data.root=nowhere", "no such directory"),
        ("data.label_overrides=gone.csv", "data.label_overrides=gone.csv: no such file"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_rejected(settings, override: str, message: str):
    with pytest.raises(UserError, match=message):
        DataModule.open(settings(override))


def test_deepspeed_config_is_derived_from_the_settings(settings):
    extra = "deepspeed.extra={zero_optimization: {overlap_comm: true}, wall_clock_breakdown: true}"
    loaded = settings("optim.gradient_accumulation_steps=3", "deepspeed.zero_stage=2", extra)
    config = deepspeed_config(loaded, TWO_RANKS)
    assert config["train_micro_batch_size_per_gpu"] == 4 and config["gradient_accumulation_steps"] == 3
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True} and config["wall_clock_breakdown"]
    assert config["bf16"] == {"enabled": False}
    assert deepspeed_config(settings("deepspeed.precision=bf16"), TWO_RANKS)["bf16"] == {"enabled": True}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.global_batch=25", r"optim.global_batch=25 cannot be divided among 2 ranks .* e.g. 24 or 26"),
        ("deepspeed.extra={train_batch_size: 4}", "deepspeed.extra.train_batch_size follows from `optim`"),
    ],
)
def test_invalid_deepspeed_settings_are_rejected(settings, override: str, message: str):
    with pytest.raises(UserError, match=message):
        deepspeed_config(settings(override), TWO_RANKS)


def test_phase_timer_continues_after_a_restart_and_is_reset_by_the_next_phase(monkeypatch: pytest.MonkeyPatch):
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


def test_run_state_is_restored_from_json():
    state = RunState(
        seconds_in_phase=1.5,
        quarantined={3: "CRC-32 differs"},
        nce_partition=2.25,
        given_labels_learned=True,
        correction=CorrectionState(True, [0.1, -1.0], [0.2, -2.0]),
        correspondence=CorrespondenceState(is_estimated=True, first_refined_phase=0, full_trust_threshold=0.75),
        report=ReportFigures(corrections=[{"phase": "first"}], skipped_steps=2),
    )
    state.report.checkpointing.seconds = 0.125
    assert RunState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert RunState.from_json(json.loads(json.dumps(RunState().to_json()))) == RunState()


def test_checkpoint_of_another_format_is_rejected(tmp_path: Path):
    checkpoint = tmp_path / Progress(total_steps=3).name
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text(json.dumps({"format": 1}))
    write_manifest(checkpoint, {"state.json": file_entry(checkpoint / "state.json")})
    engine: Any = None  # Not used before the format is checked.
    with pytest.raises(UserError, match="checkpoint format 1; this version of distav reads format 7") as error:
        CheckpointManager(tmp_path, 2).restore(engine, engine, print)
    assert checkpoint.name in str(error.value) and "run.name" in str(error.value)
