"""One pass of a network over samples, without gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from distav.data.pipeline.loader import Batch, Loader
from distav.data.pipeline.sampler import Ids
from distav.evaluation.fusion import Fusion

Outputs = TypeVar("Outputs")


def iter_outputs(
    forward: Callable[[Batch], Outputs], loader: Loader, batches: Sequence[Ids], view: int = 0
) -> Iterator[tuple[Ids, Batch, Outputs]]:
    """Yield ids, batch and outputs for each batch of ids; clips are the center crops of evaluation.

    The caller sets the network to evaluation mode and closes the loader.

    Args:
        forward: computes the outputs of a batch.
        loader: reads the split; created with `augment=None`.
        batches: [b] ids each, padded with `PADDING`, see `distav.data.pipeline.sampler.padded_batches`.
        view: index of the view, for a loader with several.
    """
    for ids, batch in zip(batches, loader.batches((ids, view) for ids in batches), strict=True):
        with torch.no_grad():
            outputs = forward(batch)
        yield ids, batch, outputs


def clip_logits(outputs: Mapping[str, Tensor], present: Mapping[str, Tensor], fusion: Fusion | None = None) -> Tensor:
    """Return the logits of clips from the modalities that they have: [b, C].

    Args:
        outputs: `logits`, `visual_logits` and `audio_logits` of the network, [b, C] each.
        present: [b] bool by modality.
        fusion: combines the classifiers for clips with both modalities; None: the joint classifier alone.
    """
    both = outputs["logits"] if fusion is None else fusion(outputs)
    single = torch.where(present["visual"][:, None], outputs["visual_logits"], outputs["audio_logits"])
    return torch.where((present["visual"] & present["audio"])[:, None], both, single)
