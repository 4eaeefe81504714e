import json
import re
from pathlib import Path

import numpy as np
import pytest

from distav.config import loading
from distav.config.errors import UserError
from tests.conftest import ROOT
from tools.bench.noise.datasets import digit_datasets
from tools.bench.noise.experiments import ABLATIONS, EXPERIMENTS, METHODS, PAIR_METHODS, Cell, Job, ablations, grid
from tools.bench.noise.plots import save
from tools.bench.noise.results import over_seeds, training_records, vote_records
from tools.bench.noise.results import save as store
from tools.bench.noise.runner import Bench
from tools.bench.noise.tables import (
    ablation_table,
    accuracy_table,
    all_tables,
    correction_table,
    pair_table,
    time_table,
)

SHORT = ["data.num_frames=1", "optim.global_batch=300", "model.visual.width=8", "model.audio.width=8"]


@pytest.mark.long
def test_every_method_has_a_configuration_with_the_data_and_towers_of_the_recipe():
    recipe = loading.load(ROOT / "configs" / "avdigits.yaml")
    for name, method in METHODS.items():
        settings = loading.load(ROOT / "configs" / f"{method.config}.yaml", method.overrides)
        for section in ("data", "augment", "model", "optim", "memory_bank"):
            assert getattr(settings, section) == getattr(recipe, section), (name, section)
        if method.shares_pretraining:
            assert settings.phases["contrastive"] == recipe.phases["contrastive"], name
    for name, method in PAIR_METHODS.items():
        settings = loading.load(ROOT / "configs" / f"{method.config}.yaml", method.overrides)
        for section in ("data", "augment", "model", "optim", "memory_bank"):
            assert getattr(settings, section) == getattr(recipe, section), (name, section)
        phases = list(settings.phases.values())
        assert phases[-1].epochs == recipe.phases["contrastive"].epochs and not method.shares_pretraining, name
        assert {(phase.kind, phase.temperature) for phase in phases} == {("contrastive", 0.3)}, name
    supervised = [phase.epochs for phase in recipe.phases.values() if phase.kind == "supervised"]
    for name in ("ce", "gce", "elr", "true_labels"):
        settings = loading.load(ROOT / "configs" / "baselines" / f"{name}.yaml")
        assert [phase.epochs for phase in settings.phases.values()] == [sum(supervised)]


@pytest.mark.long
def test_every_ablation_changes_only_the_phases_of_the_recipe():
    recipe = loading.load(ROOT / "configs" / "avdigits.yaml")
    for name, method in ABLATIONS.items():
        changed = loading.load(ROOT / "configs" / f"{method.config}.yaml", method.overrides)
        assert changed.phases != recipe.phases, name
        assert (changed.data, changed.model, changed.optim) == (recipe.data, recipe.model, recipe.optim), name
        assert method.shares_pretraining == (changed.phases.get("contrastive") == recipe.phases["contrastive"]), name
        supervised = [phase.epochs for phase in changed.phases.values() if phase.kind == "supervised"]
        assert sum(supervised) == 36, name
    assert {cell.name for cell, _ in ablations()} <= {cell.name for cell, methods in grid() if "distav" in methods}


def test_the_grid_has_every_hard_cell_with_every_simple_baseline():
    hard = [(cell, methods) for cell, methods in grid() if cell.dataset == "hard"]
    assert len(hard) == 8 and all({"distav", "CE", "GCE", "ELR"} <= set(methods) for _, methods in hard)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_training_has_a_unique_name_that_is_a_file_name(experiment: str):
    names = [Job(cell, method, 0).name for cell, methods in EXPERIMENTS[experiment]() for method in methods]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w.-]+", name) for name in names)


@pytest.fixture
def bench(real_data: Path, tmp_path: Path, monkeypatch) -> Bench:
    """The noise benchmark with short trainings and small networks."""
    short = tmp_path / "configs"
    for path in (ROOT / "configs").rglob("*.yaml"):
        text = path.read_text().replace("epochs: 28", "epochs: 1").replace("epochs: 36", "epochs: 1")
        (short / path.relative_to(ROOT / "configs")).parent.mkdir(parents=True, exist_ok=True)
        (short / path.relative_to(ROOT / "configs")).write_text(text)
    monkeypatch.setattr("tools.bench.noise.runner.CONFIGS", short)
    return Bench(digit_datasets(real_data / "avdigits"), tmp_path, SHORT)


