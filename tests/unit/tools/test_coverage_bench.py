"""Synthetic problems of the coverage benchmark, their truth, the scores and the command."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distav.noise.noise_rate import RateEstimate
from tools.bench import markdown
from tools.bench.command import main
from tools.bench.coverage import stored, summary
from tools.bench.coverage.correction import Estimates
from tools.bench.coverage.families import FAMILIES, MIN_SAMPLES_PER_CLASS, PROBLEMS, problems, subset
from tools.bench.coverage.generator import class_frequencies, generate
from tools.bench.coverage.labels import transition_matrix
from tools.bench.coverage.problem import NOISES, CoverageData, CoverageProblem, ModalityModel
from tools.bench.coverage.reference import classify
from tools.bench.coverage.runner import WorkFile, run
from tools.bench.coverage.scores import score, score_problem

PROBLEM = CoverageProblem("problem", "symmetric", seed=3, num_samples=4000, num_classes=6)
TINY = replace(PROBLEM, name="tiny", num_samples=300, num_classes=3, pair_noise=0.3)
NO_FEATURES = ModalityModel(separability=0.0)


@pytest.fixture(autouse=True)
def _single_thread() -> Iterator[None]:
    """Use one thread, as the processes of the benchmark do; tiny tensors gain nothing from more."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("noise", NOISES)
def test_label_noise_has_the_rate_of_the_problem(noise: str):
    data = generate(replace(PROBLEM, label_noise=noise, label_noise_rate=0.3))
    assert data.wrong.mean() == pytest.approx(0.3, abs=0.03)
    assert data.given.min() == 0 and data.given.max() == 5
    assert not generate(replace(PROBLEM, label_noise=noise, label_noise_rate=0.0)).wrong.any()


def test_wrong_labels_name_the_classes_of_the_noise():
    wrong_labels = {}
    for noise in ("next", "confusable", "symmetric"):
        data = generate(replace(PROBLEM, label_noise=noise))
        pairs = Counter(zip(data.true[data.wrong].tolist(), data.given[data.wrong].tolist(), strict=True))
        wrong_labels[noise] = {true: {label for first, label in pairs if first == true} for true in range(6)}
    assert wrong_labels["next"] == {true: {(true + 1) % 6} for true in range(6)}
    assert all(len(labels) == 2 for labels in wrong_labels["confusable"].values())
    assert all(len(labels) == 5 for labels in wrong_labels["symmetric"].values())


def test_prior_noise_names_frequent_classes():
    data = generate(replace(PROBLEM, label_noise="prior", zipf=1.0, label_noise_rate=0.5))
    counts = np.bincount(data.given[data.wrong & (data.true == 5)], minlength=6)
    assert counts[0] > 2 * counts[4] > 0


def test_rates_of_classes_differ_in_a_random_matrix_and_right_labels_are_most_likely():
    problem = replace(PROBLEM, label_noise="matrix", label_noise_rate=0.4, num_classes=12)
    matrix = transition_matrix(problem, class_frequencies(problem), np.zeros((12, 1)), np.random.default_rng(1))
    assert matrix.sum(1) == pytest.approx(np.ones(12))
    assert (matrix.argmax(1) == np.arange(12)).all()
    assert 1 - matrix.diagonal().mean() == pytest.approx(0.4, abs=0.02) and np.ptp(matrix.diagonal()) > 0.3


def test_instance_noise_is_near_the_boundary_of_the_classes_in_its_modality():
    problem = replace(
        PROBLEM, label_noise="instance", visual=ModalityModel(separability=4.0), noise_peak=0.9, noise_softness=0.05
    )
    data = generate(problem)
    rows = torch.from_numpy(np.flatnonzero(data.wrong))
    features = torch.nn.functional.normalize(data.visual - data.visual.mean(0), dim=1)
    neighbors = (features @ features.T).fill_diagonal_(-1).topk(20, dim=1).indices
    purity = (torch.from_numpy(data.true)[neighbors] == torch.from_numpy(data.true)[:, None]).double().mean(1)
    wrong = torch.from_numpy(data.wrong)
    assert len(rows) > 1000 and purity[wrong].mean() < purity[~wrong].mean() - 0.2


