"""Averages over the views of a clip and the clips of a video."""

import pytest
import torch
import torch.nn.functional as F

from distav.config.errors import UserError
from distav.evaluation.frozen_tasks import EmbeddedSplit, LabeledFeatures, knn_metrics, probe_metrics

CLASSES = 3


def split(clips_per_video: int, videos: int, noise: float, seed: int) -> EmbeddedSplit:
    """Clips with two views around the center of their class, [n, 2, 4]."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(videos).repeat_interleave(clips_per_video)
    labels = groups % CLASSES
    centers = F.one_hot(labels, 4).float()[:, None]
    features = centers + noise * torch.randn(len(labels), 2, 4, generator=generator)
    clips = LabeledFeatures(features, labels, groups)
    return EmbeddedSplit({"visual": clips}, features[:, 0], features[:, 0], labels)


@pytest.mark.parametrize("task", ["knn", "linear_probe", "svm"])
def test_means_over_videos_are_more_accurate_than_single_clips(task: str):
    train, test = split(4, 60, 1.0, 0), split(8, 60, 1.0, 1)

    def metrics(by_video: bool) -> dict[str, float]:
        if task == "knn":
            return knn_metrics(train, test, CLASSES, 20, by_video)
        return probe_metrics(train, test, CLASSES, task, by_video)

    clips, videos = metrics(False), metrics(True)
    assert clips["top1_visual"] < 0.9 < videos["top1_visual"]
    # 480 clips and 60 videos.
    correct = 60 * videos["top1_visual"]
    assert correct == pytest.approx(round(correct), abs=1e-3)


def test_clips_of_a_video_with_different_labels_are_rejected():
    test = split(4, 6, 0.1, 0)
    test.features["visual"].labels[0] += 1
    with pytest.raises(UserError, match="--by-video: clips of one video have different labels"):
        knn_metrics(test, test, CLASSES + 1, 5, by_video=True)
    assert knn_metrics(test, test, CLASSES + 1, 5)["top1_visual"] > 0.5
