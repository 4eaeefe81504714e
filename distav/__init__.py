"""distav: audio-visual training on video with noisy labels and mismatched audio."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from distav.config.version import __version__

if TYPE_CHECKING:
    from distav.api import FinishedRun, make_shards, train
    from distav.config.errors import UserError
    from distav.data.preparation.output_dir import BuildResult
    from distav.distributed.signals import Interrupted
    from distav.models.hub import push_to_hub
    from distav.models.onnx_export import export_onnx
    from distav.models.pretrained import load_encoders
    from distav.noise.label_issues import CorrectedLabels, correct_labels, find_label_issues
    from distav.noise.multi_label_issues import CorrectedLabelLists, correct_label_lists
    from distav.noise.noise_rate import RateEstimate

if "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules:
    # Threads that wait actively use a core, which slows down others if processes compete for the cores.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "0")

__all__ = [
    "BuildResult",
    "CorrectedLabelLists",
    "CorrectedLabels",
    "FinishedRun",
    "Interrupted",
    "RateEstimate",
    "UserError",
    "__version__",
    "correct_label_lists",
    "correct_labels",
    "export_onnx",
    "find_label_issues",
    "load_encoders",
    "make_shards",
    "push_to_hub",
    "train",
]

_MODULES = {
    "BuildResult": "distav.data.preparation.output_dir",
    "CorrectedLabelLists": "distav.noise.multi_label_issues",
    "CorrectedLabels": "distav.noise.label_issues",
    "FinishedRun": "distav.api",
    "Interrupted": "distav.distributed.signals",
    "RateEstimate": "distav.noise.noise_rate",
    "UserError": "distav.config.errors",
    "correct_label_lists": "distav.noise.multi_label_issues",
    "correct_labels": "distav.noise.label_issues",
    "export_onnx": "distav.models.onnx_export",
    "find_label_issues": "distav.noise.label_issues",
    "load_encoders": "distav.models.pretrained",
    "make_shards": "distav.api",
    "push_to_hub": "distav.models.hub",
}
"""Modules of the names that are imported on first use, since most of them import torch."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use; `distav.train` is a module that can be called."""
    if name == "train":
        return import_module("distav.train")
    if name not in _MODULES:
        raise AttributeError(f"module 'distav' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)
