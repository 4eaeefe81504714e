"""Active complementary loss of CRCL (Qin et al. 2023), robust to mismatched pairs.

The active part, cross-entropy, is weighted by the correspondence probability. The complementary part lowers the
probabilities of the negatives and applies to every pair.

Legend: b samples of this rank, M candidates per sample, its own included.
"""

from torch import Tensor

from distav.losses.info_nce import ScoreLoss


def active_complementary_loss(correspondence: Tensor, weight: float) -> ScoreLoss:
    """Return the loss over the scores of one direction.

    With matching probabilities p, the softmax of the scores, and q = 1 - y,

        y (-log p_own) + weight * sum_negatives tan(p) / (sum_all tan(p))^q.

    For a trusted pair (y = 1) the second part is the plain sum over the negatives. For a mismatched pair (y = 0) it
    lies between 0 and the weight and is the only part. On 0..1 the tangent is finite and grows faster than linearly.

    Args:
        correspondence: [b] correspondence probability y; used without gradient.
        weight: weight lambda of the complementary part.
    """
    correspondence = correspondence.detach()

    def score_loss(scores: Tensor, own: Tensor) -> Tensor:
        log_probs, index = scores.log_softmax(1), own[:, None]
        active = -log_probs.gather(1, index).squeeze(1)
        tangents = log_probs.exp().tan()
        negatives = tangents.scatter(1, index, 0.0).sum(1)
        return correspondence * active + weight * negatives / tangents.sum(1).pow(1 - correspondence)

    return score_loss


def rescale_matching_probability(probability: Tensor, num_candidates: Tensor | int, reference_size: int) -> Tensor:
    """Return matching probabilities restated for another number of candidates.

    A matching probability falls with the number of candidates, so a threshold is valid for one number only. The
    probability mass of the negatives is assumed to grow in proportion to their number:
    p / (p + (1 - p) (reference_size - 1) / (num_candidates - 1)).

    Args:
        probability: [b] softmax probability p of the own candidate.
        num_candidates: number of candidates in that softmax, the own one included; [b] or one number for all.
        reference_size: number of candidates that the result is stated for.
    """
    if isinstance(num_candidates, Tensor):
        num_negatives = (num_candidates - 1).clamp_min(1)
    else:
        num_negatives = max(1, num_candidates - 1)
    negatives_mass = (1 - probability).clamp_min(0) * (reference_size - 1) / num_negatives
    return probability / (probability + negatives_mass).clamp_min(1e-12)
