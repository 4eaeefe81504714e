"""The text of label noise, as in `data.synthetic.label_noise` and `make_shards.py --label-noise`."""

import math

LABEL_NOISE_KINDS = ("symmetric", "asymmetric")


def parse_label_noise(text: str) -> tuple[str, float] | None:
    """Return kind and rate of `KIND:RATE`, without a check of the kind; the rate is NaN if it is not from 0 to 1.

    Empty text means no noise, None.
    """
    if not text:
        return None
    kind, _, rate = text.partition(":")
    try:
        value = float(rate)
    except ValueError:
        value = math.nan
    return kind, value if 0 <= value <= 1 else math.nan


def is_label_noise(text: str) -> bool:
    """Return whether a text is empty or label noise."""
    noise = parse_label_noise(text)
    return noise is None or noise[0] in LABEL_NOISE_KINDS and math.isfinite(noise[1])
