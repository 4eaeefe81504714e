"""Uses of an exported network: loading without the other dependencies, embedding, evaluation, further training."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from distav.config.errors import UserError
from distav.config.loading import load
from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset
from distav.data.pipeline.loader import Batch
from distav.distributed.process_group import process_group
from distav.evaluate import main as evaluate
from distav.evaluation.embedding import Embedder, Embeddings
from distav.evaluation.frozen_tasks import classifier_metrics
from distav.models.pretrained import load_encoders, load_parser, load_weights
from distav.tools.embed import main as embed
from distav.training.run_setup import open_run
from tests.conftest import make_shards
from tests.helpers.launch import tiny_config, train
from tests.helpers.media import write_audio, write_media, write_silent
from tests.helpers.model_cards import front_matter, run_usage
from tests.helpers.rank_group import context, run_to_completion

CPU = torch.device("cpu")
BARE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        third_party = {"nvidia", "deepspeed", "hydra", "omegaconf", "webdataset", "pyarrow", "av", "soundfile", "scipy",
                       "tqdm", "rich", "tensorboard", "isal", "transformers", "fsspec", "pandas", "sklearn",
                       "torchaudio", "huggingface_hub"}
        if top in third_party:
            raise ImportError(f"{name} is not installed")

import torch, torchvision
for name in [module for module in sys.modules if module.split(".")[0] == "fsspec"]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocked())
import distav
from safetensors.torch import load_file, save_file

model, description = distav.load_encoders(sys.argv[1])
inputs = load_file(sys.argv[2])
with torch.no_grad():
    save_file({"visual": model.visual(inputs["frames"]), "audio": model.audio(inputs["audio"])}, sys.argv[3])
"""


def _run_training_graph(run: str, inputs: str, outputs: str) -> None:
    """Write the features that the engine of a finished run computes."""
    config = load(Path(run) / "config.yaml", [f"run.root={Path(run).parent}"])
    with process_group("cpu", 60, 1) as world, open_run(config, world) as resumed:
        media = safetensors.torch.load_file(inputs)
        ids = torch.arange(len(media["frames"]))
        resumed.engine.train(False)
        with torch.no_grad():
            features = resumed.engine(Batch(ids, ids >= 0, {}, ids, media))
        safetensors.torch.save_file(
            {"visual": features["visual_features"].float(), "audio": features["audio_features"].float()}, outputs
        )


def test_towers_without_other_dependencies_equal_the_training_graph(finished: tuple[Path, str], tmp_path: Path):
    run = tmp_path / "tiny"
    shutil.copytree(finished[0], run)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "frames": torch.randint(0, 256, (6, 2, 16, 16, 3), dtype=torch.uint8, generator=generator),
        "audio": torch.rand(6, 4000, generator=generator) * 2 - 1,
    }
    safetensors.torch.save_file(inputs, tmp_path / "inputs.safetensors")
    script = tmp_path / "bare.py"
    script.write_text(BARE)
    arguments = [str(run / "export"), str(tmp_path / "inputs.safetensors"), str(tmp_path / "bare.safetensors")]
    result = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    graph = tmp_path / "graph.safetensors"
    rank = context.Process(target=_run_training_graph, args=(str(run), arguments[1], str(graph)))
    rank.start()
    rank.join(60)
    assert rank.exitcode == 0
    bare, trained = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("bare", "graph"))
    for tower in ("visual", "audio"):
        assert bare[tower].std() > 0
        torch.testing.assert_close(bare[tower], trained[tower], atol=1e-5, rtol=1e-5)


def test_the_model_card_names_data_noise_and_metrics(finished: tuple[Path, str], tiny_shards: Path):
    card = (finished[0] / "export" / "README.md").read_text()
    report = json.loads((finished[0] / "report.json").read_text())
    assert f"`{tiny_shards.name}`, 96 training clips" in card and "The test split `test` has 24 clips" in card
    no_signal = "k-NN votes carry no label signal"  # The card says what the summary of the run says.
    assert (f"not estimated, since {no_signal}" in card) == (f"not estimated: {no_signal}" in finished[1])
    assert ("pair mismatch rate" in card) != (no_signal in card)
    assert str(report["test"]["top1"]) in card
    assert front_matter(card)["library_name"] == "distav"
    values = run_usage(card, str(finished[0] / "export"))
    assert values["visual"].shape == values["audio"].shape == (1, 16)


