import json
import re
from pathlib import Path

import numpy as np
import pytest

from distav.config import loading
from distav.config.errors import UserError
from tests.conftest import ROOT
from tools.bench.noise.experiments import ABLATIONS, METHODS, PAIR_METHODS, Cell, Job, ablations, grid
from tools.bench.noise.plots import save
from tools.bench.noise.results import over_seeds, trainings, votes
from tools.bench.noise.results import save as store
from tools.bench.noise.runner import PARTS, Bench
from tools.bench.noise.tables import ablation, accuracy, correction, every, pairs, times

SHORT = ["data.num_frames=1", "optim.global_batch=300", "model.visual.width=8", "model.audio.width=8"]


@pytest.mark.long
def test_every_method_has_a_configuration_with_the_data_and_towers_of_the_recipe():
    recipe = loading.load(ROOT / "configs" / "avdigits.yaml")
    for name, method in METHODS.items():
        settings = loading.load(ROOT / "configs" / f"{method.config}.yaml", method.changes)
        for section in ("data", "augment", "model", "optim", "bank"):
            assert getattr(settings, section) == getattr(recipe, section), (name, section)
        if method.shares_phase_1:
            assert settings.phases["contrastive"] == recipe.phases["contrastive"], name
    for name, method in PAIR_METHODS.items():
        settings = loading.load(ROOT / "configs" / f"{method.config}.yaml", method.changes)
        for section in ("data", "augment", "model", "optim", "bank"):
            assert getattr(settings, section) == getattr(recipe, section), (name, section)
        phases = list(settings.phases.values())
        assert phases[-1].epochs == recipe.phases["contrastive"].epochs and not method.shares_phase_1, name
        assert {(phase.kind, phase.temperature) for phase in phases} == {("contrastive", 0.3)}, name
    learnt = [phase.epochs for phase in recipe.phases.values() if phase.kind == "supervised"]
    for name in ("ce", "gce", "elr", "true_labels"):
        settings = loading.load(ROOT / "configs" / "baselines" / f"{name}.yaml")
        assert [phase.epochs for phase in settings.phases.values()] == [sum(learnt)]


@pytest.mark.long
def test_every_ablation_changes_the_recipe_and_nothing_else():
    recipe = loading.load(ROOT / "configs" / "avdigits.yaml")
    for name, method in ABLATIONS.items():
        changed = loading.load(ROOT / "configs" / f"{method.config}.yaml", method.changes)
        assert changed.phases != recipe.phases, name
        assert (changed.data, changed.model, changed.optim) == (recipe.data, recipe.model, recipe.optim), name
        assert method.shares_phase_1 == (changed.phases.get("contrastive") == recipe.phases["contrastive"]), name
        learnt = [phase.epochs for phase in changed.phases.values() if phase.kind == "supervised"]
        assert sum(learnt) == 36, name
    assert {cell.name for cell, _ in ablations()} <= {cell.name for cell, methods in grid() if "distav" in methods}


def test_the_grid_has_every_hard_cell_with_every_simple_baseline():
    hard = [(cell, methods) for cell, methods in grid() if cell.set == "hard"]
    assert len(hard) == 8 and all({"distav", "ce", "gce", "elr"} <= set(methods) for _, methods in hard)


@pytest.mark.parametrize("part", PARTS)
def test_every_training_has_a_name_of_its_own_that_a_command_line_takes(part: str):
    names = [Job(cell, method, 0).name for cell, methods in PARTS[part]() for method in methods]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w.-]+", name) for name in names)


@pytest.fixture
def bench(real_data: Path, tmp_path: Path, monkeypatch) -> Bench:
    """The bench at a fraction of its size."""
    short = tmp_path / "configs"
    for path in (ROOT / "configs").rglob("*.yaml"):
        text = path.read_text().replace("epochs: 28", "epochs: 1").replace("epochs: 36", "epochs: 1")
        (short / path.relative_to(ROOT / "configs")).parent.mkdir(parents=True, exist_ok=True)
        (short / path.relative_to(ROOT / "configs")).write_text(text)
    monkeypatch.setattr("tools.bench.noise.runner.CONFIGS", short)
    return Bench(real_data / "avdigits", tmp_path, SHORT)


