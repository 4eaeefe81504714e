"""Every command in a README: run where a small run is quick, otherwise parsed by the program that it calls."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch.distributed.run import parse_args as parse_torchrun

from distav import evaluate, train
from distav.config import loading
from distav.tools import export_onnx, make_shards
from distav.tools.audit import command as audit
from distav.tools.embed import main as embed
from distav.tools.inspect_shards import command as inspect_shards
from distav.tools.pseudo_label import command as pseudo_label
from tests.fuzz.targets import TARGETS
from tests.gpu.parts import PARTS
from tests.helpers.launch import ROOT
from tools.bench import command as bench
from tools.bench.noise.results import over_seeds

READMES = sorted(path for path in ROOT.rglob("README.md") if not path.is_relative_to(ROOT / ".venv"))


def commands_of(path: Path) -> list[str]:
    """Return the command lines of the bash blocks of a README."""
    return [
        line.split(" # ")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    ]


COMMANDS = list(dict.fromkeys(command for path in READMES for command in commands_of(path)))
PARSERS = {
    "distav/evaluate.py": evaluate._parser,
    "tools/make_shards.py": make_shards._parser,
    "tools/inspect_shards.py": inspect_shards._parser,
    "tools/pseudo_label.py": pseudo_label._parser,
    "tools/export_onnx.py": export_onnx._parser,
    "tools/audit.py": audit._parser,
    "tools/bench.py": bench._parser,
}
RUN_SMALL = ("tools/make_shards.py videos", "tools/make_shards.py csv", "tools/inspect_shards.py", "tools/audit.py",
             "tools/make_shards.py clean", "tools/embed.py",
             "python distav/evaluate.py runs/mine/export shards/mine")  # fmt: skip
"""What `test_tools_run_as_the_readmes_say` runs."""


CHECKS = ("pip", "uv", "pytest", "ruff", "pyright", "lint-imports")


def _words(command: str) -> list[str]:
    """Return the words of a command without launcher, environment, and preceding commands on the line."""
    words = shlex.split(command.split("&&")[-1])
    if words[0] in ("deepspeed", "torchrun", "srun"):
        return words[next(position for position, word in enumerate(words) if word.endswith(".py")) :]
    return words[1:] if words[0] == "python" else words


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_valid(command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    program, *arguments = _words(command)
    if program == "distav/train.py":
        options = train._parse(arguments)
        assert loading.load(options.config, options.overrides).phases
    elif program in PARSERS:
        PARSERS[program]().parse_args(arguments)
    elif program in ("sbatch", "kubectl"):
        position = next(position for position, word in enumerate(arguments) if word.startswith("configs/"))
        assert (ROOT / arguments[position]).is_file()
        if program == "sbatch":
            options = train._parse(arguments[position + 1 :])
            assert loading.load(options.config, options.overrides).phases
    elif program == "docker":
        assert arguments == ["build", "-f", "configs/launch/Dockerfile", "-t", "distav:0.1.0", "."]
    elif program.startswith(("PARTS=", "configs/launch")):
        make_shards._parser().parse_args(arguments[arguments.index("configs/launch/make_shards.sh") + 1 :])
    elif program == "-m":
        assert arguments[0] == "tests.fuzz.fuzz" and arguments[1] in TARGETS and float(arguments[2]) > 0
    elif "tests/gpu/run.sh" in command:
        parts = arguments[1:] if program == "tests/gpu/run.sh" else arguments[2:]
        assert set(parts) <= {part.name for part in PARTS}
    else:
        assert program in CHECKS or command.startswith(RUN_SMALL), f"nothing tests this command: {command}"


LAUNCH = ROOT / "configs" / "launch"


def test_the_kubernetes_job_starts_torchrun_on_every_node():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec, name = job["spec"], job["metadata"]["name"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    variables = {variable["name"]: variable.get("value", name) for variable in container["env"]}
    variables["JOB_COMPLETION_INDEX"] = "2"
    assert service["metadata"]["name"] == pod["subdomain"] == service["spec"]["selector"]["job-name"] == name
    assert service["spec"]["clusterIP"] == "None"
    assert spec["completions"] == spec["parallelism"] == int(variables["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["GPUS"])
    assert 60 < int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    program, *words = [
        re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], word)
        for word in container["command"] + container["args"]
    ]
    launch = parse_torchrun(words)
    assert program == "torchrun" and launch.training_script == "distav/train.py"
    assert (launch.nnodes, launch.nproc_per_node, launch.node_rank) == ("4", "8", 2)
    assert (launch.master_addr, launch.master_port) == (f"{name}-0.{name}", 29500)
    options = train._parse(launch.training_script_args)
    assert loading.load(ROOT / options.config, options.overrides).run.root == "/data/runs"


@pytest.mark.long
def test_tools_run_as_the_readmes_say(
    finished: tuple[Path, str], tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Run them in the order of the READMEs, in a directory where the names in the READMEs refer to small data."""
    import av

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    rng, labels = np.random.default_rng(0), []
    for number in range(4):
        path = tmp_path / "clips" / ("dog", "rain")[number % 2] / f"{number}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            video, audio = container.add_stream("mjpeg", rate=8), container.add_stream("pcm_s16le", rate=8000)
            video.width, video.height, video.pix_fmt = 48, 32, "yuvj420p"  # pyright: ignore[reportAttributeAccessIssue]
            for _ in range(16):
                frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8), format="rgb24")
                container.mux(video.encode(frame))  # pyright: ignore[reportAttributeAccessIssue]
            noise = (rng.normal(0, 3000, (1, 16000))).astype(np.int16)
            audio_frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
            audio_frame.sample_rate = 8000
            container.mux(audio.encode(audio_frame))  # pyright: ignore[reportAttributeAccessIssue]
            for stream in (video, audio):
                container.mux(stream.encode())  # pyright: ignore[reportAttributeAccessIssue]
        labels.append(f"clips/{path.parent.name}/{path.name},{path.parent.name}")
    (tmp_path / "clips.csv").write_text("\n".join(["path,label", *labels]) + "\n")
    (tmp_path / "tags.csv").write_text("\n".join(["path,label", *(f"{row};loud" for row in labels)]) + "\n")
    repeated = [f"{row.split(',')[0]},loud" for row in labels]
    (tmp_path / "events.csv").write_text("\n".join(["path,label", *labels, *repeated]) + "\n")
    shutil.copytree(finished[0], tmp_path / "runs" / "mine")
    # The READMEs use the name of a correction phase that this run does not have.
    table = next((tmp_path / "runs" / "mine" / "labels").glob("*.parquet"))
    (table.parent / "labels.parquet").symlink_to(table)
    (tmp_path / "decisions.csv").write_text("key,label,pair\ntrain-000000000,,mismatched\n")
    mains: dict[str, Callable[[list[str]], int]] = {
        "tools/make_shards.py": make_shards.main,
        "tools/inspect_shards.py": inspect_shards.main,
        "tools/audit.py": audit.main,
        "tools/embed.py": embed,
        "distav/evaluate.py": evaluate.main,
    }
    done = []
    for command in COMMANDS:
        if not command.startswith(RUN_SMALL) or "s3://" in command or "fine_tune" in command:
            continue
        program, *arguments = _words(command)
        arguments = [str(tmp_path / word[2:]) if word.startswith("~/") else word for word in arguments]
        if program == "tools/make_shards.py":
            # As a program, since its worker processes start from a main module.
            small = ["--workers", "1"] if arguments[0] == "clean" else ["--workers", "1", "--short-side", "32"]
            completed = subprocess.run([sys.executable, str(ROOT / program), *arguments, *small], check=False)
            assert completed.returncode in (0, 3), command
            if arguments[0] == "videos":  # The commands below use the dataset that the run was trained on.
                shutil.rmtree(tmp_path / "shards" / "mine")
                shutil.copytree(tiny_shards, tmp_path / "shards" / "mine")
        else:
            assert mains[program](arguments) == 0, command
        done.append(command)
    assert {next(start for start in RUN_SMALL if command.startswith(start)) for command in done} == set(RUN_SMALL)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    embedded = {f"embeddings/{name}-000000.parquet" for name in ("mine/train", "clips/files")}
    datasets = {f"shards/{name}/manifest.json" for name in ("listed", "parts", "clean", "cleaner", "tags", "events")}
    assert {"sheet.png", "runs/mine/audit.html"} | embedded | datasets <= written


@pytest.mark.long
def test_the_help_of_every_tool_has_an_example():
    for path in sorted((ROOT / "tools").glob("[!_]*.py")):
        done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, check=True)
        assert path.name in done.stdout.replace("usage: ", "", 1).partition("\n")[2], path.name


def test_the_accuracies_in_the_readme_are_the_stored_ones():
    records = json.loads((ROOT / "tools" / "results" / "noise.json").read_text())["rows"]
    stored = {
        (row["label_noise"], row["mismatch_rate"], row["method"]): f"{row['test_top1']['mean']:.1f}"
        for row in over_seeds(records)
        if row["dataset"] == "hard"
    }
    lines = re.findall(r"^\| (0\.\d) \| (0(?:\.\d)?) \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) == 8
    for label_noise, mismatch_rate, cells in lines:
        expected = [
            stored[f"symmetric:{label_noise}", float(mismatch_rate), method]
            for method in ("distav", "CE", "GCE", "ELR")
        ]
        assert cells.replace("*", "").split(" | ") == expected
