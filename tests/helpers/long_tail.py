"""A synthetic dataset whose training clips are long-tailed over the classes."""

from dataclasses import dataclass
from pathlib import Path

from distav.data.preparation.build_config import BuildConfig
from distav.data.preparation.builder import build_dataset
from distav.data.preparation.encoding import ClipSource, Encoding
from distav.data.preparation.noise_injection import LabelNoise
from distav.data.preparation.sources.synthetic import CLASSES, SyntheticSource


@dataclass(frozen=True)
class LongTailedSource(SyntheticSource):
    """Synthetic clips of which class number c, from 0, has `largest / (c + 1)^exponent` in the training split."""

    largest: int = 48
    exponent: float = 1.0

    def candidates(self) -> list[ClipSource]:
        """Return the training clips of Zipf's law, mixed, and as many test clips of each class."""
        names = ["+".join(words) for words in CLASSES]
        counts = [max(1, round(self.largest / (number + 1) ** self.exponent)) for number in range(len(names))]
        clips = sorted(
            (index / count, name) for name, count in zip(names, counts, strict=True) for index in range(count)
        )
        train = [ClipSource(f"train-scene-{number}", name, "train") for number, (_, name) in enumerate(clips)]
        test = [
            ClipSource(f"test-scene-{index}", names[index % len(names)], "test") for index in range(self.test_clips)
        ]
        return train + test


def long_tailed_shards(out: Path, source: LongTailedSource, label_noise: LabelNoise | None = None) -> Path:
    """Render a long-tailed dataset and return its directory."""
    encoding = Encoding(short_side=24, clip_s=1.0, sample_rate_hz=8000)
    build_dataset(source, out, BuildConfig(encoding, shard_samples=40, label_noise=label_noise), workers=1)
    return out
