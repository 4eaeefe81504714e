"""The neighbor search on a GPU: what the CPU finds, with few waits, with and without kernels."""

import logging
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.memory import top_k
from distav.memory.key_shard import Tiling
from distav.memory.knn import nearest_neighbors
from distav.memory.top_k import dot_products, kernels_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=["kernels", "operators"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "operators":
        monkeypatch.setattr(top_k, "kernels_for", lambda device, width: None)
    yield request.param


def problem(num: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(num // 50, dim, generator=generator)
    features = centers[torch.randint(len(centers), (num,), generator=generator)]
    features = F.normalize(features + torch.randn(num, dim, generator=generator), dim=1)
    features[100:140] = features[300]
    valid = torch.rand(num, generator=generator) < 0.97
    features[~valid] = torch.nan
    return features, torch.arange(num) // 3, valid


@pytest.mark.parametrize("dim", [48, 256])
def test_kernels_serve_here(dim: int, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "distav"):
        assert kernels_for(torch.device("cuda", 0), dim) is not None, caplog.text


@pytest.mark.parametrize(
    ("num", "dim", "k"), [(50_000, 64, 200), (20_000, 48, 50), (20_000, 256, 700), (3_000, 37, 20)]
)
def test_neighbors_are_those_of_the_cpu(num: int, dim: int, k: int, way: str):
    features, groups, valid = problem(num, dim)
    queries = torch.arange(0, num, max(1, num // 5000))
    ids, similarity = nearest_neighbors(features, k, groups, valid, queries=queries)
    there = [each.cuda() for each in (features, groups, valid, queries)]
    gpu_ids, gpu_similarity = nearest_neighbors(there[0], k, there[1], there[2], queries=there[3])
    usable = valid[queries]
    ids, similarity, gpu_ids, gpu_similarity = (
        each.cpu()[usable] for each in (ids, similarity, gpu_ids, gpu_similarity)
    )
    torch.testing.assert_close(similarity, gpu_similarity, atol=2e-6, rtol=0)
    row, place = (ids != gpu_ids).nonzero(as_tuple=True)  # only where float32 cannot tell two scores apart
    assert len(row) < 0.01 * ids.numel()
    asked = features[queries[usable]]
    ours, theirs = (features[each[row, place]].double() for each in (ids, gpu_ids))
    assert ((asked[row].double() * (ours - theirs)).sum(1).abs() < 2e-6).all()
    # The definition of a similarity, and with it every bit of it, is the same on both.
    rows = torch.arange(len(asked)).repeat_interleave(k)
    folded = dot_products(asked, features, rows, gpu_ids.flatten()).view(gpu_ids.shape)
    assert torch.equal(folded, gpu_similarity)


@pytest.mark.parametrize("coarse", [torch.float16, torch.bfloat16], ids=str)
def test_the_tiling_changes_no_bit(coarse: torch.dtype, way: str):
    features, groups, valid = (each.cuda() for each in problem(20_000, 64))
    expected = nearest_neighbors(features, 100, groups, valid)
    for tiling in (Tiling(1000, 3000, coarse), Tiling(4096, 20_000, coarse), Tiling(7000, 1500, coarse)):
        for ours, theirs in zip(nearest_neighbors(features, 100, groups, valid, tiling=tiling), expected, strict=True):
            assert torch.equal(ours[valid], theirs[valid])


def test_alike_features_are_told_apart(way: str):
    generator = torch.Generator().manual_seed(1)
    features = F.normalize(torch.ones(64) + 1e-3 * torch.randn(6000, 64, generator=generator), dim=1)
    groups, valid = torch.arange(6000), torch.ones(6000, dtype=torch.bool)
    ids, similarity = nearest_neighbors(features.cuda(), 100, groups.cuda(), valid.cuda())
    rows = torch.arange(6000).repeat_interleave(100)
    assert torch.equal(dot_products(features, features, rows, ids.cpu().flatten()), similarity.cpu().flatten())
    exact = features[:500].double() @ features.double().T
    exact[torch.arange(500), torch.arange(500)] = -torch.inf
    torch.testing.assert_close(similarity[:500].cpu().double(), exact.topk(100, dim=1).values, atol=1e-7, rtol=0)


def waits(num: int, num_queries: int, tiling: Tiling) -> int:
    generator = torch.Generator().manual_seed(2)
    features = F.normalize(torch.randn(num, 64, generator=generator), dim=1).cuda()
    groups, queries = torch.arange(num, device="cuda"), torch.arange(num_queries, device="cuda")
    arguments = features, 50, groups, groups >= 0
    nearest_neighbors(*arguments, queries=queries, tiling=tiling)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            nearest_neighbors(*arguments, queries=queries, tiling=tiling)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in caught)


def test_a_tile_takes_few_waits(way: str):
    tiling = Tiling(512, 4096, torch.float16)
    few, many = (waits(4096 * tiles, 1024, tiling) - waits(4096 * tiles, 512, tiling) for tiles in (8, 24))
    print(f"waits of a block of 8 tiles: {few}, of 24: {many}")
    assert (many - few) / 16 <= (0.3 if way == "kernels" else 2.1)
    assert few <= (10 if way == "kernels" else 22)
