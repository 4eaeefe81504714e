"""Networks of torchvision, timm and transformers as towers: features, weights, input and messages."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from distav.config.errors import UserError
from distav.config.model import AudioConfig, ModelConfig, VisualConfig
from distav.config.schema import DataConfig
from distav.models.av_model import check_towers
from distav.models.encoder import Encoder
from distav.models.families.transformers_audio import TransformersAudio
from distav.models.tower_inputs import describe_towers, with_tower_inputs
from distav.models.towers import AudioTower, VisualTower
from tests.helpers.hub_networks import AUDIO, SIDE, VISUAL, VISUAL_MOMENTS, save_audio, save_visual

transformers = pytest.importorskip("transformers")
RATE = 16000
CPU_TOLERANCE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def visual_tower(config: VisualConfig, data: DataConfig | None = None) -> tuple[VisualTower, DataConfig]:
    """A tower with its initial weights, in evaluation mode, and its clips."""
    model = ModelConfig(visual=config)
    check_towers(model)
    model = describe_towers(model)
    data = with_tower_inputs(data or DataConfig(), model, fps=30)
    tower = VisualTower(model.visual, data, activation_checkpointing=False)
    weights = tower.net.initial_weights(model.visual)
    if weights:
        result = tower.net.load_state_dict(weights, strict=False)
        assert not result.missing_keys
        assert all(name.endswith("num_batches_tracked") for name in result.unexpected_keys)
    return tower.eval(), data


def audio_tower(config: AudioConfig, audio_s: float = 0.0, rate: int = RATE) -> AudioTower:
    model = describe_towers(ModelConfig(audio=config))
    data = with_tower_inputs(DataConfig(audio_s=audio_s), model, fps=30)
    tower = AudioTower(model.audio, data, rate, activation_checkpointing=False)
    result = tower.net.load_state_dict(tower.net.initial_weights(model.audio), strict=False)
    assert not result.missing_keys
    return tower.eval()


def clips(data: DataConfig, number: int = 2) -> Tensor:
    size = (number, data.num_frames, data.frame_size, data.frame_size, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalized(frames: Tensor) -> Tensor:
    """Normalize frames as the preprocessors of the small networks say: [B, T, H, W, 3] uint8 -> [B, T, 3, H, W]."""
    mean, std = (torch.tensor(VISUAL_MOMENTS[name]) for name in ("image_mean", "image_std"))
    return ((frames.float() / 255 - mean) / std).permute(0, 1, 4, 2, 3)


def published_features(kind: str, net: Any, pixels: Tensor) -> Tensor:
    """Features of clips as the network's own classification head gets them, and its projection for CLIP."""
    if kind in ("clip", "siglip"):
        return net.vision_model(pixel_values=pixels.flatten(0, 1)).pooler_output.view(*pixels.shape[:2], -1).mean(1)
    if kind in ("resnet", "convnext", "dinov2"):
        return net(pixel_values=pixels.flatten(0, 1)).pooler_output.flatten(1).view(*pixels.shape[:2], -1).mean(1)
    if kind == "vit":
        return net(pixel_values=pixels.flatten(0, 1)).last_hidden_state[:, 0].view(*pixels.shape[:2], -1).mean(1)
    if kind.startswith("pe_"):
        return getattr(net, "video_model", net).video_encoder(pixels.contiguous()).pooler_output
    if kind == "vjepa2":
        return net(pixel_values_videos=pixels, skip_predictor=True).last_hidden_state.mean(1)
    tokens = net(pixel_values=pixels).last_hidden_state
    return tokens.mean(1) if kind == "videomae" else tokens[:, 0]


def assert_files_have_the_published_weights(net: Encoder, config: VisualConfig | AudioConfig, folder: Path) -> None:
    """Compare the weights that the network's name selects with those of its file, whose names may be others."""
    published = net.initial_weights(config)
    for source in (folder, folder / "model.safetensors"):
        stored = net.initial_weights(replace(config, weights=str(source)))
        assert published and published.keys() <= stored.keys()
        for name, values in published.items():
            assert torch.equal(values, stored[name]), name


