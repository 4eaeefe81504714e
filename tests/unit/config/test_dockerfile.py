"""The image: its Dockerfile fits the tree, kubernetes.yaml and pyproject.toml, and only code is sent to the build."""

import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.helpers.launch import ROOT

LAUNCH = ROOT / "configs" / "launch"


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile and their arguments, in order."""
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def values(instruction: str) -> list[str]:
    return [value for name, value in instructions() if name == instruction]


def is_sent(path: str) -> bool:
    """Return whether Docker sends a path to the build: the last matching pattern of the ignore file decides."""
    sent = True
    for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = Path(path).parts
        names = parts if "**/" in line else ["/".join(parts[: end + 1]) for end in range(len(parts))]
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            sent = line.startswith("!")
    return sent


def test_copied_paths_exist_and_are_sent_to_the_build():
    sources = [source for arguments in values("COPY") for source in shlex.split(arguments)[:-1]]
    assert {"pyproject.toml", "distav", "configs", "tools"} <= set(sources)
    assert all((ROOT / source).exists() and is_sent(source) for source in sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= set(sources)


@pytest.mark.parametrize(
    "path",
    [".git", ".git/config", "runs", "runs/mine/report.json", "shards", "shards/mine/train-000000.tar", ".venv/bin/pip",
     "outputs", "tests/conftest.py", "distav/__pycache__/train.cpython-312.pyc", "distav.egg-info/PKG-INFO"],
)  # fmt: skip
def test_other_files_are_not_sent_to_the_build(path: str):
    assert not is_sent(path)


def test_all_tracked_code_is_sent_to_the_build():
    words = ["git", "ls-files", "distav", "configs", "tools"]
    tracked = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    if not tracked:
        pytest.skip("this is not a Git clone")
    assert [path for path in tracked if not is_sent(path)] == []


def test_image_is_that_of_the_kubernetes_job():
    _, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    build = f"docker build -f configs/launch/Dockerfile -t {container['image']} ."
    assert build in (LAUNCH / "Dockerfile").read_text() and build in (ROOT / "configs" / "README.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert container["image"] == f"{project['name']}:{project['version']}"
    assert values("WORKDIR") == [container["workingDir"]] == ["/opt/distav"]
    (useradd,) = (command for command in values("RUN") if command.startswith("useradd"))
    assert values("USER") == [useradd.split()[-1]]
    assert int(useradd.split()[useradd.split().index("--uid") + 1]) == pod["securityContext"]["fsGroup"]


def test_python_of_the_base_image_is_supported_and_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (base,) = values("FROM")
    assert re.fullmatch(r"python:3\.12-slim-\w+", base) and project["requires-python"] == ">=3.11,<3.14"
    installs = " ".join(values("RUN"))
    (extras,) = values("ARG")
    code = re.search(r'python -c "(.*?)" >', installs)
    assert extras == "EXTRAS=remote" and code
    optional = project["optional-dependencies"]
    for chosen in ("remote", "remote,pretrained,hub"):
        words = [sys.executable, "-c", code[1]]
        done = subprocess.run(
            words, cwd=ROOT, env={"EXTRAS": chosen}, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert done == [*project["dependencies"], *(line for extra in chosen.split(",") for line in optional[extra])]
