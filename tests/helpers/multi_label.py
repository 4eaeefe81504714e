"""A small multi-label dataset with missing and wrong labels."""

from pathlib import Path

from distav.data.preparation.build_config import BuildConfig
from distav.data.preparation.builder import build_dataset
from distav.data.preparation.encoding import Encoding
from distav.data.preparation.multi_label_noise import ClassRates
from distav.data.preparation.sources.synthetic_multi import SyntheticMultiSource


def multi_label_shards(
    out: Path, train_clips: int, test_clips: int, missing: ClassRates | None = None, wrong: ClassRates | None = None
) -> Path:
    """Render a multi-label dataset and return its directory."""
    encoding = Encoding(fps=4, short_side=24, clip_s=1.0, sample_rate_hz=8000)
    config = BuildConfig(encoding, missing_labels=missing, wrong_labels=wrong)
    build_dataset(SyntheticMultiSource(train_clips, test_clips), out, config, workers=1)
    return out