@pytest.mark.parametrize("kind", list(VISUAL))
@torch.inference_mode()
def test_visual_networks_of_transformers_have_their_weights_and_preprocessing(kind: str, tmp_path: Path):
    net = save_visual(kind, tmp_path)
    tower, data = visual_tower(VisualConfig(f"hf:{tmp_path}"))
    assert data.frame_size == SIDE
    frames = clips(data)
    features = tower(frames)
    assert features.shape == (2, tower.feature_dim)
    torch.testing.assert_close(features, published_features(kind, net, normalized(frames)), **CPU_TOLERANCE)
    assert_files_have_the_published_weights(tower.net, VisualConfig(f"hf:{tmp_path}"), tmp_path)


@pytest.mark.parametrize("kind", list(AUDIO))
@torch.inference_mode()
def test_audio_networks_of_transformers_have_their_weights_and_front_end(kind: str, tmp_path: Path):
    net, extractor = save_audio(kind, tmp_path)
    tower = audio_tower(AudioConfig(f"hf:{tmp_path}"), audio_s=1.0)
    audio = 0.1 * torch.randn(2, RATE, generator=torch.Generator().manual_seed(1))
    inputs = extractor(list(audio.numpy()), sampling_rate=RATE, return_tensors="pt")
    if kind.startswith("clap"):
        is_longer = torch.zeros(2, 1, dtype=torch.bool)  # The extractor marks a random clip of each batch.
        own = net.audio_model(inputs["input_features"], is_longer=is_longer).pooler_output
    elif kind.startswith("pe_"):
        encoder = getattr(net, "audio_model", net).audio_encoder
        own = encoder(inputs["input_values"]).pooler_output
    elif kind == "ast":
        own = net(inputs["input_values"]).pooler_output
    elif kind == "whisper":
        own = net.encoder(inputs["input_features"]).last_hidden_state.mean(1)
    else:
        own = net(inputs["input_values"]).last_hidden_state.mean(1)
    features = tower(audio)
    assert features.shape == (2, tower.feature_dim)
    # The front end computes spectrograms in another order of operations than the extractor.
    torch.testing.assert_close(features, own.flatten(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(tower.net(inputs[tower.net.argument]), own.flatten(1), **CPU_TOLERANCE)
    assert_files_have_the_published_weights(tower.net, AudioConfig(f"hf:{tmp_path}"), tmp_path)


@torch.inference_mode()
def test_audio_is_resampled_inside_the_tower(tmp_path: Path):
    save_audio("ast", tmp_path)
    own, other = audio_tower(AudioConfig(f"hf:{tmp_path}"), 1.0), audio_tower(AudioConfig(f"hf:{tmp_path}"), 1.0, 44100)
    audio = 0.1 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(1))
    # Resampling removes the highest frequencies.
    similarity = torch.cosine_similarity(other(torchaudio.functional.resample(audio, RATE, 44100)), own(audio))
    assert similarity > 0.98
    assert torch.cosine_similarity(other(torch.zeros(1, 44100)), own(audio)) < similarity - 0.02


LARGE = [pytest.param(name, marks=pytest.mark.long) for name in ("vit_b_16", "convnext_tiny", "swin3d_t", "mvit_v2_s")]


@pytest.mark.parametrize("name", ["resnet18", "r3d_18", *LARGE])
@torch.inference_mode()
def test_networks_of_torchvision_give_what_their_classifier_gets(name: str):
    is_video = name in torchvision.models.list_models(module=torchvision.models.video)
    torch.manual_seed(0)
    tower, data = visual_tower(
        VisualConfig(f"torchvision:{name}", weights="none"), DataConfig(num_frames=16 * is_video)
    )
    published = torchvision.models.get_model(name, weights=None).eval()
    state = tower.net.state_dict()
    published.load_state_dict({k.removeprefix("network."): v for k, v in state.items()}, strict=False)
    heads: list[Tensor] = []
    last = [module for module in published.modules() if isinstance(module, torch.nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    frames = clips(data, 1)
    weights: Any = torchvision.models.get_model_weights(name).DEFAULT  # pyright: ignore[reportAttributeAccessIssue]
    mean, std = (torch.tensor(values) for values in (weights.transforms().mean, weights.transforms().std))
    pixels = ((frames.float() / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    published(pixels if is_video else pixels.transpose(1, 2).flatten(0, 1))
    torch.testing.assert_close(tower(frames), heads[0].mean(0, keepdim=True), **CPU_TOLERANCE)


@torch.inference_mode()
def test_networks_of_timm_have_the_moments_and_features_of_timm(tmp_path: Path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("efficientnet_lite0", num_classes=0).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    config = VisualConfig("timm:efficientnet_lite0", weights=str(tmp_path / "weights.safetensors"))
    tower, data = visual_tower(config, DataConfig(num_frames=2, frame_size=64))
    cfg = timm.get_pretrained_cfg("efficientnet_lite0")
    frames = clips(data)
    pixels = ((frames.float() / 255 - torch.tensor(cfg.mean)) / torch.tensor(cfg.std)).permute(0, 1, 4, 2, 3)
    own = net(pixels.flatten(0, 1)).view(2, 2, -1).mean(1)
    torch.testing.assert_close(tower(frames), own, **CPU_TOLERANCE)


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit", "dinov2", "videomae"])
@torch.inference_mode()
def test_position_embeddings_are_interpolated_to_another_size(kind: str, tmp_path: Path):
    save_visual(kind, tmp_path)
    tower, data = visual_tower(
        VisualConfig(f"hf:{tmp_path}", interpolate_positions=True), DataConfig(frame_size=48, num_frames=2)
    )
    assert tower(clips(data)).shape == (2, tower.feature_dim)
    same, native = visual_tower(VisualConfig(f"hf:{tmp_path}", interpolate_positions=True))
    plain, _ = visual_tower(VisualConfig(f"hf:{tmp_path}"))
    torch.testing.assert_close(same(clips(native)), plain(clips(native)))


@torch.inference_mode()
def test_ast_is_built_for_the_length_of_the_clips(tmp_path: Path):
    save_audio("ast", tmp_path)
    short = audio_tower(AudioConfig(f"hf:{tmp_path}", interpolate_positions=True), audio_s=0.5)
    padded = audio_tower(AudioConfig(f"hf:{tmp_path}"), audio_s=0.5)
    positions = [tower.net.get_parameter("network.embeddings.position_embeddings") for tower in (short, padded)]
    assert positions[0].shape[1] < positions[1].shape[1]
    torch.testing.assert_close(positions[0][:, :2], positions[1][:, :2])
    assert short(torch.randn(2, RATE // 2)).shape == (2, 32)


def test_an_export_needs_no_source(tmp_path: Path):
    save_visual("clip", tmp_path / "clip")
    model = describe_towers(ModelConfig(visual=VisualConfig(f"hf:{tmp_path / 'clip'}")))
    (tmp_path / "clip").rename(tmp_path / "moved")
    data = with_tower_inputs(DataConfig(), model, 30)
    tower = VisualTower(copy.deepcopy(model.visual), data, activation_checkpointing=False)
    assert tower(clips(data)).shape == (2, 32)


@pytest.mark.parametrize(
    ("config", "data", "expected"),
    [
        (VisualConfig("torchvision:resnet19@X"), {}, "Did you mean"),
        (VisualConfig("torchvision:resnet18@IMAGENET1K_V9"), {}, "IMAGENET1K_V1"),
        (VisualConfig("torchvision:resnet18"), {}, "selects no weights"),
        (VisualConfig("timm:resnet18"), {}, "a1_in1k"),
        (VisualConfig("timm:resnet18.a1_in2k"), {}, "a1_in1k"),
        (VisualConfig("timm:resnett18"), {}, "Did you mean"),
        (VisualConfig("hf:nobody/nothing"), {}, "hf download nobody/nothing"),
        (VisualConfig("tv:resnet18"), {}, "torchvision:NAME"),
        (VisualConfig("torchvision:vit_b_16", weights="none"), {"frame_size": 160}, "224 pixels; remove data.frame"),
        (VisualConfig("torchvision:mvit_v2_s", weights="none"), {"num_frames": 8}, "takes 16"),
        (VisualConfig("torchvision:s3d", weights="none"), {"num_frames": 4}, "14 or more"),
        (VisualConfig("timm:vit_tiny_patch16_224", weights="none"), {"frame_size": 160}, "interpolate_positions=true"),
    ],
)  # fmt: skip
def test_messages_name_setting_value_and_what_is_allowed(config: VisualConfig, data: dict[str, int], expected: str):
    with pytest.raises(UserError) as error:
        visual_tower(config, DataConfig(**data))
    assert expected in str(error.value) and config.name in str(error.value)


def test_clips_that_contradict_a_network_of_transformers_are_rejected(tmp_path: Path):
    save_visual("videomae", tmp_path / "visual")
    name = f"hf:{tmp_path / 'visual'}"
    for data, expected in (({"frame_size": 48}, "data.frame_size=48"), ({"num_frames": 8}, "data.num_frames=8")):
        with pytest.raises(UserError, match=expected):
            visual_tower(VisualConfig(name), DataConfig(**data))
    save_audio("whisper", tmp_path / "audio")
    with pytest.raises(UserError, match=r"data\.audio_s=3.*at most 2 s"):
        audio_tower(AudioConfig(f"hf:{tmp_path / 'audio'}"), audio_s=3.0)


def test_networks_of_another_modality_are_rejected(tmp_path: Path):
    save_visual("clip", tmp_path / "clip")
    bert = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(**bert, vocab_size=64)).save_pretrained(tmp_path / "bert")
    for name in ("clip", "bert"):
        with pytest.raises(UserError, match=r"model\.audio\.name=.*takes "):
            audio_tower(AudioConfig(f"hf:{tmp_path / name}"), audio_s=0.5)
    with pytest.raises(UserError, match=r"model\.visual\.name=.*takes input_ids"):
        visual_tower(VisualConfig(f"hf:{tmp_path / 'bert'}"), DataConfig(frame_size=32))


def test_networks_without_a_preprocessor_get_the_input_that_their_settings_name(tmp_path: Path):
    save_audio("ast", tmp_path)
    config = AudioConfig(f"hf:{tmp_path}")
    stored = TransformersAudio.describe(config)
    for file in tmp_path.glob("*preprocessor*"):
        file.unlink()
    derived = TransformersAudio.describe(config)
    for name in ("max_length", "num_mel_bins"):
        assert derived["preprocessor"][name] == stored["preprocessor"][name] == stored["network"][name]
    assert audio_tower(config, audio_s=1.0)(torch.zeros(2, RATE)).shape == (2, 32)


def test_image_networks_of_one_size_refuse_frames_of_another_one(tmp_path: Path):
    save_visual("vit", tmp_path)
    tower, data = visual_tower(VisualConfig(f"hf:{tmp_path}"))
    assert tower(clips(data)[:, :1]).shape == (2, tower.feature_dim)
    with pytest.raises(ValueError, match=rf"allowed: .* with TxHxW = Tx{SIDE}x{SIDE}"):
        tower(clips(data)[:, :, :-2, :-2])


def test_directories_without_a_network_of_timm_are_reported(tmp_path: Path):
    save_visual("vit", tmp_path / "vit")
    (tmp_path / "empty").mkdir()
    for name, reason in (
        ("none", "no such directory"),
        ("empty", "it has no config.json"),
        ("vit", f"names no architecture of timm; a network of transformers is hf:{tmp_path / 'vit'}"),
    ):
        with pytest.raises(UserError, match=rf"model\.visual\.name=timm:local-dir:.*{name}: .*{reason}"):
            visual_tower(VisualConfig(f"timm:local-dir:{tmp_path / name}"))
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.visual\.name=timm:local-dir:.*empty: not available here"):
        visual_tower(VisualConfig(f"timm:local-dir:{tmp_path / 'empty'}"))


def test_settings_without_effect_are_rejected(tmp_path: Path):
    save_visual("vit", tmp_path)
    with pytest.raises(UserError, match=r"model\.visual\.unfreeze_after=3 has no effect with model\.visual\.freeze=0"):
        visual_tower(VisualConfig(f"hf:{tmp_path}", unfreeze_after=3))


def test_directories_and_files_that_hold_no_weights_are_reported(tmp_path: Path):
    save_visual("vit", tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").write_bytes(b"hello")
    with pytest.raises(UserError, match="Allowed: a directory with config.json and model.safetensors"):
        visual_tower(VisualConfig(f"hf:{tmp_path / 'vit'}"))
    with pytest.raises(UserError, match="There is no such directory"):
        visual_tower(VisualConfig(f"hf:{tmp_path / 'none'}"))
    for content in (b"hello", 100 * b"garbage"):
        (tmp_path / "junk.pt").write_bytes(content)
        config = VisualConfig("torchvision:resnet18", weights=str(tmp_path / "junk.pt"))
        with pytest.raises(UserError, match=r"model\.visual\.weights=.*junk\.pt: unreadable.*download it again"):
            visual_tower(config, DataConfig(frame_size=32))


def test_more_frozen_blocks_than_there_are_and_adapters_without_blocks_are_rejected(tmp_path: Path):
    pytest.importorskip("peft")
    save_visual("clip", tmp_path)
    with pytest.raises(UserError, match=r"model\.visual\.freeze=50: .* blocks; allowed: -1 \(all\) to"):
        visual_tower(VisualConfig(f"hf:{tmp_path}", freeze=50))
    with pytest.raises(UserError, match=r"lora_rank=2 contradicts model\.visual\.freeze=-1"):
        visual_tower(VisualConfig(f"hf:{tmp_path}", freeze=-1, lora_rank=2))


def test_weights_that_cannot_be_downloaded_say_where_to_put_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(UserError) as error:
        visual_tower(VisualConfig("torchvision:r2plus1d_18@KINETICS400_V1"))
    assert str(tmp_path / "checkpoints" / "r2plus1d_18-91a641e6.pth") in str(error.value)


def test_running_statistics_are_used_and_kept_where_the_settings_say_so():
    torch.manual_seed(0)
    model = ModelConfig(visual=VisualConfig("torchvision:resnet18", weights="none", batch_norm="running"))
    data = with_tower_inputs(DataConfig(num_frames=1, frame_size=64), model, fps=30)
    tower = VisualTower(model.visual, data, activation_checkpointing=False)
    for name, values in tower.net.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            values.uniform_(0.5, 1.5)
    before, frames = copy.deepcopy(dict(tower.net.named_buffers())), clips(data)
    trained, evaluated = tower.train()(frames), tower.eval()(frames)
    torch.testing.assert_close(trained, evaluated)
    assert all(torch.equal(values, before[name]) for name, values in tower.net.named_buffers())
    other = VisualTower(VisualConfig("torchvision:resnet18", weights="none"), data, activation_checkpointing=False)
    other.load_state_dict(tower.state_dict())
    assert not torch.allclose(other.train()(frames), evaluated, rtol=0.1)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("kind", ["small_conv", "vit_tiny", "clip", "ast"])
def test_networks_compile_without_a_graph_break(kind: str, recomputes: bool, tmp_path: Path):
    torch._dynamo.reset()
    if kind == "ast":
        save_audio(kind, tmp_path)
        model = describe_towers(ModelConfig(audio=AudioConfig(f"hf:{tmp_path}")))
        tower: Any = AudioTower(model.audio, DataConfig(audio_s=0.5), RATE, recomputes)
        x = tower.front_end(torch.randn(2, RATE // 2))
    else:
        if kind == "clip":
            save_visual(kind, tmp_path)
        name = f"hf:{tmp_path}" if kind == "clip" else kind
        model = describe_towers(ModelConfig(visual=VisualConfig(name, drop_path=0.5)))
        data = with_tower_inputs(DataConfig(num_frames=2, frame_size=32), model, fps=30)
        tower = VisualTower(model.visual, data, recomputes)
        x = torch.randn(2, 3, 2, 32, 32)
    tower.train()._set_seeds(torch.arange(2))
    before = copy.deepcopy(tower.net.state_dict())
    expected = tower.net(x)
    expected.sum().backward()
    gradients = [parameter.grad for parameter in tower.net.parameters()]
    tower.zero_grad()
    tower.net.load_state_dict(before)
    actual = torch.compile(tower.net, fullgraph=True, backend="aot_eager")(x)
    actual.sum().backward()
    torch.testing.assert_close(actual, expected)
    for parameter, gradient in zip(tower.net.parameters(), gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)
