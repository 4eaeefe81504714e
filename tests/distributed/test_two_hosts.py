"""Training on two hosts: two connected network namespaces, each with its own deepspeed launcher."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, command, environment, losses

SMALL = [
    "run.log_every=1", "run.device=cpu",
    "data.num_frames=2", "data.frame_stride=2", "data.frame_size=16", "data.audio_s=0.5",
    "model.visual.name=small_conv", "model.audio.name=small_conv", "model.visual.width=8", "model.audio.width=8",
    "optim.global_batch=24", "phases.contrastive.epochs=2", "data.max_quarantined_fraction=0", "data.decode_threads=1",
    *(f"phases.learn_{number}.epochs=1" for number in (1, 2, 3)),
    *(f"phases.{name}.{setting}" for name in ("correct_1", "correct_2", "correct_3", "labels")
      for setting in ("num_neighbors=[12]", "second_round_neighbors=[0,6]")),
]  # fmt: skip


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str]]]:
    """Names and addresses of two hosts that reach each other and nothing else."""
    if not shutil.which("ip"):
        pytest.skip("two hosts need the `ip` command (iproute2)")
    names = [f"distav{number}-{os.getpid()}" for number in range(2)]
    ends = [f"dv{number}{os.getpid() % 100000}" for number in range(2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be created: {error.stderr.strip()}")
        addresses = []
        for number, (name, end) in enumerate(zip(names, ends, strict=True)):
            address = f"10.77.0.{number + 1}"
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
            addresses.append((name, address))
        yield addresses
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start_runs(hosts: list[tuple[str, str]], shards: Path, folder: Path, *more: str) -> list[subprocess.Popen[str]]:
    """Start the run on both hosts, each by its own launcher; their output is written to host-N.txt."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for _, address in hosts))
    processes = []
    for number, (name, _) in enumerate(hosts):
        launcher = ("--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(number), "--master_addr", hosts[0][1],
                    "--master_port", "29711")  # fmt: skip
        overrides = (f"data.root={shards}", f"run.root={folder}", *SMALL, *more)
        words = command(ROOT / "configs" / "multinode.yaml", *overrides, launcher=launcher)
        with open(folder / f"host-{number}.txt", "w") as output:
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *words],
                    env={**environment(), "GLOO_SOCKET_IFNAME": f"dv{number}{os.getpid() % 100000}"},
                    stdout=output,
                    stderr=output,
                    text=True,
                )
            )
    return processes


def read_output(folder: Path) -> list[str]:
    return [(folder / f"host-{number}.txt").read_text() for number in range(2)]


@pytest.mark.long
def test_multinode_configuration_trains_on_two_hosts(hosts: list[tuple[str, str]], tiny_shards: Path, tmp_path: Path):
    statuses = [process.wait(240) for process in start_runs(hosts, tiny_shards, tmp_path)]
    assert statuses == [0, 0], [output[-3000:] for output in read_output(tmp_path)]
    report = json.loads((tmp_path / "multinode" / "report.json").read_text())
    assert report["samples"] == 96 and len(losses(tmp_path / "multinode")) == 20
    assert json.loads((tmp_path / "multinode" / "environment.json").read_text())["world_size"] == 2


@pytest.mark.long
def test_disconnected_host_is_named_on_both_sides_and_the_run_resumes(
    hosts: list[tuple[str, str]], tiny_shards: Path, tmp_path: Path
):
    more = ("run.timeout_s=8", "run.checkpoint_every=2", "phases.contrastive.epochs=40")
    processes = start_runs(hosts, tiny_shards, tmp_path, *more)
    deadline = time.monotonic() + 120
    while "step 8/160 phase=contrastive" not in read_output(tmp_path)[0]:
        assert all(process.poll() is None for process in processes), read_output(tmp_path)
        assert time.monotonic() < deadline, read_output(tmp_path)
        time.sleep(0.02)
    name, link = hosts[1][0], f"dv1{os.getpid() % 100000}"
    subprocess.run(["ip", "-n", name, "link", "set", link, "down"], check=True)
    statuses = [process.wait(60) for process in processes]
    first, second = read_output(tmp_path)
    assert all(statuses), (statuses, first[-3000:], second[-3000:])
    pattern = r"rank 0: watchdog timeout: no heartbeat from rank 1 for .*; contrastive step \d+, "
    assert re.search(pattern, first), first[-3000:]
    assert re.search(r"rank 1: .*(no answer from rank 0|rank 0 has exited)", second), second[-3000:]
    subprocess.run(["ip", "-n", name, "link", "set", link, "up"], check=True)
    again = [process.wait(240) for process in start_runs(hosts, tiny_shards, tmp_path, *more)]
    assert again == [0, 0] and "resuming in phase contrastive after step" in read_output(tmp_path)[0]
