"""Parts of the GPU verification that no other program covers: facts, quickstart on two devices, steps of full size."""

import argparse
import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from distav.distributed.environment import machine
from tests.helpers.launch import DEEPSPEED, ROOT, command, environment

PACKAGES = ("torchvision", "torchaudio", "triton", "transformers", "pyarrow", "pytest")
"""Packages whose versions are recorded in addition to those of the benchmarks."""
DALI = "nvidia-dali-cuda130"
WARM_UP = 1
"""Steps before the timed ones."""


def facts(file: Path, device: str) -> int:
    """Write versions, the state of the GPU, and whether DALI's libraries are those of its wheel."""
    print(_output("nvidia-smi"))
    info = machine()
    info["versions"] |= {name: version for name in PACKAGES if (version := _version(name))}
    info |= {
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "dali": _dali(),
        "deepspeed_launcher": str(DEEPSPEED) if DEEPSPEED.is_file() else None,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        info |= {
            "capability": list(torch.cuda.get_device_capability()),
            "gpu_free_gib": round(free / 2**30, 2),
            "gpu_total_gib": round(total / 2**30, 2),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    _save(file, {}, machine=info)
    print(json.dumps(info, indent=1))
    if not info["deepspeed_launcher"]:
        print(f"{DEEPSPEED} is missing; install DeepSpeed's launcher beside the interpreter")
        return 1
    if device == "cuda" and not info["gpu"]:
        print("PyTorch finds no GPU")
        return 1
    return 0


def _dali() -> dict[str, Any]:
    """Return DALI's version and location, and which of its libraries differ from those of its wheel."""
    wheel = metadata.distribution(DALI)
    altered = []
    for path in wheel.files or []:
        if path.name.startswith("libdali") and path.hash:
            with open(str(path.locate()), "rb") as library:
                digest = hashlib.file_digest(library, path.hash.mode).digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != path.hash.value:
                altered.append(path.name)
    state = f"reduced ({', '.join(altered)})" if altered else "as published"
    return {"version": wheel.version, "path": str(wheel.locate_file("nvidia/dali")), "libraries": state}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(*words: str) -> str | None:
    """Return the output of a program; None if it is missing or fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def quickstart(file: Path, device: str) -> int:
    """Train the quickstart on the GPU in bf16 with ZeRO 1 and on the CPU in fp32 with ZeRO 0, and compare the results.

    Both run at the same time. Frames have 160 pixels, which a GPU can decode. In the rehearsal both trainings are short
    and run on the CPU in fp32.
    """
    small = device == "cpu"
    cores = len(os.sched_getaffinity(0))
    clips, side = ((120, 30), 32) if small else ((1200, 300), 160)
    threads = f"run.threads_per_rank={max(1, cores * 3 // 8)}", f"data.decode_threads={max(1, cores // 4)}"
    short = "phases.contrastive.epochs=2", "phases.learn_1.epochs=1", "phases.learn_2.epochs=1"
    runs = {
        "run": ("run.device=cpu", "deepspeed.precision=fp32")
        if small
        else ("run.device=gpu", "deepspeed.precision=bf16"),
        "reference": ("run.device=cpu", "deepspeed.precision=fp32"),
    }
    with tempfile.TemporaryDirectory(prefix="distav-quickstart-") as name:
        folder = Path(name)
        _render(folder / "dataset", clips, "--label-noise=symmetric:0.4", f"--short-side={side}")
        processes = {}
        for training, stage in (("run", 1), ("reference", 0)):
            words = command(
                ROOT / "configs" / "quickstart.yaml", f"data.root={folder / 'dataset'}", "data.synthetic.enabled=false",
                f"run.root={folder / training}", f"deepspeed.zero_stage={stage}", *runs[training], *threads,
                *(short if small else ()),
            )  # fmt: skip
            with file.with_name(f"{file.stem}-{training}.log").open("w") as log:
                processes[training] = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=log, stderr=log)
        while None in (statuses := [process.poll() for process in processes.values()]) and not any(statuses):
            time.sleep(0.2)
        if any(statuses):  # One training failed, so the other cannot be compared.
            for process in psutil.Process().children(
                recursive=True
            ):  # The launcher alone would leave its rank running.
                process.kill()
            statuses = [process.wait() for process in processes.values()]
            print(f"exit statuses {statuses}: see {file.stem}-run.log and {file.stem}-reference.log")
            return 1
        reports = {
            training: json.loads((folder / training / "quickstart" / "report.json").read_text()) for training in runs
        }
    results = {training: _results(report) for training, report in reports.items()}
    values = {}
    for figure, value in results["run"].items():
        values |= {figure: value, f"{figure}, reference": results["reference"][figure]}
        if figure in ("label accuracy", "noise rate", "top-1"):
            values[f"{figure}, difference"] = abs(value - results["reference"][figure])
    values["noise rate, error"] = abs(results["run"]["noise rate"] - 0.4)
    _save(file, values, reports=reports)
    print(*(f"{figure}: {value:.4g}" for figure, value in values.items()), sep="\n")
    return 0


def _results(report: Mapping[str, Any]) -> dict[str, float]:
    seconds = {f"seconds of {phase['name']}": phase["seconds"] for phase in report["phases"]}
    return {
        "label accuracy": report["label_accuracy"]["corrected"],
        "noise rate": report["corrections"][-1]["label_noise_rate"]["estimate"],
        "top-1": report["test"]["top1"],
        "quarantined clips": len(report["quarantined_samples"]),
        **seconds,
    }


def multinode(file: Path, device: str) -> int:
    """Train some steps of the first phase of configs/multinode.yaml with its 128 clips per GPU, decoded from shards.

    Writes memory, clips/s and the rate relative to a matrix product; if memory is insufficient, the line and the size
    of the failed allocation.
    """
    small = device == "cpu"
    clips, steps, encoding, reduced = 128, 10, ("--short-side=256", "--clip-s=4"), ()
    if small:
        clips, steps, encoding = 2, 2, ("--short-side=48", "--clip-s=1")
        reduced = "data.num_frames=2", "data.frame_size=32", "data.audio_s=0.5", "data.decode_threads=1"
    with tempfile.TemporaryDirectory(prefix="distav-multinode-") as name:
        folder, results = Path(name), dict[str, Any]()
        _render(folder / "dataset", (clips, 1), "--codec=h264", "--fps=16", "--sample-rate=24000", *encoding)
        overrides = [
            f"data.root={folder / 'dataset'}", f"run.root={folder}", f"run.device={'cpu' if small else 'gpu'}",
            f"optim.global_batch={clips}", "run.threads_per_rank=2", *reduced,
        ]  # fmt: skip
        try:
            _train(overrides, clips, steps, results)
        except torch.OutOfMemoryError as error:
            frames = traceback.extract_tb(error.__traceback__)
            last = [frame for frame in frames if frame.filename.startswith((str(ROOT / "distav"), __file__))][-1]
            results["out of memory"] = f"{last.filename}:{last.lineno} ({last.line}): {str(error).splitlines()[0]}"
            traceback.print_exc()
            print(torch.cuda.memory_summary())
    if device == "cuda":
        results["peak memory allocated, GiB"] = torch.cuda.max_memory_allocated() / 2**30
        results["peak memory reserved, GiB"] = torch.cuda.max_memory_reserved() / 2**30
    _save(file, {name: value for name, value in results.items() if isinstance(value, int | float)}, results=results)
    print(*(f"{name}: {value}" for name, value in results.items()), sep="\n")
    return 1 if "out of memory" in results or results["quarantined clips"] else 0


def _train(overrides: list[str], clips: int, steps: int, results: dict[str, Any]) -> None:
    from distav.distributed.process_group import process_group
    from distav.training.phases.contrastive import contrastive_losses
    from distav.training.run_setup import open_run
    from tools.bench.timing import Setting
    from tools.bench.training_step import TOWERS, count_operations, matmul_rate

    settings = TOWERS["r2plus1d_18"].settings(*overrides)
    phase: Any = next(iter(settings.phases.values()))
    with (
        process_group(settings.run.device.name, 600, settings.run.threads_per_rank) as world,
        open_run(settings, world) as run,
    ):
        on_gpu = world.device.type == "cuda"
        losses, sampler = contrastive_losses(run, phase), run.sampler(0)
        batches = run.loader.batches((sampler.batch(0), epoch) for epoch in range(WARM_UP + steps))
        run.engine.train()
        run.engine.set_lr(1e-5, 1e-5)
        waited = started = 0.0
        begun = time.perf_counter()
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                waited, started = 0.0, _now(on_gpu)
            requested = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - requested
            run.engine.backward(losses(batch, 0.5)["loss"])
            run.engine.step()
            results |= {"steps": step + 1, "quarantined clips": len(run.loader.quarantine.reasons)}
            print(f"step {step + 1} after {_now(on_gpu) - begun:.1f} s", flush=True)
        seconds = (_now(on_gpu) - started) / steps
        num_classes, sample_rate_hz = len(run.data.shards.classes), run.data.train.sample_rate_hz
        operations = count_operations(settings, sample_rate_hz, num_classes, batch)
        rate = matmul_rate(Setting(world.device, 2, 10), world.device)
        results |= {
            "clips/s": clips / seconds,
            "seconds of a step": seconds,
            "data wait, fraction of a step": waited / steps / seconds,
            "operations of a step, TFLOP": operations / 1e12,
            "rate of a matrix product, TFLOP/s": rate / 1e12,
            "rate of a step / rate of a matrix product": operations / seconds / rate,
        }


def _now(on_gpu: bool) -> float:
    """Return the time in seconds after synchronizing the GPU."""
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def _render(folder: Path, clips: tuple[int, int], *options: str) -> None:
    words = [sys.executable, str(ROOT / "tools" / "make_shards.py"), "synthetic", str(folder), *options]
    started = time.perf_counter()
    subprocess.run([*words, f"--train-clips={clips[0]}", f"--test-clips={clips[1]}"], check=True)
    print(f"clips rendered in {time.perf_counter() - started:.1f} s", flush=True)


def _save(file: Path, values: Mapping[str, float], **more: Any) -> None:
    """Write figures in the format of tools/bench.py, and additional information."""
    figures = {name: {"value": value} for name, value in values.items()}
    file.write_text(json.dumps({"figures": figures, **more}, indent=1) + "\n")


def main() -> int:
    """Run one of the scripts; returns the exit status."""
    scripts = {script.__name__: script for script in (facts, quickstart, multinode)}
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.scripts", description=__doc__)
    parser.add_argument("script", choices=tuple(scripts))
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small sizes")
    options = parser.parse_args()
    return scripts[options.script](options.json.resolve(), options.device)


if __name__ == "__main__":
    sys.exit(main())