def test_embeddings_of_a_dataset_are_the_same_bytes_for_any_number_of_ranks(
    finished: tuple[Path, str], tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    export, out = finished[0] / "export", tmp_path / "out"
    shutil.copytree(tiny_shards, tmp_path / "dataset")
    shards = ShardedDataset.open(tmp_path / "dataset")
    split = shards.split("train")
    with open(split.shards[0], "r+b") as shard:
        shard.seek(int(split.columns["video_offset"][7]) + 5)
        shard.write(b"\xff\x00\xff")
    arguments = [str(export), str(tmp_path / "dataset"), "--device", "cpu", "--batch-size", "8"]
    run_to_completion(2, [*arguments, "--out", str(out)], tmp_path / "log", module="distav.tools.embed")
    assert embed([*arguments, "--out", str(tmp_path / "alone"), "--threads", "1"]) == 0
    for path in sorted(out.iterdir()):
        assert path.read_bytes() == (tmp_path / "alone" / path.name).read_bytes(), path.name
    table = pq.read_table(out)
    assert len(table) == 120 and set(table.column("split").to_pylist()) == {"train", "test"}
    rows = table.filter([name == "train" for name in table.column("split").to_pylist()])
    assert rows.column("key").to_pylist() == split.keys.tolist()
    assert [row for row, value in enumerate(rows.column("visual").to_pylist()) if value is None] == [7]
    direct = Embedder.open(export, CPU, 8).embed_clips(split)
    read = Embeddings.from_table(rows)
    assert np.array_equal(read.valid, direct.valid) and not direct.valid[7]
    for name in ("visual", "audio", "visual_embedding", "audio_embedding"):
        np.testing.assert_allclose(getattr(read, name), getattr(direct, name), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(direct.visual_embedding[direct.valid], axis=1), 1, atol=1e-5)
    # Existing files are kept; embeddings of another batch size are rejected.
    (out / "test-000000.parquet").unlink()
    kept = (out / "train-000000.parquet").stat().st_mtime_ns
    assert embed([*arguments, "--out", str(out), "--threads", "1"]) == 0
    assert (out / "test-000000.parquet").read_bytes() == (tmp_path / "alone" / "test-000000.parquet").read_bytes()
    assert (out / "train-000000.parquet").stat().st_mtime_ns == kept
    assert embed([*arguments[:-1], "4", "--out", str(out)]) == 1


def test_files_and_arrays_are_embedded_like_shards(
    finished: tuple[Path, str], tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import av

    export = finished[0] / "export"
    media = tmp_path / "media" / "nested"
    media.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with av.open(str(media / "one.mp4"), "w") as container:
        video, audio = container.add_stream("libx264", rate=24), container.add_stream("aac", rate=22050)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"  # pyright: ignore[reportAttributeAccessIssue]
        for _ in range(60):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8), format="rgb24")
            container.mux(video.encode(frame))  # pyright: ignore[reportAttributeAccessIssue]
        audio_frame = av.AudioFrame.from_ndarray(
            rng.normal(0, 0.1, (1, 2 * 22050 + 11025)).astype(np.float32), format="fltp", layout="mono"
        )
        audio_frame.sample_rate = 22050
        container.mux(audio.encode(audio_frame))  # pyright: ignore[reportAttributeAccessIssue]
        for stream in (video, audio):
            container.mux(stream.encode())  # pyright: ignore[reportAttributeAccessIssue]
    (media / "note.txt").write_text("no video")
    assert embed([str(export), str(tmp_path / "media"), "--out", str(tmp_path / "files"), "--device", "cpu"]) == 0
    table = pq.read_table(tmp_path / "files")
    assert table.column("source").to_pylist() == ["nested/one.mp4"] * 2
    assert table.column("start_s").to_pylist() == [0.0, 1.0] and not table.column("visual").null_count
    assert "note.txt" in (tmp_path / "files" / "_rejected.csv").read_text()
    assert not (tmp_path / "files" / ".work").exists()

    frames = rng.integers(0, 255, (5, 2, 16, 16, 3), dtype=np.uint8)
    audio = rng.normal(0, 0.1, (5, 4000)).astype(np.float32)
    np.savez(tmp_path / "clips.npz", frames=frames, audio=audio)
    assert embed([str(export), str(tmp_path / "clips.npz"), "--out", str(tmp_path / "arrays"), "--device", "cpu"]) == 0
    table = pq.read_table(tmp_path / "arrays")
    model = Embedder.open(export, CPU).model
    with torch.no_grad():
        expected = model.visual(torch.from_numpy(frames)).numpy()
    np.testing.assert_allclose(np.array(table.column("visual").to_pylist()), expected, atol=1e-5)

    np.savez(tmp_path / "wrong.npz", frames=frames[:, :1], audio=audio)
    np.savez(tmp_path / "uneven.npz", frames=frames, audio=audio[:4])
    np.savez(tmp_path / "types.npz", frames=frames, audio=(32767 * audio).astype(np.int16))
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("wrong.npz", "the network takes [n, 2, 16, 16, 3]"),
        ("uneven.npz", "`audio` (4, 4000)"),
        ("types.npz", "frames are uint8 and audio is int16; the network takes uint8 from 0 to 255 and float32"),
        ("none.npz", "has to contain the arrays `frames` and `audio`"),
        ("nowhere", "nowhere: no such file or directory"),
        ("empty", "contains neither the manifest.json of a dataset nor media files"),
    ):
        assert embed([str(export), str(tmp_path / name), "--out", str(tmp_path / f"{name}.out")]) == 1
        assert message in capsys.readouterr().err


