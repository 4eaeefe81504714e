"""The two modalities, and the shape of precomputed feature streams."""

import re
from dataclasses import dataclass

STREAM_NAME = re.compile(r"[a-z][a-z0-9_]*")
"""Valid names of feature streams."""
MODALITIES = ("audio", "visual")
"""The modalities, in the order of tensor axes that hold both: events, teacher scores and parsed segments.

Category probabilities `[n, 2, K]` (memory bank and category contrast loss) are in the order visual, audio instead."""


@dataclass(frozen=True)
class FeatureStream:
    """Features of one modality, computed by a frozen network: [steps, dim] float16 or float32 per sample."""

    modality: str
    steps: int
    dim: int
