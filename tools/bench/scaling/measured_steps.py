"""Training steps of distav, measured with one and with several ranks on the cores of this machine."""

import dataclasses
import multiprocessing
import os
import queue
import socket
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from distav.config.schema import Config
from distav.training.phases.contrastive import contrastive_losses
from tools.bench.scaling.network import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER
from tools.bench.training_step import TOWERS

WARM_UP_STEPS = 5
MEASURED_STEPS = 24
_START_S = 300


@dataclass
class RankTimes:
    """Steps of one rank.

    Attributes:
        seconds: wall time of each step.
        cpu_s: mean CPU time of a step, of all threads of the rank.
        parts: median wall time of forward pass, loss, backward pass and optimizer.
        collectives: how often a step has each (kind, bytes), as `Network.seconds` takes them.
        rows: clips of the dataset.
        classes: classes of the dataset.
    """

    seconds: list[float]
    cpu_s: float
    parts: dict[str, float]
    collectives: Counter[tuple[str, int]] = field(default_factory=Counter)
    rows: int = 0
    classes: int = 0


def step_settings(dataset: Path, batch: int, ranks: int, overrides: Sequence[str], run_root: Path) -> Config:
    """Return the settings of the measured steps: `batch` clips on each rank, one thread, small networks."""
    return TOWERS["small"].settings(
        f"data.root={dataset}", f"run.root={run_root}", "run.name=bench",
        "run.device=cpu", "run.threads_per_rank=1", f"optim.global_batch={batch * ranks}", *overrides,
    )  # fmt: skip


