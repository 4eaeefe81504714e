"""Prediction of the time of a training step of W ranks.

A step takes the compute time of the slowest rank, the collectives that computation does not hide, and what every rank
does for the batch of all ranks; it takes at least as long as loading its batch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import norm

from tools.bench.scaling.collectives import CONTROL, GRADIENTS, TERMS, StepShape, step_collectives
from tools.bench.scaling.network import KINDS, Network

COMPUTE, JITTER, GLOBAL_ROWS, LOADING = "compute", "slowest rank", "rows of all ranks", "loading"
ROW_PASSES = 24
"""Times that a number of the embeddings of all ranks is read or written: gathered rows are split and copied (6), and
the update of a replicated memory bank averages repeated rows, interpolates, normalizes and stores them (18)."""
GRADIENT_PASSES = 6
"""Times that a gradient is read or written to be reduced: flattening, scaling and copying back, two each."""


@dataclass(frozen=True)
class Compute:
    """Compute time of a step of one rank, in seconds.

    Attributes:
        forward_s: forward pass of the network.
        loss_s: loss over the memory bank, its update and the category loss.
        backward_s: backward pass, with recomputed activations.
        optimizer_s: update of all parameters.
    """

    forward_s: float
    loss_s: float
    backward_s: float
    optimizer_s: float

    def seconds(self, optimizer_ranks: int = 1) -> float:
        """Return the seconds of a step whose optimizer update is divided among a number of ranks."""
        return self.forward_s + self.loss_s + self.backward_s + self.optimizer_s / optimizer_ranks


@dataclass(frozen=True)
class Machine:
    """Nodes on which the ranks of a run compute.

    Attributes:
        networks: network by kind of collective.
        control: network of the collectives of CPU tensors, by which ranks agree on the end of the run.
        cores_per_node: cores that the ranks of a node share; 0 if each rank has a device of its own.
        slowdowns: compute time of a rank relative to its time alone, by the number of ranks of its node, where it was
            measured.
        memory_bandwidth: bytes per second of the memory of a rank.
        waits_for_control: whether a rank waits for them; distav reads their result one step later.
        overlap: fraction of the backward pass that hides the reduction of gradients.
        jitter: standard deviation of the compute time of a rank, relative to its mean.
        stretches: number of equal parts of a step in which delays of a rank are independent and all ranks wait for the
            slowest one. 1: a rank is slow in the complete step or not at all.
        loader_clips_per_s: clips per second of the loader of a rank; infinite if batches are in memory.
    """

    networks: Mapping[str, Network]
    control: Network
    cores_per_node: int = 0
    slowdowns: Mapping[int, float] = field(default_factory=dict)
    memory_bandwidth: float = math.inf
    waits_for_control: bool = False
    overlap: float = 0.0
    jitter: float = 0.0
    stretches: int = 1
    loader_clips_per_s: float = math.inf

    def slowdown(self, world_size: int) -> float:
        """Return the compute time of a rank beside the other ranks of its node, relative to its time alone.

        Where it was not measured, ranks share the cores equally: k / cores for k ranks, at least 1.
        """
        ranks = min(world_size, self.control.ranks_per_node)
        return self.slowdowns.get(ranks, max(1.0, ranks / self.cores_per_node) if self.cores_per_node else 1.0)


def one_network(network: Network) -> dict[str, Network]:
    """Return the same network for all kinds of collectives."""
    return dict.fromkeys(KINDS, network)


def expected_maximum(world_size: int) -> float:
    """Return the expected maximum of W independent standard normal numbers; 0 for W = 1."""
    if world_size < 1:
        raise ValueError(f"world_size={world_size}: allowed: 1 or more")
    # The maximum is below x with probability F(x) = Phi(x)^W, and its expected value is b minus the integral of F up to
    # any b that it never exceeds.
    grid = np.linspace(-12.0, 12.0, 24001)
    return float(grid[-1] - np.trapezoid(np.exp(world_size * norm.logcdf(grid)), grid))


def predict_step(compute: Compute, shape: StepShape, machine: Machine, world_size: int) -> dict[str, float]:
    """Return the seconds of each term of a step; their sum is the time of the step.

    Terms are those of `tools.bench.scaling.collectives.TERMS` and of this module. `loading` is the time by which
    loading a batch takes longer than all other terms together.

    Args:
        compute: compute time of one rank alone.
        shape: shape of the step.
        machine: nodes and network.
        world_size: W.
    """
    slowdown = machine.slowdown(world_size)
    seconds = compute.seconds(world_size if shape.optimizer_share else 1) * slowdown
    terms = {COMPUTE: seconds}
    terms[JITTER] = seconds * machine.jitter * math.sqrt(machine.stretches) * expected_maximum(world_size)
    terms |= collective_seconds(shape, machine, world_size)
    if world_size > 1:
        copies = GRADIENT_PASSES * shape.number_bytes * shape.num_gradients
        hidden = machine.overlap * compute.backward_s * slowdown
        terms[GRADIENTS] = max(0.0, terms[GRADIENTS] - hidden) + copies * slowdown / machine.memory_bandwidth
        if not machine.waits_for_control:
            terms[CONTROL] = max(0.0, terms[CONTROL] - seconds)
    rows = (world_size if shape.replicated else 1) * shape.clips
    numbers = (world_size - 1) * shape.clips * 6 + (rows - shape.clips) * (ROW_PASSES - 6)
    terms[GLOBAL_ROWS] = numbers * 2 * shape.dim * 4 * slowdown / machine.memory_bandwidth
    terms[LOADING] = max(0.0, shape.clips * slowdown / machine.loader_clips_per_s - sum(terms.values()))
    return terms


def collective_seconds(shape: StepShape, machine: Machine, world_size: int) -> dict[str, float]:
    """Return the seconds of the collectives of a step by term, as if nothing hid them."""
    terms: dict[str, float] = {term: 0.0 for term in TERMS}
    for item in step_collectives(shape, world_size):
        network = machine.control if item.term == CONTROL else machine.networks[item.kind]
        seconds = network.seconds(item.kind, item.num_bytes, world_size, in_parts=item.in_parts)
        terms[item.term] += item.count * seconds
    return terms


def efficiency(steps: Mapping[int, Mapping[str, float]], first: int, world_size: int) -> float:
    """Return the clips per second and rank of W ranks, relative to those of `first` ranks.

    Args:
        steps: terms of a step with the same number of clips on each rank, by number of ranks.
        first: number of ranks that the efficiency refers to.
        world_size: W.
    """
    return sum(steps[first].values()) / sum(steps[world_size].values())