@pytest.mark.long
def test_trainings_share_the_pretraining_and_are_not_repeated(bench: Bench, capsys):
    cell = Cell("easy", "symmetric:0.4", 0.4)
    jobs = [Job(cell, "contrastive + probe", 0), Job(cell, "CE", 0)]
    bench.run(jobs, max_parallel=2)
    output = capsys.readouterr().out
    assert "contrastive-pretraining" in output and output.count(" s, ") == 3
    report = json.loads(bench.result_path(jobs[0]).read_text())
    assert [phase["name"] for phase in report["phases"]] == ["contrastive", "probe"]
    rows = training_records(bench, jobs)
    assert [row["method"] for row in rows] == ["contrastive + probe", "CE"]
    assert all(0 <= row["test_top1"] <= 100 and row["seed"] == 0 for row in rows)
    bench.run(jobs, max_parallel=2)
    assert not capsys.readouterr().out
    votes = vote_records(bench, jobs)
    assert {(vote["dataset"], vote["label_noise"], vote["seed"]) for vote in votes} == {("easy", "symmetric:0.4", 0)}
    accuracy = {(vote["k"], vote["second_round_neighbors"]): vote["label_accuracy"] for vote in votes}
    assert len(accuracy) == len(votes) == 8 + 6 and accuracy[5, 0] < accuracy[200, 0]


@pytest.mark.long
def test_failed_trainings_are_reported_with_their_logs_after_the_other_trainings(bench: Bench, monkeypatch, capsys):
    monkeypatch.setattr("tools.bench.noise.runner._without_later_phases", lambda: ("phases.contrastive.epochs=-1",))
    dependent, other = (Job(Cell("easy", "", 0.0), method, 0) for method in ("distav", "CE"))
    with pytest.raises(
        UserError, match=r"finished\.\n.*contrastive-pretraining_seed-0 ended with status 1; see .*\.log\.$"
    ):
        bench.run([dependent, other], max_parallel=1)
    assert bench.result_path(other).exists() and not bench.result_path(dependent).exists()
    assert "ce_seed-0: " in capsys.readouterr().out


def test_a_directory_without_the_digits_is_reported(tmp_path: Path):
    with pytest.raises(UserError, match="--digits=.*: t10k-images.* is missing"):
        digit_datasets(tmp_path)


def _row(dataset: str, label_noise: str, method: str, score: float, **more: float) -> dict:
    figures = {key: {"mean": value, "sd": 1.0} for key, value in ({"test_top1": score} | more).items()}
    fields = {"dataset": dataset, "label_noise": label_noise, "mismatch_rate": 0.4}
    return fields | {"method": method, "seeds": 3} | figures


@pytest.fixture
def rows() -> list[dict]:
    figures = {
        "corrected_label_accuracy_last": 97.25,
        "mismatch_auroc_swapped_last": 94.0,
        "mismatch_auroc_other_class_last": 99.0,
    }
    scores = ("symmetric:0.4", 90.0, 80.0), ("symmetric:0.8", 60.0, 70.0)
    rows = [_row("hard", noise, "distav", distav, **figures) for noise, distav, _ in scores]
    rows += [_row("hard", noise, "CE", ce) for noise, _, ce in scores]
    return [*rows, _row("hard", "symmetric:0.8", "20 neighbors", 30.0, corrected_label_accuracy_last=33.0)]


def test_tables_show_the_rows(rows: list[dict]):
    assert "| hard | symmetric:0.4 | 0.4 | **90.0 ± 1.0** | 80.0 ± 1.0 |" in accuracy_table(rows)
    assert "| hard | symmetric:0.8 | 0.4 | 60.0 ± 1.0 | **70.0 ± 1.0** |" in accuracy_table(rows)
    assert "30.0" not in accuracy_table(rows)
    assert "97.2 ± 1.0" in correction_table(rows)
    assert "| full recipe | 60.0 ± 1.0 | 97.2 ± 1.0 |" in ablation_table(rows)
    assert "| 20 neighbors | 30.0 ± 1.0 | 33.0 ± 1.0 |" in ablation_table(
        rows
    ) and "no whitening" not in ablation_table(rows)


def test_cells_are_ordered_and_only_a_compared_method_is_in_bold(rows: list[dict]):
    alone = [_row("easy", "symmetric:0.6", *score) for score in (("distav", 95.0), ("true labels", 99.0))]
    lines = accuracy_table([*rows[::-1], *alone]).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["symmetric:0.6", "symmetric:0.4", "symmetric:0.8"]
    assert "*" not in lines[0]


def test_times_are_compared_for_trainings_with_the_same_seed():
    fields = {"dataset": "hard", "label_noise": "", "mismatch_rate": 0.4, "test_top1": 50.0}
    seconds = {"contrastive": 180.0, "label_correction": 40.0, "supervised": 100.0}
    spent = {f"seconds_{kind}": value for kind, value in seconds.items()} | {"seconds": 320.0}
    records = [fields | spent | {"method": "distav", "seed": 0}, fields | {"method": "CE", "seed": 0, "seconds": 200.0}]
    others = [fields | {"method": "distav", "seed": 1}, fields | {"method": "CE", "seed": 1, "seconds": 1.0}]
    table = time_table(records + others)
    assert "| contrastive | 0.90 |" in table and "| all | 1.60 |" in table
    assert time_table(others) == "" and len(all_tables(others[1:])) == 1
    ablated = [fields | {"method": "20 neighbors", "seed": 0, "test_top1": 40.0}]
    tables = all_tables([*records, *ablated, fields | {"method": "distav", "seed": 1, "test_top1": 60.0}])
    assert len(tables) == 4 and "**55.0 ± 7.1**" in tables[0]
    assert "| full recipe | 50.0 |" in tables[2] and "| 20 neighbors | 40.0 |" in tables[2]