def test_files_with_one_modality_have_embeddings_of_it_alone(finished: tuple[Path, str], tmp_path: Path):
    folder, out = tmp_path / "media", tmp_path / "out"
    folder.mkdir()
    write_media(folder / "both.mkv", 2.0)
    write_silent(folder / "silent.mp4", 2.0)
    write_audio(folder / "tone.wav", 2.0)
    write_audio(folder / "cover.mp3", 2.0, cover=True)
    assert embed([str(finished[0] / "export"), str(folder), "--out", str(out), "--device", "cpu", "--workers=1"]) == 0
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == 8 and not (out / "_rejected.csv").exists()
    for row in rows:
        for name in ("visual", "visual_embedding"):
            assert (row[name] is None) == (row["source"] in ("tone.wav", "cover.mp3"))
        for name in ("audio", "audio_embedding"):
            assert (row[name] is None) == (row["source"] == "silent.mp4")


def test_metrics_are_the_same_for_any_number_of_ranks(
    finished: tuple[Path, str], tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = [str(finished[0] / "export"), str(tiny_shards), "--device", "cpu"]
    assert evaluate([*arguments, "--json", str(tmp_path / "one.json"), "--threads", "1"]) == 0
    run_to_completion(2, [*arguments, "--json", str(tmp_path / "two.json")], tmp_path / "log", module="distav.evaluate")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["metrics"] for name in ("one", "two"))
    assert one.keys() == {"knn", "linear_probe", "retrieval"}
    assert one["knn"].keys() == {
        f"{score}_{name}"
        for score in ("top1", "top5", "balanced", "f1_macro", "map")
        for name in ("visual", "audio", "both")
    }
    for name, values in one.items():
        assert two[name] == pytest.approx(values, abs=1e-6)
    assert all(0 <= value <= 1 for name in ("knn", "linear_probe") for value in one[name].values())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:3] == ["task", "modality", "top1,"]
    assert f"{100 * one['knn']['top1_both']:.1f}" == next(row for row in rows if row[:2] == ["knn", "both"])[2]
    assert evaluate([*arguments, "--train-split", "trian"]) == 1
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_training_starts_from_exported_weights(finished: tuple[Path, str], tiny_shards: Path, tmp_path: Path):
    export = finished[0] / "export"
    text = """defaults: [schema, _self_]
run: {name: on, device: cpu, log_every: 1}
data: {num_frames: 2, frame_stride: 2, frame_size: 16, audio_s: 0.5}
model: {embed_dim: 16, hidden_dim: 32, visual: {width: 8}, audio: {width: 8, num_mels: 32}}
optim: {global_batch: 24, lr: 1e-9}
phases: {learn: {kind: supervised, epochs: 1, targets: given}}
"""
    common = (f"data.root={tiny_shards}", f"run.root={tmp_path}", f"model.pretrained={export}")
    for stage in (0, 3):
        output = train(
            tiny_config(tmp_path, text), *common, f"deepspeed.zero_stage={stage}", f"run.name=at_{stage}", ranks=2
        )
        assert f"initialized from {export}\n" in output
        weights = safetensors.torch.load_file(tmp_path / f"at_{stage}" / "export" / "model.safetensors")
        before = safetensors.torch.load_file(export / "model.safetensors")
        weight_names = [name for name in before if name.endswith("weight")]
        for name in weight_names:
            torch.testing.assert_close(weights[name], before[name], atol=1e-5, rtol=1e-4)
    output = train(tiny_config(tmp_path, text), *common, "model.embed_dim=8", "run.name=other")
    assert "except project_audio, project_visual" in output
    output = train(tiny_config(tmp_path, text), *common[:2], "model.pretrained=nowhere", "run.name=third", status=1)
    assert "nowhere holds no export" in output


