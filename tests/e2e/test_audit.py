"""The audit page in a browser, and its decisions applied to a training."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset
from distav.data.files import write_table
from distav.tools.audit.command import main
from distav.tools.audit.issues import Issues
from distav.tools.audit.page import Audit, write_page
from distav.tools.make_shards import main as clean
from tests.helpers.issues import planted_issues
from tests.helpers.modalities import audit_of, mixed_shards, write_mixed_folder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    with sync_playwright() as driver:
        with driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
            yield browser


@pytest.fixture(scope="module")
def page_file(finished: tuple[Path, str], tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose labels table is replaced by known values, so that both lists have entries."""
    run = tmp_path_factory.mktemp("audit") / "tiny"
    shutil.copytree(finished[0], run)
    report = json.loads((run / "report.json").read_text())
    path = run / "labels" / f"{report['corrections'][-1]['phase']}.parquet"
    table, classes = pq.read_table(path), ShardedDataset.open(tiny_shards).classes
    given = table.column("given_label").to_pylist()
    self_confidence = np.linspace(0.001, 0.999, len(table)).astype(np.float32)
    correspondence = np.where(np.arange(len(table)) % 8 == 3, 0.1, 0.9).astype(np.float32)
    knn = [
        classes[(classes.index(name) + 1) % len(classes)] if confidence < 0.4 else name
        for name, confidence in zip(given, self_confidence, strict=True)
    ]
    columns = {"self_confidence": self_confidence, "correspondence": correspondence, "knn_label": knn}
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, [values])
    write_table(path, table)
    assert main([str(run), "--neighbors", "3", "--shards", str(tiny_shards), "--workers", "1"]) == 0
    return run / "audit.html"


def open_page(browser: Browser, path: Path) -> tuple[Page, list[str]]:
    """Open the page; the list collects console messages, errors and requests to the network.

    ``page.wait_for_function`` is not for these tests: it calls ``eval``, which the page's policy forbids and reports.
    """
    page, messages = browser.new_page(viewport={"width": 1300, "height": 800}), []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else messages.append(request.url),
    )
    page.goto(path.as_uri())
    return page, messages


