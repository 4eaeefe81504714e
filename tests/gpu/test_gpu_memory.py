"""The memory bank, its losses and its attention on a GPU: no waits, no recompilation, no memory beyond the rows."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from distav.losses.active_complementary import active_complementary_loss, rescale_matching_probability
from distav.losses.category_contrast import category_agreement, category_loss
from distav.losses.info_nce import WITHIN_MODAL, InBatchNegatives, SampledNegatives, cross_entropy
from distav.losses.instance_discrimination import SoftTargets, instance_losses
from distav.losses.reduction import weighted_mean
from distav.memory import fused_attention
from distav.memory.attention import AttentionInputs, reference_attention
from distav.memory.attention_backends import BACKENDS, select_backend
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.negative_sampling import NegativeSampling
from distav.memory.softmax import attend
from tests.helpers.bank import unit
from tools.bench.command import main

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DIM, CATEGORIES = 128, 30


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Clears compiled code: FlexAttention is compiled for at most eight kinds of calls, and all tests need more."""
    torch._dynamo.reset()
    fused_attention._compiled_flex.cache_clear()
    yield
    torch._dynamo.reset()
    fused_attention._compiled_flex.cache_clear()


def inputs_of(
    num_queries: int, num_keys: int, scale: float | Tensor, with_bias: bool = False, with_exclude: bool = False
) -> AttentionInputs:
    queries, keys = unit(num_queries, DIM).to(GPU), unit(num_keys, DIM, seed=1).to(GPU, torch.bfloat16)
    bias = torch.linspace(-2, 2, num_keys, device=GPU) if with_bias else None
    exclude = torch.arange(num_queries, device=GPU)[:, None] % num_keys if with_exclude else None
    return AttentionInputs(queries.bfloat16(), keys, keys, scale, bias, exclude)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("with_exclude", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_flex_attention_is_compiled_once_for_all_temperatures(
    with_bias: bool, with_exclude: bool, monkeypatch: pytest.MonkeyPatch
):
    counter = CompileCounterWithBackend("inductor")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    flex = next(backend for backend in BACKENDS if backend.name == "flex")
    for number in range(14):
        scale = 1 / (0.02 + 0.01 * number)
        inputs = inputs_of(200 + number, 5000 + 1711 * number, scale, with_bias, with_exclude)
        if number > 11:
            inputs = dataclasses.replace(inputs, scale=torch.full((), scale, device=GPU))
        for actual, expected in zip(flex.run(inputs), reference_attention(inputs), strict=True):
            torch.testing.assert_close(actual.double(), expected, atol=1e-2, rtol=1e-2)
    assert counter.frame_count == 1


@pytest.mark.parametrize("num_keys", [1, 2, 3, 127, 129, 2051])
@pytest.mark.parametrize("name", ["cudnn", "flash", "flex", "tiles"])
def test_few_keys_equal_the_reference(name: str, num_keys: int):
    inputs = inputs_of(33, num_keys, 10.0)
    backend = next(backend for backend in BACKENDS if backend.name == name)
    assert backend.supports(inputs) == (name != "cudnn" or num_keys > 1)
    if not backend.supports(inputs):
        with pytest.raises(ValueError, match="backend=cudnn does not support these inputs; supported: flash, flex"):
            attend(inputs.queries, inputs.keys, inputs.values, 0.1, backend=name)
        return
    for actual, expected in zip(backend.run(inputs), reference_attention(inputs), strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=1e-2, rtol=1e-2)


def test_attention_runs_fused():
    names = {
        (with_bias, with_exclude): select_backend(inputs_of(256, 5000, 10.0, with_bias, with_exclude)).name
        for with_bias in (False, True)
        for with_exclude in (False, True)
    }
    assert names.pop((False, False)) in ("cudnn", "flash")
    assert set(names.values()) == {"flex"}


@pytest.mark.parametrize("backend", ["cudnn", "flash", "flex", "tiles"])
def test_a_tensor_temperature_equals_a_number(backend: str):
    queries, keys = unit(300, DIM).to(GPU), unit(5000, DIM, seed=1).to(GPU, torch.bfloat16)
    output = attend(queries, keys, keys, torch.full((), 0.07, device=GPU), backend=backend)
    for actual, expected in zip(output, attend(queries, keys, keys, 0.07, backend=backend), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)


def bank_on(device: torch.device, num_samples: int = 5000, dtype: torch.dtype = torch.bfloat16) -> Bank:
    return Bank(num_samples, DIM, 0.5, device, seed=3, num_categories=CATEGORIES, dtype=dtype)


def batch_on(device: torch.device, seed: int = 0) -> GlobalBatch:
    """A batch with repeated ids, and with rows that are not valid or not finite."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5000, (300,), generator=generator)
    ids[10:20] = ids[:10]
    visual, audio = unit(300, DIM, seed=seed + 1), unit(300, DIM, seed=seed + 2)
    visual[5, 0] = torch.nan
    valid = torch.rand(300, generator=generator) < 0.9
    return GlobalBatch.gather(ids.to(device), valid.to(device), visual.to(device), audio.to(device))


def test_a_step_does_not_wait_for_the_gpu():
    bank, global_batch = bank_on(GPU), batch_on(GPU)
    pair = [unit(300, DIM, seed=seed).to(GPU).requires_grad_() for seed in (5, 6)]
    logits = torch.randn(2, 300, CATEGORIES, device=GPU, requires_grad=True)
    learnable = torch.full((), 0.07, device=GPU, requires_grad=True)
    ones = torch.ones(300, device=GPU)

    def step() -> None:
        total = torch.zeros((), device=GPU)
        for kind in ("none", "bootstrapping", "swapped", "neighbor", "cycle"):
            for temperature in (0.07, learnable):
                soft = SoftTargets(kind, 0.1, 0.1, excludes_self=kind in ("neighbor", "cycle"))
                arguments = bank, global_batch, *pair, temperature, ones / 2, soft
                total = total + weighted_mean(instance_losses(*arguments, mask_uninitialized=True).losses, ones)
        within_modal = instance_losses(bank, global_batch, *pair, 0.07, directions=WITHIN_MODAL)
        total = total + weighted_mean(within_modal.losses, ones)
        in_batch = InBatchNegatives(global_batch, *pair, 0.07)
        sampled = SampledNegatives(bank, global_batch, *pair, 0.07, NegativeSampling(64, 0, 1))
        for negatives in (in_batch, sampled):
            losses = negatives.losses(active_complementary_loss(ones / 2, 5.0)) + negatives.losses(cross_entropy)
            total = total + weighted_mean(losses, ones)
            rescale_matching_probability(negatives.matching_probability(), negatives.num_candidates(), 10)
        category = category_loss(*logits, ones, 1.0, bank.assignments.gram_matrices())
        total = total + category.contrast + category.imbalance + category.row_entropy
        correspondence = bank.fetch(("correspondence",), global_batch.ids)[0]
        bank.write("correspondence", correspondence, global_batch.ids, global_batch.valid)
        bank.update(global_batch, category_agreement(category.weighted_probs), category.weighted_probs)
        total.backward()

    step()  # Runs the self-tests of the backends and compiles kernels.
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_updates_on_a_gpu_equal_those_on_a_cpu():
    cpu_bank, gpu_bank = bank_on(CPU), bank_on(GPU)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        agreement, probs = torch.rand(300, generator=generator), torch.rand(300, 2, CATEGORIES, generator=generator)
        agreement[7] = torch.inf
        for bank in (cpu_bank, gpu_bank):
            global_batch = batch_on(bank.device, seed)
            bank.update(global_batch, agreement.to(bank.device), probs.to(bank.device))
            bank.write("correspondence", agreement.to(bank.device), global_batch.ids, global_batch.valid)
    for name, column in cpu_bank.columns.items():
        gpu_column = gpu_bank.columns[name].cpu()
        if name == "categories":  # One step apart where the mean of two samples is rounded differently.
            assert (column.int() - gpu_column.int()).abs().max() <= 1
        else:
            torch.testing.assert_close(column, gpu_column, atol=1e-5, rtol=1e-5)
    assignments, stored = gpu_bank.assignments, gpu_bank.columns["categories"].double()
    visual, audio = stored.unbind(1)
    assert torch.equal(assignments.gram, torch.stack([visual.T @ visual, visual.T @ audio, audio.T @ audio]))
    assert int(assignments.num_assigned) == int(stored.flatten(1).any(1).sum())
    gram = assignments.gram.clone()
    assignments.recount()
    assert torch.equal(assignments.gram, gram)
    for name in ("visual", "audio"):
        assert torch.equal(gpu_bank.keys(name), gpu_bank.columns[name].bfloat16())


def test_a_bank_takes_little_more_memory_than_its_rows():
    tile_bytes = 160 * 2**20
    bank_on(GPU).reinitialize()

    def reset_peak() -> int:
        torch.cuda.reset_peak_memory_stats(GPU)
        return torch.cuda.memory_allocated(GPU)

    before = reset_peak()
    bank = bank_on(GPU, 1_000_000)
    size = torch.cuda.memory_allocated(GPU) - before
    assert size >= 1_000_000 * DIM * 2 * 6
    assert torch.cuda.max_memory_allocated(GPU) - before <= 1.3 * size + tile_bytes
    state = bank.state()
    for work in (bank.reinitialize, bank.refresh, lambda: bank.restore([state])):
        before = reset_peak()
        work()
        assert torch.cuda.max_memory_allocated(GPU) - before <= tile_bytes
    assert torch.equal(bank.columns["audio"].cpu(), state["audio"])


@pytest.mark.usefixtures("fresh_compiler")
def test_the_memory_bank_benchmark_runs_fused(tmp_path: Path):
    sizes = ["--batch=256", "--rows=20000", "--dim=64", "--memory-rows=20000", "--shard-rows=600", "--rounds=1"]
    main(["bank", "--device=cuda", *sizes, f"--json={tmp_path / 'bank.json'}"])
    results = json.loads((tmp_path / "bank.json").read_text())
    assert results["arguments"]["attention"] in ("cudnn and flex", "flash and flex")
    assert results["ratios"]["largest relative difference to dense"]["passed"]
