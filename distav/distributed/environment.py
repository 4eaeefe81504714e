"""Machine and package versions that a result depends on."""

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "distav",
    "torch",
    "torchvision",
    "torchaudio",
    "numpy",
    "nvidia-dali-cuda130",
    "deepspeed",
    "webdataset",
    "faiss-cpu",
    "torchcodec",
    "av",
    "cleanlab",
    "scikit-learn",
    "torchmetrics",
    "timm",
    "transformers",
    "mteb",
)


def machine() -> dict[str, Any]:
    """Return processor, number of usable cores, GPU, Python version and package versions."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": package_versions(PACKAGES),
    }


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
