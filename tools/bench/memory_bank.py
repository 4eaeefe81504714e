"""The exact loss over the bank, beside the matrix products that it cannot do without and beside dense cross-entropy.

Legend: B queries, N bank rows, D width.
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
from tools.bench.multiprocess import cpu_seconds, loopback_bytes, on_ranks
from tools.bench.timing import Results, Setting

TEMPERATURE = 0.07
CATEGORIES = 300
MEASURED_GLOO_STEPS = 3


class MemoryBankBenchmark:
    """A bank of random rows and a batch, the same on any number of ranks; each rank holds its part of the batch."""

    def __init__(self, batch: int, rows: int, dim: int, device: torch.device, num_categories: int = 0):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.bank = Bank(rows, dim, 0.5, device, seed=1, num_categories=num_categories, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randperm(rows, generator=generator)[:batch]
        visual, audio = (F.normalize(torch.randn(batch, dim, generator=generator), dim=1) for _ in range(2))
        logits = torch.randn(2, batch, max(1, num_categories), generator=generator)
        self.ids, self.visual, self.audio = (local_batch(each).to(device) for each in (ids, visual, audio))
        self.logits = local_batch(logits.transpose(0, 1)).transpose(0, 1).contiguous().to(device)
        self.ones = torch.ones(len(self.ids), device=device)
        self.tau = TEMPERATURE

    def backends(self) -> list[str]:
        """Return the names of the attention back ends that serve the loss, without a bias and with one."""
        keys = self.bank.keys("visual")
        plain = AttentionInputs(self.visual, keys, keys, 1.0)
        biased = dataclasses.replace(plain, bias=self.bank.resident_column("pair_similarity"))
        return [select_backend(each).name for each in (plain, biased)]

    def global_batch(self) -> GlobalBatch:
        """Gather the batch."""
        return GlobalBatch.gather(self.ids, self.ones > 0, self.visual, self.audio)

    def loss(self, soft: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """Return the summed loss of both directions and the gradients of both modalities."""
        visual, audio = self.visual.clone().requires_grad_(), self.audio.clone().requires_grad_()
        softness = 0.5 * self.ones if soft else None
        losses = instance_losses(
            self.bank, self.global_batch(), visual, audio, self.tau, softness, SoftTargets(soft)
        ).losses
        losses.sum().backward()
        assert visual.grad is not None and audio.grad is not None
        return losses.detach(), visual.grad, audio.grad

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Do the same with a matrix of logits and autograd."""
        visual, audio = self.visual.clone().requires_grad_(), self.audio.clone().requires_grad_()
        losses = torch.zeros_like(self.ones)
        for queries, other in ((visual, "audio"), (audio, "visual")):
            logits = queries @ self.bank.columns[other].T / self.tau
            losses = losses + F.cross_entropy(logits, self.ids, reduction="none")
        losses.sum().backward()
        assert visual.grad is not None and audio.grad is not None
        return losses.detach(), visual.grad, audio.grad

    def step(self, with_categories: bool) -> None:
        """Loss, gradient and bank update, with or without the category-level loss."""
        visual, audio = self.visual.clone().requires_grad_(), self.audio.clone().requires_grad_()
        visitors = self.global_batch()
        loss = instance_losses(self.bank, visitors, visual, audio, self.tau).losses.sum()
        shares = None
        if with_categories:
            logits = self.logits.clone().requires_grad_()
            memory = self.bank.assignments.columns()
            category = category_loss(logits[0], logits[1], self.ones, 1.0, memory)
            loss = loss + category.contrast + category.imbalance + category.row_entropy
            shares, agreement = category.shares, category_agreement(category.shares)
        else:
            agreement = self.ones
        loss.backward()
        self.bank.update(visitors, agreement, shares)

    def floor(self, width: int) -> None:
        """Do the matrix products of both directions alone, 4 B N D operations each, some rows at a time."""
        for queries, other in ((self.visual, "audio"), (self.audio, "visual")):
            keys = self.bank.keys(other)
            queries = queries.to(keys.dtype)
            logits = queries.new_empty(len(queries), width)
            out = torch.zeros_like(queries)
            for start in range(0, len(keys), width):
                part = keys[start : start + width]
                torch.mm(queries, part.T, out=logits[:, : len(part)])
                out.addmm_(logits[:, : len(part)], part)


