"""Between trainings: clean features of every clip, exact neighbours over all ranks, and a vote on every label."""

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from distav.config.phases import CorrectionPhase
from distav.data.annotations.labels import correction_table
from distav.data.files import write_table
from distav.data.modalities import SENSES
from distav.data.pipeline.loader import Loader
from distav.data.pipeline.sampler import PADDING, padded_batches
from distav.distributed.collectives import gather_ragged_rows, max_, row_range
from distav.evaluation.metrics import (
    NOISE_KINDS,
    auroc,
    confusion,
    expected_calibration_error,
    label_accuracy,
    noise_kinds,
)
from distav.noise.label_correction import Before, Correction, Space, Voting, correct, nothing_known
from distav.run import Run

_USABLE, _UNUSABLE = 1, 2
_OF_RATES = ("evidence", "told")
"""What the first correction knows of the noise rate, kept for all later ones."""
SPACES = {"towers": ("visual_features", "audio_features"), "projections": ("visual", "audio")}


def run_correction(run: Run, name: str, settings: CorrectionPhase) -> None:
    """Vote on every label, keep the votes beside the bank, and write the table `labels/<phase>.parquet`."""
    if run.notes.get("given_labels_learnt") and not run.notes.get("neighbors_have_signal", True):
        # Such features hold the given labels, right and wrong; votes among them would only repeat these.
        if settings.harvested and run.world.is_main:
            run.monitor.warn(
                f"phase={name} its teachers are not heard, since given labels were learnt after a correction that knew "
                "nothing; let them vote in that one"
            )
        given = torch.from_numpy(run.data.labels.given).to(run.world.device)
        found = nothing_known(given, len(run.data.labels.classes))
    else:
        if run.notes.get("given_labels_learnt") and "rate_evidence" not in run.notes and run.world.is_main:
            run.monitor.warn(
                f"phase={name} votes among features that have learnt the given labels agree with them more than they "
                "should, and tell too little noise; put a correction before the first training on labels"
            )
        found = vote(run, name, settings)
    keep(run, found)
    _report(run, name, found)


def vote(run: Run, name: str, settings: CorrectionPhase) -> Correction:
    """Extract features and let neighbours vote, and teachers where they were asked."""
    spaces, present = extract_features(run)
    run.check_budget()
    labels, split, device = run.data.labels, run.data.train, run.world.device
    valid = gather_ragged_rows(present.float()) > 0
    voting = Voting(**{each.name: getattr(settings, each.name) for each in fields(Voting)})
    given = torch.from_numpy(labels.given).to(device)
    groups = torch.from_numpy(split.source_codes).to(device)
    columns, before = run.bank.columns, None
    if "held_out" in columns and run.notes["neighbors_have_signal"]:
        rates = (torch.tensor(run.notes[f"rate_{each}"], dtype=torch.float64, device=device) for each in _OF_RATES)
        before = Before(columns["held_out"], *rates)
    teachers, held = None, run.data.teachers_shares(name, settings)
    if held is not None:
        own = row_range(len(split))
        shares = torch.from_numpy(held[own.start : own.stop]).to(device)
        teachers = shares[:, SENSES.index("visual")], shares[:, SENSES.index("audio")]
    return correct(spaces, given, len(labels.classes), groups, valid, voting, before, teachers)


