"""Cross-modal instance discrimination against the whole bank (xID; Morgado et al. 2021b, equations 1-9).

Legend: b rows of this rank, B of all ranks, D width, n bank rows of this rank.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distav.distributed.collectives import all_gather_rows, local_batch
from distav.losses.info_nce import DIRECTIONS, MODALITIES, Directions
from distav.losses.known_gradient import attach_gradient
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.softmax import attend, merge_across_ranks


@dataclass(frozen=True)
class SoftTargets:
    """How targets are softened.

    Attributes:
        kind: none, bootstrapping, swapped, neighbour or cycle.
        temperature: tau_s, divides the similarities between samples.
        cycle_temperature: tau_t, divides the pair similarities of cycle-consistent targets.
        excludes_self: whether a sample is left out of its own soft target.
    """

    kind: str = "cycle"
    temperature: float = 0.02
    cycle_temperature: float = 0.07
    excludes_self: bool = False


class InstanceLosses(NamedTuple):
    """What instance discrimination comes to.

    Attributes:
        losses: [b] losses, the sum over both directions.
        matching: [b] softmax share of a sample's own row, the mean over both directions; no gradient.
        candidates: how many rows that is among.
    """

    losses: Tensor
    matching: Tensor
    candidates: int


def instance_losses(
    bank: Bank,
    visitors: GlobalBatch,
    visual: Tensor,
    audio: Tensor,
    temperature: float | Tensor,
    softness: Tensor | None = None,
    soft: SoftTargets | None = None,
    *,
    mask_uninitialized: bool = False,
    directions: Directions = DIRECTIONS,
) -> InstanceLosses:
    """Return each sample's loss in both directions, exact over all rows.

    With target T = (1 - s) onehot + s S the loss of a query q is lse - q . (sum_j T_j row_j) / tau, and its gradient
    is (sum_j P_j row_j - sum_j T_j row_j) / tau.

    Args:
        bank: holds the targets; not changed here.
        visitors: this batch of all ranks.
        visual, audio: [b, D] unit vectors, with gradient.
        temperature: tau; a tensor of no dimensions gets a gradient.
        softness: [b] share s of the soft target, 0..1; None for hard targets, on all ranks alike.
        soft: how S is made.
        mask_uninitialized: leave rows that were never written out of the softmax; samples that were never seen before
            then have no loss.
        directions: across or within; soft targets are for those across.
    """
    tau = temperature.detach() if isinstance(temperature, Tensor) else temperature
    queries = {"visual": visual, "audio": audio}
    rows: dict[str, Tensor] = dict(zip(MODALITIES, bank.fetch(MODALITIES, visitors.ids), strict=True))
    seen = None
    if mask_uninitialized:
        seen = bank.resident_column("visits") > 0
    bias = None if seen is None else _closed(seen)
    every = queries if bank.replicated else {"visual": visitors.visual, "audio": visitors.audio}
    found = [attend(every[own], bank.keys(other), bank.keys(other), tau, bias=bias) for own, other in directions]
    if softness is not None and soft is not None and soft.kind != "none":
        found += _soft_rows(bank, soft, every, rows, visitors.ids, seen)
    if not bank.replicated:
        found = merge_across_ranks(found)
    total, matching = torch.zeros_like(visual[:, 0]), torch.zeros_like(visual[:, 0])
    for each, (own, other) in enumerate(directions):
        lse, expected = found[each]
        target = rows[other]
        if len(found) == 4 and softness is not None:
            target = torch.lerp(target, found[2 + each][1], softness[:, None])
        asked = queries[own].detach()
        losses = lse - (asked * target).sum(1) / tau
        total = total + attach_gradient(queries[own], temperature, losses, (expected - target) / tau)
        matching = matching + ((asked * rows[other]).sum(1) / tau - lse).exp().clamp_max(1) / len(directions)
    if seen is not None:
        known = bank.fetch(("visits",), visitors.ids)[0] > 0
        total = torch.where(known, total, torch.zeros_like(total))
    return InstanceLosses(total, matching, bank.num_samples)


def _closed(seen: Tensor) -> Tensor:
    return torch.zeros_like(seen, dtype=torch.float32).masked_fill_(~seen, -torch.inf)


def _soft_rows(
    bank: Bank,
    soft: SoftTargets,
    queries: dict[str, Tensor],
    rows: dict[str, Tensor],
    ids: Tensor,
    seen: Tensor | None,
) -> list[tuple[Tensor, Tensor]]:
    """Return, for each direction, the softmax S over this rank's rows and sum_j S(j|i) row_j of the other modality."""
    bias = None if seen is None else _closed(seen)
    if soft.kind == "cycle":  # The query's own pair term is the same for all j and cancels.
        pairs = bank.resident_column("pair_similarity") / soft.cycle_temperature
        bias = pairs if bias is None else bias + pairs
    if soft.kind in ("neighbour", "cycle") and not bank.replicated:
        both = all_gather_rows(torch.cat([rows["visual"], rows["audio"]], dim=1)).chunk(2, dim=1)
        rows = dict(zip(MODALITIES, both, strict=True))
    asked_ids = local_batch(ids) if bank.replicated else ids
    exclude = bank.local_index(asked_ids) if soft.excludes_self else None
    found = []
    for own, other in DIRECTIONS:
        asked, compared = {
            "bootstrapping": (queries[own], other),
            "swapped": (queries[other], own),
            "neighbour": (rows[own], own),
            "cycle": (rows[other], other),
        }[soft.kind]
        keys, values = bank.keys(compared), bank.keys(other)
        found.append(attend(asked, keys, values, soft.temperature, bias=bias, exclude=exclude))
    return found
