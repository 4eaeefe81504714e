"""k-NN search with a coarse first pass: exact, with few operators, and with the Triton kernels."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from distav.memory import coarse_top_k
from distav.memory.coarse_candidates import Candidates, largest_per_row
from distav.memory.coarse_top_k import dot_products
from distav.memory.key_shard import KeyShard, Tiling
from distav.memory.knn import nearest_neighbors
from distav.memory.packing import pack
from tests.conftest import ROOT
from tests.helpers.bank import unit

COARSE = (torch.bfloat16, torch.float16)


def folded(terms: Tensor) -> Tensor:
    """Sum the last dimension by folding it in halves, which is the definition of a similarity."""
    while (length := terms.shape[-1]) > 1:
        half = length // 2
        terms = torch.cat([terms[..., :half] + terms[..., half : 2 * half], terms[..., 2 * half :]], dim=-1)
    return terms[..., 0]


def full_sort(features: Tensor, k: int, groups: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and similarities from all scores in float64, sorted by similarity and id."""
    scores = folded(features.double()[:, None] * features.double()).float()
    scores = scores.masked_fill((groups[:, None] == groups) | ~valid, -torch.inf)
    order = (-scores).argsort(dim=1, stable=True)[:, :k]
    best = scores.gather(1, order)
    return order.masked_fill(best == -torch.inf, -1), best.masked_fill(best == -torch.inf, 0)


