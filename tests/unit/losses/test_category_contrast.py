import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.losses.category_contrast import (
    category_agreement,
    category_loss,
    detect_category_collapse,
    effective_num_categories,
    weighted_category_probs,
)

K = 10


def one_hot_logits(categories: Tensor) -> Tensor:
    return F.one_hot(categories, K) * 200.0


def test_uniform_rows_are_on_the_plateau():
    loss = category_loss(torch.zeros(64, K), torch.zeros(64, K), torch.ones(64), 1.0)
    assert loss.contrast.item() == pytest.approx(math.log(2 * K - 1), abs=1e-5)
    assert loss.imbalance.item() == pytest.approx(0, abs=1e-5)
    assert loss.row_entropy.item() == pytest.approx(math.log(K), abs=1e-5)


def test_one_category_for_all_samples_is_penalized_and_stays_finite():
    logits = one_hot_logits(torch.zeros(64, dtype=torch.long)).requires_grad_()
    loss = category_loss(logits, logits, torch.ones(64), 1.0)
    assert loss.imbalance.item() == pytest.approx(2 * math.log(K), abs=1e-3)
    (loss.contrast + loss.imbalance + loss.row_entropy).backward()
    assert torch.isfinite(logits.grad).all()


def test_balanced_categories_reach_the_minimum():
    logits = one_hot_logits(torch.arange(60) % K)
    loss = category_loss(logits, logits, torch.ones(60), 1.0)
    # A column equals its partner (cosine 1) and is orthogonal to all others: log((2K - 2) + e) - 1.
    assert loss.contrast.item() == pytest.approx(math.log(2 * K - 2 + math.e) - 1, abs=1e-5)
    assert loss.imbalance.item() == pytest.approx(0, abs=1e-4)


def test_loss_from_gram_matrices_equals_the_loss_from_columns():
    torch.manual_seed(0)
    visual, audio = torch.randn(50, K).double(), torch.randn(50, K).double()
    weights = torch.rand(50).double()
    u, z = (F.normalize(logits.softmax(1) * weights.sqrt()[:, None], dim=0) for logits in (visual, audio))
    expected = 0.0
    for own, other in ((u, z), (z, u)):
        within, across = own.T @ own / 0.5, own.T @ other / 0.5
        for k in range(K):
            total = sum(within[k, other_k].exp() for other_k in range(K) if other_k != k) + across[k].exp().sum()
            expected -= (across[k, k] - total.log()).item() / (2 * K)
    assert category_loss(visual, audio, weights, 0.5).contrast.item() == pytest.approx(expected, abs=1e-9)


def test_masked_rows_do_not_contribute():
    torch.manual_seed(1)
    visual, audio = torch.randn(20, K), torch.randn(20, K)
    weights = torch.ones(20)
    weights[15:] = 0
    masked = category_loss(visual, audio, weights, 1.0)
    shorter = category_loss(visual[:15], audio[:15], weights[:15], 1.0)
    for term in ("contrast", "imbalance", "row_entropy"):
        torch.testing.assert_close(getattr(masked, term), getattr(shorter, term))


def test_agreement_is_one_for_equal_and_zero_for_different_categories():
    same, other = one_hot_logits(torch.arange(4)), one_hot_logits(torch.arange(1, 5))
    weights = torch.tensor([1.0, 0.3, 0.5, 0.0])
    agreement = category_agreement(weighted_category_probs(same, same, weights))
    torch.testing.assert_close(agreement, weights.gt(0).float())
    assert category_agreement(weighted_category_probs(same, other, weights)).max() < 1e-6


def test_bank_rows_count_as_rows_of_the_batch():
    torch.manual_seed(2)
    visual, audio, weights = torch.randn(40, K).double(), torch.randn(40, K).double(), torch.rand(40).double() + 0.1
    large_batch = category_loss(visual, audio, weights, 0.5)
    u, z = weighted_category_probs(visual[10:], audio[10:], weights[10:]).unbind(1)
    memory = torch.stack([u.T @ u, u.T @ z, z.T @ z]), torch.tensor(30)
    visual, audio = visual[:10].requires_grad_(), audio[:10].requires_grad_()
    loss = category_loss(visual, audio, weights[:10], 0.5, memory, memory_weight=3.0)
    torch.testing.assert_close(loss.contrast, large_batch.contrast)
    torch.testing.assert_close(loss.weighted_probs, weighted_category_probs(visual, audio, weights[:10]).detach())
    arguments = weights[:10], 0.5, memory, 3.0
    assert torch.autograd.gradcheck(lambda v, a: category_loss(v, a, *arguments).contrast, (visual, audio))


@pytest.mark.parametrize(
    ("logits", "collapse", "used"),
    [
        (torch.zeros(60, K), "almost equally", K),
        (one_hot_logits(torch.zeros(60, dtype=torch.long)), "about 1.0 of 10 categories", 1),
        (one_hot_logits(torch.arange(60) % 2), "about 2.0 of 10 categories", 2),
        (one_hot_logits(torch.arange(60) % 4), None, 4),
        (one_hot_logits(torch.arange(60) % K), None, K),
    ],
    ids=["plateau", "one", "two", "four", "all"],
)
def test_collapsed_categories_are_detected(logits: Tensor, collapse: str | None, used: int):
    loss = category_loss(logits, logits, torch.ones(60), 1.0)
    contrast, imbalance = loss.contrast.item(), loss.imbalance.item()
    description = detect_category_collapse(contrast, imbalance, K)
    assert description is None if collapse is None else collapse in description
    assert effective_num_categories(imbalance, K) == pytest.approx(used, rel=0.05)
