import math

import pytest
import torch
from torch import Tensor

from distav.memory.key_shard import Tiling
from distav.memory.knn import nearest_neighbors
from tests.helpers.bank import unit

TILINGS = [None, Tiling(100, 40), Tiling(1000, 33), Tiling(64, 50, torch.bfloat16)]


def full_sort(features: Tensor, k: int, groups: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and similarities from a full sort of all scores in float64."""
    scores = (features.double() @ features.double().T).masked_fill((groups[:, None] == groups) | ~valid, -9.0)
    ordered = scores.sort(dim=1, descending=True, stable=True)
    return ordered.indices[:, :k].masked_fill(ordered.values[:, :k] == -9, -1), ordered.values[:, :k]


def check_neighbors(features: Tensor, k: int, groups: Tensor, valid: Tensor, tiling: Tiling | None) -> None:
    """Ids equal those of a full sort, except where two scores are equal within float32 precision."""
    ids, similarity = nearest_neighbors(features, k, groups, valid, tiling=tiling)
    expected_ids, expected_similarity = full_sort(features, k, groups, valid)
    torch.testing.assert_close(similarity[ids >= 0].double(), expected_similarity[ids >= 0], rtol=0, atol=2e-6)
    row, column = (ids != expected_ids).nonzero(as_tuple=True)
    difference = features[ids[row, column]].double() - features[expected_ids[row, column]].double()
    assert ((features[row].double() * difference).sum(1).abs() < 2e-6).all()


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize(("num_samples", "k"), [(300, 20), (33, 32), (3, 1), (1800, 200), (1200, 700), (2100, 2048)])
def test_neighbors_equal_a_full_sort(tiling: Tiling | None, num_samples: int, k: int):
    features = unit(num_samples, 12)
    groups = torch.arange(num_samples) // 2 * 2 if num_samples > 40 else torch.arange(num_samples)
    valid = torch.ones(num_samples, dtype=torch.bool)
    if num_samples > 40:
        groups[100:110] = 100
        valid[torch.arange(0, num_samples, 31)] = False
        features[7] = 0  # features of invalid samples are not checked
        valid[7] = False
    check_neighbors(features, k, groups, valid, tiling)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_equal_similarities_are_ordered_by_id(tiling: Tiling | None):
    num_samples, groups, valid = 600, torch.arange(600), torch.ones(600, dtype=torch.bool)
    features = unit(12, 16).repeat(50, 1)  # fifty copies of each vector
    ids, _ = nearest_neighbors(features, 60, groups, valid, tiling=tiling)
    for sample in (0, 11, 599):
        copies = [other for other in range(sample % 12, num_samples, 12) if other != sample]
        assert ids[sample, :49].tolist() == copies
        assert ids[sample, 49:].tolist() == sorted(ids[sample, 49:].tolist())
    identical = torch.ones(300, 8)
    ids, _ = nearest_neighbors(identical, 5, torch.arange(300), valid[:300], tiling=tiling)
    assert ids[0].tolist() == [1, 2, 3, 4, 5] and ids[299].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_neighbors_are_exact_where_the_estimated_bound_is_too_high(tiling: Tiling | None):
    # All tiles but the first are far from the queries, so the bound estimated from the first is too high.
    num_samples = 1500
    features = unit(num_samples, 8) * 0.05
    features[:, 0] = 0.1
    features[:: math.ceil(num_samples / tiling.keys) if tiling else 2, 0] = 1.0
    groups, valid = torch.arange(num_samples), torch.ones(num_samples, dtype=torch.bool)
    check_neighbors(features, 90, groups, valid, tiling)


def test_neighbors_do_not_depend_on_the_tiling_or_on_the_other_queries():
    features, groups, valid = unit(2000, 40), torch.arange(2000), torch.ones(2000, dtype=torch.bool)
    expected = nearest_neighbors(features, 50, groups, valid)
    for tiling in (Tiling(1, 40), Tiling(500, 64), Tiling(33, 1999)):
        queries = torch.tensor([5, 1999, 0, 77]) if tiling.queries == 1 else None
        result = nearest_neighbors(features, 50, groups, valid, queries=queries, tiling=tiling)
        for actual, complete in zip(result, expected, strict=True):
            assert torch.equal(actual, complete if queries is None else complete[queries])


def test_invalid_arguments_are_rejected():
    groups, valid = torch.arange(5), torch.ones(5, dtype=torch.bool)
    with pytest.raises(ValueError, match="k=5 neighbors among 5 samples; allowed: 1 to 4"):
        nearest_neighbors(unit(5, 4), 5, groups, valid)
    with pytest.raises(ValueError, match="k=3000 .* 1 to 2048"):
        nearest_neighbors(unit(5000, 4), 3000, torch.arange(5000), torch.ones(5000, dtype=torch.bool))
    invalid = unit(5, 4)
    invalid[2, 1] = math.nan
    with pytest.raises(ValueError, match="samples 2 are not finite.*valid=False"):
        nearest_neighbors(invalid, 2, groups, valid)
    invalid[2] = 0
    with pytest.raises(ValueError, match="samples 2 are all zero.*valid=False"):
        nearest_neighbors(invalid, 2, groups, valid)
    with pytest.raises(ValueError, match="queries must be ids of this rank, 0 to 4"):
        nearest_neighbors(unit(5, 4), 2, groups, valid, queries=torch.tensor([5]))
    with pytest.raises(ValueError, match="queries=40000 with a coarse first pass; allowed: up to 32768"):
        Tiling(40_000, 2048, torch.float16)


def test_a_sample_with_too_few_neighbors_is_padded():
    groups, valid = torch.tensor([0, 0, 0, 0, 1]), torch.ones(5, dtype=torch.bool)
    ids, similarity = nearest_neighbors(unit(5, 4), 3, groups, valid)
    assert ids[0].tolist() == [4, -1, -1] and similarity[0, 1:].tolist() == [0, 0]
