"""distav: audio-visual training on video with noisy labels and mismatched audio."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from distav.config.version import __version__

if TYPE_CHECKING:
    from distav.models.hub import push_to_hub
    from distav.models.onnx_export import export_onnx
    from distav.models.pretrained import load_encoders

if "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules:
    # Threads that wait actively use a core, which slows down others if processes compete for the cores.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "0")

__all__ = ["__version__", "export_onnx", "load_encoders", "push_to_hub"]

_MODULES = {
    "export_onnx": "distav.models.onnx_export",
    "load_encoders": "distav.models.pretrained",
    "push_to_hub": "distav.models.hub",
}
"""Modules of the functions that are imported on first use, since they import torch."""


def __getattr__(name: str) -> Any:
    """Import a public function on first use."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'distav' has no attribute '{name}'")
