"""Files about the project agree with pyproject.toml, and their links lead to files."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from distav.config.version import __version__
from tests.helpers.launch import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GITHUB = ROOT / ".github"


def test_citation_has_the_version_and_license_of_the_project():
    citation = yaml.safe_load((GITHUB / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == PROJECT["project"]["version"] == __version__
    assert citation["license"] == PROJECT["project"]["license"]


def test_changelog_begins_with_this_version():
    versions = re.findall(r"^## (\S+)", (GITHUB / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == __version__


def test_types_are_part_of_the_package():
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["distav"]
    assert (ROOT / "distav" / "py.typed").is_file()


@pytest.mark.parametrize(
    "path", [*sorted(GITHUB.glob("*.md")), ROOT / "distav" / "README.md"], ids=lambda path: path.name
)
def test_links_lead_to_files_and_headings(path: Path):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", path.read_text()):
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{target}#{anchor}"
