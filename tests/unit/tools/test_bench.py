import json
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
from tools.bench import markdown
from tools.bench.command import main
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
}


_SLOW = ("bank", "neighbors", "step")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in _SLOW)) for name in SMALL])
def test_every_benchmark_measures_and_says_whether_its_bars_are_met(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "deep" / "result.json"
    status = main([name, *SMALL[name], "--rounds=1", f"--json={file}"])
    found = json.loads(file.read_text())
    barred = [ratio for ratio in found["ratios"].values() if "bar" in ratio]
    assert barred and status == (0 if all(ratio["met"] for ratio in barred) else 3)
    assert all(ratio["value"] >= 0 for ratio in found["ratios"].values())
    assert all(figure.get("median_s", figure.get("value")) >= 0 for figure in found["figures"].values())
    assert found["machine"]["versions"]["torch"] == metadata.version("torch") and found["machine"]["cores"] >= 1
    # What does not hang on speed holds at any size.
    for what, ratio in found["ratios"].items():
        if any(word in what for word in ("ids equal", "share of ids", "largest relative difference", "bytes")):
            if "plain read" not in what and "wire" not in what:
                assert ratio["met"], what
    said = capsys.readouterr().out
    assert all(what in said for what in found["ratios"])


def test_the_dense_peer_computes_the_same():
    problem = MemoryBankBenchmark(16, 200, 24, torch.device("cpu"))
    for ours, theirs in zip(problem.loss(), problem.dense(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_ratios_are_medians_over_rounds_and_bars_have_a_side():
    results = Results("x", {})
    results.add_ratio("half", ([1.0, 9.0, 2.0], [2.0, 3.0, 4.0]), "<= 0.5")
    results.add_ratio("too low", 1.0, ">= 2")
    assert results.ratios["half"] == {"value": 0.5, "bar": "<= 0.5", "met": True}
    assert results.ratios["too low"]["met"] is False and "MISSED" in results.table()


def test_candidates_take_turns_and_the_first_round_does_not_count():
    calls: list[str] = []
    setting = Setting(torch.device("cpu"), 1, 2)
    seconds = setting.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert calls == ["a", "b"] * 3 and [len(each) for each in seconds.values()] == [2, 2]


def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["shards", "--samples=0"]) == 1
    assert main(["neighbors", "--k=90", "--rows=80"]) == 1
    assert main(["tables", f"--readme={tmp_path / 'none.md'}"]) == 1
    told = capsys.readouterr().err
    assert "--samples=0: allowed: from 1 up" in told and "--k=90" in told and "none.md" in told
    if not torch.cuda.is_available():
        assert main(["bank", "--device=cuda"]) == 1
        assert "--device=cuda: PyTorch sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("towers", TOWERS)
def test_the_towers_of_the_step_exist(towers: str):
    settings = TOWERS[towers].settings()
    assert [each.kind for each in settings.phases.values()] == ["contrastive"]


@pytest.mark.parametrize("recompute", [False, True])
def test_operations_are_those_of_the_encoders_and_heads_once(recompute: bool):
    settings = TOWERS["small"].settings(f"model.activation_checkpointing={str(recompute).lower()}")
    frames, sound = torch.zeros(3, 4, 64, 64, 3, dtype=torch.uint8), torch.randn(3, 8000)
    ids = torch.arange(3)
    batch = Batch(ids, ids >= 0, ids, {"frames": frames, "audio": sound})
    settings.model.activation_checkpointing = False
    model = AVModel(settings.model, settings.data, 8000, 5)
    with FlopCounterMode(display=False) as counter:
        outputs = model(frames, sound, ids)
        torch.stack([each.sum() for each in outputs.values()]).sum().backward()
    settings.model.activation_checkpointing = recompute
    assert count_operations(settings, 8000, 5, batch) == counter.get_total_flops() > 1e8


@pytest.mark.long
@pytest.mark.parametrize(
    ("towers", "visual", "audio"), [("vit-l", "vit_tiny", "vit_tiny"), ("r2plus1d_18", "r2plus1d_18", "avid_conv")]
)
def test_any_encoders_are_measured_at_sizes_for_a_cpu(towers: str, visual: str, audio: str, tmp_path: Path):
    file = tmp_path / "result.json"
    small = [f"model.visual.name={visual}", f"model.audio.name={audio}", "data.frame_size=32"]
    command = [sys.executable, str(ROOT / "tools" / "bench.py"), "step", f"--towers={towers}", "--batch=2", "--clips=2"]
    done = subprocess.run([*command, "--rounds=1", f"--json={file}", "--overrides", *small], check=False)
    assert done.returncode in (0, 3)  # The bar is not for these sizes.
    figures = json.loads(file.read_text())["figures"]
    assert figures["distav"]["rate"] > 0 and figures["operations of a step, encoders and heads"]["value"] > 1


def test_the_readme_shows_what_the_record_says():
    text = (ROOT / "README.md").read_text()
    for begin, end, expected in (
        (markdown.BEGIN, markdown.END, markdown.section(RESULTS)),
        (markdown.NOISE_BEGIN, markdown.NOISE_END, markdown.noise_section(RESULTS)),
        (markdown.PARSING_BEGIN, markdown.PARSING_END, markdown.parsing_section(RESULTS)),
    ):
        assert text.split(begin + "\n")[1].split(end)[0] == expected