def run(setting: Setting, batch: int, rows: int, dim: int, memory_rows: int, shard_rows: int) -> Results:
    """Measure everything about the bank.

    Args:
        setting: device, threads, rounds.
        batch, rows, dim: B, N, D of the timings.
        memory_rows: N where memory is measured.
        shard_rows: N of the bank that is spread over ranks.

    Raises:
        UserError: where attention does not run fused.
    """
    problem = MemoryBankBenchmark(batch, rows, dim, setting.device)
    back_ends = problem.backends()
    if "tiles" in back_ends:
        raise UserError(f"attention of width {dim} does not run fused on {setting.device.type}; the log says why.")
    sizes = {"batch": batch, "rows": rows, "dim": dim, "threads": setting.threads, "device": setting.device.type}
    results = Results("bank", sizes | {"attention": " and ".join(dict.fromkeys(back_ends))})
    on_cpu = setting.device.type == "cpu"
    widths = (512, 2048) if on_cpu else (2**15, 2**17)
    products = {
        f"matrix products, {width} rows at a time": lambda width=width: problem.floor(width) for width in widths
    }
    candidates = {**products, "loss + gradient": problem.loss}
    if on_cpu:
        candidates["dense cross-entropy"] = problem.dense
    for kind in ("bootstrapping", "swapped", "neighbour", "cycle"):
        candidates[f"loss + gradient, {kind}"] = lambda kind=kind: problem.loss(kind)
    seconds = setting.interleaved(candidates)
    operations = 8 * batch * rows * dim / 1e9
    results.times(seconds, {name: (operations, "GFLOP/s") for name in products})
    floor = [min(pair) for pair in zip(*(seconds[name] for name in products), strict=True)]
    plain = seconds["loss + gradient"]
    results.ratio("loss + gradient / matrix products", (plain, floor), "<= 1.25" if on_cpu else "<= 1.7")
    if on_cpu:
        results.ratio("dense cross-entropy / loss + gradient, time", (seconds["dense cross-entropy"], plain), ">= 3")
    results.ratio("cycle-consistent / plain loss", (seconds["loss + gradient, cycle"], plain), "<= 2.2")
    exact, dense = (
        MemoryBankBenchmark(64, 4096, dim, setting.device),
        MemoryBankBenchmark(64, 4096, dim, setting.device),
    )
    worst = max(_difference(a, b) for a, b in zip(exact.loss(), dense.dense(), strict=True))
    # A GPU rounds rows and queries to bfloat16, 2^-9 of each number at most.
    results.ratio("largest relative difference to dense", worst, "<= 1e-5" if on_cpu else "<= 1e-2")

    categories = MemoryBankBenchmark(batch, rows, dim, setting.device, CATEGORIES)
    seconds = setting.interleaved(
        {
            "loss + gradient + update": lambda: categories.step(False),
            f"the same with {CATEGORIES} categories": lambda: categories.step(True),
        }
    )
    results.times(seconds)
    plain, both = seconds.values()
    results.ratio("instance + category / instance", (both, plain), "<= 1.1")
    _memory(results, batch, memory_rows, dim, setting.device)
    if on_cpu and setting.threads == 1:
        _sharded(results, batch, shard_rows, dim, setting.rounds)
    return results


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def _memory(results: Results, batch: int, rows: int, dim: int, device: torch.device) -> None:
    """Measure by how much the peak of a process grows, each way in a process of its own."""
    context = multiprocessing.get_context("spawn")
    grown = []
    for way in ("loss", "dense"):
        with context.Pool(1) as pool:
            grown.append(pool.apply(_peak_growth, (way, batch, rows, dim, device)))
    results.note(f"extra memory of loss + gradient, N={rows}", grown[0] / 2**20, "MiB")
    results.note(f"extra memory of dense cross-entropy, N={rows}", grown[1] / 2**20, "MiB")
    results.ratio("dense cross-entropy / loss + gradient, memory", grown[1] / grown[0], ">= 20")


