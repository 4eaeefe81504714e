"""torchaudio as a reference.

torchaudio 2.11 cannot be imported beside a build of PyTorch for another version of CUDA, such as that of PyTorch 2.15.
"""

import importlib
from types import ModuleType

import pytest


def import_torchaudio(module: str = "torchaudio") -> ModuleType:
    """Return a module of torchaudio; skip the test if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"{module} cannot be imported: {str(error).splitlines()[0]}")
