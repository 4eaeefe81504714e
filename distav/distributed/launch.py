"""Ranks that a launcher describes in the environment: `deepspeed`, `torchrun`, Slurm's `srun`, or none."""

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass

from distav.config.errors import UserError

_FIRST_PORT, _NUM_PORTS = 20_000, 20_000
"""Ports for the rendezvous of Slurm's jobs; Linux gives other programs ports from 32,768 by default."""


@dataclass(frozen=True)
class Launch:
    """What a launcher says of this process.

    Attributes:
        rank: number of this process, 0..world_size-1.
        world_size: number of processes.
        local_rank: number of this process on its machine.
        local_size: number of processes on this machine.
        address: host of rank 0.
        port: port of the rendezvous there.
        agent_store: whether the launcher has a store at that port, as torchrun does.
        restart: how often the launcher has restarted the processes.
        cores_per_rank: CPU cores for this process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    port: int = 0
    agent_store: bool = False
    restart: int = 0
    cores_per_rank: int = 1

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read the variables that `deepspeed` and `torchrun` set; see `set_rank_variables` for `srun`.

        Raises:
            UserError: if there are several ranks and a variable is missing or invalid.
        """
        world_size = _integer("WORLD_SIZE", 1)
        local_rank = _integer("LOCAL_RANK", 0)
        if world_size == 1:
            return cls(local_rank=local_rank, cores_per_rank=len(os.sched_getaffinity(0)))
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise UserError(
                    f"WORLD_SIZE={world_size}, but the environment variable {name} is missing. Start several ranks "
                    "with deepspeed, torchrun or srun, or remove WORLD_SIZE to train with one."
                )
        rank = _integer("RANK", 0)
        if rank >= world_size:
            raise UserError(f"environment variable RANK={rank}: allowed: less than WORLD_SIZE={world_size}.")
        local_size = _integer("LOCAL_WORLD_SIZE", _integer("LOCAL_SIZE", world_size))
        agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        restart = _integer("TORCHELASTIC_RESTART_COUNT", 0)
        address, port = os.environ["MASTER_ADDR"], _integer("MASTER_PORT", 0)
        cores = max(1, len(os.sched_getaffinity(0)) // local_size)
        if os.environ.get("SLURM_STEP_NUM_TASKS") == str(
            world_size
        ):  # Slurm may have bound each rank to its own cores.
            cores = _integer("SLURM_CPUS_PER_TASK", cores)
        return cls(rank, world_size, local_rank, local_size, address, port, agent_store, restart, cores)


def set_rank_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables of `torchrun` from those of Slurm, if this process is one of several tasks of `srun`.

    Nothing changes where another launcher has set `RANK`. The port of the rendezvous follows from the numbers of the
    job and its step, so that jobs on the same machines have different ports; `MASTER_PORT` replaces it.

    Args:
        environment: environment variables, which are changed.
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS") or 1) < 2:
        return
    num_tasks = environment["SLURM_STEP_NUM_TASKS"]
    job, step = int(environment.get("SLURM_JOB_ID") or 0), int(environment.get("SLURM_STEP_ID") or 0)
    node = int(environment.get("SLURM_NODEID") or 0)
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = num_tasks
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    local_sizes = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE") or num_tasks)
    environment["LOCAL_WORLD_SIZE"] = str(local_sizes[node])
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "localhost"
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + (7 * job + step) % _NUM_PORTS))


def first_host(nodes: str) -> str:
    """Return the first host of a list in Slurm's notation, such as "gpu01" of "gpu[01-04,07],cpu3"."""
    matched = re.match(r"([^,\[]+)(?:\[([^],-]+)[^]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in matched.groups()) if matched else nodes


def tasks_per_node(text: str) -> list[int]:
    """Return the number of tasks of each node from Slurm's notation, such as [8, 8, 4] of "8(x2),4"."""
    counts = []
    for part in text.split(","):
        count, _, repeats = part.partition("(x")
        counts += [int(count)] * int(repeats.rstrip(")") or 1)
    return counts


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise UserError(f"environment variable {name}={text}: allowed: a whole number from 0 on.")
    return int(text)
