"""The bank takes no more memory than it must, and a step on it never makes the host wait for a GPU."""

import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from distav.distributed.rng import sample_seeds, uniform
from distav.losses.active_complementary import active_complementary_loss, rescale_matching_probability
from distav.losses.category_contrast import category_agreement, category_loss
from distav.losses.classification import hybrid_targets
from distav.losses.info_nce import WITHIN_MODAL, InBatchNegatives, SampledNegatives, cross_entropy
from distav.losses.instance_discrimination import SoftTargets, instance_losses
from distav.losses.reduction import weighted_mean
from distav.memory import attention_backends
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.negative_sampling import NegativeSampling
from tests.helpers.synchronizations import Synchronizations

CPU = torch.device("cpu")
DIM, CATEGORIES = 16, 5


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def batch_of(ids: Tensor, dim: int = DIM, seed: int = 1) -> GlobalBatch:
    return GlobalBatch.gather(ids, ids >= 0, unit(len(ids), dim, seed=seed), unit(len(ids), dim, seed=seed + 1))


def fresh_bank(num: int = 50, dim: int = DIM, **more: object) -> Bank:
    return Bank(num, dim, 0.5, CPU, seed=3, num_categories=CATEGORIES, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("rounded", [False, True])
def test_an_update_does_not_wait(rounded: bool):
    bank = fresh_bank(dtype=torch.bfloat16 if rounded else torch.float32)
    ids, shares = torch.tensor([3, 9, 3, 49]), torch.rand(4, 2, CATEGORIES)
    with Synchronizations() as waits:
        visitors = batch_of(ids)
        bank.update(visitors, torch.ones(4), shares)
        bank.write("correspondence", torch.rand(4), visitors.ids, visitors.valid)
        bank.fetch(("visual", "correspondence"), visitors.ids)
        bank.assignments.gram_matrices()
    assert waits.found == []


@pytest.mark.parametrize("learns_temperature", [False, True])
@pytest.mark.parametrize("excludes_self", [False, True])
@pytest.mark.parametrize("kind", ["none", "bootstrapping", "swapped", "neighbor", "cycle"])
def test_an_instance_loss_does_not_wait(kind: str, excludes_self: bool, learns_temperature: bool):
    bank, ids = fresh_bank(), torch.tensor([3, 9, 3, 49])
    temperature = torch.tensor(0.07, requires_grad=True) if learns_temperature else 0.07
    soft = SoftTargets(kind, 0.1, 0.1, excludes_self)
    pair = [unit(4, DIM, seed=seed).requires_grad_() for seed in (5, 6)]
    arguments = bank, batch_of(ids), *pair, temperature

    def step() -> None:
        losses = instance_losses(*arguments, torch.ones(4), soft, mask_uninitialized=True).losses
        losses = losses + instance_losses(*arguments, directions=WITHIN_MODAL).losses
        weighted_mean(losses, torch.ones(4)).backward()

    step()  # The back ends are tried on first use.
    with Synchronizations() as waits:
        step()
    assert waits.found == []


def test_other_losses_do_not_wait():
    bank, ids = fresh_bank(), torch.tensor([3, 9, 3, 49])
    pair = [unit(4, DIM, seed=seed).requires_grad_() for seed in (5, 6)]
    visitors, logits = batch_of(ids), torch.rand(2, 4, CATEGORIES).requires_grad_()
    with Synchronizations() as waits:
        candidates = (
            InBatchNegatives(visitors, *pair, 0.07),
            SampledNegatives(bank, visitors, *pair, 0.07, NegativeSampling(16, 0, 1)),
        )
        for each in candidates:
            loss = weighted_mean(each.losses(active_complementary_loss(torch.rand(4), 5.0)), torch.ones(4))
            loss = loss + weighted_mean(each.losses(cross_entropy), torch.ones(4))
            loss.backward()
            rescale_matching_probability(each.matching_probability(), each.num_candidates(), 10)
        category = category_loss(*logits, torch.rand(4), 1.0, bank.assignments.gram_matrices())
        (category.contrast + category.imbalance + category.row_entropy).backward()
        bank.update(visitors, category_agreement(category.weighted_probs), category.weighted_probs)
        rescale_matching_probability(torch.rand(4), bank.num_samples, 10)
        hybrid_targets(ids % 3, torch.rand(4, 3), torch.rand(4))
    assert waits.found == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_forward_pass_on_a_gpu_mixes_no_devices_and_does_not_wait(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """On tensors that have a device and a shape and no values; FlexAttention is the one part that needs values."""

    def flex(queries: Tensor, keys: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, exclude: Tensor | None):
        assert keys.shape == values.shape and queries.shape[0] == keys.shape[0] == 9 and scale.dim() == 0
        assert bias is None or bias.shape == (9, keys.shape[2])
        assert exclude is None or exclude.shape == (9, queries.shape[2], 1)
        assert {each.device.type for each in (keys, scale, bias, exclude) if each is not None} == {"cuda"}
        return queries.new_empty(queries.shape[:3]), torch.empty_like(queries)

    monkeypatch.setattr(attention_backends, "probe", lambda *_call: "")
    monkeypatch.setattr(attention_backends, "_compiled_flex", lambda: flex)
    monkeypatch.setattr(attention_backends, "_num_parts", lambda _queries, _num_keys: 9)
    gpu = torch.device("cuda", 0)
    with FakeTensorMode(), torch.no_grad():
        bank = Bank(5003, 128, 0.5, gpu, num_categories=CATEGORIES, dtype=dtype)
        ids, ones = torch.zeros(300, dtype=torch.int64, device=gpu), torch.ones(300, device=gpu)
        pair, logits = torch.randn(2, 300, 128, device=gpu), torch.randn(2, 300, CATEGORIES, device=gpu)
        with Synchronizations() as waits:
            visitors = GlobalBatch.gather(ids, ids >= 0, *pair)
            for kind in ("none", "bootstrapping", "swapped", "neighbor", "cycle"):
                for temperature in (0.07, torch.full((), 0.07, device=gpu)):
                    for also in (False, True):
                        soft = SoftTargets(kind, 0.1, 0.1, excludes_self=also)
                        arguments = bank, visitors, *pair, temperature, ones, soft
                        weighted_mean(instance_losses(*arguments, mask_uninitialized=also).losses, ones)
            InBatchNegatives(visitors, *pair, 0.07).losses(active_complementary_loss(ones, 5.0))
            drawn = SampledNegatives(bank, visitors, *pair, 0.07, NegativeSampling(64, 0, 1))
            drawn.drawn.sums(
                rescale_matching_probability(drawn.matching_probability(), drawn.num_candidates(), 10)[:, None].expand(
                    -1, 64
                ),
                "audio",
            )
            category = category_loss(*logits, ones, 1.0, bank.assignments.gram_matrices())
            bank.write("correspondence", bank.fetch(("correspondence",), ids)[0], ids, visitors.valid)
            bank.update(visitors, category_agreement(category.weighted_probs), category.weighted_probs)
            bank.refresh()
            bank.reinitialize()
    assert waits.found == []


def updated_row_by_row(bank: Bank, visitors: GlobalBatch, agreement: Tensor, shares: Tensor) -> dict[str, Tensor]:
    """What an update makes of the columns, one row after the other."""
    after = {name: column.clone() for name, column in bank.columns.items()}
    finite = torch.isfinite(visitors.visual.sum(1)) & torch.isfinite(visitors.audio.sum(1))
    own = torch.cat([agreement[:, None], shares.flatten(1)], dim=1)
    for row in visitors.ids.unique().tolist():
        usable = (visitors.ids == row) & visitors.valid & finite
        if usable.any():
            for name in ("visual", "audio"):
                mean = getattr(visitors, name)[usable].mean(0)
                after[name][row] = F.normalize(0.5 * after[name][row] + 0.5 * mean, dim=0)
            after["visits"][row] += 1
            after["pair_similarity"][row] = after["visual"][row] @ after["audio"][row]
        usable &= torch.isfinite(own.sum(1))
        if usable.any():
            mean = own[usable].mean(0)
            after["category_agreement"][row] = 0.5 * after["category_agreement"][row] + 0.5 * mean[0]
            after["categories"][row] = (mean[1:].view(2, -1).clamp(0, 1) * 127).round().to(torch.uint8)
    return after


@pytest.mark.parametrize("usable", ["all", "some", "none"])
@pytest.mark.parametrize("repeats", [False, True])
def test_an_update_writes_each_row_once_and_no_other(repeats: bool, usable: str):
    generator = torch.Generator().manual_seed(0)
    bank = fresh_bank(40)
    for step in range(6):
        ids = torch.randint(12, (20,), generator=generator) if repeats else torch.randperm(40, generator=generator)[:20]
        pair = [unit(20, DIM, seed=10 * step + each) for each in range(2)]
        agreement, shares = torch.rand(20, generator=generator), torch.rand(20, 2, CATEGORIES, generator=generator)
        valid = torch.ones(20, dtype=torch.bool)
        if usable != "all":
            valid = torch.rand(20, generator=generator) < (0.6 if usable == "some" else 0.0)
            pair[0][3, 0], pair[1][5, 0], agreement[7], shares[8, 1, 2] = math.nan, math.inf, math.nan, math.inf
        visitors = GlobalBatch.gather(ids, valid, *pair)
        expected = updated_row_by_row(bank, visitors, agreement, shares)
        bank.update(visitors, agreement, shares)
        others = ~torch.isin(torch.arange(40), ids[valid])
        for name, column in expected.items():
            torch.testing.assert_close(bank.columns[name], column, rtol=1e-6, atol=1e-6)
            assert torch.equal(bank.columns[name][others], column[others])
        visual, audio = bank.columns["categories"].double().unbind(1)
        gram = torch.stack([visual.T @ visual, visual.T @ audio, audio.T @ audio])
        assert torch.equal(bank.assignments.gram, gram)
        assert bank.assignments.num_assigned == bank.columns["categories"].flatten(1).any(1).sum()


def test_a_batch_may_have_one_sample():
    bank = fresh_bank(dim=8)
    visitors = batch_of(torch.tensor([2**40 + 1]), dim=8)
    assert visitors.ids.tolist() == [2**40 + 1] and visitors.valid.tolist() == [True]
    bank.update(batch_of(torch.tensor([7]), dim=8), torch.ones(1))
    assert bank.columns["visits"].nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize(("num", "dim"), [(1, 8), (5000, 128), (20_000, 33)])
def test_rows_are_filled_as_if_all_max_parallel(num: int, dim: int):
    bank = Bank(num, dim, 0.5, CPU, seed=3, dtype=torch.bfloat16)
    for stream, name in enumerate(("visual", "audio"), start=1):
        draws = uniform(sample_seeds(3, 0, torch.arange(num)), stream, 2 * dim).clamp_min(1e-7)
        radius, angle = (-2 * draws[:, :dim].log()).sqrt(), 2 * math.pi * draws[:, dim:]
        assert torch.equal(bank.columns[name], F.normalize(radius * angle.cos(), dim=1))
        assert torch.equal(bank.keys(name), bank.columns[name].bfloat16())
    assert torch.equal(bank.columns["pair_similarity"], (bank.columns["visual"] * bank.columns["audio"]).sum(1))
    state = bank.state()
    bank.update(batch_of(torch.arange(1), dim), torch.ones(1))
    bank.reinitialize()
    assert all(torch.equal(column, state[name]) for name, column in bank.columns.items())
    assert all(torch.equal(bank.keys(name), bank.columns[name].bfloat16()) for name in ("visual", "audio"))


TILE_BYTES = 64 * 2**20


def resident(name: str) -> int:
    """A size from the kernel's account of this process, in bytes."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(name))
    return int(line.split()[1]) * 1024


def growth(work: Callable[[], object]) -> int:
    """By how many bytes the peak of this process rises above what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def bank_growths(num: int) -> tuple[int, dict[str, int]]:
    """The size of a bank and what it takes to build it and to bring it up to date."""
    torch.set_num_threads(1)
    Bank(4096, 128, 0.5, CPU).state()  # what the libraries allocate once
    banks: list[Bank] = []
    found = {"build": growth(lambda: banks.append(Bank(num, 128, 0.5, CPU, dtype=torch.bfloat16)))}
    (bank,) = banks
    size = sum(each.nbytes for each in [*bank.columns.values(), bank.keys("visual"), bank.keys("audio")])
    state = bank.state()
    for name, work in (
        ("restart", bank.reinitialize),
        ("refresh", bank.refresh),
        ("restore", lambda: bank.restore([state])),
    ):
        found[name] = growth(work)
    return size, found


@pytest.mark.parametrize("num", [100_000, pytest.param(2_000_000, marks=pytest.mark.long)])
def test_a_bank_takes_little_more_memory_than_its_rows(num: int):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        size, found = pool.apply(bank_growths, (num,))
    assert found.pop("build") <= 1.3 * size + TILE_BYTES
    assert all(each <= TILE_BYTES for each in found.values()), found
