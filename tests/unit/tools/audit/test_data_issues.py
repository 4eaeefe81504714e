"""Duplicates, leaks, off-topic clips and media without content, planted in a small dataset."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distav.data.dataset import ShardedDataset
from distav.data.strings import StringColumn
from distav.tools.audit.command import _print_summary
from distav.tools.audit.command import main as audit
from distav.tools.audit.data_issues import DataIssues
from distav.tools.audit.duplicates import DistanceModel, duplicate_groups, find_leaks, find_matches
from distav.tools.audit.issue_table import issue_table, write_issue_table
from distav.tools.audit.issues import Issues
from distav.tools.audit.media_check import MediaCheck
from distav.tools.audit.neighborhoods import find_neighborhoods
from distav.tools.audit.off_topic import num_neighbors, off_topic_scores
from distav.tools.audit.page import _page_data
from distav.tools.make_shards import main as make_shards
from tests.helpers.issues import (
    BLACK,
    DUPLICATES,
    LEAKS,
    OFF_TOPIC,
    SAME_AUDIO,
    SAME_VIDEO,
    SILENT,
    UNREADABLE,
    as_embeddings,
    class_features,
    planted_issues,
)
from tests.helpers.media import write_media, write_silent


@pytest.fixture(scope="module")
def planted(tiny_shards: Path) -> DataIssues:
    return planted_issues(tiny_shards)[0]


def listed(data: DataIssues, kind: str) -> Issues:
    return next(issues for issues in data.issues if issues.kind == kind)


def test_near_duplicates_are_listed_with_their_modality(planted: DataIssues):
    issues = listed(planted, "duplicate")
    assert issues.matches is not None
    expected = {**DUPLICATES, SAME_VIDEO[0]: SAME_VIDEO[1], SAME_AUDIO[0]: SAME_AUDIO[1]}
    assert dict(zip(issues.ids.tolist(), issues.matches.tolist(), strict=True)) == expected
    modalities = [planted.matches.modalities[clip] for clip in issues.ids]
    assert sorted(modalities) == ["audio", "video", *["video and audio"] * 3] and modalities[-1] == "audio"
    assert issues.notes[-1].startswith(
        f"Near-duplicate of {planted.keys[SAME_AUDIO[1]]} of another source in its audio"
    )
    assert planted.duplicate_groups[5] == planted.duplicate_groups[80] == 5 and planted.duplicate_groups[0] == -1


def test_near_duplicates_of_test_clips_are_leaks_of_both_splits(planted: DataIssues):
    issues = listed(planted, "leak")
    num_train = len(planted.train)
    assert issues.matches is not None
    found = set(zip((issues.matches - num_train).tolist(), issues.ids.tolist(), strict=True))
    assert found == {*LEAKS.items(), (5, 81)}
    assert {int(row) - num_train for row in (planted.leaks.partners >= 0).nonzero()[0] if row >= num_train} == set(
        LEAKS
    )


def test_off_topic_clips_are_listed_also_if_they_resemble_each_other(planted: DataIssues):
    assert set(listed(planted, "off_topic").ids.tolist()) == set(OFF_TOPIC)
    rng = np.random.default_rng(1)
    labels = np.arange(300) % 4
    features = [class_features(labels, rng) for _ in range(2)]
    for modality in range(2):  # The last 30 clips are a cluster of their own, with random labels.
        features[modality][270:] = 3 * rng.standard_normal(24) + 0.3 * rng.standard_normal((30, 24))
    supported = np.arange(300) < 270
    embeddings, sources = as_embeddings(*features), np.arange(300)
    neighborhoods = find_neighborhoods(embeddings, sources, candidates=supported, k=num_neighbors(labels, supported))
    is_off_topic = off_topic_scores(neighborhoods, supported)[1]
    assert is_off_topic[270:].all() and not is_off_topic[:270].any()
    # Wrong labels of ordinary clips are no reason.
    mislabeled = supported & (np.arange(300) % 5 > 0)
    neighborhoods = find_neighborhoods(embeddings, sources, candidates=mislabeled, k=num_neighbors(labels, supported))
    is_off_topic = off_topic_scores(neighborhoods, mislabeled)[1]
    assert is_off_topic[270:].all() and is_off_topic[:270].mean() < 0.02


def test_small_classes_have_fewer_neighbors():
    labels = np.repeat(["a", "b", "c"], [4, 12, 300])
    assert num_neighbors(labels, np.ones(316, bool)) == 6
    assert num_neighbors(labels[4:], np.ones(312, bool)) == 10
    assert num_neighbors(labels, np.zeros(316, bool)) == 3


def test_silent_black_and_unreadable_clips_are_listed_with_reasons(planted: DataIssues):
    issues = listed(planted, "media")
    notes = dict(zip(issues.ids.tolist(), issues.notes, strict=True))
    assert notes == {SILENT: "Silent", BLACK: "Black", UNREADABLE: "Unreadable: no frames"}
    rows = [{"id": clip, "still": clip < 30} for clip in range(100)]
    assert not MediaCheck.from_rows(rows, 100).issues()[0].any()
    assert MediaCheck.from_rows([{**row, "still": row["id"] < 10} for row in rows], 100).issues()[0].sum() == 10


def test_arguments_that_do_not_fit_the_dataset_are_rejected(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = f"{{root: {tiny_shards}, train_split: train}}"
    (tmp_path / "config.yaml").write_text(f"run: {{name: x}}\nphases: {{}}\ndata: {data}\n")
    (tmp_path / "report.json").write_text(json.dumps({"corrections": [{"missing_label_rate": 0.1}]}))
    assert audit([str(tmp_path), "--shards", str(tiny_shards)]) == 1
    error = capsys.readouterr().err
    assert f"--shards={tiny_shards}: a dataset with one label per clip, but {tmp_path} is a run on a multi" in error
    (tmp_path / "report.json").write_text("{}")
    assert audit([str(tmp_path), "--neighbors", "96"]) == 1
    assert f"--neighbors=96: allowed: 1 to 95, for the 96 training clips of {tiny_shards}." in capsys.readouterr().err


def test_media_that_were_not_searched_have_no_count(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data, content = planted_issues(tiny_shards)
    data = replace(data, media=MediaCheck.skipped(len(data.train)))
    nothing = {name: (ids[:0], cosines[:0]) for name, (ids, cosines) in content.neighbors[-1].items()}
    content = replace(content, issues=data.issues, neighbors=[*content.neighbors[:-1], nothing])
    page = _page_data(content)
    assert page["totals"]["media"] is None and "not searched (--skip-media)" in page["no_issues"]["media"]
    (tmp_path / "audit.html").touch()
    _print_summary(content, tmp_path / "audit.html", [])
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[:7]}
    assert rows["issues"] == ["found", "listed"] and rows["off-topic"] == ["6", "6"] and rows["media"] == ["–", "–"]
    assert page["no_issues"]["media"] in printed


@pytest.mark.parametrize("dim", [5, 8, 30])
def test_clips_without_duplicates_have_no_near_duplicates(dim: int):
    """The limit follows the dimension of the data; a tenth of the clips has a duplicate in the second part."""
    rng = np.random.default_rng(dim)
    rows = rng.standard_normal((2000, dim)).astype(np.float32) * rng.uniform(0.5, 2, dim)
    embeddings = as_embeddings(rows.astype(np.float32), rows[rng.permutation(2000)].astype(np.float32))
    neighborhood = find_neighborhoods(embeddings, np.arange(2000))["visual"]
    model = DistanceModel.fit(neighborhood)
    assert model.dimension is not None and 0.6 * (dim - 1) < model.dimension < 1.4 * dim
    expected = model.expected_neighbors(np.arange(2000), neighborhood.distances[:, 0])
    assert (expected <= 0.5 / 2000).sum() <= 3
    rows[1800:] = rows[:200] + 1e-3 * rng.standard_normal((200, dim))
    neighborhood = find_neighborhoods(as_embeddings(rows, rows), np.arange(2000))["visual"]
    expected = DistanceModel.fit(neighborhood).expected_neighbors(np.arange(2000), neighborhood.distances[:, 0])
    is_near = expected <= 0.5 / 2000
    assert is_near[1800:].mean() > 0.9 and is_near[:200].mean() > 0.9 and is_near[200:1800].sum() <= 3


def test_clips_of_one_source_are_no_near_duplicates():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200, 8)).astype(np.float32)
    rows[1] = rows[0] * 1.0001
    sources = np.arange(200)
    sources[1] = 0
    neighborhood = find_neighborhoods(as_embeddings(rows, rows), sources)["visual"]
    assert 1 not in neighborhood.ids[0] and neighborhood.distances[0, 0] > 0.1


def test_groups_are_connected_components():
    assert duplicate_groups(np.array([-1, 3, -1, 1, 3, -1])).tolist() == [-1, 1, -1, 1, 1, -1]


def test_copies_and_shared_sources_are_found_from_the_index(tmp_path: Path):
    """Files that are equal under other names, across and within splits; silent audio is no copy."""
    folder, lines = tmp_path / "files", ["path,label,split"]
    folder.mkdir()
    for name, size in (("a.mp4", 48), ("c.mp4", 64), ("d.mp4", 80)):
        write_media(folder / name, 2.0, size=(size, 48))
    shutil.copy(folder / "a.mp4", folder / "a2.mp4")
    shutil.copy(folder / "c.mp4", folder / "c2.mp4")
    write_silent(folder / "e.mkv", 2.0, size=(96, 48))
    lines += [f"files/{name},x,{split}" for name, split in (
        ("a.mp4", "train"), ("a2.mp4", "train"), ("c.mp4", "train"), ("c2.mp4", "test"), ("d.mp4", "train"),
        ("e.mkv", "train"))]  # fmt: skip
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    options = ("--clip-s=1", "--fps=8", "--sample-rate=8000", "--workers=1", "--short-side=32", "--modalities=any")
    assert make_shards(["csv", str(tmp_path / "clips.csv"), str(tmp_path / "set"), *options]) == 0
    shards = ShardedDataset.open(tmp_path / "set")
    train, test = shards.split("train"), shards.split("test")
    count = len(train) + len(test)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, count, 4)).astype(np.float32)
    embeddings, test_embeddings = (
        as_embeddings(*rows[:, part]) for part in (slice(len(train)), slice(len(train), count))
    )
    nothing = {name: np.zeros(len(train), bool) for name in ("visual", "audio")}
    neighborhoods = find_neighborhoods(embeddings, train.source_codes, test_embeddings)
    matches = find_matches(neighborhoods, train, test, nothing)
    sources = [Path(str(source)).name for split in (train, test) for source in split.sources]
    pairs = {
        (sources[row], sources[match])
        for row, match in enumerate(matches.ids.tolist())
        if match >= 0 and matches.modalities[row] == "video and audio"
    }
    assert {("a2.mp4", "a.mp4"), ("a.mp4", "a2.mp4"), ("c2.mp4", "c.mp4")} <= pairs
    assert not any("e.mkv" in pair or "d.mp4" in pair for pair in pairs)
    leaks = find_leaks(matches, train, test)
    leaked = {sources[row] for row in (leaks.partners >= 0).nonzero()[0]}
    assert leaked == {"c.mp4", "c2.mp4"} and set(leaks.reasons[leaks.partners >= 0]) == {"copy"}
    same = StringColumn(pa.chunked_array([[train.sources[0]] * len(test)]))
    leaks = find_leaks(matches, train, replace(test, texts=test.texts | {"source": same}))
    assert leaks.reasons[0] == "same source" and leaks.partners[0] >= len(train)


def test_the_issue_table_has_a_row_per_clip(planted: DataIssues, tmp_path: Path):
    paths = write_issue_table(issue_table(planted), tmp_path)
    rows = pq.read_table(paths[0]).to_pylist()
    assert len(rows) == 120 and [row["key"] for row in rows] == planted.keys
    assert [row["id"] for row in rows if row["duplicate_issue"]] == [80, 81, 82, 83, 84]
    assert rows[80]["duplicate_of"] == planted.keys[5] and rows[5]["duplicate_group"] == 5
    assert rows[5]["duplicate_issue"] is False and rows[5]["duplicate_score"] > 0.99
    assert rows[20]["leak_of"] == planted.keys[96 + 3] and rows[20]["leak_reason"] == "near-duplicate"
    assert rows[96 + 3]["split"] == "test" and rows[96 + 3]["leak_of"] == planted.keys[20]
    assert rows[96 + 3]["label_issue"] is None and rows[96 + 3]["silent"] is None
    assert (rows[SILENT]["silent"], rows[SILENT]["black"], rows[UNREADABLE]["unreadable"]) == (True, False, "no frames")
    assert {row["id"] for row in rows if row["off_topic_issue"]} == set(OFF_TOPIC)
    with open(paths[1], newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 120 and lines[80]["duplicate_of"] == planted.keys[5] and lines[0]["leak_of"] == ""
