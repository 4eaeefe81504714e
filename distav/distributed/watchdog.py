"""Finds the rank at fault where ranks wait for one another in vain.

Every rank's watch sends a sign of life to the store of the rendezvous, with the number of collectives that the rank has
begun; the first rank's watch compares them. A rank whose signs stay out has stopped or lost the network. Where all
live and nobody gets on, the ones that have begun fewest collectives keep the others waiting. Watches run in threads of
their own and use no collective, so they see what a blocked rank cannot.

Under NCCL a rank begins a collective and goes on; it waits later, wherever it reads a value from the GPU. So whether it
waits is not seen in its stack but in torch's flight recorder, where each process group notes the last collective begun
and the last one finished. Nobody is named as long as no rank waits: ranks may work alone for as long as they like.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

EXIT_WATCHDOG = 76
"""Exit status of a rank that gave up waiting for another."""
RECORDS_S = 10.0
"""Seconds that writing the flight recorder may take, after which the process ends without."""


@dataclass
class _Heartbeat:
    said: bytes = b""
    count: int = 0
    finished: int = 0
    waits: bool = False
    place: str = "start"
    heard: float = 0.0
    moved: float = 0.0


@dataclass(frozen=True)
class Collectives:
    """What torch's flight recorder notes of this process's groups, of all backends.

    Attributes:
        begun: collectives begun in groups other than the default one, whose collectives `Watch.mark` counts: those of
            DeepSpeed.
        finished: a number that changes when a collective ends.
        under_way: whether a collective has been begun and not finished.
    """

    begun: int
    finished: int
    under_way: bool

    @classmethod
    def recorded(cls) -> "Collectives":
        """Read the flight recorders; no lock is taken and CUDA is not asked, so that this never waits."""
        begun, finished, under_way = 0, 0, False
        for read in _recorders("_json").values():
            for group, status in json.loads(read(includeCollectives=False))["pg_status"].items():
                last, ended = int(status["last_enqueued_collective"]), int(status["last_completed_collective"])
                begun += last if group != "0" else 0
                finished += ended
                under_way |= last != ended
        return cls(begun, finished, under_way)


class Watchdog(threading.Thread):
    """One rank's watch."""

    def __init__(self, address: str, port: int, rank: int, num_ranks: int, timeout_s: float):
        """Connect to the store; see `distav.distributed.process_group.joined` for the arguments."""
        super().__init__(name="watch", daemon=True)
        self.rank, self.num_ranks, self.timeout_s = rank, num_ranks, timeout_s
        self.interval_s = min(2.0, timeout_s / 10)
        self.store = TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=max(2.0, timeout_s / 2))
        )
        self.stage, self._place = "start", (0, "nothing")
        self.records: Path | None = None
        self._done, self._beats, self._gives_up = threading.Event(), 0, False
        self._answered = now = time.monotonic()
        self._deadman = threading.Thread(target=self._await_answers, name="watch's watch", daemon=True)
        self._signs = [_Heartbeat(heard=now, moved=now) for _ in range(num_ranks)]
        self._beat()

    def mark(self, what: str) -> None:
        """Note that the rank begins a collective."""
        self._place = self._place[0] + 1, what

    def stop(self) -> None:
        """End the watch; a rank that leaves in order is not missed."""
        while self._gives_up:  # It ends the process, with its own status.
            time.sleep(self.interval_s)
        self._done.set()
        self.join(self.interval_s + 1)
        if self.is_alive():  # It waits for a store that answers no more.
            return
        try:
            self.store.set(f"sign/{self.rank}", "done")
        except RuntimeError:  # The first rank has gone, and its store with it.
            return

    def run(self) -> None:
        """Send signs and look for a verdict until stopped."""
        self._deadman.start()
        while not self._done.wait(self.interval_s):
            try:
                self._beat()
                verdict = self._diagnose() if self.rank == 0 else self._read_diagnosis()
                self._answered = time.monotonic()
            except RuntimeError:
                verdict = "rank 0 has gone, or the network to it is cut"
            if verdict and not self._done.is_set():
                self._give_up(verdict)

    def _await_answers(self) -> None:
        """Give up where the store, which lives in the first rank, answers no more; asking it blocks for ever."""
        while not self._done.wait(self.interval_s):
            silent_s = time.monotonic() - self._answered
            if silent_s > self.timeout_s:
                self._give_up(f"rank 0 has not answered for {silent_s:.0f} s, or the network to it is cut")

    def explain(self, error: BaseException) -> str:
        """Say who is at fault for an error of this rank: itself, or one that it was waiting for."""
        own = f"{type(error).__name__}: {error}"
        if not _of_communication(error):
            try:
                self.store.set(f"fault/{self.rank}", f"{_host()}: {own}")
            except RuntimeError:
                return own
            return own
        deadline = time.monotonic() + 4 * self.interval_s
        while time.monotonic() < deadline:
            try:
                for each in range(self.num_ranks):
                    if self.store.check([f"fault/{each}"]):
                        return f"rank {each} failed on {self.store.get(f'fault/{each}').decode()}"
                found = self._silent(2.5 * self.interval_s)
            except RuntimeError:
                return "rank 0 has gone, or the network to it is cut"
            if found:
                return f"{found} while this rank waited in {self._here()}"
            time.sleep(self.interval_s / 4)
        return f"another rank broke off while this one waited in {self._here()} ({own.splitlines()[0]})"

    def _beat(self) -> None:
        self._beats += 1
        seen = Collectives.recorded()
        count, waits = self._place[0] + seen.begun, seen.under_way or _waits()
        said = f"{self._beats}|{count}|{seen.finished}|{int(waits)}|{self._here()}|{_host()}"
        self.store.set(f"sign/{self.rank}", said)

    def _here(self) -> str:
        return f"{self.stage}, last collective {self._place[1]}"

    def _look(self) -> None:
        """Take in the signs of all ranks."""
        now = time.monotonic()
        for each, sign in enumerate(self._signs):
            key = f"sign/{each}"
            said = self.store.get(key) if self.store.check([key]) else b""
            if said != sign.said:
                sign.said, sign.heard = said, now
                if said and said != b"done":
                    _, count, finished, waits, what, host = said.decode().split("|", 5)
                    if (int(count), int(finished)) != (sign.count, sign.finished):
                        sign.moved = now
                    sign.count, sign.finished, sign.waits = int(count), int(finished), waits == "1"
                    sign.place = f"{what} on {host}"

    def _silent(self, longest_s: float) -> str:
        """Name the ranks without a sign for so long."""
        self._look()
        now = time.monotonic()
        silent = [
            f"rank {each} (in {sign.place}) has not been heard of for {now - sign.heard:.0f} s"
            for each, sign in enumerate(self._signs)
            if each != self.rank and sign.said != b"done" and now - sign.heard > longest_s
        ]
        return ", ".join(silent)

    def _diagnose(self) -> str:
        verdict = self._silent(self.timeout_s) or self._behind()
        if verdict:
            self.store.set("verdict", verdict)
        return verdict

    def _behind(self) -> str:
        """Name the ranks that others wait for: of those that have begun fewest collectives, the ones in none.

        Where all have begun the same collective and none gets out of it, no rank is at fault.
        """
        here = [(each, sign) for each, sign in enumerate(self._signs) if sign.said != b"done"]
        still_s = time.monotonic() - max(sign.moved for sign in self._signs)
        if still_s <= self.timeout_s or not any(sign.waits for _, sign in here):
            return ""
        fewest = min(sign.count for _, sign in here)
        last = [(each, sign) for each, sign in here if sign.count == fewest]
        if len(last) == len(here) and all(sign.waits for _, sign in here):
            place = here[0][1].place
            return (
                f"all ranks began collective {fewest} (in {place}) and none has finished it for {still_s:.0f} s; no "
                "rank is behind, so look at the network between them, and with NCCL_DEBUG=INFO at NCCL"
            )
        at_fault = [(each, sign) for each, sign in last if not sign.waits] or last
        named = ", ".join(f"rank {each} (in {sign.place})" for each, sign in at_fault)
        return f"{named} keeps the others waiting for {still_s:.0f} s"

    def _read_diagnosis(self) -> str:
        return self.store.get("verdict").decode() if self.store.check(["verdict"]) else ""

    def _give_up(self, verdict: str) -> None:
        self._gives_up = True
        print(f"distav: rank {self.rank}: {verdict}. Giving up; the same command goes on.", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self._write_records()
        if self.rank == 0:
            time.sleep(3 * self.interval_s)  # The others read the verdict here.
        os._exit(EXIT_WATCHDOG)

    def _write_records(self) -> None:
        """Write what each backend has recorded of the last collectives, as `torchfrtrace` reads it."""
        if not self.records:
            return
        # Whether they have ended is asked of CUDA, which may never answer, nor let any Python run meanwhile.
        faulthandler.dump_traceback_later(RECORDS_S, exit=True)
        for backend, read in _recorders("").items():
            path = self.records / backend / f"rank_{self.rank}"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(read(includeCollectives=True, includeStackTraces=True, onlyActive=False))
            except (OSError, RuntimeError) as error:
                print(f"distav: rank {self.rank}: {path} could not be written: {error}", file=sys.stderr, flush=True)


def _recorders(suffix: str) -> dict[str, Callable[..., bytes]]:
    """Return the functions of this build of torch that read its flight recorders, by backend."""
    names = {"gloo": f"_dump_fr_trace{suffix}", "nccl": f"_dump_nccl_trace{suffix}"}
    return {backend: getattr(c10d, name) for backend, name in names.items() if hasattr(c10d, name)}


def _of_communication(error: BaseException) -> bool:
    words = ("gloo", "nccl", "connection", "timed out", "socket", "broken pipe", "peer")
    heard = any(word in str(error).lower() for word in words)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and heard)


def _waits() -> bool:
    """Whether a thread of this process is inside a call of torch.distributed, such as one that sets up a group."""
    for frame in sys._current_frames().values():
        while frame:
            if frame.f_code.co_filename.endswith("distributed_c10d.py"):
                return True
            frame = frame.f_back
    return False


def _host() -> str:
    return f"{socket.gethostname()} (process {os.getpid()})"
