"""Settings on the page of hyperparameters."""

from pathlib import Path

from distav.config import loading
from distav.training.hyperparameters import SHOWN, hyperparameters
from tests.helpers.launch import tiny_config


def test_settings_that_matter(tmp_path: Path):
    config = loading.load(tiny_config(tmp_path), ["optim.weight_decay=0.1", "run.name=x", "run.timeout_s=5"])
    settings = hyperparameters(config)
    assert set(SHOWN) <= settings.keys()
    assert settings["optim.weight_decay"] == 0.1
    assert settings["phases.contrastive.epochs"] == 3
    assert settings["phases.hybrid.kind"] == "supervised"
    assert settings["phases.correction.num_neighbors"] == "[6, 12]"
    assert not {"run.name", "run.timeout_s", "optim.grad_clip", "phases.hybrid.loss"} & settings.keys()
