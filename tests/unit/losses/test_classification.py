import pytest
import torch
import torch.nn.functional as F

from distav.config.phases import SupervisedPhase
from distav.losses.classification import (
    CLASSIFICATION_LOSSES,
    early_learning_regularization,
    generalized_cross_entropy,
    hybrid_targets,
    soft_cross_entropy,
)
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch

CLASSES = torch.tensor([1, 0])


def test_hybrid_targets_are_weighted_by_trust():
    votes = torch.tensor([[0.9, 0.1, 0.0], [0.4, 0.3, 0.3]])
    targets = hybrid_targets(CLASSES, votes, votes.amax(1))
    torch.testing.assert_close(targets[0], 0.1 * torch.tensor([0.0, 1, 0]) + 0.9 * votes[0])
    torch.testing.assert_close(targets[1], 0.5 * torch.tensor([1.0, 0, 0]) + 0.5 * votes[1])


def test_soft_cross_entropy_of_hard_targets_equals_that_of_torch():
    logits = torch.randn(2, 3)
    expected = F.cross_entropy(logits, CLASSES, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(logits, F.one_hot(CLASSES, 3).float()), expected)


def test_generalized_cross_entropy_lies_between_cross_entropy_and_absolute_error():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3).double(), F.one_hot(CLASSES, 3).double()
    small_q = generalized_cross_entropy(logits, targets, 1e-6)
    torch.testing.assert_close(small_q, soft_cross_entropy(logits, targets), rtol=1e-5, atol=1e-5)
    absolute_error = 1 - logits.softmax(1).gather(1, CLASSES[:, None]).squeeze(1)
    torch.testing.assert_close(generalized_cross_entropy(logits, targets, 1.0), absolute_error)
    assert generalized_cross_entropy(-100.0 * targets, targets, 0.5).max() <= 1 / 0.5


@pytest.mark.parametrize("name", ["ce", "gce", "elr"])
def test_losses_by_name_equal_their_formulas(name: str):
    torch.manual_seed(1)
    config = SupervisedPhase(loss=name, gce_q=0.4, elr_weight=2.0, elr_momentum=0.9)
    bank, ids = Bank(6, 4, 0.5, torch.device("cpu")), torch.tensor([5, 2])
    loss = CLASSIFICATION_LOSSES[name](config, bank, num_heads=2, num_classes=3)
    embeddings = F.normalize(torch.randn(2, 4), dim=1)
    global_batch = GlobalBatch.gather(ids, torch.tensor([True, False]), embeddings, embeddings)
    targets = [F.one_hot(CLASSES, 3).float(), torch.full((2, 3), 1 / 3)]
    averages = torch.zeros(2, 2, 3)
    for _ in range(2):
        logits = [torch.randn(2, 3), torch.randn(2, 3)]
        losses = loss(global_batch, logits, targets)
        probs = torch.stack(logits, dim=1).softmax(2).clamp(1e-4, 1 - 1e-4)
        mixed = 0.9 * averages + 0.1 * probs / probs.sum(2, keepdim=True)
        averages[0] = mixed[0]  # The second sample is masked, so its average stays 0.
        for head in range(2):
            expected = soft_cross_entropy(logits[head], targets[head])
            if name == "gce":
                expected = generalized_cross_entropy(logits[head], targets[head], 0.4)
            if name == "elr":
                expected = expected + 2.0 * early_learning_regularization(logits[head], mixed[:, head])
            torch.testing.assert_close(losses[head], expected)
    if name == "elr":
        torch.testing.assert_close(bank.columns["predictions"][ids], averages)
        assert (bank.columns["predictions"][[0, 1, 3, 4]] == 0).all()


def test_early_learning_regularization_rewards_agreement_with_the_average():
    average = torch.tensor([[0.8, 0.1, 0.1]])
    agrees = early_learning_regularization(torch.tensor([[4.0, 0.0, 0.0]]), average)
    differs = early_learning_regularization(torch.tensor([[0.0, 4.0, 0.0]]), average)
    assert agrees < differs < 0
