import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distav.data.pipeline.loader import Batch
from distav.models.av_model import AVModel
from tests.conftest import ROOT
from tests.helpers.terminal import run_python
from tools.bench import markdown, towers
from tools.bench.command import main
from tools.bench.console_tables import from_markdown
from tools.bench.memory_bank import MemoryBankBenchmark
from tools.bench.timing import Results, Setting
from tools.bench.training_step import TOWERS, count_operations

RESULTS = ROOT / "tools" / "results"
SMALL = {
    "bank": ["--batch=32", "--rows=600", "--dim=16", "--memory-rows=600", "--shard-rows=600"],
    "neighbors": ["--rows=1500", "--dim=16", "--k=20", "--queries=300", "--ring-rows=600"],
    "shards": ["--samples=20"],
    "loader": ["--clips=16", "--batch=8"],
    "step": ["--clips=96", "--batch=16"],
    "storage": ["--samples=40"],
    "busy": ["--clips=96", "--epochs=1"],
}


_SLOW = ("bank", "neighbors", "step", "busy")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in _SLOW)) for name in SMALL])
def test_every_benchmark_measures_and_reports_whether_thresholds_pass(name: str, tmp_path: Path):
    file = tmp_path / "deep" / "result.json"
    # In a process of its own: DataLoader forks, and a library that has started threads hangs in the forked process.
    words = [sys.executable, "tools/bench.py", name, *SMALL[name], "--rounds=1", f"--json={file}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert file.exists(), done.stderr
    results = json.loads(file.read_text())
    limited = [ratio for ratio in results["ratios"].values() if "threshold" in ratio]
    assert limited and done.returncode == (0 if all(ratio["passed"] for ratio in limited) else 3)
    assert all(ratio["value"] >= 0 for ratio in results["ratios"].values())
    assert all(figure.get("median_s", figure.get("value")) >= 0 for figure in results["figures"].values())
    assert results["machine"]["versions"]["torch"] == metadata.version("torch") and results["machine"]["cores"] >= 1
    # Ratios that do not depend on speed pass at any size.
    for name, ratio in results["ratios"].items():
        if any(word in name for word in ("fraction of ids", "largest relative difference", "requests / parts")):
            assert ratio["passed"], name
    assert all(name in done.stdout for name in results["ratios"])


def test_the_dense_reference_computes_the_same_values():
    benchmark = MemoryBankBenchmark(16, 200, 24, torch.device("cpu"))
    for exact, dense in zip(benchmark.loss(), benchmark.dense(), strict=True):
        torch.testing.assert_close(exact, dense, rtol=1e-4, atol=1e-5)


def test_ratios_are_medians_over_rounds_and_thresholds_have_a_direction():
    results = Results("x", {})
    results.add_ratio("half", ([1.0, 9.0, 2.0], [2.0, 3.0, 4.0]), "<= 0.5")
    results.add_ratio("too low", 1.0, ">= 2")
    assert results.ratios["half"] == {"value": 0.5, "threshold": "<= 0.5", "passed": True}
    assert results.ratios["too low"]["passed"] is False and "FAILED" in results.table()


def test_candidates_alternate_and_the_first_round_is_not_counted():
    calls: list[str] = []
    setting = Setting(torch.device("cpu"), 1, 2)
    seconds = setting.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert calls == ["a", "b"] * 3 and [len(values) for values in seconds.values()] == [2, 2]


def test_invalid_arguments_are_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["shards", "--samples=0"]) == 1
    assert main(["neighbors", "--k=90", "--rows=80"]) == 1
    assert main(["tables", f"--out={tmp_path / 'none.md'}"]) == 1
    errors = capsys.readouterr().err
    assert "--samples=0: allowed: 1 or more" in errors and "--k=90" in errors and "none.md" in errors
    if not torch.cuda.is_available():
        assert main(["bank", "--device=cuda"]) == 1
        assert "--device=cuda: PyTorch finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("towers", TOWERS)