def measure(dataset: Path, batch: int, ranks: int, overrides: Sequence[str], runs: int = 1) -> list[list[RankTimes]]:
    """Measure the steps of one or more runs at the same time; runs do not communicate with one another.

    Args:
        dataset: shards.
        batch: clips of a rank and step.
        ranks: ranks of each run.
        overrides: settings, as `key=value`.
        runs: number of runs.

    Returns:
        The ranks of each run.

    Raises:
        RuntimeError: if a rank fails; the message has the end of its output.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    ready = context.Barrier(runs * ranks)
    with tempfile.TemporaryDirectory(prefix="distav-bench-") as directory:
        processes = []
        for run in range(runs):
            port = _free_port()
            for rank in range(ranks):
                job = (run, rank, ranks, port, str(dataset), directory, batch, tuple(overrides))
                processes.append(context.Process(target=_run_rank, args=(job, ready, results), daemon=True))
        for process in processes:
            process.start()
        try:
            found = [results.get(timeout=_START_S) for _ in processes]
        except queue.Empty:
            found = [(0, 0, f"no result within {_START_S} s")]
        failures = [outcome for _, _, outcome in found if isinstance(outcome, str)]
        for process in processes:
            if failures:
                process.kill()
            process.join()
    if failures:
        raise RuntimeError(f"a measured rank failed: {failures[0][-2000:]}")
    by_place = {(run, rank): outcome for run, rank, outcome in found if not isinstance(outcome, str)}
    return [[by_place[run, rank] for rank in range(ranks)] for run in range(runs)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run_rank(job: tuple, ready: Any, results: Any) -> None:
    run, rank, ranks, port, dataset, directory, batch, overrides = job
    log = Path(directory) / f"run-{run}-rank-{rank}.log"
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    try:
        settings = step_settings(Path(dataset), batch, ranks, overrides, Path(directory) / str(run))
        results.put((run, rank, _measure_steps(settings, ready)))
    except BaseException as error:
        ready.abort()
        results.put((run, rank, f"{log.read_text()[-1500:]}\n{type(error).__name__}: {error}"))
        raise


def _measure_steps(settings: Config, ready: Any) -> RankTimes:
    from distav.distributed.process_group import process_group
    from distav.training.run_setup import open_run

    recorder = CollectiveRecorder()
    with recorder.installed(), process_group("cpu", _START_S, 1) as world, open_run(settings, world) as run:
        parts: dict[str, list[float]] = defaultdict(list)
        timed = step_of(run, parts)
        seconds = []
        for _ in range(WARM_UP_STEPS):
            timed()
        parts.clear()
        ready.wait(_START_S)
        cpu_began = time.process_time()
        for _ in range(MEASURED_STEPS):
            started = time.perf_counter()
            timed()
            seconds.append(time.perf_counter() - started)
        cpu_s = (time.process_time() - cpu_began) / MEASURED_STEPS
        with recorder.recording():
            timed()
        medians = {name: median(values) for name, values in parts.items()}
        return RankTimes(seconds, cpu_s, medians, recorder.counts, len(run.data.train), len(run.data.shards.classes))


def step_of(run: Any, parts: dict[str, list[float]]) -> Callable[[], None]:
    """Return a function that does one step on a batch in memory, as the training loop does.

    Args:
        run: run whose first phase is contrastive.
        parts: gets the seconds of the parts of each step: `forward_s`, `loss_s`, `backward_s`, `optimizer_s`.
    """
    phase = next(iter(run.config.phases.values()))
    sampler = run.sampler(0)
    plan = [next(iter(sampler.micro_batches(step, run.world.rank, run.world.world_size))) for step in range(2)]
    batches = [run.loader.load(*ids) for ids in plan]
    losses_of = contrastive_losses(dataclasses.replace(run, engine=_TimedForward(run.engine, parts)), phase)
    run.engine.train()

    def step() -> None:
        times = [time.perf_counter()]
        batch = batches[len(parts["loss_s"]) % len(batches)]
        run.engine.set_lr(1e-4, 1e-4)
        loss = losses_of(batch, 0.5)["loss"]
        times.append(time.perf_counter())
        run.engine.backward(loss)
        times.append(time.perf_counter())
        run.engine.step()
        run.stop_if_requested()
        times.append(time.perf_counter())
        for name, first, last in zip(("loss_s", "backward_s", "optimizer_s"), times, times[1:], strict=False):
            parts[name].append(last - first)
        parts["loss_s"][-1] -= parts["forward_s"][-1]

    return step


class _TimedForward:
    """An engine that records the time of forward passes."""

    def __init__(self, engine: Any, parts: dict[str, list[float]]):
        self._engine, self._parts = engine, parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, batch: Any) -> Any:
        started = time.perf_counter()
        outputs = self._engine(batch)
        self._parts["forward_s"].append(time.perf_counter() - started)
        return outputs


class CollectiveRecorder:
    """Counts the collectives that this process calls, by kind and size.

    Attributes:
        counts: number of calls by (kind, bytes), as `tools.bench.scaling.network.Network.seconds` takes them.
    """

    _SIZES: dict[str, tuple[str, Callable[..., int]]] = {
        "all_reduce": (ALL_REDUCE, lambda tensor, *_: tensor.nbytes),
        "all_gather": (ALL_GATHER, lambda parts, *_: sum(part.nbytes for part in parts)),
        "all_gather_into_tensor": (ALL_GATHER, lambda result, *_: result.nbytes),
        "all_gather_single": (ALL_GATHER, lambda result, *_: result.nbytes),
        "reduce_scatter_tensor": (REDUCE_SCATTER, lambda _part, values, *_: values.nbytes),
        "reduce_scatter_single": (REDUCE_SCATTER, lambda _part, values, *_: values.nbytes),
        "all_to_all_single": (ALL_TO_ALL, lambda received, sent, *_: max(received.nbytes, sent.nbytes)),
    }

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()
        self._is_recording, self._depth = False, 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the functions of torch.distributed; to be entered before DeepSpeed refers to them."""
        originals = {name: getattr(dist, name) for name in self._SIZES if hasattr(dist, name)}
        for name, original in originals.items():
            setattr(dist, name, self._recorded(name, original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Count the calls inside the context."""
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    def _recorded(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        kind, size = self._SIZES[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [*args, *kwargs.values()]
            if self._is_recording and self._depth == 0:
                self.counts[kind, size(*(value for value in tensors if isinstance(value, torch.Tensor | list)))] += 1
            self._depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1

        return call


def relative_spread(seconds: Sequence[float]) -> float:
    """Return half the distance of the 16th and 84th percentile, relative to the median: a robust standard deviation."""
    low, middle, high = torch.tensor(seconds, dtype=torch.float64).quantile(
        torch.tensor([0.16, 0.5, 0.84], dtype=torch.float64)
    )
    return float((high - low) / 2 / middle)
