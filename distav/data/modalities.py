"""What is heard and what is seen, and streams of features of either."""

import re
from dataclasses import dataclass

STREAM_NAME = re.compile(r"[a-z][a-z0-9_]*")
MODALITIES = ("audio", "visual")
"""What is heard and what is seen, in the order of every axis of both."""


@dataclass(frozen=True)
class FeatureStream:
    """Features that a frozen network gave of one modality of a sample: [steps, dim] float16 or float32."""

    modality: str
    steps: int
    dim: int
