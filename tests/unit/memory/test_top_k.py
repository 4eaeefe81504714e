"""The neighbor search with a coarse first pass: exact, in few operators, and with the kernels of a GPU."""

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

from distav.memory import top_k
from distav.memory.key_shard import KeyShard, Tiling
from distav.memory.knn import nearest_neighbors
from distav.memory.reservoir import Candidates, largest_of_rows, packed
from distav.memory.top_k import dot_products
from tests.conftest import ROOT

COARSE = (torch.bfloat16, torch.float16)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def folded(terms: Tensor) -> Tensor:
    """Add up the last dimension by halves, as the definition of a similarity has it."""
    while (length := terms.shape[-1]) > 1:
        half = length // 2
        terms = torch.cat([terms[..., :half] + terms[..., half : 2 * half], terms[..., 2 * half :]], dim=-1)
    return terms[..., 0]


def dense(features: Tensor, k: int, groups: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Score all pairs in float64, and sort each row by similarity and id."""
    scores = folded(features.double()[:, None] * features.double()).float()
    scores = scores.masked_fill((groups[:, None] == groups) | ~valid, -torch.inf)
    order = (-scores).argsort(dim=1, stable=True)[:, :k]
    best = scores.gather(1, order)
    return order.masked_fill(best == -torch.inf, -1), best.masked_fill(best == -torch.inf, 0)


@st.composite
def searches(draw: st.DrawFn) -> tuple[Tensor, int, Tensor, Tensor, Tiling]:
    num = draw(st.integers(2, 400))
    dim = draw(st.sampled_from([1, 2, 3, 8, 13, 24]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    features = torch.randn(num, dim, generator=generator)
    kind = draw(st.sampled_from(["unit", "any length", "few values", "copies", "all alike"]))
    if kind == "few values":
        features = features.mul(2).round()
    elif kind == "any length":
        features *= 10 ** (6 * torch.rand(num, 1, generator=generator) - 3)
    else:
        features = F.normalize(features, dim=1)
    if kind == "copies":
        features = features[torch.randint(max(1, num // 20), (num,), generator=generator)]
    elif kind == "all alike":
        features = features[0] + 1e-4 * features
    features += (features == 0).all(1, keepdim=True).float()
    groups = torch.randint(draw(st.sampled_from([2, num // 2 + 1, 10 * num])), (num,), generator=generator)
    valid = torch.rand(num, generator=generator) < draw(st.sampled_from([1.0, 0.9, 0.3]))
    features[~valid] = torch.nan
    k = draw(st.integers(1, num - 1))
    tiling = Tiling(draw(st.integers(1, 100)), draw(st.integers(20, 300)), draw(st.sampled_from(COARSE)))
    return features, k, groups, valid, tiling


@settings(max_examples=100, deadline=None)
@given(searches(), st.sampled_from([2**24, 500]))
def test_a_coarse_pass_changes_no_neighbor_and_no_similarity(
    search: tuple[Tensor, int, Tensor, Tensor, Tiling], longest: int
):
    features, k, groups, valid, tiling = search
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_k, "LONGEST_LIST", longest)
        ids, similarity = nearest_neighbors(features, k, groups, valid, tiling=tiling)
    expected = dense(features.nan_to_num(), k, groups, valid)
    assert torch.equal(ids[valid], expected[0][valid])
    assert torch.equal(similarity[valid], expected[1][valid])


@pytest.mark.parametrize("coarse", COARSE, ids=str)
def test_the_bound_holds_for_every_coarse_score(coarse: torch.dtype):
    generator = torch.Generator().manual_seed(3)
    for scale in (1e-3, 1.0, 300.0):
        keys = torch.randn(500, 40, generator=generator) * 10 ** torch.rand(500, 1, generator=generator) * scale
        shard = KeyShard.of(keys, 0, torch.arange(500), float(keys.norm(dim=1).max()), Tiling(500, 500, coarse))
        scaled = keys * shard.scale
        rounded = scaled.to(coarse)
        error = top_k._rounding(scaled, rounded, shard)
        exact = scaled.double() @ scaled.double().T
        sums = rounded.double() @ rounded.double().T
        off = (sums - exact).abs().amax(1)
        assert (off <= error).all() and (off.amax() > error.amax() / 20)
        assert scaled.norm(dim=1).max() <= 1 and scaled.norm(dim=1).max() > 0.4


class Counting(TorchDispatchMode):
    """Counts the operators that a GPU launches, and those for which it makes the host wait."""

    def __init__(self):
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view:
            self.operators[name] += 1
        by_mask = name in ("index", "index_put", "index_put_") and any(
            each is not None and each.dtype is torch.bool for each in args[1]
        )
        sized_by_data = ("nonzero", "_local_scalar_dense", "bincount", "repeat_interleave", "masked_select")
        if by_mask or name in sized_by_data:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


class CountingLists(TorchFunctionMode):
    """Counts what `Counting` does not see."""

    def __init__(self):
        super().__init__()
        self.lists = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.lists += func is Tensor.tolist
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Other threads' operators would not be counted."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def counted(tiles: int, blocks: int, coarse: torch.dtype) -> tuple[int, int]:
    num, tiling = 512 * tiles, Tiling(64, 512, coarse)
    features, groups, queries = unit(num, 16), torch.arange(num) // 2, torch.arange(64 * blocks)
    with CountingLists() as lists, Counting() as counts:
        nearest_neighbors(features, 20, groups, groups >= 0, queries=queries, tiling=tiling)
    return counts.operators.total(), counts.waits.total() + lists.lists


@pytest.mark.parametrize("coarse", COARSE, ids=str)
def test_a_tile_takes_few_operators_and_waits(coarse: torch.dtype, one_thread: None):
    few, many = (torch.tensor(counted(tiles, 3, coarse)) - torch.tensor(counted(tiles, 2, coarse)) for tiles in (8, 24))
    operators, waits = ((many - few) / 16).tolist()
    assert 10 < operators <= 20 and waits <= 2
    operators, waits = (few - (many - few) / 2).tolist()  # of a block of queries, whatever the number of tiles
    assert operators <= 250 and waits <= 4


def test_a_list_of_candidates_gives_ranks_and_prefixes():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(6, 50, generator=generator).round(decimals=1).to(torch.float16)
    scores[0, :3] = torch.tensor([-0.0, 0.0, -0.0])
    candidates = Candidates(6, torch.float16, torch.device("cpu"))
    row, place = (scores > torch.tensor([-9, -1, -0.5, 0, 1, 9])[:, None]).nonzero(as_tuple=True)
    for part in torch.randperm(len(row), generator=generator).split(40):
        candidates.add(row[part], scores[row[part], place[part]], place[part])
    for rank in (1, 2, 30, 51):
        expected = [
            kept.sort(descending=True).values[rank - 1].item() if len(kept) >= rank else -torch.inf
            for kept in (scores[each, place[row == each]].float() for each in range(6))
        ]
        assert candidates.nth_largest(rank).tolist() == expected
    bound = torch.tensor([0.0, 0.5, -2, 3, 1.5, 0], dtype=torch.float16)
    found = {(r, p) for r, p in zip(*map(Tensor.tolist, candidates.reaching(bound)), strict=True)}
    assert found == {(r, p) for r, p in zip(row.tolist(), place.tolist(), strict=True) if scores[r, p] >= bound[r]}
    best = largest_of_rows(packed(scores[row, place].float(), place), row, 6, 4)
    assert (best[5] == best[5, 0]).all() and (best[0].diff() < 0).all()


@pytest.mark.parametrize("dim", [1, 2, 7, 48, 96, 256])
def test_dot_products_are_folded(dim: int):
    rows = unit(200, dim)
    row, place = torch.randint(200, (2, 500), generator=torch.Generator().manual_seed(0))
    assert torch.equal(dot_products(rows, rows, row, place), folded(rows[row].double() * rows[place].double()).float())


def test_sums_of_16_bits_are_left_to_others():
    matmul = torch.backends.cuda.matmul
    seen = []
    first, second = (Tiling(4, 40, torch.bfloat16), unit(50, 8))
    keep: Callable[..., Any] = KeyShard.excluded

    def barred(*arguments: Any) -> Any:
        seen.append((matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction))
        return keep(*arguments)

    before = matmul.allow_bf16_reduced_precision_reduction
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyShard, "barred", barred)
        nearest_neighbors(second, 3, torch.arange(50), torch.ones(50, dtype=torch.bool), tiling=first)
    assert seen and set(seen) == {(False, False)}
    assert matmul.allow_bf16_reduced_precision_reduction is before


_KERNELS_FIND_THE_SAME = """
import torch
from distav.memory import top_k, top_k_kernels
from distav.memory.knn import nearest_neighbors
from distav.memory.key_shard import Tiling

torch.set_num_threads(1)  # The interpreter keeps its state in globals.
top_k_kernels.check(torch.device("cpu"), 24)
top_k_kernels._SPAN, top_k_kernels._COLUMNS = 256, 128  # The interpreter is slow.
generator = torch.Generator().manual_seed(0)
rows = torch.nn.functional.normalize(torch.randn(160, 24, generator=generator), dim=1)
rows[100:150] = rows[100]  # Of copies more pass than there are slots.
valid = torch.rand(160, generator=generator) < 0.95
top_k.SLOTS = 40
for coarse, k in ((torch.float16, 5), (torch.bfloat16, 30)):
    data = rows, k, torch.arange(160) // 2, valid
    top_k.kernels_for = lambda device, width: None
    plain = nearest_neighbors(*data, tiling=Tiling(90, 70, coarse))
    top_k.kernels_for = lambda device, width: top_k_kernels
    for ours, expected in zip(nearest_neighbors(*data, tiling=Tiling(90, 70, coarse)), plain, strict=True):
        assert torch.equal(ours, expected)
"""


def test_kernels_find_the_same_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", _KERNELS_FIND_THE_SAME],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dim", [48, 256])
def test_kernels_compile_for_a_gpu(dim: int):
    compiler = pytest.importorskip("triton.compiler")
    from triton import compile
    from triton.backends.compiler import GPUTarget

    from distav.memory import top_k_kernels

    target, length = GPUTarget("cuda", 90, 32), dim & -dim
    append = {"scores": "*bf16", "bound": "*bf16", "held": "*i64", "filled": "*i32"}
    append |= {name: "i32" for name in ("width", "slots", "tile", "tiles")} | {
        "SPAN": "constexpr",
        "COLUMNS": "constexpr",
    }
    sizes = {"SPAN": top_k_kernels._SPAN, "COLUMNS": top_k_kernels._COLUMNS}
    assert compile(compiler.ASTSource(top_k_kernels._append_passing, append, sizes), target=target).asm["cubin"]
    fold = {"queries": "*fp32", "keys": "*fp32", "row": "*i64", "place": "*i64", "out": "*fp64", "number": "i32"}
    sizes = {"PAIRS": top_k_kernels._TERMS // length, "PARTS": dim // length, "LENGTH": length}
    sizes |= {"HALVINGS": length.bit_length() - 1}
    fold |= {name: "constexpr" for name in sizes}
    assert compile(compiler.ASTSource(top_k_kernels._fold_products, fold, sizes), target=target).asm["cubin"]
