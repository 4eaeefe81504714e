"""Benchmark of label correction for growing numbers of samples."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from distav.config.errors import UserError
from tools.bench import correction
from tools.bench.command import main
from tools.bench.correction import Case, draw_features, draw_truth, exponent, scaling_table, table
from tools.bench.markdown import correction_section

CASE = Case(9000, 1, "exact", 0, 20, 64, 0.4, 0.2, 1)


def row_of(case: Case, cpu_s: float, peak_mib: float) -> dict[str, Any]:
    figures = {"wall_s": cpu_s, "cpu_s": cpu_s, "base_mib": 100.0, "peak_mib": peak_mib, "right_before": 0.6,
               "right_after": 0.95, "noise": 0.4, "noise_estimate": [0.41, 0.38, 0.44], "mismatch": 0.2,
               "mismatch_estimate": [0.2, 0.1, 0.3]}  # fmt: skip
    return asdict(case) | figures


def test_rates_of_the_truth_are_those_requested():
    truth = draw_truth(CASE)
    assert float((truth.given != truth.true).float().mean()) == pytest.approx(0.4, abs=0.02)
    assert float((truth.audio != truth.true).float().mean()) == pytest.approx(0.2, abs=0.02)
    assert torch.bincount(truth.true).min() > 9000 / 20 * 0.8


def test_features_do_not_depend_on_the_division_of_the_rows_and_show_the_class():
    truth = draw_truth(CASE)
    whole = draw_features(truth.true, CASE, "visual", range(9000))
    parts = [
        draw_features(truth.true, CASE, "visual", range(*bounds)) for bounds in ((0, 2999), (2999, 8200), (8200, 9000))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(draw_features(truth.true, CASE, "audio", range(9000)), whole)
    means = torch.stack([whole[:4500][truth.true[:4500] == number].mean(0) for number in range(20)])
    nearest = torch.cdist(whole[4500:], means).argmin(1)
    assert float((nearest == truth.true[4500:]).float().mean()) > 0.95
    assert float(F.cosine_similarity(whole[:-1], whole[1:]).abs().max()) < 0.999


def test_exponents_are_fitted_and_ratios_of_ranks_compared(tmp_path: Path):
    assert exponent([10, 100, 1000], [3, 300, 30000]) == pytest.approx(2)
    sizes = (10_000, 100_000)
    cases = [Case(size, ranks, "exact", 0, 309, 128, 0.4, 0.2, 1) for ranks in (1, 4) for size in sizes]
    rows = [row_of(case, 1e-6 * case.samples**1.5 * (1 + case.ranks / 10), 100 + case.samples / 100) for case in cases]
    text = scaling_table({"rows": rows})
    assert "exact, 10,000 to 100,000 samples: exponent of the CPU time | 1.50" in text
    assert "exact, 10,000 to 100,000 samples: exponent of the memory above that of the libraries | 1.00" in text
    assert "exact, 100,000 samples: CPU time of 4 ranks / of one process | 1.27 | <= 1.2, **FAILED**" in text
    assert "| exact | 4 | 10,000 |" in table({"rows": rows}) and "60.0% → 95.0%" in table({"rows": rows})
    assert "No results" in correction_section(tmp_path)


def test_results_of_other_cases_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "correction.json"
    for cpu_s in (1.0, 2.0):
        measured = lambda case, cpu_s=cpu_s: row_of(case, cpu_s, 500.0)  # noqa: E731
        with mock.patch.object(correction, "measure", measured):
            sizes = ("20000", "10000") if cpu_s == 1 else ("20000", "40000")
            assert main(["correction", "--samples", *sizes, "--search", "ivf", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["samples"], row["cpu_s"], row["probes"]) for row in rows] == [
        (10_000, 1.0, 128), (20_000, 2.0, 128), (40_000, 2.0, 128)
    ]  # fmt: skip
    assert "ivf, 10,000 to 40,000 samples: exponent" in correction_section(tmp_path)
    path.write_text("[]")
    with pytest.raises(UserError, match="no results of this benchmark; choose another file"):
        correction.run([], path)
    capsys.readouterr()
    assert main(["correction", "--samples", "10"]) == 1 and "--samples=10: allowed: 1000" in capsys.readouterr().err
    assert main(["correction", "--noise", "1"]) == 1 and "--noise=1.0: allowed" in capsys.readouterr().err