def _peak_growth(way: str, batch: int, rows: int, dim: int, device: torch.device) -> int:
    torch.set_num_threads(1)
    MemoryBankBenchmark(8, 64, dim, device).loss()  # what the libraries allocate once
    problem = MemoryBankBenchmark(batch, rows, dim, device)
    work: Callable[[], object] = getattr(problem, way)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # what building the bank has left could hide what comes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _resident("VmRSS")
    work()
    return max(2**12, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    """Return a size from the kernel's account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def _sharded(results: Results, batch: int, rows: int, dim: int, rounds: int) -> None:
    """Spread the bank over 2 and 4 processes: CPU time of all together, bytes on the wire, and the same numbers."""
    (alone,) = on_ranks(1, sharded_part, batch, rows, dim, rounds)
    results.note(f"one process, N={rows}", min(alone["seconds"]), "CPU-s")
    for ranks in (2, 4):
        parts = on_ranks(ranks, sharded_part, batch, rows, dim, rounds)
        total = [sum(part["seconds"][number] for part in parts) for number in range(rounds)]
        results.note(f"{ranks} ranks, N={rows}", min(total), "CPU-s")
        results.ratio(f"{ranks} ranks / one process, CPU time of all", min(total) / min(alone["seconds"]), "<= 1.15")
        wire = parts[0]["bytes"] / parts[0]["formula"]
        results.note(f"{ranks} ranks, bytes on the wire a step", parts[0]["bytes"], "bytes")
        results.note(f"{ranks} ranks, bytes by the formula", parts[0]["formula"], "bytes")
        results.ratio(f"{ranks} ranks, bytes on the wire / formula", wire, "<= 1.02")
        worst = max(_difference(a, b) for a, b in zip(parts[0]["found"], alone["found"], strict=True))
        results.ratio(f"{ranks} ranks, largest relative difference", worst, "<= 1e-6")


def sharded_part(batch: int, rows: int, dim: int, rounds: int) -> dict:
    """Run the loss on this rank's part of the problem; returns times, numbers and traffic."""
    problem = MemoryBankBenchmark(batch, rows, dim, torch.device("cpu"))
    found = [all_gather_rows(each) for each in problem.loss()]
    seconds = cpu_seconds(problem.loss, rounds)
    return {"seconds": seconds, "found": found, "bytes": _traffic(problem), "formula": wire_bytes(problem)}


def _traffic(problem: MemoryBankBenchmark) -> float:
    """Return the bytes that a step puts on the loopback interface, all ranks together."""
    if get_world_size() == 1:
        return 0.0
    dist.barrier()
    time.sleep(0.2)
    before = loopback_bytes()
    time.sleep(0.2)
    dist.barrier()
    for _ in range(MEASURED_GLOO_STEPS):
        problem.loss()
    time.sleep(0.2)
    dist.barrier()
    return (loopback_bytes() - before) / MEASURED_GLOO_STEPS


def wire_bytes(problem: MemoryBankBenchmark) -> int:
    """Return the bytes that the loss of one step has to move, all ranks together.

    Each rank receives the (2 D + 1) floats and the id of the (W - 1) b samples of others, sends them their parts of
    two softmaxes, (D + 1) floats each, and gets the bank's rows of both modalities for those of its b samples that
    another rank owns.
    """
    world, dim = get_world_size(), problem.visual.shape[1]
    batch = len(problem.ids) * world
    gathered = (world - 1) * batch * (4 * (2 * dim + 1) + 8)
    parts = (world - 1) * batch * 2 * (dim + 1) * 4
    owners = problem.bank.owner(all_gather_rows(problem.ids)).view(world, -1)
    away = int((owners != torch.arange(world)[:, None]).sum())
    return gathered + parts + away * 2 * dim * 4
