"""Between the phases: clean features of every clip, exact neighbours over all ranks, and a vote on every label."""

import numpy as np
import torch

from distav.data.format import write_table
from distav.data.labels import correction_table
from distav.data.loader import Loader
from distav.data.order import PADDING, owned_batches
from distav.evaluate import auroc, label_accuracy
from distav.phase_settings import CorrectionPhase, Features, Vote
from distav.robust.correction import Correction, Voting, correct
from distav.run import Run
from distav.world import gather_ragged_rows, row_range


def run_correction(run: Run, name: str, settings: CorrectionPhase) -> None:
    """Vote on every label, keep the votes beside the bank, and write the table `labels/<phase>.parquet`."""
    visual, audio, present = extract_features(run, settings.features)
    labels, split = run.data.labels, run.data.train
    device = run.world.device
    valid = gather_ragged_rows(present.float()) > 0
    voting = Voting(
        settings.neighbors,
        settings.refine_neighbors,
        settings.temperature,
        settings.class_prior,
        settings.vote is Vote.gated,
    )
    given = torch.from_numpy(labels.given).to(device)
    groups = torch.from_numpy(split.source_codes).to(device)
    found = correct(visual, audio, given, len(labels.classes), groups, valid, voting)
    keep(run, found, gated=voting.gated)
    run.check_budget()

    corrected = gather_ragged_rows(found.labels.argmax(1)).cpu().numpy()
    confidence = gather_ragged_rows(found.labels.amax(1)).cpu().numpy()
    own = row_range(len(split))
    agreement = found.labels.gather(1, given[own.start : own.stop, None]).squeeze(1)
    agreement = gather_ragged_rows(agreement).cpu().numpy()
    correspondence = run.bank.whole("correspondence").cpu().numpy()
    step = run.position.total_steps
    changed = float((corrected != labels.given).mean())
    record: dict[str, float | str] = {"phase": name, "labels/changed": changed}
    if labels.true is not None:
        accuracy = label_accuracy(labels.given, corrected, labels.true)
        record |= {f"labels/{key}": value for key, value in accuracy.items() if value is not None}
        run.notes["label_accuracy"] = accuracy
    wrong = labels.mismatched()
    if wrong is not None and wrong.any():
        run.notes["correspondence_auroc"] = record["pairs/auroc"] = auroc(correspondence, ~wrong)
    run.notes["labels_changed"] = changed
    if run.world.is_main:
        table = correction_table(split, labels, corrected, confidence, agreement, correspondence)
        (run.folder / "labels").mkdir(exist_ok=True)
        write_table(run.folder / "labels" / f"{name}.parquet", table)
    run.monitor.record(step, record)
    run.monitor.confusion("labels/given_to_corrected", labels.given, corrected, labels.classes, step)
    run.monitor.histogram("labels/confidence", torch.from_numpy(np.ascontiguousarray(confidence)), step)
    told = ""
    if labels.true is not None:
        given_right, right = (100 * float((each == labels.true).mean()) for each in (labels.given, corrected))
        told = f", right for {right:.1f} % (given: {given_right:.1f} %)"
    run.monitor.say(
        f"phase={name} corrected labels differ from the given ones for {100 * changed:.1f} % of clips{told}"
    )


def extract_features(run: Run, kind: Features) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the towers once over the middle of every clip that this rank owns, in evaluation mode.

    Returns:
        Features by picture and by sound [n, E] float32, and whether a sample could be used [n] bool.
    """
    data, settings, world = run.data, run.settings, run.world
    batches = owned_batches(len(data.train), run.micro_batch, world.rank, world.num_ranks)
    loader = Loader(data.train, settings.data, None, settings.run.seed, run.micro_batch, world.device)
    loader.quarantine = run.loader.quarantine
    own = row_range(len(data.train))
    names = ("visual_features", "audio_features") if kind is Features.backbone else ("visual", "audio")
    pieces: list[list[torch.Tensor]] = [[], [], []]
    run.engine.train(False)
    try:
        with torch.no_grad():
            for batch in loader.batches((ids, 0) for ids in batches):
                outputs = run.engine(batch)
                for piece, rows in zip(pieces, (*(outputs[each].float() for each in names), batch.valid), strict=True):
                    piece.append(rows)
    finally:
        loader.close()
        run.engine.train()
    real = torch.from_numpy(np.concatenate(batches) != PADDING).to(world.device)
    visual, audio, present = (torch.cat(piece)[real] for piece in pieces)
    assert len(visual) == len(own)
    return visual, audio, present


def keep(run: Run, found: Correction, gated: bool) -> None:
    """Store the votes beside the bank's rows, where checkpoints and the next phase find them."""
    columns = run.bank.columns
    columns |= {"votes": found.labels, "visual_votes": found.visual, "audio_votes": found.audio}
    if gated:
        columns["correspondence"] = found.pairing