@pytest.mark.long
def test_trainings_share_phase_1_are_kept_and_not_repeated(bench: Bench, capsys):
    cell = Cell("easy", "symmetric:0.4", 0.4)
    jobs = [Job(cell, "contrast + probe", 0), Job(cell, "ce", 0)]
    bench.run(jobs, max_parallel=2)
    said = capsys.readouterr().out
    assert "phase-1" in said and said.count(" s, ") == 3
    report = json.loads(bench.result_path(jobs[0]).read_text())
    assert [each["name"] for each in report["phases"]] == ["contrastive", "probe"]
    rows = trainings(bench, jobs)
    assert [row["method"] for row in rows] == ["contrast + probe", "ce"]
    assert all(0 <= row["test_top1"] <= 100 and row["seed"] == 0 for row in rows)
    bench.run(jobs, max_parallel=2)
    assert not capsys.readouterr().out
    swept = votes(bench, jobs)
    assert {(row["set"], row["labels"], row["seed"]) for row in swept} == {("easy", "symmetric:0.4", 0)}
    right = {(row["k"], row["second"]): row["right"] for row in swept}
    assert len(right) == len(swept) == 8 + 6 and right[5, 0] < right[200, 0]


@pytest.mark.long
def test_trainings_that_fail_are_named_with_their_logs_after_the_others(bench: Bench, monkeypatch, capsys):
    monkeypatch.setattr("tools.bench.noise.runner._only_phase_1", lambda: "phases: {contrastive: {epochs: -1}}\n")
    needing, other = (Job(Cell("easy", "", 0.0), method, 0) for method in ("distav", "ce"))
    with pytest.raises(UserError, match=r"but:\n.*phase-1_seed-0 ended with status 1; see .*\.log\.$"):
        bench.run([needing, other], max_parallel=1)
    assert bench.result_path(other).exists() and not bench.result_path(needing).exists()
    assert "ce_seed-0: " in capsys.readouterr().out


def test_a_folder_without_the_digits_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="--digits=.* has no t10k-images"):
        Bench(tmp_path, tmp_path)


def _row(name: str, labels: str, method: str, score: float, **more: float) -> dict:
    figures = {"test_top1": score} | more
    spreads = {key: {"mean": value, "sd": 1.0} for key, value in figures.items()}
    return {"set": name, "labels": labels, "pairs": 0.4, "method": method, "seeds": 3} | spreads


@pytest.fixture
def rows() -> list[dict]:
    told = {"labels_corrected_last": 97.25, "auroc_swapped_last": 94.0, "auroc_other_class_last": 99.0}
    scores = ("symmetric:0.4", 90.0, 80.0), ("symmetric:0.8", 60.0, 70.0)
    found = [_row("hard", labels, "distav", ours, **told) for labels, ours, _ in scores]
    found += [_row("hard", labels, "ce", theirs) for labels, _, theirs in scores]
    return [*found, _row("hard", "symmetric:0.8", "k 20", 30.0, labels_corrected_last=33.0)]


def test_tables_show_the_rows(rows: list[dict]):
    assert "| hard | symmetric:0.4 | 0.4 | **90.0 ± 1.0** | 80.0 ± 1.0 |" in accuracy(rows)
    assert "| hard | symmetric:0.8 | 0.4 | 60.0 ± 1.0 | **70.0 ± 1.0** |" in accuracy(rows)
    assert "30.0" not in accuracy(rows)
    assert "97.2 ± 1.0" in correction(rows)
    assert "| as it is | 60.0 ± 1.0 | 97.2 ± 1.0 |" in ablation(rows)
    assert "| k 20 | 30.0 ± 1.0 | 33.0 ± 1.0 |" in ablation(rows) and "no whitening" not in ablation(rows)


def test_cells_stand_in_order_and_only_a_method_with_rivals_is_the_best(rows: list[dict]):
    alone = [_row("easy", "symmetric:0.6", *each) for each in (("distav", 95.0), ("true labels", 99.0))]
    lines = accuracy([*rows[::-1], *alone]).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["symmetric:0.6", "symmetric:0.4", "symmetric:0.8"]
    assert "*" not in lines[0]


def test_times_are_told_of_trainings_with_the_same_seed():
    place = {"set": "hard", "labels": "", "pairs": 0.4, "test_top1": 50.0}
    spent = {"seconds_contrastive": 180.0, "seconds_correction": 40.0, "seconds_supervised": 100.0, "seconds": 320.0}
    records = [place | spent | {"method": "distav", "seed": 0}, place | {"method": "ce", "seed": 0, "seconds": 200.0}]
    others = [place | {"method": "distav", "seed": 1}, place | {"method": "ce", "seed": 1, "seconds": 1.0}]
    told = times(records + others)
    assert "| contrastive | 0.90 |" in told and "| all | 1.60 |" in told
    assert times(others) == "" and len(every(others[1:])) == 1
    ablated = [place | {"method": "k 20", "seed": 0, "test_top1": 40.0}]
    tables = every([*records, *ablated, place | {"method": "distav", "seed": 1, "test_top1": 60.0}])
    assert len(tables) == 4 and "**55.0 ± 7.1**" in tables[0]
    assert "| as it is | 50.0 |" in tables[2] and "| k 20 | 40.0 |" in tables[2]


