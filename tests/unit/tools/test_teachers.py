"""Scores of teachers equal those of transformers; pseudo-labels follow from scores, thresholds and given labels."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import distav.data.annotations.teacher_scores
import distav.tools.pseudo_label.command
from distav.config.errors import UserError
from distav.config.schema import DataConfig
from distav.data.annotations.events import load_events, read_events
from distav.data.annotations.teacher_scores import read_scores, read_teacher_probs
from distav.data.dataset import ShardedDataset
from distav.data.pipeline.loader import Batch, Loader
from distav.tools.pseudo_label.clap_teacher import CLAPTeacher
from distav.tools.pseudo_label.clip_teacher import CLIPTeacher
from distav.tools.pseudo_label.command import main
from distav.tools.pseudo_label.prompts import read_prompts
from distav.tools.pseudo_label.teachers import TEACHERS
from tests.conftest import ROOT, make_shards
from tests.helpers.events import AVE_CLASSES, ave_shards, write_ave
from tests.helpers.media import copy_stream

transformers = pytest.importorskip("transformers", reason="teachers need transformers: pip install 'distav[teachers]'")
from tests.helpers.teachers import SIDE, write_prompts, write_teachers  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ave(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ave")
    write_ave(folder / "raw")
    ave_shards(folder / "raw", folder / "shards")
    captions = [f"A photo of a {name}." for name in AVE_CLASSES] + [
        f"This is a sound of {name}" for name in AVE_CLASSES
    ]
    write_teachers(folder, captions)
    write_prompts(folder / "prompts.yaml", folder, [*AVE_CLASSES][::-1])
    return folder


def load_batch(folder: Path, split: str, count: int) -> Batch:
    data = DataConfig(num_frames=10, frame_stride=8, frame_size=SIDE, squash=True, audio_s=10.0)
    loader = Loader(ShardedDataset.open(folder / "shards").split(split), data, None, 0, count, CPU)
    batch = loader.load(np.arange(count), 0)
    loader.close()
    return batch


@torch.no_grad()
def test_scores_equal_those_of_transformers(ave: Path):
    batch, prompts = load_batch(ave, "test", 3), read_prompts(ave / "prompts.yaml")
    visual_scores = CLIPTeacher(prompts["visual"], CPU).scores(batch.media["frames"])
    model = transformers.CLIPModel.from_pretrained(ave / "clip")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ave / "clip")
    image_processor = transformers.CLIPImageProcessor.from_pretrained(ave / "clip")
    for clip in range(3):
        images = image_processor(list(batch.media["frames"][clip].numpy()), return_tensors="pt", do_resize=False)
        tokens = tokenizer(prompts["visual"].captions, return_tensors="pt", padding=True)
        tokens.pop("token_type_ids", None)
        expected = model(**images, **tokens).logits_per_image
        torch.testing.assert_close(visual_scores[clip], expected, atol=1e-4, rtol=1e-4)

    audio_scores = CLAPTeacher(prompts["audio"], CPU, 16000, 10).scores(batch.media["audio"])
    model = transformers.ClapModel.from_pretrained(ave / "clap")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ave / "clap")
    feature_extractor = transformers.AutoFeatureExtractor.from_pretrained(ave / "clap")
    tokens = tokenizer(prompts["audio"].captions, return_tensors="pt", padding=True)
    tokens.pop("token_type_ids", None)
    for clip in range(3):
        for second in range(10):
            segment = batch.media["audio"][clip, 16000 * second : 16000 * (second + 1)].numpy()
            features = feature_extractor(segment, sampling_rate=16000, return_tensors="pt")["input_features"]
            outputs = model(input_features=features, is_longer=torch.zeros(1, 1, dtype=torch.bool), **tokens)
            expected = outputs.logits_per_audio[0]
            torch.testing.assert_close(audio_scores[clip, second], expected, atol=1e-4, rtol=1e-4)
    assert visual_scores.shape == audio_scores.shape == (3, 10, 3)
    assert visual_scores.std() > 0 and audio_scores.std() > 0


@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
@pytest.mark.parametrize("seconds", [0.3, 1, 2, 2.5])
def test_spectrograms_equal_those_of_the_feature_extractor(ave: Path, truncation: str, seconds: float):
    teacher = CLAPTeacher(read_prompts(ave / "prompts.yaml")["audio"], CPU, 16000, 10)
    teacher.feature_extractor = transformers.ClapFeatureExtractor(
        sampling_rate=16000, max_length_s=2, truncation=truncation
    )
    segments = 0.1 * torch.randn(3, int(16000 * seconds), generator=torch.Generator().manual_seed(0))
    segments[1] = 0
    segments[2, 2000:] = 0
    np.random.seed(0)  # The extractor crops longer segments at random.
    spectrograms = teacher._spectrograms(segments)
    np.random.seed(0)
    expected = teacher.feature_extractor(list(segments.numpy()), sampling_rate=16000, return_tensors="pt")[
        "input_features"
    ]
    torch.testing.assert_close(spectrograms, expected, atol=1e-4, rtol=0)


def test_audio_of_another_sample_rate_is_resampled(ave: Path):
    batch, prompts = load_batch(ave, "test", 1), read_prompts(ave / "prompts.yaml")
    audio = batch.media["audio"]
    upsampled = torch.nn.functional.interpolate(audio[:, None], scale_factor=2, mode="linear")[:, 0]
    expected = CLAPTeacher(prompts["audio"], CPU, 16000, 10).scores(audio)
    scores = CLAPTeacher(prompts["audio"], CPU, 32000, 10).scores(upsampled)
    assert (scores - expected).abs().max() < 0.3 * expected.std()


def arguments(folder: Path, out: Path) -> list[str]:
    paths = [str(folder / "shards"), "--prompts", str(folder / "prompts.yaml"), "--out", str(out)]
    return [*paths, "--device", "cpu", "--batch-size", "4", "--threads", "1"]


def pseudo_label(folder: Path, out: Path, *options: str) -> int:
    return main([*arguments(folder, out), *options])


def change_prompts(path: Path, **changes: dict) -> None:
    content = yaml.safe_load(path.read_text())
    for section, values in changes.items():
        content[section] |= values
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def test_pseudo_labels_are_scores_above_the_threshold_of_classes_in_the_label(
    ave: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert pseudo_label(ave, tmp_path) == 0
    rows = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0][0] == "split" and rows[0][-4:] == ["segment F-score audio", "visual", "Type@AV", "Event@AV"]
    assert [len(row) for row in rows[:4]] == [8] * 4 and [row[0] for row in rows[1:4]] == ["test", "train", "val"]
    shards, prompts = ShardedDataset.open(ave / "shards"), read_prompts(ave / "prompts.yaml")
    median = np.median(read_scores(tmp_path, "x", shards, shards.split("train")), axis=(0, 2, 3))
    (tmp_path / "shards").symlink_to(ave / "shards")
    write_prompts(tmp_path / "prompts.yaml", ave, [*AVE_CLASSES][::-1], float(median[1]), float(median[0]))
    assert pseudo_label(tmp_path, tmp_path) == 0
    for name in ("train", "val", "test"):
        split = shards.split(name)
        scores = read_scores(tmp_path, "x", shards, split)
        batch = load_batch(ave, name, len(split))
        expected = CLIPTeacher(prompts["visual"], CPU).scores(batch.media["frames"]).numpy()
        np.testing.assert_allclose(scores[:, 1, :, ::-1], expected, atol=1e-4)
        weak = load_events(shards, split).weak
        predicted, scored = read_events(tmp_path / "events.parquet", "pseudo_labels", split, shards.classes, weak)
        assert scored.all()
        above = scores > median[:, None, None].astype(np.float32)
        assert np.array_equal(predicted, above & weak[:, None, None])
        assert 0 < predicted.sum() < weak.sum() * 20
    assert set(json.loads((tmp_path / "quality.json").read_text())) == {"train", "val", "test"}


def test_clips_have_scores_in_their_modalities_alone(ave: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("clip", "clap", "prompts.yaml"):
        (tmp_path / name).symlink_to(ave / name)
    raw = Path(shutil.copytree(ave / "raw", tmp_path / "raw"))
    kinds = {"a2000000000": "video", "a2000000001": "audio"}
    for name, kind in kinds.items():
        path = raw / "videos" / f"{name}.mp4"
        copy_stream(path.rename(path.with_suffix(".both")), path, kind)
    make_shards("ave", raw, tmp_path / "shards", f"--videos={raw}/videos", "--short-side=32", "--modalities=any")
    assert pseudo_label(tmp_path, tmp_path / "out", "--splits", "test") == 0
    assert "could not be read" not in capsys.readouterr().err
    shards = ShardedDataset.open(tmp_path / "shards")
    split = shards.split("test")
    scores = read_scores(tmp_path / "out", "x", shards, split)
    probs = read_teacher_probs(tmp_path / "out", "x", shards, split)
    weak = load_events(shards, split).weak
    events, scored = read_events(tmp_path / "out" / "events.parquet", "pseudo_labels", split, shards.classes, weak)
    assert scored.all()
    for index, modality in enumerate(("audio", "visual")):
        has_modality = split.has_modality(modality)
        assert has_modality.sum() == 3
        np.testing.assert_array_equal(np.isfinite(scores[:, index]).all(axis=(1, 2)), has_modality)
        assert np.isnan(scores[~has_modality, index]).all() and not events[~has_modality, index].any()
        assert events[has_modality, index].any(axis=(1, 2)).all()
        np.testing.assert_allclose(probs[~has_modality, index], 1 / 3)


def score_times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "scores").iterdir() if path.suffix == ".npz"}


def test_new_thresholds_need_no_teachers_and_new_captions_need_another_directory(
    ave: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, folder = tmp_path / "labels", tmp_path / "teachers"
    folder.mkdir()
    for name in ("clip", "clap", "shards"):
        (folder / name).symlink_to(ave / name)
    prompts = folder / "prompts.yaml"
    write_prompts(prompts, folder, [*AVE_CLASSES])
    assert pseudo_label(folder, out) == 0
    times = score_times(out)
    before = pq.read_table(out / "events.parquet")
    write_prompts(prompts, folder, [*AVE_CLASSES], visual=1e9)
    (folder / "clip").unlink()  # The checkpoint is not read again.
    assert pseudo_label(folder, out) == 0
    after = pq.read_table(out / "events.parquet")
    assert set(after.column("modality").to_pylist()) - {None} == {"audio"} < set(before.column("modality").to_pylist())
    assert score_times(out) == times
    change_prompts(prompts, visual={"template": "No photo of {}."})
    capsys.readouterr()
    assert pseudo_label(folder, out) == 1
    error = capsys.readouterr().err
    assert "by other teachers or for other captions" in error and "choose another --out" in error


@pytest.mark.long
def test_missing_scores_are_computed_by_any_number_of_ranks(ave: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (distav.tools.pseudo_label.command, distav.data.annotations.teacher_scores):
        monkeypatch.setattr(module, "CHUNK", 4)
    assert pseudo_label(ave, tmp_path) == 0
    expected = pq.read_table(tmp_path / "events.parquet")
    files = sorted((tmp_path / "scores").glob("*.npz"))
    contents = {path: path.read_bytes() for path in files}
    assert len(files) == 5
    for path in files[1:4]:
        path.unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = "import sys, distav.data.annotations.teacher_scores as scores; scores.CHUNK = 4; "
    script += "from distav.tools.pseudo_label.command import main; "
    script += f"sys.exit(main({arguments(ave, tmp_path)!r}))"
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script], env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [process.wait(240) for process in ranks] == [0, 0]
    for path, content in contents.items():
        with np.load(path) as recomputed, np.load(io.BytesIO(content)) as original:
            for modality in ("audio", "visual"):
                np.testing.assert_allclose(recomputed[modality], original[modality], atol=1e-4)
    assert pq.read_table(tmp_path / "events.parquet").equals(expected)


LOUDNESS_PACKAGE = """
import torch

