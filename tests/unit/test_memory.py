import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.losses.instance import SoftTargets, instance_losses, weighted_mean
from distav.memory.bank import Bank
from distav.memory.neighbors import nearest_neighbors
from distav.memory.softmax import attend

CPU = torch.device("cpu")


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def filled_bank(num: int, dim: int) -> Bank:
    bank = Bank(num, dim, 0.5, CPU)
    bank.columns["visual"], bank.columns["audio"] = unit(num, dim, seed=1), unit(num, dim, seed=2)
    bank.columns["visits"][:] = 1
    return bank


@pytest.mark.parametrize(("num_queries", "num_rows", "tile"), [(3, 50, 7), (8, 64, 64), (5, 1, 4), (2, 130, 128)])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_attend_equals_the_dense_softmax(num_queries: int, num_rows: int, tile: int, temperature: float):
    queries, keys, values = unit(num_queries, 16), unit(num_rows, 16, seed=1), unit(num_rows, 16, seed=2)
    bias = torch.linspace(-3, 3, num_rows)
    logits = queries.double() @ keys.double().T / temperature + bias.double()
    lse, out = attend(queries, keys, values, temperature, bias=bias, tile=tile)
    torch.testing.assert_close(lse, logits.logsumexp(1).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, (logits.softmax(1) @ values.double()).float(), rtol=1e-4, atol=1e-5)


def test_attend_leaves_rows_out():
    queries, keys = unit(4, 8), unit(20, 8, seed=1)
    exclude = torch.tensor([3, -1, 19, 0])
    logits = (queries @ keys.T).double() / 0.1
    for row, column in enumerate(exclude.tolist()):
        if column >= 0:
            logits[row, column] = -math.inf
    lse, _ = attend(queries, keys, keys, 0.1, exclude=exclude, tile=6)
    torch.testing.assert_close(lse, logits.logsumexp(1).float())
    lse, out = attend(queries, keys, keys, 0.1, bias=torch.full((20,), -math.inf))
    assert (lse == -math.inf).all() and (out == 0).all()


def dense_losses(
    bank: Bank, ids: Tensor, visual: Tensor, audio: Tensor, tau: float, softness: Tensor, soft: SoftTargets
) -> Tensor:
    """The published formulas, term by term, in float64."""
    bars = {name: bank.columns[name].double() for name in ("visual", "audio")}
    queries = {"visual": visual.double(), "audio": audio.double()}
    pair = (bars["visual"] * bars["audio"]).sum(1)
    total = torch.zeros(len(ids), dtype=torch.float64)
    for own, other in (("visual", "audio"), ("audio", "visual")):
        log_p = (queries[own] @ bars[other].T / tau).log_softmax(1)
        with torch.no_grad():
            scores = {
                "none": torch.zeros(len(ids), bank.num_samples, dtype=torch.float64),
                "bootstrapping": queries[own] @ bars[other].T / soft.temperature,
                "swapped": queries[other] @ bars[own].T / soft.temperature,
                "neighbour": bars[own][ids] @ bars[own].T / soft.temperature,
                "cycle": pair[ids][:, None] / soft.cycle_temperature
                + bars[other][ids] @ bars[other].T / soft.temperature
                + pair / soft.cycle_temperature,
            }[soft.kind]
            if soft.excludes_self:
                scores[torch.arange(len(ids)), ids] = -math.inf
            targets = scores.softmax(1) * softness.double()[:, None]
            targets[torch.arange(len(ids)), ids] += 1 - softness.double()
        total = total - (targets * log_p).sum(1)
    return total


@pytest.mark.parametrize("kind", ["none", "bootstrapping", "swapped", "neighbour", "cycle"])
@pytest.mark.parametrize("excludes_self", [False, True])
def test_instance_loss_and_gradient_equal_the_dense_formula(kind: str, excludes_self: bool):
    bank = filled_bank(40, 16)
    ids = torch.tensor([7, 30, 12, 12, 39])
    softness = torch.tensor([0.0, 0.2, 0.5, 0.5, 1.0]) * (kind != "none")
    soft = SoftTargets(kind, 0.2, 0.3, excludes_self)
    gradients = []
    for function in (instance_losses, dense_losses):
        raw = [torch.randn(5, 16, generator=torch.Generator().manual_seed(seed), requires_grad=True) for seed in (8, 9)]
        visual, audio = (F.normalize(each, dim=1) for each in raw)
        losses = function(bank, ids, visual, audio, 0.07, softness, soft)
        (losses * torch.arange(1.0, 6.0)).sum().backward()
        gradients.append([losses.detach().double(), *(each.grad.double() for each in raw)])
    for ours, published in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, published, rtol=2e-5, atol=2e-5)


