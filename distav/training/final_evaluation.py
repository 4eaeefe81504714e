"""How well a run's network does on the test split: top-1 and retrieval, or events."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from distav.config.phases import SupervisedPhase
from distav.data.dataset import Split
from distav.data.pipeline.loader import Batch, Loader
from distav.data.pipeline.sampler import local_batches
from distav.distributed.collectives import all_gather_variable_rows, all_reduce_sum_
from distav.evaluation.event_metrics import event_metrics, predicted_events, segment_accuracy
from distav.evaluation.metrics import retrieval
from distav.training.run import Run

_LIKELY = 0.5


def test(run: Run) -> dict[str, Any] | None:
    """Score the network on the test split; None without one.

    Returns:
        What `retrieval` returns; and, where classifiers were trained, `top1` by both modalities, `top1_visual` and
        `top1_audio` by each alone.
    """
    split, labels = run.data.test, run.data.test_labels
    if split is None or labels is None:
        return None
    device, settings = run.world.device, run.settings
    truth = torch.from_numpy(labels.given if labels.true is None else labels.true).to(device)
    hits = torch.zeros(4, device=device)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch, outputs in _outputs(run, split):
        valid = batch.valid
        for number, name in enumerate(("logits", "visual_logits", "audio_logits")):
            right = outputs[name].argmax(1) == truth[batch.ids]
            hits[number] += (right & valid).sum()
        hits[3] += valid.sum()
        parts.append((outputs["visual"][valid], outputs["audio"][valid], truth[batch.ids[valid]]))
    both, visual, audio, count = all_reduce_sum_(hits).tolist()
    shares = {}
    if any(isinstance(phase, SupervisedPhase) for phase in settings.phases.values()):
        count = max(1.0, count)
        shares = {"top1": both / count, "top1_visual": visual / count, "top1_audio": audio / count}
    return shares | retrieval(*(torch.cat(each) for each in zip(*parts, strict=True)))


def test_parsing(run: Run) -> dict[str, Any] | None:
    """Score the event parser on the test split; None without one, or where nobody told its events.

    A class counts in a segment where its probability there and in the whole clip are 0.5 or more (LLP's rule).

    Returns:
        What `parsing_scores` returns; and, where a clip has one event, `segment_accuracy` (AVE).
    """
    split, known = run.data.test, run.data.test_events
    if split is None or known is None or known.events is None:
        return None
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch, outputs in _outputs(run, split, parse=True):
        shares = outputs["segments"].float().sigmoid()
        parts.append((batch.ids[batch.valid], shares[batch.valid], outputs["video"].float()[batch.valid]))
    ids, shares, video = (all_gather_variable_rows(torch.cat(each)).cpu().numpy() for each in zip(*parts, strict=True))
    true = known.events[ids]
    told = (shares >= _LIKELY) & (video >= _LIKELY)[:, None, None]
    found: dict[str, Any] = {**event_metrics(told, true)}
    if not run.data.shards.multi_label:
        happens = predicted_events(true[:, 0], true[:, 1])
        found["segment_accuracy"] = segment_accuracy(predicted_events(shares[:, 0], shares[:, 1]), happens)
    return found


def _outputs(run: Run, split: Split, **how: bool) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Yield this rank's batches of a split and what the network gives for them, in evaluation mode."""
    world, settings = run.world, run.settings
    loader = Loader(split, settings.data, None, settings.run.seed, run.micro_batch, world.device)
    plan = local_batches(len(split), run.micro_batch, world.rank, world.world_size)
    run.engine.train(False)
    try:
        with torch.no_grad():
            for batch in loader.batches((ids, 0) for ids in plan):
                yield batch, run.engine(batch, **how)
    finally:
        loader.close()
        run.engine.train()
