"""Losses for several labels per clip, against the formulas of their papers."""

import pytest
import torch
from torch import Tensor

from distav.config.phases import SupervisedPhase
from distav.losses.classification import CLASSIFICATION_LOSSES
from distav.losses.multi_label import asymmetric_loss, binary_cross_entropy
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return logits, torch.rand(5, 4, generator=generator, dtype=torch.float64)


def paper_loss(logits: Tensor, targets: Tensor, negative: float, positive: float, clip: float) -> Tensor:
    p = logits.sigmoid()
    shifted = (p - clip).clamp_min(0)
    present = targets * (1 - p) ** positive * p.log()
    return -(present + (1 - targets) * shifted**negative * (1 - shifted).log()).sum(1)


@pytest.mark.parametrize("settings", [(4.0, 0.0, 0.05), (2.0, 1.0, 0.2), (0.0, 0.0, 0.05), (1.0, 2.0, 0.0)])
def test_asymmetric_loss_is_that_of_the_paper(settings: tuple[float, float, float]):
    logits, targets = batch()
    torch.testing.assert_close(asymmetric_loss(logits, targets, *settings), paper_loss(logits, targets, *settings))


def test_asymmetric_loss_without_focusing_is_binary_cross_entropy():
    logits, targets = batch()
    torch.testing.assert_close(asymmetric_loss(logits, targets, 0, 0, 0), binary_cross_entropy(logits, targets))
    p = logits.sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1)
    torch.testing.assert_close(binary_cross_entropy(logits, targets), expected)


def test_absent_classes_below_the_clip_have_no_loss_and_no_gradient():
    logits = torch.tensor([[-4.0, 0.0]], requires_grad=True)
    loss = asymmetric_loss(logits, torch.zeros(1, 2), 4, 0, 0.05)
    loss.sum().backward()
    assert logits.grad is not None and logits.grad[0, 0] == 0 and logits.grad[0, 1] > 0


@pytest.mark.parametrize("gammas", [(4.0, 0.0), (0.5, 0.5), (0.0, 2.0)])
def test_extreme_logits_have_finite_losses_and_gradients(gammas: tuple[float, float]):
    logits = torch.tensor([[-200.0, 200.0, -200.0, 200.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.5]])
    for clip in (0.0, 0.05):
        loss = asymmetric_loss(logits, targets, *gammas, clip)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", ["bce", "asymmetric"])
def test_registered_losses_use_the_settings_of_the_phase(name: str):
    config = SupervisedPhase(loss=name, asymmetric_gamma_negative=2, asymmetric_gamma_positive=1, asymmetric_clip=0.1)
    bank = Bank(5, 2, 0.5, torch.device("cpu"), 0)
    loss_type = CLASSIFICATION_LOSSES.select(name, "phases.x.loss")
    logits, targets = batch()
    ids = torch.arange(5)
    global_batch = GlobalBatch.gather(ids, ids >= 0, torch.zeros(5, 2), torch.zeros(5, 2))
    (losses,) = loss_type(config, bank, 1, 4)(global_batch, [logits], [targets])
    expected = binary_cross_entropy(logits, targets) if name == "bce" else asymmetric_loss(logits, targets, 2, 1, 0.1)
    torch.testing.assert_close(losses, expected)
    assert loss_type.multi_label and not CLASSIFICATION_LOSSES.select("ce", "x").multi_label