def test_the_towers_of_the_step_benchmark_exist(towers: str):
    settings = TOWERS[towers].settings()
    assert [phase.kind for phase in settings.phases.values()] == ["contrastive"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_of_encoders_and_heads_are_counted_once(checkpointing: bool):
    settings = TOWERS["small"].settings(f"model.activation_checkpointing={str(checkpointing).lower()}")
    frames, audio = torch.zeros(3, 4, 64, 64, 3, dtype=torch.uint8), torch.randn(3, 8000)
    ids = torch.arange(3)
    batch = Batch(ids, ids >= 0, {}, ids, {"frames": frames, "audio": audio})
    settings.model.activation_checkpointing = False
    model = AVModel(settings.model, settings.data, 8000, 5)
    with FlopCounterMode(display=False) as counter:
        outputs = model(frames, audio, ids)
        torch.stack([output.sum() for output in outputs.values()]).sum().backward()
    settings.model.activation_checkpointing = checkpointing
    assert count_operations(settings, 8000, 5, batch) == counter.get_total_flops() > 1e8


@pytest.mark.long
@pytest.mark.parametrize(
    ("towers", "visual", "audio"), [("vit-l", "vit_tiny", "vit_tiny"), ("r2plus1d_18", "r2plus1d_18", "avid_conv")]
)
def test_every_tower_size_is_measured_with_small_towers(towers: str, visual: str, audio: str, tmp_path: Path):
    file = tmp_path / "result.json"
    small = [f"model.visual.name={visual}", f"model.audio.name={audio}", "data.frame_size=32"]
    command = [sys.executable, str(ROOT / "tools" / "bench.py"), "step", f"--towers={towers}", "--batch=2", "--clips=2"]
    done = subprocess.run([*command, "--rounds=1", f"--json={file}", "--overrides", *small], check=False)
    assert done.returncode in (0, 3)  # The threshold is not meant for these sizes.
    figures = json.loads(file.read_text())["figures"]
    assert figures["distav"]["rate"] > 0 and figures["operations of a step, encoders and heads"]["value"] > 1


@pytest.mark.parametrize("name", markdown.SECTIONS)
def test_the_pages_show_the_stored_results(name: str):
    if name == "audit":
        pytest.importorskip("cleanlab")
    page = ROOT / "configs" / "README.md" if name == "towers" else RESULTS / "README.md"
    assert markdown.read_section(page, name) == markdown.SECTIONS[name](RESULTS)


def test_towers_are_measured_in_processes_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "towers.json"
    names = ["small_conv (visual)", "avid_conv"]
    assert main(["towers", *names, "--batch=2", "--rounds=1", "--threads=1", f"--json={file}"]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == names
    assert rows[1]["parameters"] == 4_725_696 and rows[0]["input"] == "4 x 32 x 32"
    for row in rows:  # Weights and gradients alone take 8 bytes per parameter.
        assert row["train_mib"] > 8 * row["parameters"] / 2**20
        assert 0 < row["train_clips_per_s"] < row["encode_clips_per_s"]
    assert re.search(r"^small_conv \(visual\) +0\.8 M +256 +4 × 32 × 32 ", capsys.readouterr().out, re.MULTILINE)
    assert main(["towers", "avid_con"]) == 1 and "Did you mean 'avid_conv'?" in capsys.readouterr().err


def test_markdown_tables_are_drawn_on_the_console():
    text = "Title\n\n| `a` | n | x |\n|---|---|---|\n| **first** `b` | 7 | **99.5 ± 0.1** |\n| *c* | 12 | |\n\nrest | x"
    assert from_markdown(text).splitlines() == [
        "Title",
        "",
        "a             n               x",
        "**first** b   7  **99.5 ± 0.1**",
        "*c*          12",
        "",
        "rest | x",
    ]
    program = "from tools.bench.console_tables import from_markdown; print(from_markdown('| a |\\n|---|\\n| **b** |'))"
    assert "\x1b[1mb" in run_python(program)["terminal"]


@pytest.mark.long
@pytest.mark.parametrize("name", towers.REFERENCES)
def test_towers_of_the_table_exist(name: str):
    pytest.importorskip("transformers" if name.startswith("hf:") else "timm" if name.startswith("timm:") else "torch")
    tower, clips, _ = towers.build(name, 1)
    if name.startswith("torchvision:resnet50"):
        assert (
            sum(parameter.numel() for parameter in tower.net.parameters()) == 23_508_032
        )  # 25.6 M with the classifier.
    with torch.no_grad():
        assert tower.eval()(clips).shape == (1, tower.feature_dim)


def test_tables_replaces_the_generated_sections_of_a_page(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- benchmarks: begin -->\nold\n<!-- benchmarks: end -->\nafter\n")
    assert main(["tables", f"--results={RESULTS}", f"--out={page}"]) == 0
    assert markdown.read_section(page, "benchmarks") == markdown.SECTIONS["benchmarks"](RESULTS)
    assert page.read_text().startswith("before\n") and page.read_text().endswith("-->\nafter\n")