def test_methods_for_mismatched_pairs_have_their_own_table():
    rows = [
        _row(
            "cross-class audio",
            "",
            method,
            50.0,
            test_v2a_map=v2a,
            test_a2v_map=90.0,
            correspondence_auroc_similarity=80.0,
        )
        for method, v2a in (("InfoNCE", 70.0), ("CRCL", 95.0))
    ]
    rows[1]["correspondence_auroc_correspondence"] = {"mean": 99.5, "sd": 0.2}
    table = pair_table(rows)
    assert "| InfoNCE | 70.0 ± 1.0 / 90.0 ± 1.0 |" in table and "| CRCL | 95.0 ± 1.0 / 90.0 ± 1.0 |" in table
    assert "| InfoNCE | 80.0 ± 1.0 |" in table and "| CRCL | 99.5 ± 0.2 |" in table
    records = [
        {key: figure["mean"] if isinstance(figure, dict) else figure for key, figure in row.items()} for row in rows
    ]
    assert all_tables([record | {"seed": 0} for record in records]) == [pair_table(over_seeds(records))]
    assert pair_table([]) == ""


def test_one_seed_has_no_deviation(rows: list[dict]):
    rows[0]["test_top1"] = {"mean": 90.0, "sd": None}
    assert "| **90.0** |" in accuracy_table(rows)


def test_records_are_added_to_the_file_and_the_same_seed_is_replaced(tmp_path: Path):
    fields = {"dataset": "hard", "label_noise": "", "mismatch_rate": 0.4, "method": "CE"}

    def record(seed: int, top1: float, **more: float) -> dict:
        return {**fields, "seed": seed, "test_top1": top1, **more}

    path = tmp_path / "new" / "noise.json"
    store({"rows": [record(0, 90.0, f1=1.0)], "votes": []}, path)
    store({"rows": [record(1, 50.0)], "votes": []}, path)
    figures = {"label_accuracy": 10.0, "log_likelihood_gain": 1.0}
    vote = {"dataset": "hard", "seed": 1, "label_noise": "", "k": 5, "second_round_neighbors": 0, **figures}
    merged = store({"rows": [record(1, 94.0)], "votes": [vote, vote | {"k": 10}]}, path)
    assert [row["seed"] for row in merged["rows"]] == [0, 1] and len(merged["votes"]) == 2
    stored = json.loads(path.read_text())
    assert stored["rows"] == merged["rows"] and len(stored["machines"]) == 1
    top1 = {"mean": 92.0, "sd": pytest.approx(2.828)}
    assert over_seeds(merged["rows"]) == [fields | {"seeds": 2, "test_top1": top1}]
    assert over_seeds(merged["votes"])[1]["label_accuracy"] == {"mean": 10.0, "sd": None}


def test_a_file_of_another_kind_is_reported_and_not_changed(tmp_path: Path):
    path = tmp_path / "bank.json"
    contents = {'{"benchmark": "bank"}': "no results of the noise benchmark", '{"benchm': "not a valid JSON file"}
    for text, reason in contents.items():
        path.write_text(text)
        with pytest.raises(UserError, match=f"--json={path}: .*{reason}.*choose another"):
            store({"rows": []}, path)
        assert path.read_text() == text


def test_plots_show_the_rows_and_are_reproducible(rows: list[dict], tmp_path: Path):
    votes = [
        {"dataset": "hard", "label_noise": "symmetric:0.8", "k": k, "second_round_neighbors": second, "seeds": 1,
         "label_accuracy": {"mean": 50.0 + k, "sd": None}, "log_likelihood_gain": {"mean": 0.01 * k, "sd": None}}
        for second in (0, 20) for k in (20, 50)
    ]  # fmt: skip
    for name in ("one.svg", "two.svg"):
        save({"rows": rows, "votes": votes}, tmp_path / name)
    assert (tmp_path / "one.svg").read_text() == (tmp_path / "two.svg").read_text()
    assert "<svg" in (tmp_path / "one.svg").read_text()


def test_the_f1_score_counts_false_positives_and_false_negatives():
    detection = pytest.importorskip("tools.bench.noise.detection")
    detected, wrong = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert detection.f1_score(detected, wrong) == 0.5
    assert detection.f1_score(wrong, wrong) == 1
