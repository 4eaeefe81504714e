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


def test_over_parameterization_equals_gradient_descent_on_its_variables():
    generator = torch.Generator().manual_seed(0)
    config = SupervisedPhase(loss="sop", sop_lr_u=3.0, sop_lr_v=7.0)
    bank, ids = Bank(6, 4, 0.5, torch.device("cpu")), torch.tensor([5, 2])
    loss = CLASSIFICATION_LOSSES["sop"](config, bank, num_heads=1, num_classes=3)
    loss.START = 0.3  # Large enough for a change in a few steps.
    embeddings = F.normalize(torch.randn(2, 4, generator=generator), dim=1)
    global_batch = GlobalBatch.gather(ids, torch.tensor([True, False]), embeddings, embeddings)
    y = F.one_hot(CLASSES, 3).float()
    u, v = (torch.full((2, 3), 0.3, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [u], "lr": 3.0}, {"params": [v], "lr": 7.0}])
    for _ in range(3):
        logits = torch.randn(2, 3, generator=generator)
        p = logits.softmax(1)
        plus, minus = (u.square() * y).clamp(max=1), (v.square() * (1 - y)).clamp(max=1)
        shifted = (p + plus - minus.detach()).clamp(min=1e-4)
        expected = -(shifted / shifted.sum(1, keepdim=True)).gather(1, CLASSES[:, None]).log().squeeze(1)
        (losses,) = loss(global_batch, [logits], [y])
        torch.testing.assert_close(losses, expected.detach())
        error = F.one_hot(p.argmax(1), 3) + plus - minus - y
        optimizer.zero_grad()
        (expected.mean() + error.square().sum() / 2).backward()
        u.grad[1], v.grad[1] = 0, 0  # The second sample is masked.
        optimizer.step()
    moved = bank.fetch((loss.column,), ids)[0][:, 0]
    torch.testing.assert_close(moved, torch.stack([u, v], 1).detach() - 0.3, rtol=1e-4, atol=1e-5)


def test_over_parameterization_learns_the_true_classes_from_wrong_labels():
    generator = torch.Generator().manual_seed(0)
    num, classes = 600, 4
    true = torch.randint(0, classes, (num,), generator=generator)
    # More features than samples, so that cross-entropy fits the wrong labels.
    centers = torch.randn(classes, 800, generator=generator)
    inputs = centers[true] + 3.0 * torch.randn(num, 800, generator=generator)
    is_wrong = torch.rand(num, generator=generator) < 0.4
    given = torch.where(is_wrong, torch.randint(0, classes, (num,), generator=generator), true)
    tests = centers[true] + 3.0 * torch.randn(num, 800, generator=generator)
    accuracies = {}
    for name in ("ce", "sop"):
        torch.manual_seed(0)
        bank, ids = Bank(num, 4, 0.5, torch.device("cpu")), torch.arange(num)
        loss = CLASSIFICATION_LOSSES[name](SupervisedPhase(loss=name, sop_lr_u=100.0), bank, 1, classes)
        embeddings = F.normalize(torch.ones(num, 4), dim=1)
        batch = GlobalBatch.gather(ids, torch.ones(num, dtype=torch.bool), embeddings, embeddings)
        layer = torch.nn.Linear(800, classes)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.02)
        for _ in range(400):
            optimizer.zero_grad()
            loss(batch, [layer(inputs)], [F.one_hot(given, classes).float()])[0].mean().backward()
            optimizer.step()
        accuracies[name] = float((layer(tests).argmax(1) == true).float().mean())
    assert accuracies["sop"] > accuracies["ce"] + 0.03, accuracies
