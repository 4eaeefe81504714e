"""Active complementary loss (CRCL; Qin et al. 2023): believed pairs are learnt, what does not match always is.

Legend: b samples of this rank, M candidates of each, one of which is its own.
"""

from torch import Tensor

from distav.losses.info_nce import ScoreLoss


def active_complementary_loss(correspondence: Tensor, weight: float) -> ScoreLoss:
    """Return the loss over one direction's scores.

    With matching probabilities p, the softmax of the scores, and q = 1 - y,

        y (-log p_own) + weight * sum_others tan(p) / (sum_all tan(p))^q.

    For a pair that is believed (y = 1) the second part is the plain sum over the others; for one that is not (y = 0)
    it lies between 0 and 1 and is all there is. On 0..1 the tangent is finite and grows faster than linearly.

    Args:
        correspondence: [b] y, the probability that a pair belongs together; no gradient.
        weight: lambda.
    """
    believed = correspondence.detach()

    def loss_of(scores: Tensor, own: Tensor) -> Tensor:
        logs, place = scores.log_softmax(1), own[:, None]
        active = -logs.gather(1, place).squeeze(1)
        tangents = logs.exp().tan()
        others = tangents.scatter(1, place, 0.0).sum(1)
        return believed * active + weight * others / tangents.sum(1).pow(1 - believed)

    return loss_of


def rescale_matching_probability(share: Tensor, candidates: Tensor | int, among: int) -> Tensor:
    """Return what a matching probability would be among another number of candidates.

    A probability falls with the number of candidates, so a threshold on it means something for one number alone. The
    others' part of the softmax is taken to grow with their number: p / (p + (1 - p) (among - 1) / (candidates - 1)).

    Args:
        share: [b] the own candidate's share p of the softmax.
        candidates: how many it was found among, itself included; [b] or one for all.
        among: how many it is asked for.
    """
    others = (candidates - 1).clamp_min(1) if isinstance(candidates, Tensor) else max(1, candidates - 1)
    return share / (share + (1 - share).clamp_min(0) * (among - 1) / others).clamp_min(1e-12)
