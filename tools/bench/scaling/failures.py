"""Useful fraction of the time of a run with failures and checkpoints (Young 1974, Daly 2006).

All times are in seconds; failures are a Poisson process.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Failures:
    """Failures of a run and its checkpoints.

    Attributes:
        node_mtbf_s: mean time between failures of one node.
        checkpoint_s: time by which a checkpoint delays training.
        restart_s: time from a failure to the first step of the restarted run, detection included.
    """

    node_mtbf_s: float
    checkpoint_s: float
    restart_s: float

    def mtbf_s(self, num_nodes: int) -> float:
        """Return the mean time between failures of a run on a number of nodes, each of which stops the run."""
        return self.node_mtbf_s / num_nodes

    def goodput(self, interval_s: float, num_nodes: int) -> float:
        """Return the fraction of the time that advances training, 0..1.

        The time lost to a failure is that since the last checkpoint and the restart, during which the run can fail
        again. (Daly 2006, equation 13.)

        Args:
            interval_s: training time between two checkpoints.
            num_nodes: number of nodes.
        """
        mtbf = self.mtbf_s(num_nodes)
        exponent = (interval_s + self.checkpoint_s) / mtbf
        if exponent > 500:
            return 0.0
        return interval_s / (mtbf * math.exp(self.restart_s / mtbf) * math.expm1(exponent))

    def young_interval_s(self, num_nodes: int) -> float:
        """Return Young's interval between checkpoints, sqrt(2 C M)."""
        return math.sqrt(2 * self.checkpoint_s * self.mtbf_s(num_nodes))

    def daly_interval_s(self, num_nodes: int) -> float:
        """Return Daly's interval between checkpoints, a higher-order estimate of the one with the largest goodput."""
        mtbf = self.mtbf_s(num_nodes)
        if self.checkpoint_s >= 2 * mtbf:
            return mtbf
        root = math.sqrt(self.checkpoint_s / (2 * mtbf))
        return self.young_interval_s(num_nodes) * (1 + root / 3 + root * root / 9) - self.checkpoint_s


def first_order_goodput(interval_s: float, checkpoint_s: float, restart_s: float, mtbf_s: float) -> float:
    """Return the goodput for intervals that are short relative to the mean time between failures M.

    It is 1 - C / T - T / (2 M) - R / M.
    """
    return 1 - checkpoint_s / interval_s - interval_s / (2 * mtbf_s) - restart_s / mtbf_s
