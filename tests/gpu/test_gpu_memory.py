"""The bank, its losses and its attention on a GPU: no waiting, no recompilation, no memory beyond the rows."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from distav.losses.active_complementary import active_complementary_loss, rescale_matching_probability
from distav.losses.category_contrast import category_agreement, category_loss
from distav.losses.info_nce import WITHIN_MODAL, InBatchNegatives, SampledNegatives, cross_entropy
from distav.losses.instance_discrimination import SoftTargets, instance_losses
from distav.losses.reduction import weighted_mean
from distav.memory import attention_backends
from distav.memory.attention import AttentionInputs, reference_attention
from distav.memory.attention_backends import BACKENDS, select_backend
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.negative_sampling import NegativeSampling
from distav.memory.softmax import attend
from tools.bench.command import main

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DIM, CATEGORIES = 128, 30


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """FlexAttention is compiled for eight kinds of call at most; all tests together make more."""
    for function in (torch._dynamo.reset, attention_backends._compiled_flex.cache_clear):
        function()
    yield
    for function in (torch._dynamo.reset, attention_backends._compiled_flex.cache_clear):
        function()


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def asked_of(
    num_queries: int, num_keys: int, scale: float | Tensor, biased: bool = False, excluded: bool = False
) -> AttentionInputs:
    queries, keys = unit(num_queries, DIM).to(GPU), unit(num_keys, DIM, seed=1).to(GPU, torch.bfloat16)
    bias = torch.linspace(-2, 2, num_keys, device=GPU) if biased else None
    exclude = torch.arange(num_queries, device=GPU)[:, None] % num_keys if excluded else None
    return AttentionInputs(queries.bfloat16(), keys, keys, scale, bias, exclude)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_flex_attention_is_compiled_once_for_all_temperatures(
    biased: bool, excluded: bool, monkeypatch: pytest.MonkeyPatch
):
    counter = CompileCounterWithBackend("inductor")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    flex = next(each for each in BACKENDS if each.name == "flex")
    for number in range(14):
        scale = 1 / (0.02 + 0.01 * number)
        asked = asked_of(200 + number, 5000 + 1711 * number, scale, biased, excluded)
        if number > 11:
            asked = AttentionInputs(
                asked.queries, asked.keys, asked.values, torch.full((), scale, device=GPU), asked.bias, asked.exclude
            )
        for ours, expected in zip(flex.run(asked), reference_attention(asked), strict=True):
            torch.testing.assert_close(ours.double(), expected, atol=1e-2, rtol=1e-2)
    assert counter.frame_count == 1


@pytest.mark.parametrize("num_keys", [1, 2, 3, 127, 129, 2051])
@pytest.mark.parametrize("back_end", ["cudnn", "flash", "flex", "tiles"])
def test_few_keys_are_attended_to_by_what_can(back_end: str, num_keys: int):
    asked = asked_of(33, num_keys, 10.0)
    chosen = next(each for each in BACKENDS if each.name == back_end)
    assert chosen.supports(asked) == (back_end != "cudnn" or num_keys > 1)
    if not chosen.supports(asked):
        with pytest.raises(ValueError, match="back_end=cudnn cannot do this here; these can: flash, flex, tiles"):
            attend(asked.queries, asked.keys, asked.values, 0.1, backend=back_end)
        return
    for ours, expected in zip(chosen.run(asked), reference_attention(asked), strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=1e-2, rtol=1e-2)


def test_attention_runs_fused():
    names = {
        (biased, excluded): select_backend(asked_of(256, 5000, 10.0, biased, excluded)).name
        for biased in (False, True)
        for excluded in (False, True)
    }
    assert names.pop((False, False)) in ("cudnn", "flash")
    assert set(names.values()) == {"flex"}


@pytest.mark.parametrize("back_end", ["cudnn", "flash", "flex", "tiles"])
def test_a_temperature_on_the_gpu_is_a_temperature(back_end: str):
    queries, keys = unit(300, DIM).to(GPU), unit(5000, DIM, seed=1).to(GPU, torch.bfloat16)
    found = attend(queries, keys, keys, torch.full((), 0.07, device=GPU), backend=back_end)
    for ours, expected in zip(found, attend(queries, keys, keys, 0.07, backend=back_end), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-2, rtol=1e-2)


def bank_on(device: torch.device, num: int = 5000, dtype: torch.dtype = torch.bfloat16) -> Bank:
    return Bank(num, DIM, 0.5, device, seed=3, num_categories=CATEGORIES, dtype=dtype)


def visitors_on(device: torch.device, seed: int = 0) -> GlobalBatch:
    """A batch with ids that are there twice, with rows that are not valid or not finite."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5000, (300,), generator=generator)
    ids[10:20] = ids[:10]
    visual, audio = unit(300, DIM, seed=seed + 1), unit(300, DIM, seed=seed + 2)
    visual[5, 0] = torch.nan
    valid = torch.rand(300, generator=generator) < 0.9
    return GlobalBatch.gather(*(each.to(device) for each in (ids, valid, visual, audio)))


