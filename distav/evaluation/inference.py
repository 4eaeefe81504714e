"""One pass of a network over samples, without gradients."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from distav.data.pipeline.loader import Batch, Loader
from distav.data.pipeline.sampler import Ids

Outputs = TypeVar("Outputs")


def iter_outputs(
    forward: Callable[[Batch], Outputs], loader: Loader, batches: Sequence[Ids]
) -> Iterator[tuple[Ids, Batch, Outputs]]:
    """Yield ids, batch and outputs for each batch of ids; clips are the center crops of evaluation.

    The caller sets the network to evaluation mode and closes the loader.

    Args:
        forward: computes the outputs of a batch.
        loader: reads the split; created with `augment=None`.
        batches: [b] ids each, padded with `PADDING`, see `distav.data.pipeline.sampler.padded_batches`.
    """
    for ids, batch in zip(batches, loader.batches((ids, 0) for ids in batches), strict=True):
        with torch.no_grad():
            outputs = forward(batch)
        yield ids, batch, outputs
