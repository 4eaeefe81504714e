"""How well wrong labels are found, beside cleanlab on the same features.

cleanlab gets what it asks for: class probabilities of a logistic regression on the towers' features, cross-validated.
"""

import json
from pathlib import Path

import numpy as np
import torch
from cleanlab.filter import find_label_issues
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset
from distav.data.files import read_table, write_atomically
from distav.evaluation.embedding import Embeddings, Encoders


def f1(found: np.ndarray, wrong: np.ndarray) -> float:
    """Return the F1 score of samples said to be wrong, [N] bool twice, where some are."""
    return 2 * float((found & wrong).sum()) / float(found.sum() + wrong.sum())


def out_of_sample_pred_probs(embeddings: Embeddings, given: np.ndarray) -> np.ndarray:
    """Return what cleanlab asks for, class probabilities of each sample's label by the others: [N, C].

    Args:
        embeddings: of all samples.
        given: [N] labels.
    """
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01))
    inputs = np.concatenate([embeddings.visual, embeddings.audio], axis=1)
    return np.asarray(cross_val_predict(classifier, inputs, given, cv=5, method="predict_proba"))


def compare(run: Path, shards: Path, given: Path, table: str) -> dict[str, float]:
    """Compare what a run's correction calls wrong with what cleanlab does; writes `detection.json` in the run's folder.

    Args:
        run: its folder, with the export.
        shards: the set, which knows the true labels.
        given: the table of given labels.
        table: name of the correction.

    Returns:
        F1 scores; nothing, and nothing is written, where no label is wrong.
    """
    opened = ShardedDataset.open(shards)
    split = opened.split("train")
    labels = load_labels(opened, split, str(given))
    truth = labels.given if labels.true is None else labels.true
    wrong = labels.given != truth
    if not wrong.any():
        return {}
    corrected = read_table(run / "labels" / f"{table}.parquet")
    ours = np.array(corrected.column("given_label").to_pylist()) != np.array(
        corrected.column("corrected_label").to_pylist()
    )
    embeddings = Encoders.open(run / "export", torch.device("cpu"), batch=128).of_clips(split)
    chances = out_of_sample_pred_probs(embeddings, labels.given)
    theirs = np.asarray(find_label_issues(labels.given, chances, n_jobs=1), dtype=bool)
    found = {"f1": f1(ours, wrong), "f1_cleanlab": f1(theirs, wrong)}
    write_atomically(run / "detection.json", (json.dumps(found) + "\n").encode())
    return found