def test_a_step_does_not_wait_for_the_gpu():
    bank, global_batch = bank_on(GPU), visitors_on(GPU)
    pair = [unit(300, DIM, seed=seed).to(GPU).requires_grad_() for seed in (5, 6)]
    logits = torch.randn(2, 300, CATEGORIES, device=GPU, requires_grad=True)
    learnt = torch.full((), 0.07, device=GPU, requires_grad=True)
    ones = torch.ones(300, device=GPU)

    def step() -> None:
        total = torch.zeros((), device=GPU)
        for kind in ("none", "bootstrapping", "swapped", "neighbor", "cycle"):
            for temperature in (0.07, learnt):
                soft = SoftTargets(kind, 0.1, 0.1, excludes_self=kind in ("neighbor", "cycle"))
                losses = instance_losses(
                    bank, global_batch, *pair, temperature, ones / 2, soft, mask_uninitialized=True
                ).losses
                total = total + weighted_mean(losses, ones)
        total = total + weighted_mean(instance_losses(bank, global_batch, *pair, 0.07, directions=WITHIN_MODAL).losses, ones)
        batch, drawn = (
            InBatchNegatives(global_batch, *pair, 0.07),
            SampledNegatives(bank, global_batch, *pair, 0.07, NegativeSampling(64, 0, 1)),
        )
        for each in (batch, drawn):
            total = total + weighted_mean(
                each.losses(active_complementary_loss(ones / 2, 5.0)) + each.losses(cross_entropy), ones
            )
            rescale_matching_probability(each.matching_probability(), each.num_candidates(), 10)
        category = category_loss(*logits, ones, 1.0, bank.assignments.gram_matrices())
        total = total + category.contrast + category.imbalance + category.row_entropy
        believed = bank.fetch(("correspondence",), global_batch.ids)[0]
        bank.write("correspondence", believed, global_batch.ids, global_batch.valid)
        bank.update(global_batch, category_agreement(category.weighted_probs), category.weighted_probs)
        total.backward()

    step()  # Back ends are tried and kernels compiled on first use.
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_updates_are_the_same_on_both():
    banks = [bank_on(device) for device in (CPU, GPU)]
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        agreement, shares = torch.rand(300, generator=generator), torch.rand(300, 2, CATEGORIES, generator=generator)
        agreement[7] = torch.inf
        for bank in banks:
            global_batch = visitors_on(bank.device, seed)
            bank.update(global_batch, agreement.to(bank.device), shares.to(bank.device))
            bank.write("correspondence", agreement.to(bank.device), global_batch.ids, global_batch.valid)
    here, there = banks
    for name, column in here.columns.items():
        other = there.columns[name].cpu()
        if name == "categories":  # a step of the rounding apart where the mean of two is rounded differently
            assert (column.int() - other.int()).abs().max() <= 1
        else:
            torch.testing.assert_close(column, other, atol=1e-5, rtol=1e-5)
    stored = there.columns["categories"].double()
    visual, audio = stored.unbind(1)
    assert torch.equal(there.assignments.gram, torch.stack([visual.T @ visual, visual.T @ audio, audio.T @ audio]))
    assert int(there.assignments.num_assigned) == int(stored.flatten(1).any(1).sum())
    gram = there.assignments.gram.clone()
    there.assignments.recount()
    assert torch.equal(there.assignments.gram, gram)
    for name in ("visual", "audio"):
        assert torch.equal(there.keys(name), there.columns[name].bfloat16())


def test_a_bank_takes_little_more_memory_than_its_rows():
    tile = 160 * 2**20
    bank_on(GPU).reinitialize()

    def begin() -> int:
        torch.cuda.reset_peak_memory_stats(GPU)
        return torch.cuda.memory_allocated(GPU)

    before = begin()
    bank = bank_on(GPU, 1_000_000)
    size = torch.cuda.memory_allocated(GPU) - before
    assert size >= 1_000_000 * DIM * 2 * 6
    assert torch.cuda.max_memory_allocated(GPU) - before <= 1.3 * size + tile
    state = bank.state()
    for work in (bank.reinitialize, bank.refresh, lambda: bank.restore([state])):
        before = begin()
        work()
        assert torch.cuda.max_memory_allocated(GPU) - before <= tile
    assert torch.equal(bank.columns["audio"].cpu(), state["audio"])


@pytest.mark.usefixtures("fresh_compiler")
def test_the_benchmark_of_the_bank_runs_fused(tmp_path: Path):
    sizes = ["--batch=256", "--rows=20000", "--dim=64", "--memory-rows=20000", "--shard-rows=600", "--rounds=1"]
    main(["bank", "--device=cuda", *sizes, f"--json={tmp_path / 'bank.json'}"])
    found = json.loads((tmp_path / "bank.json").read_text())
    assert found["arguments"]["attention"] in ("cudnn and flex", "flash and flex")
    assert found["ratios"]["largest relative difference to dense"]["met"]
