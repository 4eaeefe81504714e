"""Phase 2: supervised training on given and corrected labels, the bank kept as regulariser (NTL, "hybrid")."""

import torch

from distav.data.loader import Batch
from distav.errors import UserError
from distav.losses.category import category_agreement, weighted_shares
from distav.losses.instance import instance_losses, weighted_mean
from distav.losses.supervised import hybrid_targets, soft_cross_entropy
from distav.memory.bank import Visitors
from distav.phase_settings import HybridPhase
from distav.phases.loop import Losses, train
from distav.robust.correspondence import sample_weights
from distav.run import Run

_WEIGHT_MIN = 0.25


def run_hybrid(run: Run, name: str, settings: HybridPhase) -> None:
    """Train the classifiers, and the towers at a lower rate.

    Where the pair is doubtful each modality learns the label that its own neighbours gave it, and the classifier over
    both counts the sample by how far it is believed to be a pair.

    Raises:
        UserError: where no correction came before.
    """
    if "votes" not in run.bank.columns:
        raise UserError(
            f"phases.{name}: a hybrid phase needs a correction phase before it; add one with kind: correction."
        )
    given = torch.from_numpy(run.data.labels.given).to(run.world.device)

    def losses_of(batch: Batch, progress: float) -> Losses:
        del progress
        outputs = run.engine(batch)
        bank, pair = run.bank, (outputs["visual"], outputs["audio"])
        visitors = Visitors.gather(batch.ids, batch.valid, *pair)
        votes, by_picture, by_sound, believed = bank.fetch(
            ("votes", "visual_votes", "audio_votes", "correspondence"), visitors.ids
        )
        present = batch.valid.float()
        targets = hybrid_targets(given[batch.ids], votes, votes.amax(1))
        doubtful = (believed < settings.mismatch_below)[:, None]
        both = weighted_mean(soft_cross_entropy(outputs["logits"], targets), present * believed)
        visual_targets, audio_targets = (
            torch.where(doubtful, by_picture, targets),
            torch.where(doubtful, by_sound, targets),
        )
        visual = weighted_mean(soft_cross_entropy(outputs["visual_logits"], visual_targets), present)
        audio = weighted_mean(soft_cross_entropy(outputs["audio_logits"], audio_targets), present)
        losses = {"loss": both + visual + audio, "both": both, "visual": visual, "audio": audio}
        if settings.instance_weight:
            each = instance_losses(bank, visitors, *pair, settings.temperature)
            losses["instance"] = weighted_mean(each, present * sample_weights(believed, _WEIGHT_MIN))
            losses["loss"] = losses["loss"] + settings.instance_weight * losses["instance"]
            logits = outputs["visual_categories"], outputs["audio_categories"]
            bank.update(visitors, category_agreement(weighted_shares(*logits, present)))
        return losses

    rate = run.settings.optim.lr * settings.lr_scale
    train(run, name, settings.epochs, (rate * settings.tower_lr_scale, rate), losses_of)
