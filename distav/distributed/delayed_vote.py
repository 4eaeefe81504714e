"""Agreement of all ranks on a flag without waiting for it."""

import torch
import torch.distributed as dist
from torch import Tensor

from distav.distributed.collectives import get_world_size
from distav.distributed.rendezvous import record_collective


class DelayedVote:
    """Ranks agree on a flag while they do something else: every call returns whether it was set at the previous one.

    The time of a reduction of CPU tensors is proportional to the number of ranks; no rank waits for it here.
    """

    def __init__(self) -> None:
        self._pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, flag: bool) -> bool:
        """Return whether the flag was set on any rank at the previous call, the same on all ranks.

        A single process returns the flag itself. The first call of several ranks returns False.
        """
        if get_world_size() == 1:
            return flag
        record_collective("all_reduce max")
        votes = torch.tensor([float(flag)])
        work = dist.all_reduce(votes, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        previous, self._pending = self._pending, (work, votes)
        if previous is None:
            return False
        previous[0].wait()
        return bool(previous[1].item())
