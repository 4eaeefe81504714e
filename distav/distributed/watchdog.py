"""Watchdog that finds the rank at fault when ranks wait for each other without progress.

The watchdog of every rank writes a heartbeat to the store of the rendezvous, with the number of collectives that the
rank has begun; the watchdog of rank 0 compares them. A rank without heartbeats has stopped or lost the network. If all
ranks have heartbeats and none makes progress, the ranks that have begun the fewest collectives are at fault. Watchdogs
run in their own threads and use no collective, so they also work while the main thread is blocked.

With NCCL a rank begins a collective and continues; it waits later, wherever it reads a value from the GPU. So its stack
does not show whether it waits. torch's flight recorder does: each process group records the last collective that was
begun and the last one that finished. No rank is reported while no rank waits: ranks may compute alone for any time.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from distav.distributed.torch_internals import flight_recorders, is_in_collective, recorded_collectives

EXIT_WATCHDOG = 76
"""Exit status of a rank that the watchdog has ended."""
MAX_RECORDING_S = 10.0
"""Seconds that writing the flight recorder may take; then the process exits without it."""
_RANK_0_UNREACHABLE = "rank 0 has exited, or the network to it is down"


@dataclass
class _Heartbeat:
    """Last heartbeat of a rank.

    Attributes:
        content: as the rank wrote it; `done` if the rank has left.
        num_begun, num_finished: collectives.
        waits: whether the rank waits for a collective.
        location: host, process, stage and last collective.
        received_at, progressed_at: times of the last heartbeat and of the last change in the numbers of collectives.
    """

    content: bytes = b""
    num_begun: int = 0
    num_finished: int = 0
    waits: bool = False
    location: str = "start"
    received_at: float = 0.0
    progressed_at: float = 0.0


@dataclass(frozen=True)
class CollectiveCounts:
    """Counts of torch's flight recorders over the process groups of this process, for all backends.

    Attributes:
        begun: collectives begun in groups other than the default one, such as those of DeepSpeed. Collectives of the
            default group are counted by `Watchdog.record_collective`.
        finished: a number that changes when a collective finishes.
        in_progress: whether a collective has begun and not finished.
    """

    begun: int
    finished: int
    in_progress: bool

    @classmethod
    def read(cls) -> "CollectiveCounts":
        """Read the flight recorders; never blocks."""
        begun, finished, in_progress = 0, 0, False
        for is_default_group, last_begun, last_finished in recorded_collectives():
            begun += 0 if is_default_group else last_begun
            finished += last_finished
            in_progress |= last_begun != last_finished
        return cls(begun, finished, in_progress)


class Watchdog(threading.Thread):
    """Watchdog thread of one rank."""

    def __init__(self, address: str, port: int, rank: int, world_size: int, timeout_s: float):
        """Connect to the store; see `distav.distributed.rendezvous.rendezvous` for the arguments."""
        super().__init__(name="watchdog", daemon=True)
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.interval_s = min(2.0, timeout_s / 10)
        self.store = TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=max(2.0, timeout_s / 2))
        )
        self.stage, self._last_collective = "start", (0, "none")
        self.record_dir: Path | None = None
        self._done, self._num_beats, self._aborting = threading.Event(), 0, False
        self._store_answered_at = now = time.monotonic()
        self._store_monitor = threading.Thread(target=self._monitor_store, name="watchdog store monitor", daemon=True)
        self._heartbeats = [_Heartbeat(received_at=now, progressed_at=now) for _ in range(world_size)]
        self._send_heartbeat()

    def record_collective(self, name: str) -> None:
        """Record that the rank begins a collective of the default group."""
        self._last_collective = self._last_collective[0] + 1, name

    def stop(self) -> None:
        """Stop the watchdog; the other ranks do not miss a rank that leaves in this way."""
        while self._aborting:  # Aborting ends the process with its own exit status.
            time.sleep(self.interval_s)
        self._done.set()
        self.join(self.interval_s + 1)
        if self.is_alive():  # The thread is blocked on a store that no longer answers.
            return
        try:
            self.store.set(f"heartbeat/{self.rank}", "done")
        except RuntimeError:  # Rank 0 has exited, and its store with it.
            return

    def run(self) -> None:
        """Send heartbeats and look for a diagnosis until stopped."""
        self._store_monitor.start()
        while not self._done.wait(self.interval_s):
            try:
                self._send_heartbeat()
                diagnosis = self._diagnose() if self.rank == 0 else self._read_diagnosis()
                self._store_answered_at = time.monotonic()
            except RuntimeError:
                diagnosis = _RANK_0_UNREACHABLE
            if diagnosis and not self._done.is_set():
                self._abort(diagnosis)

    def _monitor_store(self) -> None:
        """Abort when the store, which lives in rank 0, no longer answers; a request to it would block forever."""
        while not self._done.wait(self.interval_s):
            silent_s = time.monotonic() - self._store_answered_at
            if silent_s > self.timeout_s:
                self._abort(f"no answer from rank 0 for {silent_s:.0f} s; it has stopped, or the network to it is down")

    def explain(self, error: BaseException) -> str:
        """Return the cause of an exception on this rank: the rank itself, or another rank that it was waiting for."""
        message = f"{type(error).__name__}: {error}"
        if not _is_communication_error(error):
            try:
                self.store.set(f"failure/{self.rank}", f"{_host()}: {message}")
            except RuntimeError:
                return message
            return message
        deadline = time.monotonic() + 4 * self.interval_s
        while time.monotonic() < deadline:
            try:
                for rank in range(self.world_size):
                    if self.store.check([f"failure/{rank}"]):
                        return f"rank {rank} failed on {self.store.get(f'failure/{rank}').decode()}"
                silent_ranks = self._find_silent(2.5 * self.interval_s)
            except RuntimeError:
                return _RANK_0_UNREACHABLE
            if silent_ranks:
                return f"{silent_ranks} while this rank waited in {self._location()}"
            time.sleep(self.interval_s / 4)
        return f"another rank ended while this rank waited in {self._location()} ({message.splitlines()[0]})"

    def _send_heartbeat(self) -> None:
        self._num_beats += 1
        counts = CollectiveCounts.read()
        num_begun, waits = self._last_collective[0] + counts.begun, counts.in_progress or _waits_in_python()
        location = f"{_host()}; {self._location()}"
        content = f"{self._num_beats}|{num_begun}|{counts.finished}|{int(waits)}|{location}"
        self.store.set(f"heartbeat/{self.rank}", content)

    def _location(self) -> str:
        return f"{self.stage}, last collective {self._last_collective[1]}"

    def _receive_heartbeats(self) -> None:
        now = time.monotonic()
        for rank, heartbeat in enumerate(self._heartbeats):
            key = f"heartbeat/{rank}"
            content = self.store.get(key) if self.store.check([key]) else b""
            if content == heartbeat.content:
                continue
            heartbeat.content, heartbeat.received_at = content, now
            if content and content != b"done":
                _, num_begun, num_finished, waits, location = content.decode().split("|", 4)
                if (int(num_begun), int(num_finished)) != (heartbeat.num_begun, heartbeat.num_finished):
                    heartbeat.progressed_at = now
                heartbeat.num_begun, heartbeat.num_finished = int(num_begun), int(num_finished)
                heartbeat.waits, heartbeat.location = waits == "1", location

    def _find_silent(self, max_silence_s: float) -> str:
        """Return a message that names the ranks without a heartbeat for too long; empty if there are none."""
        self._receive_heartbeats()
        now = time.monotonic()
        return ", ".join(
            f"no heartbeat from rank {rank} for {now - heartbeat.received_at:.0f} s ({heartbeat.location})"
            for rank, heartbeat in enumerate(self._heartbeats)
            if rank != self.rank and heartbeat.content != b"done" and now - heartbeat.received_at > max_silence_s
        )

    def _diagnose(self) -> str:
        diagnosis = self._find_silent(self.timeout_s) or self._find_behind()
        if diagnosis:
            self.store.set("diagnosis", diagnosis)
        return diagnosis

    def _find_behind(self) -> str:
        """Return a message that names the ranks others wait for; empty if there are none.

        These are the ranks that have begun the fewest collectives and are in none. If all ranks have begun the same
        collective and none finishes it, no rank is at fault.
        """
        active = [(rank, beat) for rank, beat in enumerate(self._heartbeats) if beat.content != b"done"]
        stalled_s = time.monotonic() - max(beat.progressed_at for beat in self._heartbeats)
        if stalled_s <= self.timeout_s or not any(beat.waits for _, beat in active):
            return ""
        fewest = min(beat.num_begun for _, beat in active)
        last = [(rank, beat) for rank, beat in active if beat.num_begun == fewest]
        if len(last) == len(active) and all(beat.waits for _, beat in active):
            return (
                f"all ranks began collective {fewest} ({active[0][1].location}) and none has finished it for "
                f"{stalled_s:.0f} s; no rank is behind. Check the network between the hosts, and NCCL with "
                "NCCL_DEBUG=INFO"
            )
        at_fault = [(rank, beat) for rank, beat in last if not beat.waits] or last
        ranks = ", ".join(f"rank {rank} ({beat.location})" for rank, beat in at_fault)
        return f"{ranks} has made no progress for {stalled_s:.0f} s while other ranks wait for it"

    def _read_diagnosis(self) -> str:
        return self.store.get("diagnosis").decode() if self.store.check(["diagnosis"]) else ""

    def _abort(self, diagnosis: str) -> None:
        self._aborting = True
        print(
            f"distav: rank {self.rank}: watchdog timeout: {diagnosis}. Aborting. Rerun the same command to resume from "
            "the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self._write_records()
        if self.rank == 0:
            time.sleep(3 * self.interval_s)  # The other ranks read the diagnosis from this process.
        os._exit(EXIT_WATCHDOG)

    def _write_records(self) -> None:
        """Write what each backend has recorded of the last collectives, in the format of `torchfrtrace`."""
        if not self.record_dir:
            return
        # The recorder asks CUDA whether collectives have ended. CUDA may never answer, and no Python code runs then.
        faulthandler.dump_traceback_later(MAX_RECORDING_S, exit=True)
        for backend, read_recorder in flight_recorders().items():
            path = self.record_dir / backend / f"rank_{self.rank}"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(read_recorder(includeCollectives=True, includeStackTraces=True, onlyActive=False))
            except (OSError, RuntimeError) as error:
                print(f"distav: rank {self.rank}: failed to write {path}: {error}", file=sys.stderr, flush=True)


def _is_communication_error(error: BaseException) -> bool:
    words = ("gloo", "nccl", "connection", "timed out", "socket", "broken pipe", "peer")
    mentions_network = any(word in str(error).lower() for word in words)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and mentions_network)


def _waits_in_python() -> bool:
    """Whether a thread of this process is inside a call of torch.distributed, such as one that creates a group."""
    for frame in sys._current_frames().values():
        while frame:
            if is_in_collective(frame):
                return True
            frame = frame.f_back
    return False


def _host() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"