def test_ways_to_learn_from_mismatched_pairs_have_a_table_of_their_own():
    found = [
        _row(
            "other classes",
            "",
            method,
            50.0,
            test_v2a_map=seen,
            test_a2v_map=90.0,
            correspondence_auroc_similarity=80.0,
        )
        for method, seen in (("infonce", 70.0), ("crcl", 95.0))
    ]
    found[1]["correspondence_auroc_correspondence"] = {"mean": 99.5, "sd": 0.2}
    told = pairs(found)
    assert "| infonce | 70.0 ± 1.0 / 90.0 ± 1.0 |" in told and "| crcl | 95.0 ± 1.0 / 90.0 ± 1.0 |" in told
    assert "| infonce | 80.0 ± 1.0 |" in told and "| crcl | 99.5 ± 0.2 |" in told
    records = [
        {key: figure["mean"] if isinstance(figure, dict) else figure for key, figure in row.items()} for row in found
    ]
    assert every([each | {"seed": 0} for each in records]) == [pairs(over_seeds(records))] and pairs([]) == ""


def test_one_seed_has_no_deviation(rows: list[dict]):
    rows[0]["test_top1"] = {"mean": 90.0, "sd": None}
    assert "| **90.0** |" in accuracy(rows)


def test_seeds_add_up_in_the_file_and_the_same_seed_takes_its_place(tmp_path: Path):
    def record(seed: int, top1: float, **more: float) -> dict:
        return {"set": "hard", "labels": "", "pairs": 0.4, "method": "ce", "seed": seed, "test_top1": top1, **more}

    path = tmp_path / "of" / "noise.json"
    store({"rows": [record(0, 90.0, f1=1.0)], "votes": []}, path)
    store({"rows": [record(1, 50.0)], "votes": []}, path)
    vote = {"set": "hard", "seed": 1, "labels": "", "k": 5, "second": 0, "right": 10.0, "nats": 1.0}
    found = store({"rows": [record(1, 94.0)], "votes": [vote, vote | {"k": 10}]}, path)
    assert [each["seed"] for each in found["rows"]] == [0, 1] and len(found["votes"]) == 2
    stored = json.loads(path.read_text())
    assert stored["rows"] == found["rows"] and len(stored["machines"]) == 1
    spread = {"mean": 92.0, "sd": pytest.approx(2.828)}
    place = {"set": "hard", "labels": "", "pairs": 0.4, "method": "ce"}
    assert over_seeds(found["rows"]) == [place | {"seeds": 2, "test_top1": spread}]
    assert over_seeds(found["votes"])[1]["right"] == {"mean": 10.0, "sd": None}


def test_a_file_of_something_else_is_named_and_left_alone(tmp_path: Path):
    path = tmp_path / "bank.json"
    for text, told in (('{"benchmark": "bank"}', "no records of trainings"), ('{"benchm', "is damaged")):
        path.write_text(text)
        with pytest.raises(UserError, match=f"--json={path}: .*{told}.*name another file"):
            store({"rows": []}, path)
        assert path.read_text() == text


def test_plots_show_the_rows_and_are_the_same_again(rows: list[dict], tmp_path: Path):
    swept = [
        {"set": "hard", "labels": "symmetric:0.8", "k": k, "second": second, "seeds": 1,
         "right": {"mean": 50.0 + k, "sd": None}, "nats": {"mean": 0.01 * k, "sd": None}}
        for second in (0, 20) for k in (20, 50)
    ]  # fmt: skip
    for name in ("one.svg", "two.svg"):
        save({"rows": rows, "votes": swept}, tmp_path / name)
    assert (tmp_path / "one.svg").read_text() == (tmp_path / "two.svg").read_text()
    assert "<svg" in (tmp_path / "one.svg").read_text()


def test_f1_counts_both_kinds_of_mistake():
    detection = pytest.importorskip("tools.bench.noise.detection")
    found, wrong = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert detection.f1(found, wrong) == 0.5
    assert detection.f1(wrong, wrong) == 1
