"""Feature extraction for label correction."""

from contextlib import closing

import torch
from torch import Tensor

from distav.data.pipeline.sampler import PADDING, padded_batches
from distav.distributed.collectives import all_reduce_max_, shard_range
from distav.noise.vote_search import FeatureSpace
from distav.training.run import Run

SPACES = {"towers": ("visual_features", "audio_features"), "projections": ("visual", "audio")}
"""Names of the visual and the audio output of the network, by feature space."""

_DONE = "extracted"
"""Bank column: 0 before extraction, then 1 plus the sum of `_HAS` over the modalities that were read."""
_HAS = {"visual": 1, "audio": 2}


def extract_features(run: Run) -> tuple[list[FeatureSpace], dict[str, Tensor]]:
    """Extract the features of the training clips that this rank owns, in evaluation mode from their center crops.

    Features are columns of the memory bank until extraction is complete. They are saved in checkpoints, so a restarted
    run extracts only the remaining clips.

    Returns:
        One feature space per entry of `SPACES`, with visual and audio features [n, E] float32; and for each modality
        [n] bool, false for clips without it and for quarantined clips.
    """
    world, bank = run.world, run.bank
    own = shard_range(len(run.data.train))
    done = bank.register_column(_DONE, dtype=torch.uint8)
    remaining = (done == 0).nonzero().squeeze(1).cpu().numpy() + own.start
    count = int(all_reduce_max_(torch.tensor([-(-len(remaining) // run.micro_batch)])))
    batches = padded_batches(remaining, run.micro_batch, count)
    outputs_by_column = {f"{_DONE}_{output}": output for space in SPACES.values() for output in space}
    with closing(run.iter_outputs(run.data.train, batches, run.loader.quarantine)) as evaluated_batches:
        for ids, batch, outputs in evaluated_batches:
            is_sample = torch.from_numpy(ids != PADDING).to(world.device)
            rows = batch.ids[is_sample] - own.start
            for column, output in outputs_by_column.items():
                values = outputs[output].float()
                bank.register_column(column, values.shape[1:])[rows] = values[is_sample]
            codes = 1 + torch.stack([code * batch.present[name] for name, code in _HAS.items()]).sum(0)
            done[rows] = codes[is_sample].to(done.dtype)
            run.progress.extracted_batches += 1
            if run.progress.extracted_batches % run.config.run.checkpoint_every == 0:
                run.save()
            run.stop_if_requested()
    codes = bank.pop_column(_DONE).int() - 1
    present = {name: (codes & code) > 0 for name, code in _HAS.items()}
    features = {output: bank.pop_column(column) for column, output in outputs_by_column.items()}
    return [FeatureSpace(name, features[visual], features[audio]) for name, (visual, audio) in SPACES.items()], present