def test_the_same_problem_has_the_same_samples_and_another_seed_has_others():
    first, second, other = generate(PROBLEM), generate(PROBLEM), generate(replace(PROBLEM, seed=4))
    for name in ("given", "true", "pair_id", "groups"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    assert torch.equal(first.visual, second.visual) and torch.equal(first.audio, second.audio)
    assert not torch.equal(first.visual, other.visual) and not np.array_equal(first.given, other.given)
    assert first.visual.dtype == first.audio.dtype == torch.float32


def test_swapped_audio_comes_from_the_pair_and_matches_if_the_class_is_the_same():
    data = generate(replace(PROBLEM, pair_noise=0.4, num_classes=2))
    swapped = data.pair_id != np.arange(4000)
    assert swapped.mean() == pytest.approx(0.4) and not data.mismatched[~swapped].any()
    assert data.mismatched.mean() == pytest.approx(0.2, abs=0.02)
    assert np.array_equal(data.audio_class, data.visual_class[data.pair_id])


@pytest.mark.parametrize("owner", ["visual", "audio", "either"])
def test_true_labels_are_those_of_the_owner(owner: str):
    data = generate(replace(PROBLEM, pair_noise=0.6, owner=owner, label_noise_rate=0.2))
    of_frames = (data.true == data.visual_class)[data.mismatched].mean()
    assert of_frames == pytest.approx({"visual": 1.0, "audio": 0.0, "either": 0.5}[owner], abs=0.05)
    assert data.wrong.mean() == pytest.approx(0.2, abs=0.03)


def test_labels_of_open_set_samples_are_wrong_and_their_pairs_match():
    data = generate(replace(PROBLEM, open_set_rate=0.2, label_noise_rate=0.0))
    is_open = data.true >= 6
    assert is_open.mean() == pytest.approx(0.2, abs=0.03) and data.given.max() == 5
    assert np.array_equal(data.wrong, is_open) and not data.mismatched.any()
    assert data.class_rate(0) == 0.0 and data.class_rate(99) is None


def test_samples_of_a_source_have_one_class_and_nearly_the_same_features():
    problem = replace(PROBLEM, clips_per_source=4.0, has_shared_errors=True)
    data = generate(problem)
    order = data.groups.argsort()
    same = data.groups[order][1:] == data.groups[order][:-1]
    assert same.mean() == pytest.approx(0.75, abs=0.02)
    assert (np.diff(data.true[order])[same] == 0).all() and (np.diff(data.given[order])[same] == 0).all()
    distance = (data.visual[order[1:]] - data.visual[order[:-1]]).norm(dim=1).numpy()
    assert distance[same].mean() < 0.5 * distance[~same].mean()
    separate = generate(replace(problem, has_shared_errors=False))
    assert (np.diff(separate.given[order])[same] != 0).mean() > 0.3


def test_classes_are_balanced_or_have_the_frequencies_of_zipf():
    balanced = np.bincount(generate(PROBLEM).true)
    assert np.ptp(balanced) <= 1
    counts = np.bincount(generate(replace(PROBLEM, zipf=1.0)).true)
    assert counts[0] / counts[3] == pytest.approx(4, rel=0.02)


def test_every_modality_is_as_separable_as_its_model():
    data = generate(replace(PROBLEM, visual=ModalityModel(separability=8.0), audio=NO_FEATURES))
    visual, audio = classify(data.visual, data), classify(data.audio, data)
    assert visual.has_signal and visual.accuracy > 0.9
    assert not audio.has_signal and audio.accuracy < 0.3


def test_families_are_complete_and_large_enough():
    assert len(PROBLEMS) >= 300 and len({problem.name for problem in PROBLEMS}) == len(PROBLEMS)
    counts = Counter(problem.family for problem in PROBLEMS)
    assert set(counts) == set(FAMILIES) and min(counts.values()) >= 15
    assert {problem.label_noise for problem in PROBLEMS} == set(NOISES)
    assert {problem.owner for problem in PROBLEMS} == {"visual", "audio", "either"}
    assert max(problem.num_samples for problem in PROBLEMS) == 50_000
    assert all(problem.num_samples >= 300 and problem.num_classes >= 2 for problem in PROBLEMS)
    assert all(problem.num_samples >= MIN_SAMPLES_PER_CLASS * problem.num_classes - 8 for problem in PROBLEMS)
    assert max(problem.num_classes for problem in PROBLEMS) > 200
    assert max(problem.label_noise_rate for problem in PROBLEMS) > 0.75
    assert max(problem.pair_noise for problem in PROBLEMS) > 0.55


def test_problems_depend_on_the_seed_alone():
    assert problems(0) == PROBLEMS
    fresh = problems(1)
    assert all(first != second for first, second in zip(PROBLEMS, fresh, strict=True))
    assert problems(1, ["owner"]) == [problem for problem in fresh if problem.family == "owner"]


def test_a_subset_has_problems_of_all_families():
    counts = Counter(problem.family for problem in subset(PROBLEMS, 40, max_work=250_000))
    assert set(counts) == set(FAMILIES) and sum(counts.values()) == 40
    assert max(problem.num_samples for problem in subset(PROBLEMS, 40, max_work=250_000)) < 10_000


def _estimates(data: CoverageData, posterior: np.ndarray, rate: RateEstimate) -> Estimates:
    rates = [rate] * data.num_classes
    corrected, ones = posterior.argmax(1), np.ones(len(posterior))
    return Estimates(posterior, posterior, posterior, corrected, ones, rate, rate, rates, True)


def test_scores_compare_the_estimates_with_the_truth():
    true = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    given = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    features, rows = torch.zeros(8, 2), np.arange(8)
    data = CoverageData(2, features, features, given, true, true, true, rows, rows)
    posterior = np.full((8, 2), 0.1)
    # Corrects the wrong label and breaks a right one, each with a probability of 0.9.
    posterior[rows, [0, 0, 0, 0, 1, 1, 1, 0]] = 0.9
    row = score(data, _estimates(data, posterior, RateEstimate(0.2, 0.1, 0.24)))
    assert row["label_rate"]["true"] == 0.125 and row["label_rate"]["covered"]
    assert row["pair_rate"]["true"] == 0.0 and not row["pair_rate"]["covered"]
    assert row["class_coverage"] == 0.0  # The rates of the classes are 0.25 and 0.
    assert row["broken"] == pytest.approx(1 / 7) and row["broken_expected"] == pytest.approx(0.2 / 5.6)
    assert row["labels_right_before"] == row["labels_right_after"] == 7 / 8
    assert row["wrong_expected"] == pytest.approx(1 - 5.6 / 8) and row["ece"] == pytest.approx(0.9 - 7 / 8)
    assert row["correspondence_auroc"] is None


def test_the_correction_of_a_tiny_problem_is_scored():
    data, row = generate(TINY), score_problem(TINY)
    assert json.loads(json.dumps(row)) == row
    assert row["signal"] and row["has_signal"] and row["seconds"] > 0
    assert row["label_rate"]["true"] == pytest.approx(data.wrong.mean(), abs=1e-5)
    assert row["label_rate"]["estimate"] == pytest.approx(0.3, abs=0.15)
    assert row["labels_right_after"] > row["labels_right_before"] + 0.1
    assert row["correspondence_auroc"] > 0.8 and row["class_coverage"] > 0 and row["class_width"] > 0
    assert not summary.table([row]).count("nan")


def _row(name: str, covered: bool, **scores: Any) -> dict[str, Any]:
    low, high = (0.15, 0.25) if covered else (0.21, 0.25)
    rate = {"true": 0.2, "estimate": 0.22, "ci95_low": low, "ci95_high": high, "covered": covered}
    row = {
        "name": name, "family": "owner", "num_samples": 3000, "num_classes": 5, "signal": True, "has_signal": True,
        "visual_accuracy": 0.9, "audio_accuracy": 0.5, "label_rate": rate, "pair_rate": rate, "class_coverage": 0.95,
        "broken": 0.05, "broken_expected": 0.04, "wrong_expected": 0.2, "labels_right_before": 0.8,
        "labels_right_after": 0.9, "ece": 0.02, "correspondence_auroc": None,
    }  # fmt: skip
    return row | scores


def test_thresholds_pass_only_for_honest_estimates():
    rows = [_row(str(number), covered=number > 0) for number in range(20)]
    ratios = summary.results(rows, {}).ratios
    assert ratios["label coverage, problems with a signal"]["value"] == 0.95
    assert ratios["label width, median, 2000 or more samples"] == pytest.approx(
        {"value": 0.1, "threshold": "<= 0.08", "passed": False}
    )
    failed = [name for name, ratio in ratios.items() if not ratio["passed"]]
    assert all("width" in name for name in failed) and len(failed) == 2
    rows[5] = _row("5", covered=True, broken=0.2)
    assert not summary.results(rows, {}).ratios["right labels broken beyond the expected number"]["passed"]
    rows[:4] = [_row(str(number), covered=False) for number in range(4)]
    assert not summary.results(rows, {}).ratios["pair coverage, lowest family"]["passed"]
    failures = summary.worst(rows)
    assert "label rate outside the interval: 4 problems" in failures and "expected number: 1 problems\n  5 " in failures
    assert "→" in summary.table(rows, rows) and "(0)" in summary.changes(rows, rows)


def test_finished_problems_are_not_scored_again(tmp_path: Path):
    work_file = WorkFile(tmp_path, seed=0)
    for problem in (TINY, PROBLEM):
        work_file.add(_row(problem.name, covered=True))
    with work_file.path.open("a") as file:
        file.write('{"name": "inter')
    work_file.add(_row("third", covered=False))
    assert [row["name"] for row in run([PROBLEM, TINY], work_file, num_jobs=1)] == ["problem", "tiny"]
    assert list(work_file.load()) == ["tiny", "problem", "third"]


def test_a_stopped_run_is_reported_from_its_finished_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["coverage", "--finished", f"--work={tmp_path}"]) == 1
    assert "has none of these problems" in capsys.readouterr().err
    for problem in PROBLEMS[:3]:
        WorkFile(tmp_path, seed=0).add(_row(problem.name, covered=True))
    out = tmp_path / "before.json"
    assert main(["coverage", "--finished", f"--work={tmp_path}", f"--json={out}"]) == 3
    assert "coverage: seed=0 problems=3" in capsys.readouterr().out
    WorkFile(tmp_path, seed=0).add(_row(PROBLEMS[0].name, covered=False))
    assert main(["coverage", "--finished", f"--work={tmp_path}", f"--baseline={out}"]) == 3
    output = capsys.readouterr().out
    assert "100.0 → 66.7" in output and f"label rate no longer covered (1): {PROBLEMS[0].name}" in output


