"""Where the ranks of a run meet, and the watch over them."""

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

_watch: Watchdog | None = None


@contextlib.contextmanager
def rendezvous(timeout_s: float) -> Iterator[tuple[Store, int, int]]:
    """Meet the other ranks at the launcher's address, and watch over them until the run ends.

    The store listens on that address alone, not on every interface of the machine. An error that came of another rank
    is explained by what that one did.
    """
    global _watch
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    at, of = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if address in ("127.0.0.1", "::1", "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = TCPStore(
        address,
        port,
        of,
        is_master=at == 0,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=_listening(address, port) if at == 0 else None,
    )
    _watch = watch = Watchdog(address, port, at, of, timeout_s)
    watch.start()
    try:
        yield store, at, of
    except Exception as error:
        error.add_note(f"distav: rank {at}: {watch.explain(error)}")
        raise
    finally:
        _watch = None
        watch.stop()


def _listening(address: str, port: int) -> int | None:
    """Return a socket that listens on one address; None where that is not one of this machine's interfaces."""
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
    """Note what this rank is about, for when it keeps others waiting."""
    if _watch:
        _watch.stage = stage


def keep_records(folder: Path) -> None:
    """Note where this rank writes its last collectives should it give up: FOLDER/BACKEND/rank_N."""
    if _watch:
        _watch.records = folder


def record_collective(what: str) -> None:
    """Note that this rank begins a collective."""
    if _watch:
        _watch.mark(what)
