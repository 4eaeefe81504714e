"""Finds the rank at fault where ranks wait for one another in vain.

Every rank's watch sends a sign of life to the store of the rendezvous, with the number of collectives that the rank has
begun; the first rank's watch compares them. A rank whose signs stay out has stopped or lost the network. Where all
live and nobody gets on, the ones that have begun fewest collectives keep the others waiting. Watches run in threads of
their own and use no collective, so they see what a blocked rank cannot.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

STATUS = 76
"""Exit status of a rank that gave up waiting for another."""


@dataclass
class _Sign:
    said: bytes = b""
    count: int = 0
    waits: bool = False
    place: str = "start"
    heard: float = 0.0
    moved: float = 0.0


class Watch(threading.Thread):
    """One rank's watch."""

    def __init__(self, address: str, port: int, rank: int, num_ranks: int, timeout_s: float):
        """Connect to the store; see `distav.world.joined` for the arguments."""
        super().__init__(name="watch", daemon=True)
        self.rank, self.num_ranks, self.timeout_s = rank, num_ranks, timeout_s
        self.interval_s = min(2.0, timeout_s / 10)
        self.store = TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=max(2.0, timeout_s / 2))
        )
        self.stage, self._place = "start", (0, "nothing")
        self._done, self._beats = threading.Event(), 0
        self._answered = now = time.monotonic()
        self._deadman = threading.Thread(target=self._await_answers, name="watch's watch", daemon=True)
        self._signs = [_Sign(heard=now, moved=now) for _ in range(num_ranks)]
        self._beat()

    def mark(self, what: str) -> None:
        """Note that the rank begins a collective."""
        self._place = self._place[0] + 1, what

    def stop(self) -> None:
        """End the watch; a rank that leaves in order is not missed."""
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
                verdict = self._judge() if self.rank == 0 else self._told()
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
        count = self._place[0]
        self.store.set(f"sign/{self.rank}", f"{self._beats}|{count}|{int(_waits())}|{self._here()}|{_host()}")

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
                    _, count, waits, what, host = said.decode().split("|", 4)
                    if int(count) != sign.count:
                        sign.moved = now
                    sign.count, sign.waits, sign.place = int(count), waits == "1", f"{what} on {host}"

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

    def _judge(self) -> str:
        verdict = self._silent(self.timeout_s) or self._behind()
        if verdict:
            self.store.set("verdict", verdict)
        return verdict

    def _behind(self) -> str:
        """Name the ranks that others wait for: of those that have begun fewest collectives, the ones in none."""
        here = [(each, sign) for each, sign in enumerate(self._signs) if sign.said != b"done"]
        still_s = time.monotonic() - max(sign.moved for sign in self._signs)
        if still_s <= self.timeout_s or not any(sign.waits for _, sign in here):
            return ""
        fewest = min(sign.count for _, sign in here)
        last = [(each, sign) for each, sign in here if sign.count == fewest]
        at_fault = [(each, sign) for each, sign in last if not sign.waits] or last
        named = ", ".join(f"rank {each} (in {sign.place})" for each, sign in at_fault)
        return f"{named} keeps the others waiting for {still_s:.0f} s"

    def _told(self) -> str:
        return self.store.get("verdict").decode() if self.store.check(["verdict"]) else ""

    def _give_up(self, verdict: str) -> None:
        print(f"distav: rank {self.rank}: {verdict}. Giving up; the same command goes on.", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if self.rank == 0:
            time.sleep(3 * self.interval_s)  # The others read the verdict here.
        os._exit(STATUS)


def _of_communication(error: BaseException) -> bool:
    words = ("gloo", "nccl", "connection", "timed out", "socket", "broken pipe", "peer")
    heard = any(word in str(error).lower() for word in words)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and heard)


def _waits() -> bool:
    """Whether this process's main thread is inside a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame:
        if frame.f_code.co_filename.endswith("distributed_c10d.py"):
            return True
        frame = frame.f_back
    return False


def _host() -> str:
    return f"{socket.gethostname()} (process {os.getpid()})"
