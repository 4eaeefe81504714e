"""Prediction for `configs/multinode.yaml` on a hypothetical cluster of H100 nodes.

Nothing in this module is measured on several GPUs. `ASSUMPTIONS` names the source of each number.
Legend: W GPUs, b clips of a GPU.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tools.bench.scaling.collectives import NormExchange, StepShape, shape_of, step_collectives
from tools.bench.scaling.failures import Failures
from tools.bench.scaling.network import Link, Network
from tools.bench.scaling.published import FittedConstants
from tools.bench.scaling.step_time import Compute, Machine, one_network, predict_step
from tools.bench.training_step import TOWERS

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
FIRST, COMPARED = 8, (128, 1024)
"""Number of GPUs that efficiencies refer to, and those for which assumptions are varied."""
CLIPS_PER_GPU, DATASET_CLIPS, CLASSES = 128, 200_000, 309
GPU_RESULTS = Path(__file__).parents[2] / "results" / "gpu"

NVLINK = Link(1.0e-6, 0.8 * 450e9, tree_latency_s=0.6e-6)
INFINIBAND = Link(2.7e-6, 0.8 * 50e9, tree_latency_s=5.0e-6)
NCCL = Network(8, NVLINK, INFINIBAND, start_s=20e-6, post_s=1e-6, part_s=5e-6)
TCP = Link(30e-6, 1e9)
GLOO = Network(8, TCP, TCP, start_s=100e-6)
MEMORY_BYTES_PER_S = 0.8 * 3.35e12
OPTIMIZER_BYTES = 40
"""Bytes that AdamW moves for each parameter: gradient, weight, two moments and the bfloat16 copy."""
FAILURES = Failures(node_mtbf_s=7.9 * 3600 * 128, checkpoint_s=10, restart_s=420)

ASSUMPTIONS = {
    "GPU": "compute of one H200 (tools/results/gpu/multinode.json, without waiting for data); an H100 has less memory "
    "bandwidth and computes longer, which raises the efficiency",
    "inside a node": "8 GPUs, NVLink 4 with 450 GB/s, of which 80 % are reached",
    "between nodes": "one adapter of 400 Gb/s for each GPU, of which 80 % are reached; no congestion",
    "latency of NCCL": "constants of its tuner (NVIDIA/nccl, src/graph/tuning.cc, LL protocol): 1 us and 2.7 us for a "
    "message of a ring inside a node and between nodes, 0.6 us and 5 us for one of a tree; 20 us to start a collective",
    "parts of an all-gather": "5 us for the copy of each rank's part, where the result is a list of tensors",
    "CPU tensors": "gloo over TCP, a ring with 30 us for a message",
    "slowest GPU": "standard deviation of the compute time in a step as fitted to the published table; a GPU is slow "
    "in a complete step or not at all",
    "overlap": "none: distav reduces gradients after the backward pass",
    "loader": "clips/s of one H200 with MJPEG (tools/results/gpu/loader-mjpeg.json), which is faster than a step; "
    "decoding on the same GPU is not counted: on one H200 it costs 14 % of a step with MJPEG, and H.264 is slower than "
    "the steps, with any number of GPUs",
    "failures": "7.9 h between failures of 1,024 GPUs (Kokolis et al. 2025, arXiv 2410.21680), 10 s for a checkpoint, "
    "420 s for a restart: `run.timeout_s` and 120 s to start",
    "data": f"{DATASET_CLIPS:,} clips of {CLASSES} classes; {CLIPS_PER_GPU} clips per GPU and step for any number of "
    "GPUs",
}
"""Assumptions of the prediction by topic."""


@dataclass(frozen=True)
class Recipe:
    """Settings of the predicted training.

    Attributes:
        shape: shape of a step.
        compute: compute time of a step of one GPU.
        checkpoint_every: steps between two checkpoints.
    """

    shape: StepShape
    compute: Compute
    checkpoint_every: int


def multinode_recipe() -> Recipe:
    """Return the contrastive phase of `configs/multinode.yaml` with ZeRO-1 in bfloat16."""
    shape = multinode_shape()
    measured = _stored("multinode")
    seconds = measured["seconds of a step"]["value"] * (1 - measured["data wait, fraction of a step"]["value"])
    return Recipe(shape, _compute(shape, seconds), TOWERS["r2plus1d_18"].settings().run.checkpoint_every)


@functools.cache
def multinode_shape(*overrides: str) -> StepShape:
    """Return the shape of a step of `multinode_recipe` with other settings, as `key=value`."""
    config = TOWERS["r2plus1d_18"].settings(*overrides)
    shape = shape_of(config, CLIPS_PER_GPU, DATASET_CLIPS, CLASSES)
    return replace(shape, number_bytes=2, zero_stage=1)


def _compute(shape: StepShape, seconds: float) -> Compute:
    """Divide the measured time; recomputing backward passes have three times the operations of forward passes."""
    bank = _stored("bank")["loss + gradient"]["median_s"]
    loss_s = shape.loss_operations / (8 * 4096 * 2_000_000 * 128 / bank)
    optimizer_s = OPTIMIZER_BYTES * sum(shape.groups) / MEMORY_BYTES_PER_S
    rest = seconds - loss_s - optimizer_s
    return Compute(forward_s=rest / 4, loss_s=loss_s, backward_s=3 * rest / 4, optimizer_s=optimizer_s)


def _stored(name: str) -> dict[str, Any]:
    return json.loads((GPU_RESULTS / f"{name}.json").read_text())["figures"]


def h100_cluster(constants: FittedConstants) -> Machine:
    """Return the hypothetical cluster, with the jitter that was fitted to the published table."""
    return Machine(
        networks=one_network(NCCL),
        control=GLOO,
        memory_bandwidth=MEMORY_BYTES_PER_S,
        jitter=constants.jitter,
        loader_clips_per_s=_stored("loader-mjpeg")["loader"]["rate"],
    )


def scaling_rows(recipe: Recipe, machine: Machine, gpus: Sequence[int] = GPUS) -> list[dict[str, Any]]:
    """Return a row for each number of GPUs: seconds of each term, efficiency and goodput.

    The efficiency is relative to `FIRST` GPUs; the goodput is that of checkpoints every `checkpoint_every` steps, and
    `best_goodput` that of Daly's interval.
    """
    steps = {number: predict_step(recipe.compute, recipe.shape, machine, number) for number in {FIRST, *gpus}}
    rows = []
    for number in gpus:
        seconds = sum(steps[number].values())
        nodes = math.ceil(number / machine.control.ranks_per_node)
        interval = FAILURES.daly_interval_s(nodes)
        rows.append(
            {
                "gpus": number,
                "terms": steps[number],
                "step_s": seconds,
                "efficiency": sum(steps[FIRST].values()) / seconds,
                "goodput": FAILURES.goodput(recipe.checkpoint_every * seconds, nodes),
                "best_interval_s": interval,
                "best_goodput": FAILURES.goodput(interval, nodes),
            }
        )
    return rows


def bottlenecks(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Return the terms by how many seconds they grow from the first to the last row, largest first."""
    first, last = rows[0]["terms"], rows[-1]["terms"]
    return sorted(((term, last[term] - first[term]) for term in last), key=lambda pair: -pair[1])


