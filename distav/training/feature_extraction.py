"""Features of every training clip, extracted in evaluation mode."""

import torch
from torch import Tensor

from distav.data.pipeline.loader import Loader
from distav.data.pipeline.sampler import PADDING, padded_batches
from distav.distributed.collectives import all_reduce_max_, shard_range
from distav.noise.label_correction import FeatureSpace
from distav.training.run import Run

_USABLE, _UNUSABLE = 1, 2


SPACES = {"towers": ("visual_features", "audio_features"), "projections": ("visual", "audio")}


def extract_features(run: Run) -> tuple[list[FeatureSpace], Tensor]:
    """Run the network once over the middle of every clip that this rank owns, in evaluation mode.

    Features are kept beside the bank's rows until the votes are counted, so a run that ends in between goes on with
    the clips that are left.

    Returns:
        Tower outputs and their projections, by picture and by sound [n, E] float32 each, and whether a sample could
        be used [n] bool.
    """
    data, settings, world, columns = run.data, run.settings, run.world, run.bank.columns
    own = shard_range(len(data.train))
    done = columns.setdefault("extracted", torch.zeros(len(own), dtype=torch.uint8, device=world.device))
    left = (done == 0).nonzero().squeeze(1).cpu().numpy() + own.start
    count = int(all_reduce_max_(torch.tensor([-(-len(left) // run.micro_batch)])))
    batches = padded_batches(left, run.micro_batch, count)
    loader = Loader(data.train, settings.data, None, settings.run.seed, run.micro_batch, world.device)
    loader.quarantine = run.loader.quarantine
    wanted = {f"extracted_{each}": each for pair in SPACES.values() for each in pair}
    run.engine.train(False)
    try:
        with torch.no_grad():
            for ids, batch in zip(batches, loader.batches((ids, 0) for ids in batches), strict=True):
                outputs = run.engine(batch)
                real = torch.from_numpy(ids != PADDING).to(world.device)
                rows = batch.ids[real] - own.start
                for column, name in wanted.items():
                    values = outputs[name].float()
                    if column not in columns:
                        columns[column] = torch.zeros(len(own), values.shape[1], device=world.device)
                    columns[column][rows] = values[real]
                done[rows] = torch.where(batch.valid[real], _USABLE, _UNUSABLE).to(done.dtype)
                run.progress.extracted_batches += 1
                if run.progress.extracted_batches % settings.run.checkpoint_every == 0:
                    run.save()
                run.stop_if_requested()
    finally:
        loader.close()
        run.engine.train()
    present = columns.pop("extracted") == _USABLE
    found = {name: columns.pop(column) for column, name in wanted.items()}
    return [FeatureSpace(name, found[visual], found[audio]) for name, (visual, audio) in SPACES.items()], present
