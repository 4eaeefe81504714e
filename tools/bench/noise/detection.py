"""Detection of wrong labels, compared with cleanlab on the same features.

cleanlab receives cross-validated class probabilities of a logistic regression on the embeddings.
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
from distav.evaluation.embedding import Embedder, Embeddings


def f1_score(detected: np.ndarray, wrong: np.ndarray) -> float:
    """Return the F1 score of detected samples; both arguments are [N] bool and not all False."""
    return 2 * float((detected & wrong).sum()) / float(detected.sum() + wrong.sum())


def out_of_sample_pred_probs(embeddings: Embeddings, given: np.ndarray) -> np.ndarray:
    """Return cross-validated class probabilities: [N, C].

    Args:
        embeddings: embeddings of all samples.
        given: [N] labels.
    """
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01))
    features = np.concatenate([embeddings.visual, embeddings.audio], axis=1)
    return np.asarray(cross_val_predict(classifier, features, given, cv=5, method="predict_proba"))


def compare(run: Path, shards: Path, given: Path, table: str) -> dict[str, float]:
    """Compare the labels that a run changed with cleanlab's label issues, and write `detection.json` in the run.

    Args:
        run: directory of the run, with its export.
        shards: the dataset, with true labels.
        given: the table of given labels.
        table: name of the label correction.

    Returns:
        F1 scores; {} if no label is wrong, in which case nothing is written.
    """
    dataset = ShardedDataset.open(shards)
    split = dataset.split("train")
    labels = load_labels(dataset, split, str(given))
    true = labels.given if labels.true is None else labels.true
    wrong = labels.given != true
    if not wrong.any():
        return {}
    correction = read_table(run / "labels" / f"{table}.parquet")
    columns = (np.array(correction.column(f"{name}_label").to_pylist()) for name in ("given", "corrected"))
    changed = np.not_equal(*columns)
    embeddings = Embedder.open(run / "export", torch.device("cpu"), batch_size=128).embed_clips(split)
    pred_probs = out_of_sample_pred_probs(embeddings, labels.given)
    issues = np.asarray(find_label_issues(labels.given, pred_probs, n_jobs=1), dtype=bool)
    scores = {"f1": f1_score(changed, wrong), "f1_cleanlab": f1_score(issues, wrong)}
    write_atomically(run / "detection.json", (json.dumps(scores) + "\n").encode())
    return scores
