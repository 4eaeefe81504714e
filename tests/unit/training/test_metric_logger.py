"""Lines, scalars and images of a run."""

import json
import logging
from pathlib import Path

import pytest
import torch

from distav.distributed.process_group import World
from distav.training.metric_logger import MetricLogger


def test_lines_are_printed_once_and_other_loggers_are_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    package = logging.getLogger("distav")
    before = (package.handlers, package.level, package.propagate)
    logger = MetricLogger(tmp_path, World(0, 1, 0, torch.device("cpu")))
    logger.info("step 1")
    logger.log_metrics(1, {"loss": 0.5})
    logger.close()
    assert capsys.readouterr().out.count("step 1") == 1
    assert (package.handlers, package.level, package.propagate) == before
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.5


def test_warnings_of_other_ranks_are_in_their_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    logger = MetricLogger(tmp_path, World(3, 4, 0, torch.device("cpu")))
    logger.info("not recorded")
    logger.warn("a clip is damaged")
    logger.close()
    assert capsys.readouterr().out == ""
    assert (tmp_path / "logs" / "rank_003.log").read_text() == "a clip is damaged\n"