def extract_features(run: Run) -> tuple[list[Space], Tensor]:
    """Run the network once over the middle of every clip that this rank owns, in evaluation mode.

    Features are kept beside the bank's rows until the votes are counted, so a run that ends in between goes on with
    the clips that are left.

    Returns:
        Tower outputs and their projections, by picture and by sound [n, E] float32 each, and whether a sample could
        be used [n] bool.
    """
    data, settings, world, columns = run.data, run.settings, run.world, run.bank.columns
    own = row_range(len(data.train))
    done = columns.setdefault("extracted", torch.zeros(len(own), dtype=torch.uint8, device=world.device))
    left = (done == 0).nonzero().squeeze(1).cpu().numpy() + own.start
    count = int(max_(torch.tensor([-(-len(left) // run.micro_batch)])))
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
                run.position.extracted += 1
                if run.position.extracted % settings.run.checkpoint_every == 0:
                    run.save()
                run.end_if_asked()
    finally:
        loader.close()
        run.engine.train()
    present = columns.pop("extracted") == _USABLE
    found = {name: columns.pop(column) for column, name in wanted.items()}
    return [Space(name, found[visual], found[audio]) for name, (visual, audio) in SPACES.items()], present


def keep(run: Run, found: Correction) -> None:
    """Store the votes beside the bank's rows, where checkpoints and the next phases find them."""
    first = "rate_evidence" not in run.notes
    for name in ("held_out", "posterior", "audio_held_out", "audio_posterior", "correspondence"):
        run.bank.columns[name] = getattr(found, name)
    run.notes["neighbors_have_signal"] = found.has_signal
    if first and found.has_signal:
        for each in _OF_RATES:
            run.notes[f"rate_{each}"] = getattr(found, each).tolist()


def _report(run: Run, name: str, found: Correction) -> None:
    """Write the table and tell what was found, beside the truth where the set knows it."""
    labels, split = run.data.labels, run.data.train
    own = row_range(len(split))
    given = torch.from_numpy(labels.given).to(run.world.device)[own.start : own.stop, None]
    corrected = gather_ragged_rows(found.posterior.argmax(1)).cpu().numpy()
    voted = gather_ragged_rows(found.held_out.argmax(1)).cpu().numpy()
    confidence = gather_ragged_rows(found.posterior.amax(1)).cpu().numpy()
    agreement = gather_ragged_rows(found.held_out.gather(1, given).squeeze(1)).cpu().numpy()
    correspondence = run.bank.whole("correspondence").cpu().numpy()
    step, changed = run.position.total_steps, float((corrected != labels.given).mean())
    by_class = zip(labels.classes, found.class_rates, strict=True) if found.has_signal else ()
    summary = {
        "phase": name,
        "signal_nats": round(found.nats, 1),
        "chosen": found.chosen,
        "changed": changed,
        "label_noise": found.label_rate.as_dict(),
        "label_noise_by_class": {each: rate.as_dict() for each, rate in by_class},
        "pair_noise": found.pair_rate.as_dict(),
    }
    record: dict[str, float | str] = {
        "phase": name,
        "labels/changed": changed,
        "labels/noise_rate": found.label_rate.rate,
        "pairs/noise_rate": found.pair_rate.rate,
    }
    told = ""
    if labels.true is not None:
        accuracy = label_accuracy(labels.given, corrected, labels.true)
        accuracy |= {
            f"calibration_error_{each}": calibration_error(getattr(found, each), labels.true)
            for each in ("held_out", "posterior")
        }
        record |= {f"labels/{key}": value for key, value in accuracy.items() if value is not None}
        summary["label_accuracy"] = run.notes["label_accuracy"] = accuracy
        right = [100 * float((each == labels.true).mean()) for each in (corrected, labels.given)]
        told = f", right for {right[0]:.1f} % (given: {right[1]:.1f} %)"
    wrong = labels.mismatched()
    if wrong is not None and wrong.any() and labels.pair_id is not None:
        swapped = labels.pair_id != np.arange(len(split))
        run.notes["correspondence_auroc"] = record["pairs/auroc"] = auroc(correspondence, ~wrong)
        summary["pair_auroc"] = {
            "other_class": auroc(correspondence, ~wrong),
            "swapped": auroc(correspondence, ~swapped),
        }
        if labels.true is not None:
            kinds = noise_kinds(labels.given != labels.true, wrong)
            told_kinds = noise_kinds(corrected != labels.given, correspondence < 0.5)
            summary["noise_confusion"] = confusion(kinds, told_kinds, NOISE_KINDS)
            run.monitor.confusion("noise/true_to_told", kinds, told_kinds, NOISE_KINDS, step)
    run.notes["labels_changed"] = changed
    run.notes.setdefault("corrections", []).append(summary)
    if run.world.is_main:
        table = correction_table(split, labels, corrected, voted, confidence, agreement, correspondence)
        (run.folder / "labels").mkdir(exist_ok=True)
        write_table(run.folder / "labels" / f"{name}.parquet", table)
    run.monitor.record(step, record)
    run.monitor.confusion("labels/given_to_corrected", labels.given, corrected, labels.classes, step)
    run.monitor.histogram("labels/confidence", torch.from_numpy(np.ascontiguousarray(confidence)), step)
    noise = "label noise {rate:.0%} ({low:.0%} to {high:.0%})".format(**found.label_rate.as_dict())
    if found.has_signal:
        share = f"{100 * changed:.1f} % of clips"
        run.monitor.say(f"phase={name} corrected labels differ from the given ones for {share}{told}; {noise}")
    else:
        run.monitor.say(
            f"phase={name} neighbours say nothing of the labels ({found.nats:.1f} nats over all clips), so the given "
            "ones stay, and the next training takes them with a loss that bears wrong ones"
        )


def calibration_error(shares: Tensor, true: np.ndarray) -> float:
    """Return the calibration error over all ranks, of which each sends its largest shares and not whole rows.

    Args:
        shares: [n, C] of this rank.
        true: [N] class numbers of all.
    """
    confidence, told = (gather_ragged_rows(each).cpu().numpy() for each in shares.max(1))
    largest_first = np.stack([confidence, np.zeros_like(confidence)], axis=1)
    return expected_calibration_error(largest_first, np.where(told == true, 0, 1))
