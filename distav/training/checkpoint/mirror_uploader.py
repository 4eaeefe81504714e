"""Background thread that copies checkpoints and results to the mirror of a run."""

import threading
from pathlib import Path

from distav.config.errors import UserError
from distav.training.checkpoint.files import list_checkpoints
from distav.training.checkpoint.mirror import RunMirror


class MirrorUploader(threading.Thread):
    """Copies the newest complete checkpoint of a run; one that completes in the meantime is copied next."""

    def __init__(self, mirror: RunMirror, checkpoints: Path):
        """Prepare to copy the checkpoints in a directory to a mirror."""
        super().__init__(name="mirror", daemon=True)
        self.mirror, self.checkpoints = mirror, checkpoints
        self._changed = threading.Condition()
        self._pending: Path | None = None
        self._current: Path | None = None
        self._stopped = False
        self._error = ""

    def queue(self, checkpoint: Path) -> None:
        """Copy a complete checkpoint in the background, instead of one that waits to be copied."""
        with self._changed:
            self._pending = checkpoint
            self._changed.notify()

    def in_use(self) -> set[Path]:
        """Return the checkpoints that are being copied or wait to be copied."""
        with self._changed:
            return {checkpoint for checkpoint in (self._pending, self._current) if checkpoint}

    def take_error(self) -> str:
        """Return why the last copy failed, and forget it; empty if it did not fail."""
        with self._changed:
            error, self._error = self._error, ""
            return error

    def run(self) -> None:
        """Copy checkpoints until `finish` is called; a failure is stored for `take_error`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._stopped)
                if self._stopped:  # `finish` copies the newest checkpoint itself.
                    return
                self._current, self._pending = self._pending, None
            error = ""
            try:
                self.mirror.upload(self._current)
            except Exception as failure:  # noqa: BLE001  # Reported by `take_error`; training continues.
                error = _describe(failure, self.mirror)
            with self._changed:
                self._current, self._error = None, error

    def finish(self) -> None:
        """End the thread, and copy the newest checkpoint and the results.

        Raises:
            UserError: if the copy fails.
        """
        with self._changed:
            self._stopped, self._pending = True, None
            self._changed.notify()
        if self.is_alive():
            self.join()
        try:
            self.mirror.upload(next(reversed(list_checkpoints(self.checkpoints)), None))
        except (UserError, OSError) as failure:
            raise UserError(
                f"Failed to copy the run to its mirror: {_describe(failure, self.mirror)} {self.mirror.folder} is "
                "complete; run the same command again to copy it."
            ) from None


def _describe(failure: Exception, mirror: RunMirror) -> str:
    if isinstance(failure, UserError):
        return str(failure)
    if isinstance(failure, OSError):
        return f"run.mirror={mirror.location}: {failure.filename} cannot be copied ({failure.strerror})."
    return f"run.mirror={mirror.location}: {type(failure).__name__}: {failure}."
