import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.video.resnet import BasicBlock

from distav.config.errors import UserError
from distav.config.model import AudioConfig, ModelConfig, VisualConfig
from distav.config.schema import DataConfig
from distav.models.av_model import AVModel, check_towers, parameter_groups
from distav.models.encoder import IMAGENET_MEAN, IMAGENET_STD, VisualEncoder
from distav.models.heads import CategoryHead
from distav.models.layers import GlobalBatchNorm, SeededDropout, _GlobalNormalize
from distav.models.log_mel import LogMel
from distav.models.towers import VISUAL_TOWERS, VisualTower
from distav.train import main
from tests.helpers.on_gpu import OnGPU

DATA = DataConfig(num_frames=4, frame_size=32, audio_s=0.5)
RATE = 8000


def inputs(num: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (num, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return frames, torch.randn(num, 4000, generator=generator) * 0.1, torch.arange(num)


def model_config(visual: str = "small_conv", audio: str = "small_conv", **options: object) -> ModelConfig:
    return ModelConfig(VisualConfig(visual, width=8), AudioConfig(audio, width=8), hidden_dim=32, **options)  # type: ignore[arg-type]


def model(visual: str = "small_conv", audio: str = "small_conv", **options: object) -> AVModel:
    torch.manual_seed(0)
    return AVModel(model_config(visual, audio, **options), DATA, RATE, num_classes=5)


@pytest.mark.parametrize(
    ("visual", "audio"), [("small_conv", "small_conv"), ("r2plus1d_18", "avid_conv"), ("vit_tiny", "vit_tiny")]
)
def test_towers_compute_all_outputs_and_gradients(visual: str, audio: str):
    net = model(visual, audio)
    outputs = net(*inputs())
    assert outputs["logits"].shape == outputs["audio_categories"].shape == (3, 5)
    torch.testing.assert_close(outputs["visual"].norm(dim=1), torch.ones(3))
    sum(values.float().square().sum() for values in outputs.values()).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_activation_checkpointing_changes_no_gradient_and_no_statistics():
    gradients = []
    for activation_checkpointing in (False, True):
        net = model(activation_checkpointing=activation_checkpointing)
        net(*inputs())["logits"].square().sum().backward()
        present = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
        gradients.append([*present, *net.buffers()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_r2plus1d_recomputes_one_residual_block_at_a_time():
    tower = VisualTower(VisualConfig("r2plus1d_18"), DATA, activation_checkpointing=True)
    blocks = [block for block in tower.modules() if isinstance(block, BasicBlock)]
    complete: list[bool] = []

    def record(block: torch.nn.Module, _inputs: object) -> None:
        later = blocks[blocks.index(block) + 1 :]  # pyright: ignore[reportArgumentType]
        complete.append(all(parameter.grad is not None for other in later for parameter in other.parameters()))

    features = tower(inputs()[0])
    for block in blocks:
        block.register_forward_pre_hook(record)
    features.sum().backward()
    assert complete == [True] * 8


def test_r2plus1d_loads_torchvision_weights_and_computes_its_features():
    from torchvision.models.video import r2plus1d_18

    published = r2plus1d_18().eval()
    tower = VisualTower(VisualConfig("r2plus1d_18"), DATA, activation_checkpointing=False).eval()
    missing, _ = tower.net.load_state_dict(published.state_dict(), strict=False)
    assert not missing
    published.fc = torch.nn.Identity()
    clip = torch.randn(2, 3, 4, 32, 32)
    torch.testing.assert_close(tower.net(clip), published(clip), rtol=1e-4, atol=1e-4)


def test_random_numbers_of_a_sample_do_not_depend_on_its_batch():
    net = model().train()
    _, audio, seeds = inputs(6)
    seeds = seeds + 100
    tower = copy.deepcopy(net.audio)
    mel = tower.front_end(audio)
    masked, part = tower._mask(mel, seeds), tower._mask(mel[2:4], seeds[2:4])
    torch.testing.assert_close(masked[2:4], part)
    fraction = (masked != mel).float().mean((1, 2, 3))
    assert fraction.min() >= 0 and 0 < fraction.max() < 0.4
    drop = SeededDropout(0.5, 3).train()
    x = torch.ones(6, 200)
    torch.testing.assert_close(drop(x, seeds)[2:4], drop(x[2:4], seeds[2:4]))
    assert drop(x, seeds).mean().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(drop.eval()(x, seeds), x)


def test_log_mel_localizes_a_tone_and_ignores_loudness():
    front_end = LogMel(AudioConfig(num_mels=40), RATE)
    time = torch.arange(RATE) / RATE
    tone = torch.sin(2 * torch.pi * 1000 * time)[None]
    mel = front_end(tone)
    mel = mel[:, 0]
    assert mel.shape == (1, 40, front_end.num_frames(RATE))
    # HTK mel scale: 1000 Hz is 1000 mel; 4000 Hz is 2146 mel, divided into 40 bins.
    assert abs(mel.mean(2).argmax().item() - 1000 / 2146 * 41 + 1) <= 1
    torch.testing.assert_close(front_end(0.3 * tone)[:, 0, 15:22], mel[:, 15:22], rtol=0.1, atol=0.35)


def test_front_end_stays_in_float32_when_the_model_is_cast():
    net = model().to(torch.bfloat16).eval()
    outputs = net(*inputs())
    assert outputs["visual_features"].dtype == torch.bfloat16 and outputs["visual"].dtype == torch.float32
    norms = [module for module in net.modules() if isinstance(module, GlobalBatchNorm)]
    assert norms and all(norm.running_var.dtype == torch.float32 for norm in norms)
    expected = model().eval()(*inputs())
    assert F.cosine_similarity(outputs["audio"], expected["audio"]).min() > 0.98


def test_global_batch_norm_on_one_rank_is_batch_norm():
    x = torch.randn(8, 5, 4, 4, requires_grad=True)
    weight, bias = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    grad = torch.randn(8, 5, 4, 4)
    actual = _GlobalNormalize.apply(x, weight, bias, 1e-5)[0]
    expected = F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad((out * grad).sum(), [x, weight, bias]) for out in (actual, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_frames_are_normalized_in_float32_whatever_the_precision_of_the_model(on_gpu: bool):
    tower, frames = model().visual, inputs()[0]
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    expected = (frames.float() / 255 - mean) / std
    passed: list[torch.Tensor] = []
    tower.net.register_forward_pre_hook(lambda _, arguments: passed.append(arguments[0]))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        tower.to(dtype)(frames.as_subclass(OnGPU) if on_gpu else frames)
        assert passed[-1].dtype == dtype and passed[-1].is_contiguous(memory_format=torch.channels_last_3d)
        clip = passed[-1].permute(0, 2, 3, 4, 1)
        if on_gpu:
            torch.testing.assert_close(clip, expected.to(dtype), rtol=tolerance, atol=1e-6)
        else:
            assert torch.equal(clip, expected.to(dtype))
    assert not any("moment" in name for name in [*tower.state_dict(), *dict(tower.named_buffers())])


def test_parameter_groups_contain_every_parameter_once():
    net = model()
    groups = parameter_groups(net, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    for group in groups:
        assert all((parameter.dim() > 1) == (group["weight_decay"] > 0) for parameter in group["params"])
    towers = {id(parameter) for group in groups if group["lr_group"] == "towers" for parameter in group["params"]}
    assert towers == {id(parameter) for tower in (net.visual, net.audio) for parameter in tower.parameters()}


def test_a_new_head_trains_at_the_learning_rate_of_heads():
    net = model()
    net.new_head = CategoryHead(64, 32, 5)
    net.new_scale = torch.nn.Parameter(torch.ones(1))
    heads = [group for group in parameter_groups(net, 0.1) if group["lr_group"] == "heads"]
    parameters = {id(parameter) for group in heads for parameter in group["params"]}
    assert {id(parameter) for parameter in [net.new_scale, *net.new_head.parameters()]} <= parameters


def test_a_registered_tower_is_selected_by_its_name(monkeypatch: pytest.MonkeyPatch):
    class MeanColor(VisualEncoder):
        def __init__(self, config: VisualConfig, data: DataConfig):
            super().__init__(config, data)
            self.feature_dim = config.width
            self.linear = torch.nn.Linear(3, config.width)

        def forward(self, clip: torch.Tensor) -> torch.Tensor:
            return self.linear(clip.mean((2, 3, 4)))

    monkeypatch.setattr(VISUAL_TOWERS, "_components", {**VISUAL_TOWERS, "mean_color": MeanColor})
    net = model("mean_color")
    assert isinstance(net.visual.net, MeanColor) and net(*inputs())["visual_features"].shape == (3, 8)
    with pytest.raises(
        UserError, match="model.visual.name=mean_color: allowed: small_conv, r2plus1d_18, torchvision:NAME, "
    ):
        check_towers(model_config("mean_color"), parses_clips=True)


def test_impossible_towers_are_named_before_anything_is_built(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("distav.models.av_model.VisualTower", None)
    with pytest.raises(UserError, match=r"model.visual.name=small_con: allowed: small_conv, r2plus1d_18, vit_tiny"):
        model(visual="small_con")
    with pytest.raises(UserError, match=r"model.visual.name=small_con: .*Did you mean 'small_conv'"):
        model(visual="small_con")
    with pytest.raises(UserError, match="model.audio.name=vit_gigantic: allowed: small_conv, avid_conv, vit_tiny"):
        model(audio="vit_gigantic")
    with pytest.raises(UserError, match="model.audio.name=vit_tiny: allowed: small_conv, avid_conv, since"):
        AVModel(model_config(audio="vit_tiny"), DATA, RATE, 5, num_segments=4)


def test_patches_that_do_not_divide_the_clip_are_named():
    with pytest.raises(UserError, match=r"model.visual.patch=10 does not divide data.frame_size=32"):
        VisualTower(VisualConfig("vit_tiny", patch=10), DATA, activation_checkpointing=False)


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        ("contrastive", "model.visual.name=small_con", "model.visual.name=small_con: allowed: small_conv, r2plus1d_18"),
        ("parsing", "model.audio.name=vit_tiny", "model.audio.name=vit_tiny: allowed: small_conv, avid_conv, since"),
    ],
)
def test_training_checks_towers_before_the_data(
    kind: str, override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "config.yaml"
    path.write_text(f"defaults: [schema, _self_]\nphases: {{learn: {{kind: {kind}}}}}\n")
    assert main(["--config", str(path), override, f"data.root={tmp_path}/missing"]) == 1
    assert message in capsys.readouterr().err
