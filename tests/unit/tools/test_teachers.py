"""Teachers are what transformers computes; harvested labels are what their scores and the clips' own labels allow."""

import io
import json
import os
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
from distav.data.annotations.teacher_scores import read_scores
from distav.data.dataset import ShardedDataset
from distav.data.pipeline.loader import Batch, Loader
from distav.tools.pseudo_label.command import main
from distav.tools.pseudo_label.prompts import read_prompts
from distav.tools.pseudo_label.teachers import CLAPTeacher, CLIPTeacher
from tests.conftest import ROOT
from tests.helpers.events import AVE_CLASSES, ave_shards, write_ave

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


def batch_of(folder: Path, split: str, count: int) -> Batch:
    data = DataConfig(num_frames=10, frame_stride=8, frame_size=SIDE, squash=True, audio_s=10.0)
    loader = Loader(ShardedDataset.open(folder / "shards").split(split), data, None, 0, count, CPU)
    batch = loader.load(np.arange(count), 0)
    loader.close()
    return batch


@torch.no_grad()
def test_scores_are_those_of_transformers_called_by_hand(ave: Path):
    batch, prompts = batch_of(ave, "test", 3), read_prompts(ave / "prompts.yaml")
    found = CLIPTeacher(prompts["visual"], CPU).scores(batch.media["frames"])
    model = transformers.CLIPModel.from_pretrained(ave / "clip")
    tokens = transformers.AutoTokenizer.from_pretrained(ave / "clip")
    looks = transformers.CLIPImageProcessor.from_pretrained(ave / "clip")
    for clip in range(3):
        images = looks(list(batch.media["frames"][clip].numpy()), return_tensors="pt", do_resize=False)
        words = tokens(prompts["visual"].captions, return_tensors="pt", padding=True)
        words.pop("token_type_ids", None)
        torch.testing.assert_close(found[clip], model(**images, **words).logits_per_image, atol=1e-4, rtol=1e-4)

    heard = CLAPTeacher(prompts["audio"], CPU, 16000, 10).scores(batch.media["audio"])
    model = transformers.ClapModel.from_pretrained(ave / "clap")
    tokens = transformers.AutoTokenizer.from_pretrained(ave / "clap")
    hears = transformers.AutoFeatureExtractor.from_pretrained(ave / "clap")
    words = tokens(prompts["audio"].captions, return_tensors="pt", padding=True)
    words.pop("token_type_ids", None)
    for clip in range(3):
        for second in range(10):
            piece = batch.media["audio"][clip, 16000 * second : 16000 * (second + 1)].numpy()
            features = hears(piece, sampling_rate=16000, return_tensors="pt")["input_features"]
            said = model(input_features=features, is_longer=torch.zeros(1, 1, dtype=torch.bool), **words)
            torch.testing.assert_close(heard[clip, second], said.logits_per_audio[0], atol=1e-4, rtol=1e-4)
    assert found.shape == heard.shape == (3, 10, 3) and found.std() > 0 and heard.std() > 0


@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
@pytest.mark.parametrize("seconds", [0.3, 1, 2, 2.5])
def test_spectrograms_are_those_of_the_extractor(ave: Path, truncation: str, seconds: float):
    teacher = CLAPTeacher(read_prompts(ave / "prompts.yaml")["audio"], CPU, 16000, 10)
    teacher.feature_extractor = transformers.ClapFeatureExtractor(
        sampling_rate=16000, max_length_s=2, truncation=truncation
    )
    pieces = 0.1 * torch.randn(3, int(16000 * seconds), generator=torch.Generator().manual_seed(0))
    pieces[1] = 0
    pieces[2, 2000:] = 0
    np.random.seed(0)  # What is longer than the input is cut at random.
    ours = teacher._spectrograms(pieces)
    np.random.seed(0)
    theirs = teacher.feature_extractor(list(pieces.numpy()), sampling_rate=16000, return_tensors="pt")["input_features"]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_sound_of_another_rate_is_resampled(ave: Path):
    batch, prompts = batch_of(ave, "test", 1), read_prompts(ave / "prompts.yaml")
    sound = batch.media["audio"]
    fast = torch.nn.functional.interpolate(sound[:, None], scale_factor=2, mode="linear")[:, 0]
    slow = CLAPTeacher(prompts["audio"], CPU, 16000, 10).scores(sound)
    assert (CLAPTeacher(prompts["audio"], CPU, 32000, 10).scores(fast) - slow).abs().max() < 0.3 * slow.std()


def arguments(folder: Path, out: Path) -> list[str]:
    where = [str(folder / "shards"), "--prompts", str(folder / "prompts.yaml"), "--out", str(out)]
    return [*where, "--device", "cpu", "--batch-size", "4", "--threads", "1"]


def harvest(folder: Path, out: Path, *more: str) -> int:
    return main([*arguments(folder, out), *more])