@pytest.mark.long
def test_a_failed_problem_is_reported_after_the_others_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    work_file = WorkFile(tmp_path, seed=0)
    failing = replace(TINY, name="failing", visual=ModalityModel(width=4, rank=12))
    with pytest.raises(ValueError, match="1 problems failed.*\nfailing: ValueError"):
        run([failing, TINY], work_file, num_jobs=2)
    assert list(work_file.load()) == ["tiny"] and "failing: failed" in capsys.readouterr().out


def _store(path: Path, data: CoverageData, **changes: Any) -> Path:
    arrays = {name: np.asarray(getattr(data, name)) for name in stored.ARRAYS} | changes
    np.savez(path, allow_pickle=False, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_stored_features_are_scored_and_written_with_a_table_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = generate(TINY)
    file = _store(tmp_path / "run.npz", data, true=np.where(np.arange(300) < 3, -1, data.true))
    loaded = stored.load(file)
    assert loaded.wrong[:3].all() and np.array_equal(loaded.wrong[3:], data.wrong[3:])
    assert loaded.mismatched[3:].sum() >= data.mismatched[3:].sum()
    out = tmp_path / "coverage.json"
    assert main(["coverage", "--features", str(file), f"--json={out}", "--jobs=1"]) in (0, 3)
    stored_results = json.loads(out.read_text(), parse_constant=lambda constant: pytest.fail(constant))
    assert stored_results["benchmark"] == "coverage" and [row["name"] for row in stored_results["rows"]] == ["run"]
    assert stored_results["machine"]["cores"] >= 1 and set(stored_results["families"]) == {"stored", summary.OVERALL}
    assert out.with_suffix(".svg").read_text().startswith("<?xml")
    section = markdown.coverage_section(tmp_path)
    assert "| stored | 1 | " in section and "coverage.svg" in section and "label coverage, lowest family" in section
    assert any(line.split()[:2] == ["stored", "1"] for line in capsys.readouterr().out.splitlines())


def test_invalid_arguments_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = generate(TINY)
    missing = _store(tmp_path / "missing.npz", data, pair_id=None)
    shape = _store(tmp_path / "shape.npz", data, groups=np.arange(5))
    text = tmp_path / "text.json"
    text.write_text("{}")
    for arguments in (
        ["--jobs=0"], ["--seed=-1"], ["--family", "ower"], ["--features", str(missing)], ["--features", str(shape)],
        ["--features", str(text)], ["--baseline", str(text)],
    ):  # fmt: skip
        assert main(["coverage", f"--work={tmp_path}", *arguments]) == 1
    errors = capsys.readouterr().err
    assert "--jobs=0: allowed: 1 or more" in errors and "--seed=-1: allowed: 0 or more" in errors
    assert "--family=ower: allowed:" in errors
    assert "Did you mean 'owner'?" in errors and "missing.npz: pair_id is missing" in errors
    assert "groups has shape [5]" in errors and "text.json: not a readable .npz file" in errors
    assert "--baseline" in errors and "no results of this benchmark" in errors