def test_exact_loss_of_a_random_bank_is_log_n_plus_0_8_each_way():
    num, dim = 20000, 128
    bank = filled_bank(num, dim)
    ids = torch.arange(256)
    losses = instance_losses(bank, ids, unit(256, dim, seed=5), unit(256, dim, seed=6), 0.07)
    assert abs(losses.mean().item() / 2 - (math.log(num) + 1 / (2 * dim * 0.07**2))) < 0.12


def test_weighted_mean_is_the_weighted_mean():
    losses, weights = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 3.0])
    assert weighted_mean(losses, weights).item() == pytest.approx(13 / 4)
    assert weighted_mean(losses, torch.zeros(3)).item() == 0


def test_bank_averages_repeated_ids_and_refuses_what_is_not_finite():
    bank = filled_bank(6, 4)
    before = bank.columns["visual"].clone()
    ids, valid = torch.tensor([2, 2, 4, 5, 1]), torch.tensor([True, True, True, False, True])
    new = {name: unit(5, 4, seed=seed) for name, seed in (("visual", 3), ("audio", 4))}
    new["visual"][2, 0] = math.nan
    new["category_agreement"] = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.5])
    bank.update(ids, valid, new)
    after = bank.columns["visual"]
    torch.testing.assert_close(after[2], F.normalize(0.5 * before[2] + 0.5 * new["visual"][:2].mean(0), dim=0))
    torch.testing.assert_close(after[1], F.normalize(0.5 * before[1] + 0.5 * new["visual"][4], dim=0))
    for untouched in (0, 3, 4, 5):
        assert torch.equal(after[untouched], before[untouched])
    assert bank.columns["visits"].tolist() == [1, 2, 2, 1, 1, 1]
    assert bank.columns["category_agreement"][2] == pytest.approx(0.75)


def test_rows_begin_as_random_directions_and_count_as_unseen():
    bank = Bank(4000, 32, 0.5, CPU)
    for name in ("visual", "audio"):
        torch.testing.assert_close(bank.columns[name].norm(dim=1), torch.ones(4000))
        assert bank.columns[name].mean(0).abs().max() < 0.02
    assert (bank.columns["visual"] * bank.columns["audio"]).sum(1).mean().abs() < 0.02
    assert torch.isnan(bank.pair_similarity()).all()


def test_bank_state_goes_by_id_range():
    bank = filled_bank(10, 4)
    bank.columns["votes"] = torch.rand(10, 3)
    state = bank.state()
    parts = [
        {key: (value[low:high] if key != "range" else torch.tensor([low, high, 10])) for key, value in state.items()}
        for low, high in ((0, 3), (3, 7), (7, 10))
    ]
    other = Bank(10, 4, 0.5, CPU)
    other.restore(parts)
    assert all(torch.equal(other.columns[name], column) for name, column in bank.columns.items())
    with pytest.raises(ValueError, match="lacks 3"):
        Bank(10, 4, 0.5, CPU).restore(parts[1:])


def test_neighbors_are_exact_and_ties_go_by_id():
    features = unit(300, 8)
    features[40:50] = features[10]
    groups = torch.arange(300)
    groups[100:110] = 100
    valid = torch.ones(300, dtype=torch.bool)
    valid[7] = False
    ids, similarity = nearest_neighbors(features, 20, groups, valid)
    scores = (features @ features.T).masked_fill((groups[:, None] == groups) | ~valid, -9.0)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, expected.indices[:, :20])
    assert torch.equal(similarity, expected.values[:, :20])


def test_neighbors_refuse_the_impossible():
    groups, valid = torch.arange(5), torch.ones(5, dtype=torch.bool)
    with pytest.raises(ValueError, match="k=5 .* 1 to 4"):
        nearest_neighbors(unit(5, 4), 5, groups, valid)
    broken = unit(5, 4)
    broken[2, 1] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        nearest_neighbors(broken, 2, groups, valid)
    ids, similarity = nearest_neighbors(unit(5, 4), 3, torch.tensor([0, 0, 0, 0, 1]), valid)
    assert ids[0].tolist() == [4, -1, -1] and similarity[0, 1:].tolist() == [0, 0]
