"""Two hosts, as two network namespaces joined by a cable, each started by its own deepspeed launcher."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, command, environment, losses

SMALL = [
    "run.log_every=1", "run.device=cpu",
    "data.num_frames=2", "data.frame_stride=2", "data.frame_size=16", "data.audio_s=0.5",
    "model.visual.name=small_conv", "model.audio.name=small_conv", "model.visual.width=8", "model.audio.width=8",
    "optim.global_batch=24", "phases.contrastive.epochs=2", "phases.hybrid.epochs=1",
    "phases.correction.neighbors=[12]",
    "phases.correction.second=[0,6]", "data.max_bad_fraction=0", "data.decode_threads=1",
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
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        found = []
        for number, (name, end) in enumerate(zip(names, ends, strict=True)):
            address = f"10.77.0.{number + 1}"
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
            found.append((name, address))
        yield found
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_multinode_configuration_trains_on_two_hosts(hosts: list[tuple[str, str]], tiny_shards: Path, tmp_path: Path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for _, address in hosts))
    processes = []
    for number, (name, _) in enumerate(hosts):
        launcher = ("--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(number), "--master_addr", hosts[0][1],
                    "--master_port", "29711")  # fmt: skip
        words = command(
            ROOT / "configs" / "multinode.yaml",
            f"data.root={tiny_shards}",
            f"run.root={tmp_path}",
            *SMALL,
            launcher=launcher,
        )
        link = f"dv{number}{os.getpid() % 100000}"
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *words],
                env={**environment(), "GLOO_SOCKET_IFNAME": link},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said[0][-3000:] + said[1][-3000:]
    report = json.loads((tmp_path / "multinode" / "report.json").read_text())
    assert report["samples"] == 96 and len(losses(tmp_path / "multinode")) == 12
    assert json.loads((tmp_path / "multinode" / "environment.json").read_text())["num_ranks"] == 2