def test_issues_are_reviewed_with_keys_and_decisions_are_applied_to_a_training(
    browser: Browser, page_file: Path, tiny_shards: Path, tmp_path: Path
):
    page, messages = open_page(browser, page_file)
    assert page.locator(".row").first.inner_text().endswith("99.9 %")
    tabs = page.locator("nav button").all_inner_texts()
    assert tabs[:2] == ["Labels 38", "Pairs 12"] and tabs[-1] == "Overview" and len(tabs) == 7
    strip = page.locator(".row.selected img").evaluate(
        "image => [image.naturalWidth / image.naturalHeight, image.complete]"
    )
    assert strip == [4, True]
    audio = page.locator("#audio")
    audio.evaluate("audio => audio.readyState || new Promise((done) => (audio.onloadedmetadata = done))")
    assert audio.evaluate("audio => audio.duration") > 0.9
    assert page.locator(".near figure").count() == 6
    page.keyboard.press("a")
    page.keyboard.press("r")
    named = page.locator(".question b").all_inner_texts()
    other = next(name for name in ShardedDataset.open(tiny_shards).classes if name not in named)
    page.select_option("#pick", label=other)
    page.keyboard.press("a")
    page.keyboard.press("a")
    page.keyboard.press("u")
    page.keyboard.press("2")
    page.keyboard.press("a")
    page.keyboard.press("r")
    page.select_option("[name=state]", "rejected")
    assert page.locator(".row").count() == 1
    assert page.locator("#decided").inner_text() == "6 decided"
    with page.expect_download() as first:
        page.click("#save")
    decisions = tmp_path / "decisions.csv"
    first.value.save_as(decisions)
    rows = list(csv.DictReader(decisions.open()))
    decided = [(row["label_decision"], row["pair_decision"], row["pair"]) for row in rows]
    # Clip 3 has an issue of both kinds, and one row.
    assert sorted(decided) == [
        ("", "rejected", "matched"),
        ("accepted", "", ""),
        ("accepted", "accepted", "mismatched"),
        ("other", "", ""),
        ("rejected", "", ""),
    ]
    accepted = next(row for row in rows if row["label_decision"] == "accepted")
    assert accepted["label"] == accepted["knn_label"] != accepted["given_label"]
    shards = ShardedDataset.open(tiny_shards)
    split = shards.split("train")
    before, after = load_labels(shards, split), load_labels(shards, split, str(decisions))
    changed = {str(key) for key in split.keys[before.given != after.given]}
    assert changed == {row["key"] for row in rows if row["label"] not in ("", row["given_label"])} and len(changed) == 3

    page.evaluate("localStorage.clear()")
    page.reload()
    assert page.locator("#decided").inner_text() == "no decisions"
    page.set_input_files("#load", str(decisions))
    expect(page.locator("#decided")).to_contain_text("5 clips loaded")
    page.evaluate("location.reload()")  # Loaded decisions are stored like those made on the page.
    expect(page.locator("#decided")).to_have_text("6 decided")
    with page.expect_download() as again:
        page.click("#save")
    again.value.save_as(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == decisions.read_text()
    # Decisions from another run's page are compared by label; those on clips that are not shown are kept.
    lines = decisions.read_text().splitlines()
    other_run = next(line for line in lines if ",accepted,," in line).replace(",accepted,", ",rejected,", 1)
    (tmp_path / "other_run.csv").write_text(
        "\n".join([lines[0], other_run, "elsewhere,,mismatched,a,b,,accepted,file,0"]) + "\n"
    )
    page.evaluate("localStorage.clear()")
    page.reload()
    page.set_input_files("#load", str(tmp_path / "other_run.csv"))
    expect(page.locator("#decided")).to_contain_text("1 not on this page kept")
    with page.expect_download() as third:
        page.click("#save")
    third.value.save_as(tmp_path / "third.csv")
    kept = {row["key"]: row for row in csv.DictReader((tmp_path / "third.csv").open())}
    assert kept["elsewhere"]["pair"] == "mismatched" and len(kept) == 2
    assert kept[other_run.split(",")[0]]["label"] == other_run.split(",")[1]
    assert kept[other_run.split(",")[0]]["label_decision"] == "accepted"
    page.keyboard.press("0")
    assert page.locator(".confusion td").first.is_visible() and page.locator(".bar").count() == len(shards.classes)
    assert not messages


def test_filters_select_by_class_and_probability(browser: Browser, page_file: Path):
    page, messages = open_page(browser, page_file)
    name = page.locator("[name=given] option").nth(1).inner_text()
    page.select_option("[name=given]", label=name)
    shown = page.locator(".row .given").all_inner_texts()
    assert shown and set(shown) == {name}
    page.select_option("[name=given]", label="any")
    page.fill("[name=low]", "0.9")
    scores = page.locator(".row .mark").all_inner_texts()
    assert 0 < len(scores) < 38 and min(float(score.removesuffix(" %")) for score in scores) >= 90
    page.fill("[name=text]", "no such clip")
    assert page.locator(".row").count() == 0 and "Nothing to show" in page.locator("#detail").inner_text()
    assert not messages


@pytest.mark.parametrize("has_signal", [True, False])
def test_a_page_without_issues_says_why_and_what_to_do(
    has_signal: bool, browser: Browser, page_file: Path, tiny_shards: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    run = tmp_path / "run"
    shutil.copytree(page_file.parent, run)
    report = json.loads((run / "report.json").read_text())
    correction = report["corrections"][-1]
    interval = {"estimate": 0.0, "ci95_low": 0.0, "ci95_high": 0.1}
    rates = dict.fromkeys(ShardedDataset.open(tiny_shards).classes, interval) if has_signal else {}
    correction["label_noise_rate_by_class"] = rates
    (run / "report.json").write_text(json.dumps(report))
    path = run / "labels" / f"{correction['phase']}.parquet"
    table = pq.read_table(path)
    columns = {"knn_label": table.column("given_label"), "correspondence": [np.ones(len(table), np.float32)]}
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    write_table(path, table)
    assert main([str(run), "--shards", str(tiny_shards), "--workers", "1", "--export", "csv"]) == 0
    printed = capsys.readouterr().out
    assert (run / "issues.csv").is_file() and (run / "audit-csv" / "clips.csv").is_file()
    page, messages = open_page(browser, run / "audit.html")
    assert main([str(run), "--shards", str(tiny_shards), "--embeddings", "nope"]) == 1
    assert "--embeddings=nope: no such directory" in capsys.readouterr().err
    texts = [page.locator("#detail").inner_text()]
    page.keyboard.press("2")
    texts.append(page.locator("#detail").inner_text())
    if has_signal:
        assert texts[0].startswith("No label issues") and texts[1].startswith("No pair issues")
    else:
        assert texts[0] == texts[1] and "no label signal" in texts[0] and "Train with more epochs" in texts[0]
    assert all(text in printed for text in texts) and not messages


def test_clips_without_video_or_audio_are_shown_as_such(browser: Browser, tmp_path: Path):
    shards = mixed_shards(write_mixed_folder(tmp_path / "files"), tmp_path / "shards", "--short-side=32")
    audit = audit_of(shards)
    write_page(audit, tmp_path / "page.html", 48)
    page, messages = open_page(browser, tmp_path / "page.html")
    for visual, audio in zip(*(audit.split.has_modality(name).tolist() for name in ("visual", "audio")), strict=True):
        selected, detail = page.locator(".row.selected"), page.locator("#detail")
        assert selected.locator("img").count() == detail.locator("> img").count() == int(visual)
        missing = detail.locator("> .missing")
        assert (missing.count() == 0) if visual else (missing.inner_text() == "no video")
        assert detail.locator("audio").count() == int(audio)
        assert ("This clip has no audio." in detail.inner_text()) == (not audio)
        headings = detail.locator("h2").all_inner_texts()
        assert headings == ["Most similar video"] * visual + ["Most similar audio"] * audio
        page.keyboard.press("j")
    assert not messages


def test_duplicates_leaks_and_other_clips_are_removed_by_decisions(browser: Browser, tiny_shards: Path, tmp_path: Path):
    data, audit = planted_issues(tiny_shards)
    write_page(audit, tmp_path / "page.html", 48)
    page, messages = open_page(browser, tmp_path / "page.html")
    expected = {"3": "Duplicates 5", "4": "Leaks 4", "5": "Off-topic 6", "6": "Silent or black 3"}
    removed = []
    for key, name in expected.items():
        page.keyboard.press(key)
        assert page.locator("nav [aria-selected=true]").inner_text() == name
        has_match = key in "34"
        assert (page.locator("h2").first.inner_text() == "Compare with") == has_match
        assert page.locator(".match img").count() == has_match
        removed.append(page.locator("#detail .dim").first.inner_text().split(", ")[-2].split()[-1])
        page.keyboard.press("a")
        page.keyboard.press("r")
    assert "no decisions" not in page.locator("#decided").inner_text()
    with page.expect_download() as download:
        page.click("#save")
    decisions = tmp_path / "decisions.csv"
    download.value.save_as(decisions)
    rows = {row["key"]: row for row in csv.DictReader(decisions.open())}
    assert sorted(row["action"] for row in rows.values()) == ["keep"] * 4 + ["remove"] * 4
    assert all(rows[key]["action"] == "remove" and key in data.keys for key in removed)
    page.evaluate("localStorage.clear()")
    page.reload()
    page.set_input_files("#load", str(decisions))
    expect(page.locator("#decided")).to_contain_text("8 clips loaded")
    with page.expect_download() as again:
        page.click("#save")
    again.value.save_as(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == decisions.read_text()
    assert clean(["clean", str(tiny_shards), str(tmp_path / "out"), "--workers=1", "--decisions", str(decisions)]) == 3
    kept = set(ShardedDataset.open(tmp_path / "out").split("train").keys.tolist())
    assert set(data.keys[: len(data.train)]) - kept == set(removed) and not messages


def test_ten_thousand_issues_scroll_quickly_and_names_are_not_markup(
    browser: Browser, page_file: Path, tiny_shards: Path, tmp_path: Path
):
    shards = ShardedDataset.open(tiny_shards)
    split = shards.split("train")
    table = pq.read_table(next((page_file.parent / "labels").glob("*.parquet")))
    evil = "</script><img src=x onerror=alert(1)>"
    classes = [evil if name == shards.classes[0] else name for name in shards.classes]
    for name in ("given_label", "corrected_label", "knn_label"):
        values = [evil if label == shards.classes[0] else label for label in table.column(name).to_pylist()]
        table = table.set_column(table.column_names.index(name), name, [values])
    ids = np.arange(10_000) % len(split)
    issues = Issues("label", ids, np.linspace(1, 0.5, len(ids)), len(ids))
    neighbors = {modality: (np.stack([ids, ids], 1), np.ones((len(ids), 2))) for modality in ("visual", "audio")}
    correction = json.loads((page_file.parent / "report.json").read_text())["corrections"][-1]
    audit = Audit(evil, split, classes, table, correction, [issues], [neighbors], {})
    write_page(audit, tmp_path / "many.html", 48)
    page, messages = open_page(browser, tmp_path / "many.html")
    assert page.locator("nav button").first.inner_text() == "Labels 10000"
    # Scroll ten times through the list; each position is drawn before the next.
    elapsed_ms = page.evaluate("""async () => {
        const list = document.getElementById("list"), start = performance.now();
        for (let jump = 1; jump <= 10; jump++) {
            list.scrollTop = jump * list.scrollHeight / 11;
            await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
        }
        return performance.now() - start;
    }""")
    assert elapsed_ms < 5000
    assert page.locator(".row").count() < 40
    assert page.title() == evil and not messages
