"""Rendezvous of the ranks of a run, and the watchdog that runs on top of it."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from distav.config.errors import UserError
from distav.distributed.watchdog import Watchdog

_watchdog: Watchdog | None = None


@contextlib.contextmanager
def rendezvous(timeout_s: float) -> Iterator[tuple[Store, int, int]]:
    """Connect to the other ranks at the launcher's address and run a watchdog until the context ends.

    The store listens on that address only, not on every interface of the machine. An exception that another rank has
    caused gets a note with the cause.

    Args:
        timeout_s: seconds after which a stalled rank is reported.

    Yields:
        The store, the rank of this process, and the world size.

    Raises:
        UserError: if the port is in use.
    """
    global _watchdog
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if address in ("127.0.0.1", "::1", "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = TCPStore(
        address,
        port,
        world_size,
        is_master=rank == 0,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=_listening_socket(address, port) if rank == 0 else None,
    )
    _watchdog = watchdog = Watchdog(address, port, rank, world_size, timeout_s)
    watchdog.start()
    try:
        yield store, rank, world_size
    except Exception as error:
        error.add_note(f"distav: rank {rank}: {watchdog.explain(error)}")
        raise
    finally:
        _watchdog = None
        watchdog.stop()


def _listening_socket(address: str, port: int) -> int | None:
    """Return a socket that listens on one address; None if that is not an interface of this machine."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"{address}:{port} is in use, perhaps by another run; choose another port with deepspeed --master_port."
            ) from None
        return None
    listener.listen(4096)
    return listener.detach()


def set_stage(stage: str) -> None:
    """Set what this rank is doing, as the watchdog reports it."""
    if _watchdog:
        _watchdog.stage = stage


def set_record_dir(directory: Path) -> None:
    """Set where this rank writes its last collectives if the watchdog aborts: DIRECTORY/BACKEND/rank_N."""
    if _watchdog:
        _watchdog.record_dir = directory


def record_collective(name: str) -> None:
    """Record that this rank begins a collective."""
    if _watchdog:
        _watchdog.record_collective(name)
