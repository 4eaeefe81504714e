"""Cross-modal instance discrimination against the complete memory bank (xID; Morgado et al. 2021b, equations 1-9).

Legend: b samples of this rank, B of all ranks, D width, n bank rows on this rank.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distav.data.modalities import MODALITIES
from distav.distributed.collectives import all_gather_rows, local_batch
from distav.losses.info_nce import CROSS_MODAL, Directions
from distav.losses.known_gradient import attach_gradient
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.softmax import attend, merge_across_ranks


@dataclass(frozen=True)
class SoftTargets:
    """Definition of the soft targets.

    Attributes:
        kind: none, bootstrapping, swapped, neighbor or cycle.
        temperature: tau_s, divides the similarities between samples.
        cycle_temperature: tau_t, divides the pair similarities of cycle-consistent targets.
        excludes_self: whether a sample is left out of its own soft target.
    """

    kind: str = "cycle"
    temperature: float = 0.02
    cycle_temperature: float = 0.07
    excludes_self: bool = False


class InstanceLosses(NamedTuple):
    """Result of instance discrimination.

    Attributes:
        losses: [b] losses, summed over the directions.
        matching: [b] softmax probability of a sample's own row, averaged over the directions; no gradient.
        num_candidates: number of rows in that softmax.
    """

    losses: Tensor
    matching: Tensor
    num_candidates: int


def instance_losses(
    bank: Bank,
    global_batch: GlobalBatch,
    visual: Tensor,
    audio: Tensor,
    temperature: float | Tensor,
    softness: Tensor | None = None,
    soft: SoftTargets | None = None,
    *,
    mask_uninitialized: bool = False,
    directions: Directions = CROSS_MODAL,
) -> InstanceLosses:
    """Return the loss of each sample in the given directions, exact over all rows of the bank.

    With the target T = (1 - s) onehot + s S the loss of a query q is lse - q . (sum_j T_j row_j) / tau, and its
    gradient is (sum_j P_j row_j - sum_j T_j row_j) / tau.

    Args:
        bank: memory bank with the target rows; not modified.
        global_batch: batch of all ranks.
        visual, audio: [b, D] unit vectors, with gradient.
        temperature: tau; receives a gradient if it is a tensor without dimensions.
        softness: [b] weight s of the soft target, 0..1; None for hard targets, on all ranks alike.
        soft: definition of S.
        mask_uninitialized: leave rows that were never written out of the softmax; samples whose row was never written
            then have no loss. Rows without the modality of the keys are left out in any case; directions that a sample
            lacks a modality for have no loss.
        directions: cross-modal or within-modal; soft targets are defined for cross-modal ones only.
    """
    tau = temperature.detach() if isinstance(temperature, Tensor) else temperature
    embeddings = {"visual": visual, "audio": audio}
    queries = embeddings if bank.replicated else {"visual": global_batch.visual, "audio": global_batch.audio}
    rows: dict[str, Tensor] = dict(zip(MODALITIES, bank.fetch(MODALITIES, global_batch.ids), strict=True))
    bias = {key: bank.key_bias(key, mask_uninitialized) for _, key in directions}
    averages = [
        attend(queries[query], bank.keys(key), bank.keys(key), tau, bias=bias[key]) for query, key in directions
    ]
    if softness is not None and soft is not None and soft.kind != "none":
        averages += _soft_target_rows(bank, soft, queries, rows, global_batch.ids, mask_uninitialized)
    if not bank.replicated:
        averages = merge_across_ranks(averages)
    soft_averages = averages[len(directions) :]
    present = {name: local_batch(flags) for name, flags in global_batch.present.items()}
    total, matching = torch.zeros_like(visual[:, 0]), torch.zeros_like(visual[:, 0])
    for number, (query, key) in enumerate(directions):
        lse, expected = averages[number]
        target = rows[key]
        if soft_averages and softness is not None:
            target = torch.lerp(target, soft_averages[number][1], softness[:, None])
        embedding = embeddings[query].detach()
        losses = lse - (embedding * target).sum(1) / tau
        losses = attach_gradient(embeddings[query], temperature, losses, (expected - target) / tau)
        if bank.present:
            losses = torch.where(present[query] & present[key], losses, torch.zeros_like(losses))
        total = total + losses
        matching = matching + ((embedding * rows[key]).sum(1) / tau - lse).exp().clamp_max(1) / len(directions)
    if mask_uninitialized:
        has_row = bank.fetch(("visits",), global_batch.ids)[0] > 0
        total = torch.where(has_row, total, torch.zeros_like(total))
    return InstanceLosses(total, matching, bank.num_samples)


def _soft_target_rows(
    bank: Bank,
    soft: SoftTargets,
    queries: dict[str, Tensor],
    rows: dict[str, Tensor],
    ids: Tensor,
    mask_uninitialized: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Return the log-sum-exp of S over this rank's rows and sum_j S(j|i) row_j, for each cross-modal direction."""
    biases = [bank.key_bias(name, mask_uninitialized) for name in MODALITIES]  # A row needs both modalities.
    if soft.kind == "cycle":  # The query's own pair term is the same for all j and cancels.
        biases.append(bank.resident_column("pair_similarity") / soft.cycle_temperature)
    biases = [bias for bias in biases if bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    if soft.kind in ("neighbor", "cycle") and not bank.replicated:
        visual_rows, audio_rows = all_gather_rows(torch.cat([rows["visual"], rows["audio"]], dim=1)).chunk(2, dim=1)
        rows = {"visual": visual_rows, "audio": audio_rows}
    query_ids = local_batch(ids) if bank.replicated else ids
    exclude = bank.local_index(query_ids) if soft.excludes_self else None
    averages = []
    for own, other in CROSS_MODAL:
        soft_queries, compared = {
            "bootstrapping": (queries[own], other),
            "swapped": (queries[other], own),
            "neighbor": (rows[own], own),
            "cycle": (rows[other], other),
        }[soft.kind]
        keys, values = bank.keys(compared), bank.keys(other)
        averages.append(attend(soft_queries, keys, values, soft.temperature, bias=bias, exclude=exclude))
    return averages
