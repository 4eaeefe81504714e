"""Exact loss over the memory bank, compared with its matrix products alone and with dense cross-entropy.

Legend: B queries, N rows of the memory bank, D embedding dimension.
"""

import ctypes
import dataclasses
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distav.config.errors import UserError
from distav.distributed.collectives import all_gather_rows, get_world_size, local_batch
from distav.losses.category_contrast import category_agreement, category_loss
from distav.losses.instance_discrimination import SoftTargets, instance_losses
from distav.memory.attention import AttentionInputs
from distav.memory.attention_backends import select_backend
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from tools.bench.multiprocess import cpu_seconds, loopback_bytes, run_on_ranks
from tools.bench.timing import Results, Setting

TEMPERATURE = 0.07
CATEGORIES = 300
MEASURED_GLOO_STEPS = 3


class MemoryBankBenchmark:
    """A random memory bank and batch, the same for any number of ranks; each rank holds its shard of the batch."""

    def __init__(self, batch: int, rows: int, dim: int, device: torch.device, num_categories: int = 0):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.num_rows = rows
        self.bank = Bank(rows, dim, 0.5, device, seed=1, num_categories=num_categories, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randperm(rows, generator=generator)[:batch]
        visual = F.normalize(torch.randn(batch, dim, generator=generator), dim=1)
        audio = F.normalize(torch.randn(batch, dim, generator=generator), dim=1)
        logits = torch.randn(2, batch, max(1, num_categories), generator=generator)
        self.ids = local_batch(ids).to(device)
        self.visual, self.audio = local_batch(visual).to(device), local_batch(audio).to(device)
        self.logits = local_batch(logits.transpose(0, 1)).transpose(0, 1).contiguous().to(device)
        self.ones = torch.ones(len(self.ids), device=device)
        self.tau = TEMPERATURE

    def backends(self) -> list[str]:
        """Return the names of the attention backends of the loss, without and with a bias."""
        keys = self.bank.keys("visual")
        plain = AttentionInputs(self.visual, keys, keys, 1.0)
        biased = dataclasses.replace(plain, bias=self.bank.resident_column("pair_similarity"))
        return [select_backend(inputs).name for inputs in (plain, biased)]

    def global_batch(self) -> GlobalBatch:
        """Gather the batch of all ranks."""
        return GlobalBatch.gather(self.ids, self.ones > 0, self.visual, self.audio)

    def loss(self, soft_targets: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum of the losses of both directions, and the gradients of both modalities."""
        visual, audio = self.visual.clone().requires_grad_(), self.audio.clone().requires_grad_()
        softness = 0.5 * self.ones if soft_targets else None
        losses = instance_losses(
            self.bank, self.global_batch(), visual, audio, self.tau, softness, SoftTargets(soft_targets)
        ).losses
        losses.sum().backward()
        assert visual.grad is not None and audio.grad is not None
        return losses.detach(), visual.grad, audio.grad

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same values as `loss`, computed with a dense matrix of logits and autograd."""
        visual, audio = self.visual.clone().requires_grad_(), self.audio.clone().requires_grad_()
        losses = torch.zeros_like(self.ones)
        for queries, modality in ((visual, "audio"), (audio, "visual")):
            logits = queries @ self.bank.columns[modality].T / self.tau
            losses = losses + F.cross_entropy(logits, self.ids, reduction="none")
        losses.sum().backward()
        assert visual.grad is not None and audio.grad is not None
        return losses.detach(), visual.grad, audio.grad

    def step(self, with_categories: bool) -> None:
        """Compute loss and gradient and update the memory bank, with or without the category-level loss."""
        visual, audio = self.visual.clone().requires_grad_(), self.audio.clone().requires_grad_()
        global_batch = self.global_batch()
        loss = instance_losses(self.bank, global_batch, visual, audio, self.tau).losses.sum()
        probs = None
        if with_categories:
            logits = [part.clone().requires_grad_() for part in self.logits]
            memory = self.bank.assignments.gram_matrices()
            category = category_loss(logits[0], logits[1], self.ones, 1.0, memory)
            loss = loss + category.contrast + category.imbalance + category.row_entropy
            probs, agreement = category.weighted_probs, category_agreement(category.weighted_probs)
        else:
            agreement = self.ones
        loss.backward()
        self.bank.update(global_batch, agreement, probs)

    def matrix_products(self, width: int) -> None:
        """Compute the matrix products of both directions alone, 4 B N D operations each, `width` rows at a time."""
        for queries, modality in ((self.visual, "audio"), (self.audio, "visual")):
            keys = self.bank.keys(modality)
            queries = queries.to(keys.dtype)
            logits = queries.new_empty(len(queries), width)
            out = torch.zeros_like(queries)
            for start in range(0, len(keys), width):
                block = keys[start : start + width]
                torch.mm(queries, block.T, out=logits[:, : len(block)])
                out.addmm_(logits[:, : len(block)], block)


def run(setting: Setting, batch: int, rows: int, dim: int, memory_rows: int, shard_rows: int) -> Results:
    """Measure time, memory and traffic of the loss.

    Args:
        setting: device, threads, rounds.
        batch: B.
        rows: N of the timings.
        dim: D.
        memory_rows: N of the memory measurement.
        shard_rows: N of the sharded memory bank.

    Raises:
        UserError: if there is no fused attention backend for this dimension and device.
    """
    benchmark = MemoryBankBenchmark(batch, rows, dim, setting.device)
    backends = benchmark.backends()
    if "tiles" in backends:
        raise UserError(f"--dim={dim}: no fused attention backend on {setting.device.type}; the log gives the reason.")
    sizes = {"batch": batch, "rows": rows, "dim": dim, "threads": setting.threads, "device": setting.device.type}
    results = Results("bank", sizes | {"attention": " and ".join(dict.fromkeys(backends))})
    _compare_times(results, setting, benchmark)
    _compare_values(results, dim, setting.device)
    _compare_categories(results, setting, batch, rows, dim)
    _compare_memory(results, batch, memory_rows, dim, setting.device)
    if setting.device.type == "cpu" and setting.threads == 1:
        _measure_sharded(results, batch, shard_rows, dim, setting.rounds)
    return results


def _compare_times(results: Results, setting: Setting, benchmark: MemoryBankBenchmark) -> None:
    """Compare the loss with its matrix products, with dense cross-entropy, and with soft targets."""
    on_cpu = setting.device.type == "cpu"
    widths = (512, 2048) if on_cpu else (2**15, 2**17)
    products = {
        f"matrix products, {width} rows at a time": lambda width=width: benchmark.matrix_products(width)
        for width in widths
    }
    candidates = {**products, "loss + gradient": benchmark.loss}
    if on_cpu:
        candidates["dense cross-entropy"] = benchmark.dense
    for soft_targets in ("bootstrapping", "swapped", "neighbor", "cycle"):
        candidates[f"loss + gradient, {soft_targets}"] = lambda name=soft_targets: benchmark.loss(name)
    seconds = setting.interleaved(candidates)
    operations = 8 * len(benchmark.ids) * benchmark.num_rows * benchmark.visual.shape[1] / 1e9
    results.add_times(seconds, {name: (operations, "GFLOP/s") for name in products})
    fastest = [min(pair) for pair in zip(*(seconds[name] for name in products), strict=True)]
    plain = seconds["loss + gradient"]
    results.add_ratio("loss + gradient / matrix products", (plain, fastest), "<= 1.25" if on_cpu else "<= 1.7")
    if on_cpu:
        results.add_ratio(
            "dense cross-entropy / loss + gradient, time", (seconds["dense cross-entropy"], plain), ">= 3"
        )
    results.add_ratio("cycle-consistent / plain loss", (seconds["loss + gradient, cycle"], plain), "<= 2.2")


def _compare_values(results: Results, dim: int, device: torch.device) -> None:
    """Compare loss and gradients with dense cross-entropy."""
    exact = MemoryBankBenchmark(64, 4096, dim, device)
    dense = MemoryBankBenchmark(64, 4096, dim, device)
    worst = max(_relative_difference(a, b) for a, b in zip(exact.loss(), dense.dense(), strict=True))
    # On a GPU, rows and queries are rounded to bfloat16, a relative error of at most 2^-9.
    on_cpu = device.type == "cpu"
    results.add_ratio("largest relative difference to dense", worst, "<= 1e-5" if on_cpu else "<= 1e-2")


def _compare_categories(results: Results, setting: Setting, batch: int, rows: int, dim: int) -> None:
    """Measure the cost of the category-level loss."""
    categories = MemoryBankBenchmark(batch, rows, dim, setting.device, CATEGORIES)
    seconds = setting.interleaved(
        {
            "loss + gradient + update": lambda: categories.step(False),
            f"loss + gradient + update, {CATEGORIES} categories": lambda: categories.step(True),
        }
    )
    results.add_times(seconds)
    instance, both = seconds.values()
    results.add_ratio("instance + category / instance", (both, instance), "<= 1.1")


def _relative_difference(values: Tensor, reference: Tensor) -> float:
    return float((values.double() - reference.double()).norm() / reference.double().norm())


def _compare_memory(results: Results, batch: int, rows: int, dim: int, device: torch.device) -> None:
    """Measure the additional peak memory of both implementations, each in its own process."""
    context = multiprocessing.get_context("spawn")
    peaks = []
    for method in ("loss", "dense"):
        with context.Pool(1) as pool:
            peaks.append(pool.apply(_peak_growth, (method, batch, rows, dim, device)))
    results.add_value(f"extra memory of loss + gradient, N={rows}", peaks[0] / 2**20, "MiB")
    results.add_value(f"extra memory of dense cross-entropy, N={rows}", peaks[1] / 2**20, "MiB")
    results.add_ratio("dense cross-entropy / loss + gradient, memory", peaks[1] / peaks[0], ">= 20")


def _peak_growth(method: str, batch: int, rows: int, dim: int, device: torch.device) -> int:
    torch.set_num_threads(1)
    MemoryBankBenchmark(8, 64, dim, device).loss()  # one-time allocations of the libraries
    benchmark = MemoryBankBenchmark(batch, rows, dim, device)
    run_once: Callable[[], object] = getattr(benchmark, method)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run_once()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # freed memory of the setup could hide the growth
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    run_once()
    return max(2**12, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    """Return a memory size of this process in bytes, by its name in /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def _measure_sharded(results: Results, batch: int, rows: int, dim: int, rounds: int) -> None:
    """Measure total CPU time, traffic and differences for a memory bank sharded over 2 and 4 processes."""
    (single,) = run_on_ranks(1, sharded_loss, batch, rows, dim, rounds)
    results.add_value(f"one process, N={rows}", min(single["seconds"]), "CPU-s")
    for ranks in (2, 4):
        shards = run_on_ranks(ranks, sharded_loss, batch, rows, dim, rounds)
        total = [sum(shard["seconds"][number] for shard in shards) for number in range(rounds)]
        results.add_value(f"{ranks} ranks, N={rows}", min(total), "CPU-s")
        results.add_ratio(
            f"{ranks} ranks / one process, total CPU time", min(total) / min(single["seconds"]), "<= 1.15"
        )
        wire = shards[0]["bytes"] / shards[0]["formula"]
        results.add_value(f"{ranks} ranks, bytes on the wire per step", shards[0]["bytes"], "bytes")
        results.add_value(f"{ranks} ranks, bytes by the formula", shards[0]["formula"], "bytes")
        results.add_ratio(f"{ranks} ranks, bytes on the wire / formula", wire, "<= 1.02")
        worst = max(_relative_difference(a, b) for a, b in zip(shards[0]["values"], single["values"], strict=True))
        results.add_ratio(f"{ranks} ranks, largest relative difference", worst, "<= 1e-6")


def sharded_loss(batch: int, rows: int, dim: int, rounds: int) -> dict:
    """Compute the loss on this rank's shard; returns timings, gathered values and traffic."""
    benchmark = MemoryBankBenchmark(batch, rows, dim, torch.device("cpu"))
    values = [all_gather_rows(tensor) for tensor in benchmark.loss()]
    seconds = cpu_seconds(benchmark.loss, rounds)
    return {"seconds": seconds, "values": values, "bytes": _traffic(benchmark), "formula": wire_bytes(benchmark)}


def _traffic(benchmark: MemoryBankBenchmark) -> float:
    """Return the bytes sent over the loopback interface per step, summed over ranks."""
    if get_world_size() == 1:
        return 0.0
    dist.barrier()
    time.sleep(0.2)
    before = loopback_bytes()
    time.sleep(0.2)
    dist.barrier()
    for _ in range(MEASURED_GLOO_STEPS):
        benchmark.loss()
    time.sleep(0.2)
    dist.barrier()
    return (loopback_bytes() - before) / MEASURED_GLOO_STEPS


def exchanged_bytes(batch: int, world_size: int, dim: int) -> int:
    """Return the bytes of queries and partial results that the loss of one step sends, summed over ranks.

    Each rank receives (2 D + 1) floats and the id of the samples of the other ranks, and sends them partial results of
    two softmaxes, (D + 1) floats each.
    """
    gathered = (world_size - 1) * batch * (4 * (2 * dim + 1) + 8)
    partial = (world_size - 1) * batch * 2 * (dim + 1) * 4
    return gathered + partial


def wire_bytes(benchmark: MemoryBankBenchmark) -> int:
    """Return the bytes that the loss of one step has to send, summed over ranks.

    Besides `exchanged_bytes`, each rank receives the bank rows of both modalities for those of its b samples that
    another rank owns.
    """
    world_size, dim = get_world_size(), benchmark.visual.shape[1]
    batch = len(benchmark.ids) * world_size
    owners = benchmark.bank.router.owner(all_gather_rows(benchmark.ids)).view(world_size, -1)
    remote = int((owners != torch.arange(world_size)[:, None]).sum())
    return exchanged_bytes(batch, world_size, dim) + remote * 2 * dim * 4
