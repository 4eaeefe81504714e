"""Ranks started by torchrun, by tasks of Slurm, and by nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distav.config.errors import UserError
from distav.distributed.launch import Launch, first_host, set_rank_variables, tasks_per_node
from tests.helpers.launch import ROOT, environment, slurm_task

SCRIPT = """
import torch, torch.distributed as dist
from distav.distributed.launch import set_rank_variables
from distav.distributed.process_group import process_group

set_rank_variables()
with process_group("cpu", 30.0) as world:
    total = torch.tensor(1 + world.rank)
    dist.all_reduce(total)
    line = f"rank {world.rank} of {world.world_size}, local {world.local_rank}, sum {int(total)}\\n"
    print(line, end="", flush=True)  # one write, since both ranks write to the same pipe
"""
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TWO_NODES = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_STEP_TASKS_PER_NODE": "8,4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_CPUS_PER_TASK": "12",
}
EXPECTED = ["rank 0 of 2, local 0, sum 3", "rank 1 of 2, local 1, sum 3"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        if name in RANK_VARIABLES or name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


def test_torchrun_starts_ranks(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment(), cwd=ROOT, check=False
    )
    assert sorted(done.stdout.splitlines()) == EXPECTED, done.stderr


def test_tasks_of_slurm_are_ranks():
    processes = []
    for rank in range(2):
        variables = TWO_NODES | slurm_task(rank, 2)
        words = [sys.executable, "-c", SCRIPT]
        processes.append(
            subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment() | variables, cwd=ROOT)
        )
    assert sorted(process.communicate(timeout=120)[0].strip() for process in processes) == EXPECTED


def test_variables_of_slurm_are_translated(monkeypatch: pytest.MonkeyPatch):
    for name, value in TWO_NODES.items():
        monkeypatch.setenv(name, value)
    for name in RANK_VARIABLES:  # monkeypatch removes afterwards what set_rank_variables sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    set_rank_variables()
    launch = Launch.from_environment()
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_size) == (9, 12, 1, 4)
    assert (launch.address, launch.cores_per_rank, launch.agent_store) == ("gpu07", 12, False)


def test_jobs_of_slurm_on_the_same_nodes_have_different_ports():
    ports = set()
    for job in range(2_000, 2_050):
        for step in range(3):
            variables = TWO_NODES | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
            set_rank_variables(variables)
            ports.add(int(variables["MASTER_PORT"]))
    assert len(ports) == 150 and min(ports) >= 1024 and max(ports) < 65536


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # A batch script, outside of srun.
        TWO_NODES | {"RANK": "3", "WORLD_SIZE": "4"},
    ],
)
def test_variables_of_other_launchers_are_kept(variables: dict[str, str]):
    environment = dict(variables)
    set_rank_variables(environment)
    assert environment == variables


def test_host_lists_of_slurm():
    assert [first_host(nodes) for nodes in ("gpu[01-04,07],cpu3", "n1,n2", "tux[3]", "a-b[1-2]-x", "gpu.example")] == [
        "gpu01", "n1", "tux3", "a-b1-x", "gpu.example"
    ]  # fmt: skip
    assert tasks_per_node("8(x2),4") == [8, 8, 4] and tasks_per_node("3") == [3]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but the environment variable RANK is missing"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, "MASTER_PORT is missing"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: allowed: a whole number"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK=2: allowed: less than WORLD_SIZE=2",
        ),
    ],
)
def test_incomplete_variables_are_named(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        Launch.from_environment()
