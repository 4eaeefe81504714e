"""Fine-tune exported encoders in a training loop of your own.

    python tools/examples/fine_tune_encoders.py EXPORT SHARDS

EXPORT is the export/ directory of a run, SHARDS a dataset that make_shards.py wrote, with the same rates. `python
distav/evaluate.py EXPORT SHARDS --tasks fine_tune` does this with checkpoints, several ranks and published protocols.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import distav
from distav.config.schema import AugmentConfig
from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset, Split
from distav.data.pipeline.loader import Batch, Loader
from distav.data.pipeline.sampler import local_batches
from distav.models.av_model import AVModel
from distav.models.pretrained import input_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 32


class Classifier(nn.Module):
    """A linear layer on the concatenated features of both encoders."""

    def __init__(self, encoders: AVModel, num_classes: int):
        super().__init__()
        self.encoders, self.head = encoders, nn.LazyLinear(num_classes)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the logits of a batch: [B, C]."""
        features = [self.encoders.visual(batch.media["frames"]), self.encoders.audio(batch.media["audio"])]
        return self.head(torch.cat([nn.functional.normalize(part, dim=1) for part in features], dim=1))


def batches(split: Split, description: dict, augmented: bool, epoch: int = 0) -> Iterator[Batch]:
    """Yield the batches of one epoch, decoded and on the device."""
    augmentation = AugmentConfig() if augmented else None
    loader = Loader(split, input_config(description), augmentation, 0, BATCH, DEVICE)
    try:
        yield from loader.batches((ids, epoch) for ids in local_batches(len(split), BATCH, 0, 1))
    finally:
        loader.close()


def main(export: Path, shards: Path, epochs: int = 5) -> float:
    """Train all weights on the given labels; returns the top-1 accuracy on the test split."""
    encoders, description = distav.load_encoders(export)
    dataset = ShardedDataset.open(shards)
    splits = {name: dataset.split(name) for name in ("train", "test")}
    labels = {name: torch.from_numpy(load_labels(dataset, split).given).to(DEVICE) for name, split in splits.items()}
    model = Classifier(encoders, len(dataset.classes)).to(DEVICE)
    optimizer = torch.optim.AdamW(
        [{"params": model.encoders.parameters(), "lr": 1e-4}, {"params": model.head.parameters(), "lr": 1e-2}]
    )
    for epoch in range(epochs):
        model.train()
        for batch in batches(splits["train"], description, augmented=True, epoch=epoch):
            loss = nn.functional.cross_entropy(model(batch)[batch.valid], labels["train"][batch.ids[batch.valid]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy = evaluate(model, splits["test"], labels["test"], description)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test top-1 {accuracy:.1%}")
    return accuracy


def evaluate(model: Classifier, split: Split, labels: torch.Tensor, description: dict) -> float:
    """Return the top-1 accuracy."""
    model.eval()
    right = 0
    with torch.no_grad():
        for batch in batches(split, description, augmented=False):
            predicted = model(batch).argmax(1)[batch.valid]
            right += int((predicted == labels[batch.ids[batch.valid]]).sum())
    return right / len(split)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, metavar="EXPORT", help="export/ directory of a run")
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="dataset that make_shards.py wrote")
    main(**vars(parser.parse_args()))
