import copy

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.video.resnet import BasicBlock

from distav.config.errors import UserError
from distav.config.schema import AudioConfig, DataConfig, ModelConfig, VisualConfig
from distav.models.audio_encoders import LogMel
from distav.models.av_model import AVModel, parameter_groups
from distav.models.layers import GlobalBatchNorm, SeededDropout, _GlobalNormalise
from distav.models.visual_encoders import IMAGENET_MEAN, IMAGENET_STD, build_visual
from tests.helpers.on_gpu import OnGPU

DATA = DataConfig(num_frames=4, frame_size=32, audio_s=0.5)
RATE = 8000


def inputs(num: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (num, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return frames, torch.randn(num, 4000, generator=generator) * 0.1, torch.arange(num)


def model(visual: str = "small_conv", audio: str = "small_conv", **more: object) -> AVModel:
    torch.manual_seed(0)
    settings = ModelConfig(VisualConfig(visual, width=8), AudioConfig(audio, width=8), hidden_dim=32, **more)  # type: ignore[arg-type]
    return AVModel(settings, DATA, RATE, num_classes=5)


@pytest.mark.parametrize(
    ("visual", "audio"), [("small_conv", "small_conv"), ("r2plus1d_18", "avid_conv"), ("vit_tiny", "vit_tiny")]
)
def test_towers_give_all_outputs_and_gradients(visual: str, audio: str):
    net = model(visual, audio)
    out = net(*inputs())
    assert out["logits"].shape == out["audio_categories"].shape == (3, 5)
    torch.testing.assert_close(out["visual"].norm(dim=1), torch.ones(3))
    sum(each.float().square().sum() for each in out.values()).backward()
    assert all(each.grad is not None for each in net.parameters())


def test_activation_checkpointing_changes_no_gradient_and_no_statistics():
    gradients = []
    for recompute in (False, True):
        net = model(activation_checkpointing=recompute)
        net(*inputs())["logits"].square().sum().backward()
        gradients.append([*(each.grad for each in net.parameters() if each.grad is not None), *net.buffers()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_r2plus1d_recomputes_one_residual_block_at_a_time():
    tower = build_visual(VisualConfig("r2plus1d_18"), DATA, recompute=True)
    blocks = [block for block in tower.modules() if isinstance(block, BasicBlock)]
    complete: list[bool] = []

    def note(block: torch.nn.Module, _: object) -> None:
        later = blocks[blocks.index(block) + 1 :]  # pyright: ignore[reportArgumentType]
        complete.append(all(each.grad is not None for other in later for each in other.parameters()))

    features = tower(inputs()[0])
    for block in blocks:
        block.register_forward_pre_hook(note)
    features.sum().backward()
    assert complete == [True] * 8


def test_r2plus1d_takes_torchvision_weights_and_gives_its_features():
    from torchvision.models.video import r2plus1d_18

    published = r2plus1d_18().eval()
    tower = build_visual(VisualConfig("r2plus1d_18"), DATA, recompute=False).eval()
    missing, _ = tower.net.load_state_dict(published.state_dict(), strict=False)
    assert not missing
    published.fc = torch.nn.Identity()
    clip = torch.randn(2, 3, 4, 32, 32)
    torch.testing.assert_close(tower.net(clip), published(clip), rtol=1e-4, atol=1e-4)


def test_random_numbers_of_a_sample_do_not_hang_on_its_batch():
    net = model().train()
    frames, sound, seeds = inputs(6)
    seeds = seeds + 100
    tower = copy.deepcopy(net.audio)
    mel = tower.front(sound)
    whole, part = tower._masked(mel, seeds), tower._masked(mel[2:4], seeds[2:4])
    torch.testing.assert_close(whole[2:4], part)
    blanked = (whole == 0).float().mean((1, 2))
    assert blanked.min() >= 0 and 0 < blanked.max() < 0.4
    drop = SeededDropout(0.5, 3).train()
    x = torch.ones(6, 200)
    torch.testing.assert_close(drop(x, seeds)[2:4], drop(x[2:4], seeds[2:4]))
    assert drop(x, seeds).mean().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(drop.eval()(x, seeds), x)


def test_log_mel_finds_a_tone_and_ignores_loudness():
    front = LogMel(AudioConfig(num_mels=40), RATE)
    time = torch.arange(RATE) / RATE
    tone = torch.sin(2 * torch.pi * 1000 * time)[None]
    mel = front(tone)
    assert mel.shape == (1, 40, front.num_frames(RATE))
    # HTK mel scale: 1000 Hz is 1000 mel; 4000 Hz is 2146 mel, spread over 40 bins.
    assert abs(mel.mean(2).argmax().item() - 1000 / 2146 * 41 + 1) <= 1
    torch.testing.assert_close(front(0.3 * tone)[:, 15:22], mel[:, 15:22], rtol=0.1, atol=0.35)


def test_front_end_stays_in_float32_when_the_model_is_cast():
    net = model().to(torch.bfloat16).eval()
    out = net(*inputs())
    assert out["visual_features"].dtype == torch.bfloat16 and out["visual"].dtype == torch.float32
    norms = [each for each in net.modules() if isinstance(each, GlobalBatchNorm)]
    assert norms and all(each.running_var.dtype == torch.float32 for each in norms)
    close = model().eval()(*inputs())
    assert F.cosine_similarity(out["audio"], close["audio"]).min() > 0.98


def test_global_batch_norm_alone_is_batch_norm():
    x = torch.randn(8, 5, 4, 4, requires_grad=True)
    weight, bias = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    grad = torch.randn(8, 5, 4, 4)
    ours = _GlobalNormalise.apply(x, weight, bias, 1e-5)[0]
    plain = F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(*(torch.autograd.grad((y * grad).sum(), [x, weight, bias]) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_frames_are_normalized_in_float32_whatever_the_model_is_cast_to(on_gpu: bool):
    tower, frames = model().visual, inputs()[0]
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    expected = (frames.float() / 255 - mean) / std
    fed: list[torch.Tensor] = []
    tower.net.register_forward_pre_hook(lambda _, given: fed.append(given[0]))
    for dtype, places in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        tower.to(dtype)(frames.as_subclass(OnGPU) if on_gpu else frames)
        assert fed[-1].dtype == dtype and fed[-1].is_contiguous(memory_format=torch.channels_last_3d)
        clip = fed[-1].permute(0, 2, 3, 4, 1)
        if on_gpu:
            torch.testing.assert_close(clip, expected.to(dtype), rtol=places, atol=1e-6)
        else:
            assert torch.equal(clip, expected.to(dtype))
    assert not any("moment" in name for name in [*tower.state_dict(), *dict(tower.named_buffers())])


def test_parameter_groups_hold_every_parameter_once():
    net = model()
    groups = parameter_groups(net, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    for group in groups:
        assert all((each.dim() > 1) == (group["weight_decay"] > 0) for each in group["params"])
    towers = {id(each) for group in groups if group["part"] == "towers" for each in group["params"]}
    assert towers == {id(each) for tower in (net.visual, net.audio) for each in tower.parameters()}


def test_impossible_towers_are_named():
    with pytest.raises(UserError, match=r"model.visual.name=small_con .*'small_conv'"):
        model(visual="small_con")
    with pytest.raises(UserError, match="model.audio.name=vit_gigantic"):
        model(audio="vit_gigantic")
    with pytest.raises(UserError, match=r"model.visual.patch=10 does not divide data.frame_size=32"):
        build_visual(VisualConfig("vit_tiny", patch=10), DATA, recompute=False)
