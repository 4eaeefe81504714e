"""k-NN search on a GPU: equal to the CPU, with few waits, with and without the Triton kernels."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.memory import coarse_top_k
from distav.memory.coarse_top_k import dot_products, kernels_for
from distav.memory.key_shard import Tiling
from distav.memory.knn import nearest_neighbors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=["kernels", "operators"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Searches with the Triton kernels or with PyTorch operators."""
    if request.param == "operators":
        monkeypatch.setattr(coarse_top_k, "kernels_for", lambda device, width: None)
    return request.param


def clustered_features(num_samples: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features with clusters and duplicates, groups of three, and a mask of the valid samples."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(num_samples // 50, dim, generator=generator)
    features = centers[torch.randint(len(centers), (num_samples,), generator=generator)]
    features = F.normalize(features + torch.randn(num_samples, dim, generator=generator), dim=1)
    features[100:140] = features[300]
    valid = torch.rand(num_samples, generator=generator) < 0.97
    features[~valid] = torch.nan
    return features, torch.arange(num_samples) // 3, valid


@pytest.mark.parametrize("dim", [48, 256])
def test_kernels_pass_their_self_test(dim: int, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "distav"):
        assert kernels_for(torch.device("cuda", 0), dim) is not None, caplog.text


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(
    ("num_samples", "dim", "k"), [(50_000, 64, 200), (20_000, 48, 50), (20_000, 256, 700), (3_000, 37, 20)]
)
def test_neighbors_equal_those_on_the_cpu(num_samples: int, dim: int, k: int):
    features, groups, valid = clustered_features(num_samples, dim)
    queries = torch.arange(0, num_samples, max(1, num_samples // 5000))
    cpu_ids, cpu_similarity = nearest_neighbors(features, k, groups, valid, queries=queries)
    gpu_result = nearest_neighbors(features.cuda(), k, groups.cuda(), valid.cuda(), queries=queries.cuda())
    is_valid = valid[queries]
    cpu_ids, cpu_similarity = cpu_ids[is_valid], cpu_similarity[is_valid]
    gpu_ids, gpu_similarity = (result.cpu()[is_valid] for result in gpu_result)
    torch.testing.assert_close(cpu_similarity, gpu_similarity, atol=2e-6, rtol=0)
    row, column = (cpu_ids != gpu_ids).nonzero(as_tuple=True)  # where scores are equal within float32 precision
    assert len(row) < 0.01 * cpu_ids.numel()
    query_features = features[queries[is_valid]]
    difference = features[cpu_ids[row, column]].double() - features[gpu_ids[row, column]].double()
    assert ((query_features[row].double() * difference).sum(1).abs() < 2e-6).all()
    # The definition of a similarity, and therefore every bit of it, is the same on both.
    rows = torch.arange(len(query_features)).repeat_interleave(k)
    expected = dot_products(query_features, features, rows, gpu_ids.flatten()).view(gpu_ids.shape)
    assert torch.equal(expected, gpu_similarity)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("coarse", [torch.float16, torch.bfloat16], ids=str)
def test_the_tiling_changes_no_bit(coarse: torch.dtype):
    features, groups, valid = (tensor.cuda() for tensor in clustered_features(20_000, 64))
    expected = nearest_neighbors(features, 100, groups, valid)
    for tiling in (Tiling(1000, 3000, coarse), Tiling(4096, 20_000, coarse), Tiling(7000, 1500, coarse)):
        result = nearest_neighbors(features, 100, groups, valid, tiling=tiling)
        for actual, reference in zip(result, expected, strict=True):
            assert torch.equal(actual[valid], reference[valid])


@pytest.mark.usefixtures("implementation")
def test_nearly_identical_features_have_exact_similarities():
    generator = torch.Generator().manual_seed(1)
    features = F.normalize(torch.ones(64) + 1e-3 * torch.randn(6000, 64, generator=generator), dim=1)
    groups, valid = torch.arange(6000), torch.ones(6000, dtype=torch.bool)
    ids, similarity = nearest_neighbors(features.cuda(), 100, groups.cuda(), valid.cuda())
    rows = torch.arange(6000).repeat_interleave(100)
    assert torch.equal(dot_products(features, features, rows, ids.cpu().flatten()), similarity.cpu().flatten())
    exact = features[:500].double() @ features.double().T
    exact[torch.arange(500), torch.arange(500)] = -torch.inf
    torch.testing.assert_close(similarity[:500].cpu().double(), exact.topk(100, dim=1).values, atol=1e-7, rtol=0)


def count_waits(num_samples: int, num_queries: int, tiling: Tiling) -> int:
    generator = torch.Generator().manual_seed(2)
    features = F.normalize(torch.randn(num_samples, 64, generator=generator), dim=1).cuda()
    groups, queries = torch.arange(num_samples, device="cuda"), torch.arange(num_queries, device="cuda")
    arguments = features, 50, groups, groups >= 0
    nearest_neighbors(*arguments, queries=queries, tiling=tiling)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            nearest_neighbors(*arguments, queries=queries, tiling=tiling)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def test_a_tile_takes_few_waits(implementation: str):
    tiling = Tiling(512, 4096, torch.float16)
    block_of_8, block_of_24 = (
        count_waits(4096 * num_tiles, 1024, tiling) - count_waits(4096 * num_tiles, 512, tiling)
        for num_tiles in (8, 24)
    )
    print(f"waits per block: {block_of_8} with 8 tiles, {block_of_24} with 24")
    assert (block_of_24 - block_of_8) / 16 <= (0.3 if implementation == "kernels" else 2.1)
    assert block_of_8 <= (10 if implementation == "kernels" else 22)
