"""The event parser and its losses against PyTorch's layers and losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distav.losses.event_parsing import binary_cross_entropy, modality_losses, segment_losses, video_losses
from distav.models.event_parser import (
    Attention,
    AttentivePooling,
    EventParser,
    HybridLayer,
    SegmentEmbedding,
    TokenSpec,
)

SEEDS = torch.arange(3)
VALOR = [TokenSpec("vggish", 128)], [TokenSpec("resnet152", 64), TokenSpec("r2plus1d", 32)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(num: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    return [rand(num, 10, 128)], [rand(num, 80, 64, seed=1), rand(num, 10, 32, seed=2)]


def published_attention(ours: Attention, width: int, heads: int) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(width, heads, batch_first=True).eval()
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.project_weight.data, ours.project_bias.data
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    return theirs


@pytest.mark.parametrize("heads", [1, 8])
def test_attention_equals_that_of_pytorch(heads: int):
    ours = Attention(32, heads, 0.1, 5).eval()
    nn.init.normal_(ours.project_bias)
    x, y = rand(3, 10, 32), rand(3, 10, 32, seed=1)
    expected = published_attention(ours, 32, heads)(x, y, y, need_weights=False)[0]
    torch.testing.assert_close(ours(x, y, SEEDS), expected)


def test_a_layer_equals_the_published_one():
    layer = HybridLayer(32, 4, 64, 0.1, 0).eval()
    x, y = rand(3, 10, 32), rand(3, 10, 32, seed=1)
    self_attention = published_attention(layer.self_attention, 32, 4)
    cross_attention = published_attention(layer.cross_attention, 32, 4)
    expected = layer.norms[0](x + cross_attention(x, y, y)[0] + self_attention(x, x, x)[0])
    expected = layer.norms[1](expected + layer.linear2(layer.linear1(expected).relu()))
    torch.testing.assert_close(layer(x, y, SEEDS), expected)


@pytest.mark.parametrize("sequential_update", [False, True])
def test_visual_segments_attend_to_the_input_or_to_updated_audio(sequential_update: bool):
    net = EventParser(*VALOR, 25, width=32, depth=2, heads=4, ffn_dim=64, sequential_update=sequential_update).eval()
    audio, visual = features()
    audio_segments, visual_segments = net.embed_audio(audio), net.embed_visual(visual)
    for layer in net.layers:
        updated = layer(audio_segments, visual_segments, SEEDS)
        visual_segments = layer(visual_segments, updated if sequential_update else audio_segments, SEEDS)
        audio_segments = updated
    expected = net.pool(torch.stack([audio_segments, visual_segments], 1))
    for ours, theirs in zip(net(audio, visual, SEEDS), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert expected.segments.shape == (3, 2, 10, 25) and expected.modality.shape == (3, 2, 25)


def test_joint_pooling_weights_have_the_sum_one_and_published_ones_do_not():
    sums = {}
    for joint in (False, True):
        pool = AttentivePooling(8, 5, joint)
        nn.init.zeros_(pool.classify.weight)
        nn.init.constant_(pool.classify.bias, -3.0)
        for seed, layer in enumerate((pool.weigh_time, pool.weigh_modality)):
            layer.weight.data = 3 * rand(5, 8, seed=seed)
        parsed = pool(rand(4, 2, 10, 8))
        sums[joint] = parsed.video / torch.sigmoid(torch.tensor(-3.0))
        torch.testing.assert_close(parsed.modality / torch.sigmoid(torch.tensor(-3.0)), torch.ones(4, 2, 5))
    torch.testing.assert_close(sums[True], torch.ones(4, 5))
    assert sums[False].min() < 0.8 and sums[False].max() > 1.2


def test_streams_are_averaged_over_the_steps_of_each_segment():
    embedding = SegmentEmbedding([TokenSpec("a", 6)], 4, 10)
    steps = rand(2, 80, 6)
    expected = embedding.project[0](steps).unflatten(1, (10, 8)).mean(2)
    torch.testing.assert_close(embedding([steps]), expected)


def test_a_token_grid_is_interpolated_in_time_and_averaged_over_its_rows():
    embedding = SegmentEmbedding([TokenSpec("clap", 6, (2, 32))], 4, 10)
    tokens = rand(2, 64, 6)
    grid = tokens.view(2, 2, 32, 6).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (2, 1024), mode="bicubic").permute(0, 2, 3, 1)
    expected = F.adaptive_avg_pool1d(embedding.project[0](grid).mean(1).transpose(1, 2), 10).transpose(1, 2)
    torch.testing.assert_close(embedding([tokens]), expected)


def test_dropout_depends_on_the_sample_alone():
    net = EventParser(*VALOR, 25, width=32, heads=4, ffn_dim=64, dropout=0.5).train()
    audio, visual = features()
    batch = net(audio, visual, SEEDS).segments
    part = net([stream[1:] for stream in audio], [stream[1:] for stream in visual], SEEDS[1:]).segments
    torch.testing.assert_close(batch[1:], part)
    assert not torch.allclose(batch, net(audio, visual, SEEDS + 9).segments)


def test_every_parameter_has_a_gradient():
    net = EventParser(*VALOR, 25, width=32, depth=2, heads=4, ffn_dim=64)
    parsed = net(*features(), SEEDS)
    weak = torch.rand(3, 25) > 0.5
    loss = video_losses(parsed.video, weak) + modality_losses(parsed.modality, weak)
    (loss + segment_losses(parsed.segments, torch.rand(3, 2, 10, 25) > 0.5)).sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in net.parameters())


def test_losses_equal_the_published_means():
    weak, probability = torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.8, 0.3], [0.6, 0.1]]])
    bce = F.binary_cross_entropy
    audio, visual = probability[0]
    torch.testing.assert_close(video_losses(probability[:, 0], weak), bce(audio, weak[0])[None])
    expected = bce(audio, weak[0]) + bce(visual, 0.9 * weak[0] + 0.05)
    torch.testing.assert_close(modality_losses(probability, weak), expected[None])
    logits, pseudo_labels = rand(2, 2, 10, 5), torch.rand(2, 2, 10, 5) > 0.7
    expected = [
        sum(F.binary_cross_entropy_with_logits(logits[n, m], pseudo_labels[n, m].float()) for m in range(2))
        for n in range(2)
    ]
    torch.testing.assert_close(segment_losses(logits, pseudo_labels), torch.stack(expected))  # type: ignore[arg-type]


def test_binary_cross_entropy_and_its_gradient_equal_those_of_pytorch_also_at_the_ends():
    values = torch.tensor([0.0, 1e-44, 1e-30, 1e-7, 0.3, 0.5, 1 - 1e-7, 1.0])
    probability = values.repeat(3, 1).requires_grad_()
    target = torch.tensor([0.0, 0.05, 1.0])[:, None].expand_as(probability)
    results = []
    for losses in (
        binary_cross_entropy(probability, target),
        F.binary_cross_entropy(probability, target, reduction="none"),
    ):
        gradient = torch.autograd.grad(losses.sum(), probability)[0]
        assert torch.isfinite(losses).all() and torch.isfinite(gradient).all()
        results.append((losses.detach(), gradient))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    assert float(results[0][0][2, 0]) == 100


@pytest.mark.parametrize("wrong", [torch.nan, -0.1, 1.1])
def test_an_invalid_probability_makes_the_loss_of_its_sample_nan(wrong: float):
    """PyTorch raises on a CPU; on a GPU it aborts, and every later operation of the process fails."""
    probability, weak = torch.full((3, 2, 4), 0.4), torch.ones(3, 4)
    probability[1, 0, 2] = wrong
    probability.requires_grad_()
    for losses in (modality_losses(probability, weak), video_losses(probability[:, 0], weak)):
        assert torch.isnan(losses).tolist() == [False, True, False]
    if wrong != wrong:
        gradient = torch.autograd.grad(modality_losses(probability, weak).sum(), probability)[0]
        assert torch.isnan(gradient).nonzero().tolist() == [[1, 0, 2]]