def test_fine_tuning_writes_its_own_run(finished: tuple[Path, str], tiny_shards: Path, tmp_path: Path):
    out = tmp_path / "runs" / "tuned"
    arguments = [str(finished[0] / "export"), str(tiny_shards), "--tasks", "fine_tune", "--out", str(out)]
    options = ["--epochs", "2", "--global-batch", "24", "--device", "cpu", "--json", str(tmp_path / "tuned.json")]
    options += ["--warmup-epochs", "1"]
    run_to_completion(1, [*arguments, *options], tmp_path / "log", module="distav.evaluate")
    metrics = json.loads((tmp_path / "tuned.json").read_text())["metrics"]["fine_tune"]
    report = json.loads((out / "report.json").read_text())
    assert metrics["top1_visual"] == pytest.approx(report["test"]["top1_visual"])
    assert metrics["balanced_both"] == pytest.approx(report["test"]["balanced_accuracy"])
    assert [phase["steps"] for phase in report["phases"]] == [4, 8]
    assert (out / "export" / "model.safetensors").is_file()


def test_views_of_a_clip_are_averaged(finished: tuple[Path, str], tiny_shards: Path):
    embedder, split = Embedder.open(finished[0] / "export", CPU), ShardedDataset.open(tiny_shards).split("test")
    views = embedder.embed_views(split, 3)
    torch.testing.assert_close(torch.from_numpy(views[1].visual), torch.from_numpy(embedder.embed_clips(split).visual))
    assert not np.allclose(views[0].visual, views[2].visual) and not np.allclose(views[0].audio, views[2].audio)
    labels = load_labels(ShardedDataset.open(tiny_shards), split)
    metrics = classifier_metrics(embedder, split, labels.true, 3)
    probs = np.mean([torch.from_numpy(view.visual_logits).softmax(1).numpy() for view in views], axis=0)
    assert metrics["top1_visual"] == pytest.approx((probs.argmax(1) == labels.true).mean())


def test_folds_are_averaged_and_the_record_repeats_the_evaluation(
    finished: tuple[Path, str], tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    export, other = finished[0] / "export", tmp_path / "other"
    make_shards("synthetic", other, "--train-clips", 48, "--test-clips", 16, "--seed", 5, "--short-side", 24)
    arguments = [str(export), str(tiny_shards), str(other), "--protocol", "esc50", "--views", "2", "--device", "cpu"]
    assert evaluate([*arguments, "--threads", "1", "--json", str(tmp_path / "folds.json")]) == 0
    results = json.loads((tmp_path / "folds.json").read_text())
    assert results["metrics"].keys() == {"svm", "linear_probe"} and results["options"]["views"] == 2
    scores = [fold["metrics"]["svm"]["top1_audio"] for fold in results["folds"]]
    assert results["metrics"]["svm"]["top1_audio"] == pytest.approx(np.mean(scores))
    assert results["std"]["svm"]["top1_audio"] == pytest.approx(np.std(scores, ddof=1))
    assert [fold["data"] for fold in results["folds"]] == [str(tiny_shards), str(other)]
    first, second = results["folds"]
    assert second["test_clips"] == second["test_videos"] == 16 and second["test_split"] == "test"
    assert second["source"]["train_clips"] == 48 and first["test_clips"] == first["test_videos"] > 16
    digest = hashlib.sha256((export / "model.safetensors").read_bytes()).hexdigest()
    assert results["weights"]["sha256"] == digest and results["machine"]["versions"]["torch"] == version("torch")
    output = capsys.readouterr().out
    assert "Mean ± standard deviation over 2 folds:" in output
    row = next(line for line in output.splitlines() if re.match("svm +audio", line))
    assert f" {100 * np.mean(scores):.1f} ± {100 * np.std(scores, ddof=1):.1f} " in row


def test_an_export_in_an_older_format_is_rejected(finished: tuple[Path, str], tmp_path: Path):
    export = tmp_path / "export"
    shutil.copytree(finished[0] / "export", export)
    description = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**description, "format": 2}))
    for read in (load_encoders, load_parser, load_weights):
        with pytest.raises(UserError, match="config.json has export format 2; this version of distav reads format 4"):
            read(export)
