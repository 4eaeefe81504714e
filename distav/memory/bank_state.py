"""Saved state of a memory bank: columns by ranges of ids, which any number of ranks can save and restore."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

_RANGE = "range"


def save_columns(columns: Mapping[str, Tensor], rows: range, num_samples: int) -> dict[str, Tensor]:
    """Return CPU copies of the columns of the owned rows, and `range`: first id, last id + 1 and number of samples."""
    state = {
        name: column.to("cpu", copy=True, memory_format=torch.contiguous_format) for name, column in columns.items()
    }
    return state | {_RANGE: torch.tensor([rows.start, rows.stop, num_samples])}


def restore_columns(
    parts: Iterable[dict[str, Tensor]],
    num_samples: int,
    rows: range,
    target_of: Callable[[str, Tensor], tuple[Tensor, range]],
) -> None:
    """Copy rows out of saved parts; parts are read only until all rows are restored.

    Args:
        parts: states returned by `save_columns` on the ranks that saved them.
        num_samples: number of samples of this run.
        rows: ids that have to be restored.
        target_of: returns the tensor to restore for the name and the saved part of a column, and the ids of its rows.

    Raises:
        ValueError: if the number of samples differs or the parts do not contain all rows.
    """
    missing = torch.ones(len(rows), dtype=torch.bool)
    for part in parts:
        start, stop, saved_samples = part[_RANGE].tolist()
        if saved_samples != num_samples:
            raise ValueError(
                f"the saved memory bank has {saved_samples} rows; this run has {num_samples} training samples"
            )
        for name, saved in part.items():
            if name != _RANGE:
                target, ids = target_of(name, saved)
                low, high = max(start, ids.start), min(start + len(saved), ids.stop)
                if low < high:
                    target[low - ids.start : high - ids.start].copy_(saved[low - start : high - start])
        missing[max(0, start - rows.start) : max(0, stop - rows.start)] = False
        if not missing.any():
            break
    if missing.any():
        raise ValueError(f"the saved memory bank lacks {int(missing.sum())} of the rows of this rank")