def variants(recipe: Recipe, machine: Machine, constants: FittedConstants) -> list[dict[str, Any]]:
    """Return the efficiency with `COMPARED` numbers of GPUs if one assumption or setting is different."""
    shape = recipe.shape
    slow_network = replace(INFINIBAND, bandwidth=constants.network_fraction * 50e9)
    parts = replace(shape, norm_exchange=NormExchange.gathered_in_parts)
    running = multinode_shape("model.visual.batch_norm=running", "model.audio.batch_norm=running")
    num_norms = len(shape.norms_forward) + len(shape.norms_backward)
    changed: dict[str, tuple[StepShape, Machine]] = {
        "as predicted": (shape, machine),
        "between nodes, the fraction of the bandwidth that was fitted to the published table": (
            shape,
            replace(machine, networks=one_network(replace(NCCL, between=slow_network))),
        ),
        "delays independent between any two batch normalizations": (shape, replace(machine, stretches=num_norms)),
        "no difference between GPUs": (shape, replace(machine, jitter=0.0)),
        "10 million clips, sharded memory bank": (replace(shape, rows=10**7, replicated=False), machine),
        "ZeRO 0": (replace(shape, zero_stage=0), machine),
        "gradients reduced during the backward pass (`overlap_comm`)": (shape, replace(machine, overlap=0.9)),
        "`batch_norm: running` in both towers, or towers without batch normalization": (
            replace(shape, norms_forward=running.norms_forward, norms_backward=running.norms_backward),
            machine,
        ),
        "batch statistics gathered, as by `torch.nn.SyncBatchNorm`": (
            replace(shape, norm_exchange=NormExchange.gathered),
            machine,
        ),
        "batch statistics gathered in a tensor for each rank": (parts, machine),
        "all ranks wait for the stop flag": (shape, replace(machine, waits_for_control=True)),
        "the last two together": (parts, replace(machine, waits_for_control=True)),
    }
    rows = []
    for name, (other, nodes) in changed.items():
        efficiencies = scaling_rows(replace(recipe, shape=other), nodes, COMPARED)
        rows.append({"variant": name, "efficiency": {str(row["gpus"]): row["efficiency"] for row in efficiencies}})
    return rows


def fixed_batch_rows(recipe: Recipe, machine: Machine) -> list[dict[str, Any]]:
    """Return the rows of `scaling_rows` if the global batch stays that of `FIRST` GPUs.

    The compute time is taken to be proportional to the clips of a GPU, which is a lower bound.
    """
    rows = []
    for number in GPUS:
        clips = max(1, FIRST * CLIPS_PER_GPU // number)
        fraction, compute = clips / CLIPS_PER_GPU, recipe.compute
        smaller = Compute(
            compute.forward_s * fraction, compute.loss_s * fraction, compute.backward_s * fraction, compute.optimizer_s
        )
        shape = replace(recipe.shape, clips=clips)
        terms = predict_step(smaller, shape, machine, number)
        seconds = sum(terms.values())
        rows.append({"gpus": number, "clips": clips, "terms": terms, "step_s": seconds})
    for row in rows:
        row["efficiency"] = rows[0]["step_s"] * FIRST / (row["step_s"] * row["gpus"])
    return rows


def run(constants: FittedConstants) -> dict[str, Any]:
    """Predict the recipe on the cluster, and return all figures as a JSON object.

    Args:
        constants: constants fitted to the published table.
    """
    recipe, machine = multinode_recipe(), h100_cluster(constants)
    rows = scaling_rows(recipe, machine)
    return {
        "assumptions": ASSUMPTIONS,
        "parameters": sum(recipe.shape.parameters),
        "norms": [len(recipe.shape.norms_forward), len(recipe.shape.norms_backward)],
        "collectives": sum(item.count for item in step_collectives(recipe.shape, FIRST)),
        "rows": rows,
        "growth": [{"term": term, "seconds": seconds} for term, seconds in bottlenecks(rows)],
        "variants": variants(recipe, machine, constants),
        "fixed_batch": fixed_batch_rows(recipe, machine),
    }