@st.composite
def searches(draw: st.DrawFn) -> tuple[Tensor, int, Tensor, Tensor, Tiling]:
    num_samples = draw(st.integers(2, 400))
    dim = draw(st.sampled_from([1, 2, 3, 8, 13, 24]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    features = torch.randn(num_samples, dim, generator=generator)
    form = draw(st.sampled_from(["unit", "any norm", "few values", "copies", "nearly identical"]))
    if form == "few values":
        features = features.mul(2).round()
    elif form == "any norm":
        features *= 10 ** (6 * torch.rand(num_samples, 1, generator=generator) - 3)
    else:
        features = F.normalize(features, dim=1)
    if form == "copies":
        features = features[torch.randint(max(1, num_samples // 20), (num_samples,), generator=generator)]
    elif form == "nearly identical":
        features = features[0] + 1e-4 * features
    features += (features == 0).all(1, keepdim=True).float()
    num_groups = draw(st.sampled_from([2, num_samples // 2 + 1, 10 * num_samples]))
    groups = torch.randint(num_groups, (num_samples,), generator=generator)
    valid = torch.rand(num_samples, generator=generator) < draw(st.sampled_from([1.0, 0.9, 0.3]))
    features[~valid] = torch.nan
    k = draw(st.integers(1, num_samples - 1))
    tiling = Tiling(draw(st.integers(1, 100)), draw(st.integers(20, 300)), draw(st.sampled_from(COARSE)))
    return features, k, groups, valid, tiling


@settings(max_examples=50, deadline=None)
@given(searches(), st.sampled_from([2**24, 500]))
def test_a_coarse_first_pass_changes_neither_neighbors_nor_similarities(
    search: tuple[Tensor, int, Tensor, Tensor, Tiling], max_candidates: int
):
    features, k, groups, valid, tiling = search
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coarse_top_k, "MAX_CANDIDATES", max_candidates)
        ids, similarity = nearest_neighbors(features, k, groups, valid, tiling=tiling)
    expected_ids, expected_similarity = full_sort(features.nan_to_num(), k, groups, valid)
    assert torch.equal(ids[valid], expected_ids[valid])
    assert torch.equal(similarity[valid], expected_similarity[valid])


@pytest.mark.parametrize("coarse", COARSE, ids=str)
def test_the_error_bound_holds_for_every_coarse_score(coarse: torch.dtype):
    generator = torch.Generator().manual_seed(3)
    for scale in (1e-3, 1.0, 300.0):
        keys = torch.randn(500, 40, generator=generator) * 10 ** torch.rand(500, 1, generator=generator) * scale
        shard = KeyShard.build(keys, 0, torch.arange(500), float(keys.norm(dim=1).max()), Tiling(500, 500, coarse))
        scaled = keys * shard.scale
        rounded = scaled.to(coarse)
        error = coarse_top_k._rounding_error(scaled, rounded, shard)
        exact = scaled.double() @ scaled.double().T
        sums = rounded.double() @ rounded.double().T
        largest_error = (sums - exact).abs().amax(1)
        assert (largest_error <= error).all() and (largest_error.amax() > error.amax() / 20)
        assert scaled.norm(dim=1).max() <= 1 and scaled.norm(dim=1).max() > 0.4


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that a GPU would launch, and those for which the host would wait."""

    def __init__(self):
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view:
            self.operators[name] += 1
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        sized_by_data = ("nonzero", "_local_scalar_dense", "bincount", "repeat_interleave", "masked_select")
        if by_mask or name in sized_by_data:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


class ListCounter(TorchFunctionMode):
    """Counts calls of `tolist`, which runs no operator."""

    def __init__(self):
        super().__init__()
        self.lists = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.lists += func is Tensor.tolist
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Runs the search in the calling thread; operators of other threads are not counted."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def count_operators(num_tiles: int, num_blocks: int, coarse: torch.dtype) -> tuple[int, int]:
    """Numbers of operators and of waits of a search."""
    num_samples, tiling = 512 * num_tiles, Tiling(64, 512, coarse)
    features, groups, queries = unit(num_samples, 16), torch.arange(num_samples) // 2, torch.arange(64 * num_blocks)
    with ListCounter() as lists, OperatorCounter() as counts:
        nearest_neighbors(features, 20, groups, groups >= 0, queries=queries, tiling=tiling)
    return counts.operators.total(), counts.waits.total() + lists.lists


@pytest.mark.parametrize("coarse", COARSE, ids=str)
def test_a_tile_takes_few_operators_and_waits(coarse: torch.dtype, one_thread: None):
    block_of_8, block_of_24 = (
        torch.tensor(count_operators(num_tiles, 3, coarse)) - torch.tensor(count_operators(num_tiles, 2, coarse))
        for num_tiles in (8, 24)
    )
    operators, waits = ((block_of_24 - block_of_8) / 16).tolist()
    assert 10 < operators <= 20 and waits <= 2
    operators, waits = (block_of_8 - (block_of_24 - block_of_8) / 2).tolist()  # of a block, for any number of tiles
    assert operators <= 250 and waits <= 4


def test_candidates_return_ranks_and_the_scores_that_reach_a_bound():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(6, 50, generator=generator).round(decimals=1).to(torch.float16)
    scores[0, :3] = torch.tensor([-0.0, 0.0, -0.0])
    candidates = Candidates(6, torch.float16, torch.device("cpu"))
    row, position = (scores > torch.tensor([-9, -1, -0.5, 0, 1, 9])[:, None]).nonzero(as_tuple=True)
    for part in torch.randperm(len(row), generator=generator).split(40):
        candidates.add(row[part], scores[row[part], position[part]], position[part])
    for rank in (1, 2, 30, 51):
        expected = [
            kept.sort(descending=True).values[rank - 1].item() if len(kept) >= rank else -torch.inf
            for kept in (scores[query, position[row == query]].float() for query in range(6))
        ]
        assert candidates.nth_largest(rank).tolist() == expected
    bound = torch.tensor([0.0, 0.5, -2, 3, 1.5, 0], dtype=torch.float16)
    reaching_row, reaching_position = candidates.reaching(bound)
    expected = scores[row, position] >= bound[row]
    assert set(zip(reaching_row.tolist(), reaching_position.tolist(), strict=True)) == set(
        zip(row[expected].tolist(), position[expected].tolist(), strict=True)
    )
    best = largest_per_row(pack(scores[row, position].float(), position), row, 6, 4)
    assert (best[5] == best[5, 0]).all() and (best[0].diff() < 0).all()


@pytest.mark.parametrize("dim", [1, 2, 7, 48, 96, 256])
def test_dot_products_are_summed_in_halves(dim: int):
    rows = unit(200, dim)
    row, key = torch.randint(200, (2, 500), generator=torch.Generator().manual_seed(0))
    assert torch.equal(dot_products(rows, rows, row, key), folded(rows[row].double() * rows[key].double()).float())


def test_the_search_disallows_sums_in_16_bits():
    matmul = torch.backends.cuda.matmul
    settings_in_search = []
    tiling, features = Tiling(4, 40, torch.bfloat16), unit(50, 8)
    excluded_scores: Callable[..., Any] = KeyShard.excluded_scores

    def recording_excluded_scores(*arguments: Any) -> Any:
        settings_in_search.append(
            (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction)
        )
        return excluded_scores(*arguments)

    before = matmul.allow_bf16_reduced_precision_reduction
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyShard, "excluded_scores", recording_excluded_scores)
        nearest_neighbors(features, 3, torch.arange(50), torch.ones(50, dtype=torch.bool), tiling=tiling)
    assert settings_in_search and set(settings_in_search) == {(False, False)}
    assert matmul.allow_bf16_reduced_precision_reduction is before


_COMPARE_KERNELS = """
import torch
from distav.memory import coarse_top_k, top_k_kernels
from distav.memory.key_shard import Tiling
from distav.memory.knn import nearest_neighbors

torch.set_num_threads(1)  # The interpreter keeps its state in global variables.
top_k_kernels.self_test(torch.device("cpu"), 24)
top_k_kernels._SPAN, top_k_kernels._COLUMNS = 256, 128  # The interpreter is slow.
generator = torch.Generator().manual_seed(0)
rows = torch.nn.functional.normalize(torch.randn(160, 24, generator=generator), dim=1)
rows[100:150] = rows[100]  # More copies pass than there are slots.
valid = torch.rand(160, generator=generator) < 0.95
coarse_top_k.MIN_SLOTS = 40
for coarse, k in ((torch.float16, 5), (torch.bfloat16, 30)):
    arguments = rows, k, torch.arange(160) // 2, valid
    coarse_top_k.kernels_for = lambda device, width: None
    expected = nearest_neighbors(*arguments, tiling=Tiling(90, 70, coarse))
    coarse_top_k.kernels_for = lambda device, width: top_k_kernels
    actual = nearest_neighbors(*arguments, tiling=Tiling(90, 70, coarse))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))
"""


@pytest.mark.long
def test_kernels_in_the_interpreter_return_the_same_neighbors():
    process = subprocess.run(
        [sys.executable, "-c", _COMPARE_KERNELS],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("dim", [48, 256])
def test_kernels_compile_for_a_gpu(dim: int):
    compiler = pytest.importorskip("triton.compiler")
    from triton import compile
    from triton.backends.compiler import GPUTarget

    from distav.memory import top_k_kernels

    target, length = GPUTarget("cuda", 90, 32), dim & -dim
    append = {"scores": "*bf16", "bound": "*bf16", "stored": "*i64", "num_passed": "*i32"}
    append |= {name: "i32" for name in ("width", "slots", "tile", "num_tiles")} | {
        "SPAN": "constexpr",
        "COLUMNS": "constexpr",
    }
    sizes = {"SPAN": top_k_kernels._SPAN, "COLUMNS": top_k_kernels._COLUMNS}
    assert compile(compiler.ASTSource(top_k_kernels._append_passing, append, sizes), target=target).asm["cubin"]
    fold = {"queries": "*fp32", "keys": "*fp32", "row": "*i64", "key_index": "*i64", "out": "*fp64", "num_pairs": "i32"}
    sizes = {"PAIRS": top_k_kernels._TERMS // length, "PARTS": dim // length, "LENGTH": length}
    sizes |= {"HALVINGS": length.bit_length() - 1}
    fold |= {name: "constexpr" for name in sizes}
    assert compile(compiler.ASTSource(top_k_kernels._fold_products, fold, sizes), target=target).asm["cubin"]