def test_harvested_events_are_scores_above_thresholds_of_classes_that_the_label_has(
    ave: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert harvest(ave, tmp_path) == 0
    assert "beside what people say" in capsys.readouterr().out
    shards, prompts = ShardedDataset.open(ave / "shards"), read_prompts(ave / "prompts.yaml")
    middle = np.median(read_scores(tmp_path, "x", shards, shards.split("train")), axis=(0, 2, 3))
    (tmp_path / "shards").symlink_to(ave / "shards")
    write_prompts(tmp_path / "prompts.yaml", ave, [*AVE_CLASSES][::-1], float(middle[1]), float(middle[0]))
    assert harvest(tmp_path, tmp_path) == 0
    for name in ("train", "val", "test"):
        split = shards.split(name)
        scores = read_scores(tmp_path, "x", shards, split)
        batch = batch_of(ave, name, len(split))
        by_hand = CLIPTeacher(prompts["visual"], CPU).scores(batch.media["frames"]).numpy()
        np.testing.assert_allclose(scores[:, 1, :, ::-1], by_hand, atol=1e-4)
        weak = load_events(shards, split).weak
        told, looked_at = read_events(tmp_path / "events.parquet", "harvested", split, shards.classes, weak)
        assert looked_at.all()
        above = scores > middle[:, None, None].astype(np.float32)
        assert np.array_equal(told, above & weak[:, None, None])
        assert 0 < told.sum() < weak.sum() * 20
    assert set(json.loads((tmp_path / "quality.json").read_text())) == {"train", "val", "test"}


def test_other_thresholds_need_no_teachers_and_other_captions_another_folder(
    ave: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, mine = tmp_path / "labels", tmp_path / "mine"
    mine.mkdir()
    for name in ("clip", "clap", "shards"):
        (mine / name).symlink_to(ave / name)
    write_prompts(mine / "prompts.yaml", mine, [*AVE_CLASSES])
    assert harvest(mine, out) == 0
    scores = {path.name: path.stat().st_mtime_ns for path in (out / "scores").iterdir() if path.suffix == ".npz"}
    before = pq.read_table(out / "events.parquet")
    content = yaml.safe_load((mine / "prompts.yaml").read_text())
    for words in content["classes"].values():
        words["visual_threshold"] = 1e9
    (mine / "prompts.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    (mine / "clip").unlink()  # Nobody asks it again.
    assert harvest(mine, out) == 0
    after = pq.read_table(out / "events.parquet")
    assert set(after.column("modality").to_pylist()) - {None} == {"audio"} < set(before.column("modality").to_pylist())
    assert scores == {
        path.name: path.stat().st_mtime_ns for path in (out / "scores").iterdir() if path.suffix == ".npz"
    }
    content["visual"]["template"] = "No photo of {}."
    (mine / "prompts.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    capsys.readouterr()
    assert harvest(mine, out) == 1
    assert "for other captions" in capsys.readouterr().err


@pytest.mark.long
def test_scores_that_are_left_are_made_by_any_number_of_ranks(
    ave: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for module in (distav.tools.pseudo_label.command, distav.data.annotations.teacher_scores):
        monkeypatch.setattr(module, "CHUNK", 4)
    assert harvest(ave, tmp_path) == 0
    whole = pq.read_table(tmp_path / "events.parquet")
    files = sorted((tmp_path / "scores").glob("*.npz"))
    before = {path: path.read_bytes() for path in files}
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
    assert [each.wait(240) for each in ranks] == [0, 0]
    for path, content in before.items():
        with np.load(path) as made, np.load(io.BytesIO(content)) as first:
            for modality in ("audio", "visual"):
                np.testing.assert_allclose(made[modality], first[modality], atol=1e-4)
    assert pq.read_table(tmp_path / "events.parquet").equals(whole)


def test_what_cannot_be_read_is_told(ave: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match="checkpoint=.*gone: CLIPModel cannot be read"):
        content = yaml.safe_load((ave / "prompts.yaml").read_text())
        content["visual"]["checkpoint"] = str(tmp_path / "gone")
        (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(content))
        CLIPTeacher(read_prompts(tmp_path / "prompts.yaml")["visual"], CPU)
    assert (
        main([str(ave / "shards"), "--prompts", str(ROOT / "configs/teachers/llp.yaml"), "--out", str(tmp_path)]) == 1
    )
    assert "has no prompts for Bark, Bell, Church bell" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert harvest(ave, tmp_path / "file") == 1
    assert "choose another --out" in capsys.readouterr().err
    assert harvest(ave, tmp_path / "out", "--splits", "tset") == 1
    assert "--splits=tset is not in" in capsys.readouterr().err
    assert harvest(ave, tmp_path / "out") == 0
    path = next((tmp_path / "out" / "scores").glob("test-*.npz"))
    path.write_bytes(path.read_bytes()[:100])
    assert harvest(ave, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "cannot be read" in said and "Traceback" not in said
