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
from distav.distributed.launch import Launch
from distav.distributed.watchdog import Watchdog

_watchdog: Watchdog | None = None


@contextlib.contextmanager
def rendezvous(launch: Launch, timeout_s: float) -> Iterator[Store]:
    """Connect to the other ranks at the launcher's address and run a watchdog until the context ends.

    The store belongs to rank 0, so that it ends with it, and listens on that address only, not on every interface of
    the machine. An exception that another rank has caused gets a note with the cause.

    Args:
        launch: ranks and address.
        timeout_s: seconds after which a stalled rank is reported.

    Yields:
        The store.

    Raises:
        UserError: if the port is in use.
    """
    global _watchdog
    if launch.address in ("127.0.0.1", "::1", "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = _connect(launch, timedelta(seconds=timeout_s))
    _watchdog = watchdog = Watchdog(launch.address, store.port, launch.rank, launch.world_size, timeout_s)
    watchdog.start()
    try:
        yield store
    except Exception as error:
        error.add_note(f"distav: rank {launch.rank}: {watchdog.explain(error)}")
        raise
    finally:
        _watchdog = None
        watchdog.stop()


def _connect(launch: Launch, timeout: timedelta) -> TCPStore:
    """Return the store of rank 0; a launcher with a store of its own at the given port passes on where it is."""
    agent = None
    if launch.agent_store:
        agent = TCPStore(launch.address, launch.port, is_master=False, wait_for_workers=False, timeout=timeout)
    key = f"distav/port/{launch.restart}"
    if launch.rank == 0:
        port = 0 if agent else launch.port
        listener = _listening_socket(launch.address, port)
        store = TCPStore(
            launch.address, port, is_master=True, timeout=timeout, master_listen_fd=listener, wait_for_workers=False
        )
        if agent:
            agent.set(key, str(store.port))
        return store
    port = int(agent.get(key)) if agent else launch.port
    return TCPStore(launch.address, port, is_master=False, timeout=timeout, wait_for_workers=False)


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
                f"{address}:{port} is in use, perhaps by another run; choose another port with --master_port of the "
                "launcher, or MASTER_PORT for srun."
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
