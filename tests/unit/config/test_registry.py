"""Registries of components of distav and of installed packages."""

import sys
from pathlib import Path

import pytest

from distav.config.errors import UserError
from distav.config.registry import Registry


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[object]:
    """A registry with one component of its own and two of an installed package, one of which cannot be imported."""
    (tmp_path / "extra_losses.py").write_text("quadratic = 'the quadratic loss'\n")
    metadata = tmp_path / "extra_losses-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-losses\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[distav.test_losses]\nquadratic = extra_losses:quadratic\nbroken = extra_losses:missing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "extra_losses", raising=False)
    return Registry("loss", "distav.test_losses", {"linear": "the linear loss"})


def test_components_of_installed_packages_are_listed_and_imported_on_first_use(registry: Registry[object]):
    assert set(registry) == {"linear", "quadratic", "broken"} and len(registry) == 3
    assert "extra_losses" not in sys.modules
    assert registry.select("linear") == "the linear loss"
    assert registry.select("quadratic") == "the quadratic loss" == registry["quadratic"]


def test_errors_name_the_setting(registry: Registry[object]):
    with pytest.raises(UserError, match=r"phases\.a\.loss=quadratik: allowed: linear, .*Did you mean 'quadratic'"):
        registry.select("quadratik", "phases.a.loss")
    with pytest.raises(
        UserError, match=r"phases\.a\.loss=broken: entry point 'extra_losses:missing'.*fix or uninstall"
    ):
        registry.select("broken", "phases.a.loss")
    with pytest.raises(KeyError):
        registry["cubic"]
