"""Exports of the listed clips: FiftyOne, Label Studio and CSV, compared with their documented formats."""

import csv
import json
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import av
import numpy as np
import pytest

from distav.config.errors import UserError
from distav.tools.audit.command import main
from distav.tools.audit.export_media import write_mp4
from distav.tools.audit.exports import EXPORT_FORMATS, Export, write_export
from distav.tools.audit.issue_table import issue_table
from tests.helpers.issues import DUPLICATES, OFF_TOPIC, planted_issues


@pytest.fixture(scope="module")
def exported(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Export, Path]:
    data, audit = planted_issues(tiny_shards)
    export, folder = Export(audit, data, issue_table(data)), tmp_path_factory.mktemp("exports")
    audit.issues[:2] = [ranked.first(2) for ranked in audit.issues[:2]]
    for name in EXPORT_FORMATS:
        write_export(name, export, folder / name)
    return export, folder


def listed_keys(export: Export) -> set[str]:
    return {export.data.keys[clip] for ranked in export.audit.issues for clip in ranked.ids}


def test_fiftyone_reads_samples_with_classifications_and_tags(exported: tuple[Export, Path]):
    export, folder = exported[0], exported[1] / "fiftyone"
    metadata, samples = (json.loads((folder / name).read_text()) for name in ("metadata.json", "samples.json"))
    # Without a version and a schema, FiftyOne reads Sample.to_dict() and infers the fields.
    assert set(metadata) == {"info"} and set(samples) == {"samples"}
    assert {sample["key"] for sample in samples["samples"]} == listed_keys(export)
    for sample in samples["samples"]:
        assert (folder / sample["filepath"]).is_file() and sample["tags"][0] == "train"
        for name in ("given", "proposed", "corrected"):
            assert sample[name]["_cls"] == "Classification" and sample[name]["label"] in export.audit.classes
    tags = {sample["key"]: sample["tags"] for sample in samples["samples"]}
    assert all("off_topic" in tags[export.data.keys[clip]] for clip in OFF_TOPIC)
    assert all("duplicate" in tags[export.data.keys[clip]] for clip in DUPLICATES)


def test_label_studio_tasks_have_predictions_of_the_configuration(exported: tuple[Export, Path]):
    export, folder = exported[0], exported[1] / "labelstudio"
    view = ElementTree.parse(folder / "config.xml").getroot()
    names = {element.get("name"): element for element in view.iter() if element.get("name")}
    (video,) = view.iter("Video")
    tasks = json.loads((folder / "tasks.json").read_text())
    assert {task["data"]["key"] for task in tasks} == listed_keys(export)
    result_ids = []
    for task in tasks:
        path = task["data"][str(video.get("value")).removeprefix("$")]
        assert (folder / unquote(path.removeprefix("/data/local-files/?d="))).is_file()
        assert 0 <= task["predictions"][0]["score"] <= 1
        for result in task["predictions"][0]["result"]:
            control = names[result["from_name"]]
            assert control.tag == "Choices" and control.get("toName") == result["to_name"] == video.get("name")
            allowed = {choice.get("value") for choice in control.iter("Choice")}
            assert result["type"] == "choices" and set(result["value"]["choices"]) <= allowed
            result_ids.append(result["id"])
    assert len(set(result_ids)) == len(result_ids) == 3 * len(tasks)
    actions = {task["data"]["key"]: task["predictions"][0]["result"][2]["value"]["choices"] for task in tasks}
    assert actions[export.data.keys[80]] == ["remove"]


def test_the_csv_table_names_the_files_and_issues(exported: tuple[Export, Path]):
    export, folder = exported[0], exported[1] / "csv"
    with open(folder / "clips.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["key"] for row in rows} == listed_keys(export)
    assert all((folder / row["path"]).is_file() and row["issues"] for row in rows)
    assert {"duplicate_of", "leak_reason", "off_topic_score", "knn_label"} <= set(rows[0])


@pytest.mark.parametrize(("has_frames", "has_audio"), [(True, True), (True, False), (False, True)])
def test_media_files_play_with_any_modality_and_odd_sizes(has_frames: bool, has_audio: bool, tmp_path: Path):
    frames = np.full((8, 31, 45, 3), 200, np.uint8) if has_frames else None
    audio = np.sin(np.arange(8000) / 5).astype(np.float32) * 0.5 if has_audio else None
    write_mp4(tmp_path / "clip.mp4", frames, audio, 8.0, 8000)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        video = container.streams.video[0]
        assert video.codec_context.name == "h264" and bool(container.streams.audio) == has_audio
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video)]
    assert len(decoded) == 8 and decoded[0].shape[:2] == ((32, 46) if has_frames else (128, 128))
    assert abs(float(decoded[0].mean()) - (200 if has_frames else 128)) < 4
    if has_audio:
        with av.open(str(tmp_path / "clip.mp4")) as container:
            samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
        assert 0.9 < len(samples) / 48000 < 1.2 and 0.45 < np.abs(samples[24000:]).max() < 0.6


def test_a_directory_that_cannot_be_written_is_an_error(exported: tuple[Export, Path], tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--export-dir=.*file/out: Not a directory; choose another directory"):
        write_export("csv", exported[0], tmp_path / "file" / "out")


def test_invalid_export_options_are_reported(capsys: pytest.CaptureFixture[str]):
    assert main(["runs/nope", "--export-dir", "out"]) == 1
    assert "--export-dir=out: also give --export FORMAT" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["runs/nope", "--export", "label-studio"])
    assert "Did you mean 'labelstudio'" in capsys.readouterr().err
