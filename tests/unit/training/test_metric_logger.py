"""Lines, scalars and images of a run."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distav.distributed.process_group import World
from distav.drawing.figures import confusion_matrix
from distav.training.metric_logger import MetricLogger
from tests.helpers.terminal import run_python


def test_lines_are_printed_once_and_other_loggers_are_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    package = logging.getLogger("distav")
    before = (package.handlers, package.level, package.propagate)
    logger = MetricLogger(tmp_path, World(0, 1, 0, torch.device("cpu")))
    logger.resume_at(0, 0)
    logger.info("step 1")
    logger.log_metrics(1, {"loss": 0.5})
    logger.close()
    assert capsys.readouterr().out.count("step 1") == 1
    assert (package.handlers, package.level, package.propagate) == before
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.5


def test_lines_are_printed_above_a_bar_in_terminals_and_alone_elsewhere(tmp_path: Path):
    program = f"""
import pathlib, time, torch
from distav.console import show_progress
from distav.distributed.process_group import World
from distav.training.metric_logger import MetricLogger
logger = MetricLogger(pathlib.Path({str(tmp_path)!r}), World(0, 1, 0, torch.device("cpu")))
with show_progress(3, "steps", "contrastive", is_logged=True) as counter:
    for step in range(3):
        counter.advance()
        logger.info(f"step {{step}}/3 loss=[1.0]")
        time.sleep(0.3)
logger.close()
"""
    output = run_python(program)["terminal"]
    for step in range(3):
        assert f"\x1b[2Kstep {step}/3 loss=[1.0]\ncontrastive " in output
    assert "2/3 steps (66 %)" in output
    piped = run_python(program, pipes=["stdout"])
    assert piped == {"terminal": "", "stdout": "".join(f"step {step}/3 loss=[1.0]\n" for step in range(3))}


def test_warnings_of_other_ranks_are_in_their_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    logger = MetricLogger(tmp_path, World(3, 4, 0, torch.device("cpu")))
    logger.info("not recorded")
    logger.warn("a clip is damaged")
    logger.close()
    assert capsys.readouterr().out == ""
    assert (tmp_path / "logs" / "rank_003.log").read_text() == "a clip is damaged\n"


def test_a_run_that_returns_to_a_checkpoint_repeats_no_record(tmp_path: Path):
    logger = MetricLogger(tmp_path, World(0, 1, 0, torch.device("cpu")))
    logger.resume_at(0, 0)
    logger.log_metrics(1, {"train/loss": 0.5})
    checkpoint = logger.metrics_bytes
    logger.log_metrics(2, {"train/loss": float("nan")})
    logger.resume_at(1, checkpoint)
    logger.log_metrics(2, {"train/loss": 0.4})
    logger.close()
    logger = MetricLogger(tmp_path, World(0, 1, 0, torch.device("cpu")))
    logger.resume_at(1, checkpoint)
    logger.log_metrics(2, {"train/loss": 0.3})
    logger.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["train/loss"]) for record in records] == [(1, 0.5), (2, 0.3)]
    discarded = (tmp_path / "logs" / "discarded_metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded] == [2, 2]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert events.Scalars("train/loss")[1].value == pytest.approx(0.3)


def test_figures_are_in_the_event_file(tmp_path: Path):
    logger = MetricLogger(tmp_path, World(0, 1, 0, torch.device("cpu")))
    logger.resume_at(0, 0)
    rows, columns = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2])
    logger.confusion("labels/given_vs_corrected", rows, columns, ["dog", "cat", "bird"], 3)
    logger.log_metrics(3, {"test/top1": 0.75})
    assert logger.tensorboard
    logger.tensorboard.log_hyperparameters({"optim.lr": 1e-3, "model.visual.name": "small_conv"}, {"test/top1": 0.75})
    thumbnails = np.zeros((2, 8, 8, 3), np.uint8)
    features = np.eye(2, 4, dtype=np.float32)
    logger.tensorboard.log_embeddings("clips", features, ["clip", "given"], [["a", "dog"], ["b", "cat"]], thumbnails, 3)
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (image,) = events.Images("labels/given_vs_corrected")
    expected = confusion_matrix(np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]]), ["dog", "cat", "bird"],
                                "labels/given_vs_corrected", "given", "corrected")  # fmt: skip
    assert (np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) == expected).all()
    assert "_hparams_/session_start_info" in events.summary_metadata
    folder = tmp_path / "tensorboard" / "00003" / "clips"
    assert (folder / "metadata.tsv").read_text() == "clip\tgiven\na\tdog\nb\tcat\n"
    assert np.loadtxt(folder / "tensors.tsv").tolist() == features.tolist()
    assert Image.open(folder / "sprite.png").size == (16, 16)
