"""distav: audio-visual training on video with noisy labels and mismatched audio."""

import os
import sys
from typing import TYPE_CHECKING, Any

from distav.config.version import __version__

if TYPE_CHECKING:
    from distav.models.pretrained import load_encoders

if "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules:
    # Threads that wait actively use a core, which slows down others if processes compete for the cores.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "0")

__all__ = ["__version__", "load_encoders"]


def __getattr__(name: str) -> Any:
    """Import `load_encoders` on first use, since it imports torch."""
    if name == "load_encoders":
        from distav.models.pretrained import load_encoders

        return load_encoders
    raise AttributeError(f"module 'distav' has no attribute '{name}'")
