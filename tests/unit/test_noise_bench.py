import json
from pathlib import Path

import numpy as np
import pytest

from distav import config
from distav.bench.noise import Bench
from distav.bench.noise_grid import METHODS, Cell, Job, grid
from distav.bench.noise_table import accuracy, correction, plots
from distav.errors import UserError

ROOT = Path(__file__).parents[2]
SHORT = ["data.num_frames=1", "optim.global_batch=300", "model.visual.width=8", "model.audio.width=8"]


def test_every_method_has_a_configuration_with_the_data_and_towers_of_the_recipe():
    recipe = config.load(ROOT / "configs" / "avdigits.yaml")
    for name in METHODS.values():
        settings = config.load(ROOT / "configs" / f"{name}.yaml")
        for section in ("data", "augment", "model", "optim", "bank"):
            assert getattr(settings, section) == getattr(recipe, section), (name, section)
    learnt = [phase.epochs for phase in recipe.phases.values() if phase.kind == "supervised"]
    for name in ("ce", "gce", "elr", "true_labels"):
        settings = config.load(ROOT / "configs" / "baselines" / f"{name}.yaml")
        assert [phase.epochs for phase in settings.phases.values()] == [sum(learnt)]


def test_the_grid_has_every_hard_cell_with_every_simple_baseline():
    hard = [(cell, methods) for cell, methods in grid() if cell.set == "hard"]
    assert len(hard) == 8 and all({"distav", "ce", "gce", "elr"} <= set(methods) for _, methods in hard)
    names = [Job(cell, method, 0).name for cell, methods in grid() for method in methods]
    assert len(set(names)) == len(names) and all(
        set(name) <= set("-._") | set(map(chr, range(48, 123))) for name in names
    )


@pytest.fixture
def bench(real_data: Path, tmp_path: Path) -> Bench:
    return Bench(real_data / "avdigits", tmp_path, SHORT)


def test_trainings_share_phase_1_are_kept_and_not_repeated(bench: Bench, tmp_path: Path, monkeypatch, capsys):
    """Two methods after one phase 1, at a fraction of their size."""
    short = tmp_path / "configs"
    (short / "baselines").mkdir(parents=True)
    for path in (ROOT / "configs").rglob("*.yaml"):
        text = path.read_text().replace("epochs: 28", "epochs: 1").replace("epochs: 36", "epochs: 1")
        (short / path.relative_to(ROOT / "configs")).parent.mkdir(parents=True, exist_ok=True)
        (short / path.relative_to(ROOT / "configs")).write_text(text)
    monkeypatch.setattr("distav.bench.noise.CONFIGS", short)
    cell = Cell("easy", "symmetric:0.4", 0.2)
    jobs = [Job(cell, "contrast + probe", 0), Job(cell, "ce", 0)]
    bench.run(jobs, at_once=2)
    said = capsys.readouterr().out
    assert "phase-1" in said and said.count(" s, ") == 3
    report = json.loads(bench.result_path(jobs[0]).read_text())
    assert [each["name"] for each in report["phases"]] == ["contrastive", "probe"]
    rows = bench.collect(jobs)
    assert [row["method"] for row in rows] == ["contrast + probe", "ce"]
    assert all(0 <= row["test_top1"]["mean"] <= 100 and row["seeds"] == 1 for row in rows)
    bench.run(jobs, at_once=2)
    assert not capsys.readouterr().out


def test_a_training_that_fails_is_named_with_its_log(real_data: Path, tmp_path: Path):
    bench = Bench(real_data / "avdigits", tmp_path, ["optim.lr=-1"])
    with pytest.raises(UserError, match=r"ce_seed-0 ended with status 1; see .*\.log"):
        bench.run([Job(Cell("easy", "", 0.0), "ce", 0)], at_once=1)


def test_a_folder_without_the_digits_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="--digits=.* has no t10k-images"):
        Bench(tmp_path, tmp_path)


def test_tables_and_plots_show_the_rows(tmp_path: Path):
    rows = [
        {"set": "hard", "labels": labels, "pairs": 0.4, "method": method, "seeds": 3,
         "test_top1": {"mean": score, "sd": 1.0}, "labels_corrected_last": {"mean": 97.25, "sd": 0.5}}
        for labels, scores in (("symmetric:0.4", (90.0, 80.0)), ("symmetric:0.8", (60.0, 70.0)))
        for method, score in zip(("distav", "ce"), scores, strict=True)
    ]  # fmt: skip
    assert "| hard | symmetric:0.4 | 0.4 | **90.0 ± 1.0** | 80.0 ± 1.0 |" in accuracy(rows)
    assert "| hard | symmetric:0.8 | 0.4 | 60.0 ± 1.0 | **70.0 ± 1.0** |" in accuracy(rows)
    assert "97.2 ± 0.5" in correction(rows) or "97.3 ± 0.5" in correction(rows)
    plots(rows, tmp_path / "noise.svg")
    assert (tmp_path / "noise.svg").read_text().startswith("<?xml")


def test_f1_counts_both_kinds_of_mistake():
    detection = pytest.importorskip("distav.bench.detection")
    found, wrong = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert detection.f1(found, wrong) == 0.5
    assert detection.f1(wrong, wrong) == 1 and detection.f1(~wrong & False, ~wrong & False) == 1
