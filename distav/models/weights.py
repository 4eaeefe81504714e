"""Weights of pretrained networks: files, directories, and messages where they cannot be had."""

import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from distav.config.errors import UserError, format_list

FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
REFUSED = ("GLOBAL", "Unsupported global", "Unsupported class", "add_safe_globals")
"""Words in the messages of PyTorch about Python objects that it refuses to load."""
NAMES_IN_DIRECTORY = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
"""Keys under which training scripts store the weights in a file."""
COUNTER = "num_batches_tracked"
"""Ends of names in PyTorch's batch normalization, which distav's does not have."""
PREFIXES = ("module.", "model.", "backbone.", "encoder.", "net.")
"""Prefixes of names that wrappers of networks add."""


def read_weights(path: Path, key: str) -> dict[str, Tensor]:
    """Return the weights in a file, or in a directory that holds one.

    Args:
        path: a file with one of `FILE_SUFFIXES`, or a directory.
        key: setting that names it, for messages.

    Raises:
        UserError: if it is missing or unreadable, or contains code.
    """
    file = path
    if path.is_dir():
        found = [path / name for name in NAMES_IN_DIRECTORY if (path / name).is_file()]
        found = found or sorted(entry for entry in path.iterdir() if entry.suffix in FILE_SUFFIXES)
        if len(found) != 1 and not (found and found[0].name in NAMES_IN_DIRECTORY):
            raise UserError(
                f"{key}={path}: {len(found)} files with weights; allowed: a directory with one, such as "
                f"{NAMES_IN_DIRECTORY[0]}, or the path of a file."
            )
        file = found[0]
    if file.suffix not in FILE_SUFFIXES or not file.is_file():
        raise UserError(
            f"{key}={path}: no such file; allowed: a file {', '.join(FILE_SUFFIXES)}, a directory with one, none for "
            "random weights, or empty for those that the name of the network selects."
        )
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not any(word in str(error) for word in REFUSED):
            raise UserError(f"{key}={file}: unreadable; copy or download it again.") from None
        raise UserError(
            f"{key}={file} contains Python objects besides weights, which are not loaded since they may run code; "
            "convert it to safetensors."
        ) from None
    except Exception as error:  # noqa: BLE001  # PyTorch raises many types for files that it did not write.
        raise UserError(f"{key}={file}: unreadable ({_first_line(error)}); copy or download it again.") from None
    return _weights_in(content, key, file)


def _weights_in(content: object, key: str, file: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {str(name): value for name, value in content.items()}
        inner = [content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)]
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if not inner:
            if tensors:
                return tensors
            break
        content = inner[0]
    raise UserError(f"{key}={file}: no weights by name; allowed: a state dict, or one under {format_list(WRAPPERS)}.")


def with_names_of(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names that a network has for them.

    Prefixes are removed or added where more names are then those of the network. If not even a tenth of the names
    agree, but the tensors have the shapes of the network in the same order, they are those of another implementation of
    it, and get its names. Further tensors at the end belong to a classifier.

    Args:
        weights: weights by name.
        own: state dict of the network.
    """
    best = dict(weights)
    for prefix in PREFIXES:
        for candidate in (
            {name.removeprefix(prefix): value for name, value in weights.items()},
            {prefix + name: value for name, value in weights.items()},
        ):
            if len(own.keys() & candidate.keys()) > len(own.keys() & best.keys()):
                best = candidate
    if len(own.keys() & best.keys()) < len(own) / 10:
        values = [value for name, value in weights.items() if not name.endswith(COUNTER)]
        if [value.shape for value in values[: len(own)]] == [value.shape for value in own.values()]:
            return dict(zip(own, values, strict=False))
    return best


def interpolate_positions(
    positions: Tensor, length: int, old_grid: Sequence[int], new_grid: Sequence[int], dim: int
) -> Tensor:
    """Return position embeddings of another grid of patches, by cubic interpolation (Dosovitskiy et al. 2021, 3.2).

    Args:
        positions: embeddings, of which dimension `dim` has those of special tokens and then those of the patches.
        length: size of this dimension in the result.
        old_grid, new_grid: rows and columns of patches.
        dim: the dimension; the last one is the width of the embeddings.
    """
    special = length - math.prod(new_grid)
    tokens, patches = positions.float().movedim(dim, 0).flatten(1).split([special, math.prod(old_grid)])
    width = patches.shape[1]
    grid = patches.T.reshape(1, width, *old_grid)
    resized = interpolate(grid, tuple(new_grid), mode="bicubic", antialias=True, align_corners=False)
    joined = torch.cat([tokens, resized.reshape(width, -1).T])
    shape = list(positions.movedim(dim, 0).shape)
    return joined.reshape(length, *shape[1:]).movedim(0, dim).to(positions.dtype)


def unavailable(key: str, value: str, error: BaseException, what: str) -> UserError:
    """Return the error for a network that is neither in a cache nor can be downloaded.

    Args:
        key: setting that names it.
        value: its value.
        error: reason.
        what: what to fetch and where to put it.
    """
    return UserError(f"{key}={value}: not available here ({_first_line(error)}). {what}")


def missing_library(key: str, value: str, library: str) -> UserError:
    """Return the error for a library that a network needs."""
    return UserError(f"{key}={value}: {library} is missing; install it with pip install 'distav[pretrained]'.")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