class LoudnessTeacher:
    modality = "audio"
    frame_size = 0

    def __init__(self, num_classes, segments):
        self.num_classes, self.segments = num_classes, segments

    @classmethod
    def from_prompts(cls, prompts, split, device):
        return cls(len(prompts.classes), round(float(split.columns["duration_s"][0])))

    def scores(self, media):
        energy = media.unflatten(1, (self.segments, -1)).square().mean(dim=2)
        return energy[..., None].expand(-1, -1, self.num_classes).float()
"""


def test_a_teacher_of_another_package_is_selected_by_name(
    ave: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "loudness_package.py").write_text(LOUDNESS_PACKAGE)
    metadata = tmp_path / "loudness_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: loudness_package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[distav.teachers]\nloudness = loudness_package:LoudnessTeacher\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(TEACHERS, "_components", dict(TEACHERS._components))
    for name in ("clip", "clap", "shards"):
        (tmp_path / name).symlink_to(ave / name)
    write_prompts(tmp_path / "prompts.yaml", tmp_path, [*AVE_CLASSES])
    change_prompts(tmp_path / "prompts.yaml", audio={"teacher": "loudness"})
    assert pseudo_label(tmp_path, tmp_path / "out", "--splits", "test") == 0
    shards = ShardedDataset.open(ave / "shards")
    scores = read_scores(tmp_path / "out", "x", shards, shards.split("test"))
    events = load_events(shards, shards.split("test")).events
    assert events is not None
    audible = events[:, 0].any(axis=2)
    assert scores[:, 0, :, 0][audible].min() > scores[:, 0, :, 0][~audible].mean()
    change_prompts(tmp_path / "prompts.yaml", visual={"teacher": "loudness"})
    assert pseudo_label(tmp_path, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "visual.teacher=loudness: scores the modality 'audio'; allowed: clip." in error
    change_prompts(tmp_path / "prompts.yaml", visual={"teacher": "clop"})
    assert pseudo_label(tmp_path, tmp_path / "out") == 1
    assert "visual.teacher=clop: allowed: clip, clap, loudness. Did you mean 'clip'?" in capsys.readouterr().err


def test_unreadable_inputs_are_reported(ave: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    content = yaml.safe_load((ave / "prompts.yaml").read_text())
    content["visual"]["checkpoint"] = str(tmp_path / "gone")
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="checkpoint=.*gone: cannot load CLIPModel"):
        CLIPTeacher(read_prompts(tmp_path / "prompts.yaml")["visual"], CPU)
    llp_prompts = str(ROOT / "configs" / "teachers" / "llp.yaml")
    assert main([str(ave / "shards"), "--prompts", llp_prompts, "--out", str(tmp_path)]) == 1
    assert "no prompts for the classes Bark, Bell, Church bell" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert pseudo_label(ave, tmp_path / "file") == 1
    assert "choose another --out" in capsys.readouterr().err
    assert pseudo_label(ave, tmp_path / "out", "--splits", "tset") == 1
    assert "--splits=tset is not a split of" in capsys.readouterr().err
    assert pseudo_label(ave, tmp_path / "out") == 0
    path = next((tmp_path / "out" / "scores").glob("test-*.npz"))
    path.write_bytes(path.read_bytes()[:100])
    assert pseudo_label(ave, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "cannot be read" in error and "Traceback" not in error
