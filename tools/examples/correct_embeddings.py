"""Correct labels of embeddings that any network computed, without shards or training.

    python tools/examples/correct_embeddings.py [EMBEDDINGS.npz]

EMBEDDINGS.npz has arrays `visual` [N, E] and `audio` [N, F], one of them or both, and `labels` [N]. Without it, the
example makes embeddings of 1,200 samples of which 30 % have a wrong label and 20 % the audio of another sample.
"""

import sys
from pathlib import Path

import numpy as np

import distav


def make_embeddings(num_samples: int = 1200, num_classes: int = 6) -> dict[str, np.ndarray]:
    """Return embeddings of two modalities around a center for each class, with wrong labels and mismatched pairs."""
    rng = np.random.default_rng(0)
    classes = rng.integers(num_classes, size=num_samples)
    audio_classes = np.where(rng.random(num_samples) < 0.2, rng.permutation(classes), classes)
    wrong = rng.random(num_samples) < 0.3
    labels = np.where(wrong, (classes + rng.integers(1, num_classes, num_samples)) % num_classes, classes)
    centers = rng.normal(size=(2, num_classes, 32))
    noise = rng.normal(size=(2, num_samples, 32))
    return {"visual": centers[0, classes] + noise[0], "audio": centers[1, audio_classes] + noise[1], "labels": labels}


def main(path: Path | None = None) -> distav.CorrectedLabels:
    """Correct the labels, print the noise rates and the ten most suspicious labels."""
    arrays = dict(np.load(path)) if path else make_embeddings()
    labels = arrays.pop("labels")
    result = distav.correct_labels(arrays, labels)
    rates = {"labels": result.label_noise_rate, "pairs": result.pair_mismatch_rate}
    for name, rate in rates.items():
        if rate:
            print(f"{name}: {rate.estimate:.1%} wrong (95 % interval {rate.ci95_low:.1%} to {rate.ci95_high:.1%})")
    print(f"{result.is_issue.sum()} of {len(labels)} labels changed; the least probable ones:")
    for row in np.argsort(result.self_confidence)[:10]:
        print(f"  sample {row}: {result.given[row]} -> {result.corrected[row]} ({result.confidence[row]:.0%})")
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
