"""Configurations by name, and the commands of an installed package."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest

from distav.config import loading
from distav.config.errors import UserError
from distav.config.packaged import config_names, resolve_config
from distav.train import _parse
from tests.conftest import ROOT


def test_configurations_of_distav_are_found_in_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    expected = loading.load(ROOT / "configs" / "baselines" / "ce.yaml")
    for name in ("baselines/ce", "baselines/ce.yaml", "configs/baselines/ce.yaml"):
        assert loading.load(name) == expected
    assert set(config_names()) >= {"quickstart", "multinode", "baselines/ce"}


def test_a_file_takes_precedence_over_a_configuration_of_distav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    own = Path("configs/quickstart.yaml")
    own.write_text("defaults: [schema, _self_]\nphases: {learn: {kind: contrastive}}\n")
    assert resolve_config(own) == own and list(loading.load(own).phases) == ["learn"]


@pytest.mark.parametrize("name", ["../README.md", "configs/../pyproject.toml", "missing", "/missing/quickstart.yaml"])
def test_other_files_of_the_package_are_not_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_config(name) == Path(name)


def test_an_unknown_name_is_an_error_with_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--config quickstrat: .*baselines/ce.*Did you mean 'quickstart'"):
        loading.load("quickstrat")


def test_commands_of_the_package_are_functions_with_their_own_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, target in scripts.items():
        module, function = target.split(":")
        monkeypatch.setattr(sys, "argv", [f"/usr/bin/{name}", "--help"])
        with pytest.raises(SystemExit) as end:
            getattr(importlib.import_module(module), function)()
        assert end.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {name} ")
    monkeypatch.setattr(sys, "argv", ["distav/train.py"])
    with pytest.raises(SystemExit):
        _parse(["--help"])
    assert capsys.readouterr().out.startswith("usage: train.py ")
