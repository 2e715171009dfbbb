"""Area under the ROC curve, F1 and thresholds of several yes/no labels, in numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
HALF = 0.5


@dataclass(frozen=True)
class Scores:
    """One entry for each label."""

    auc: Floats
    """NaN where validation has only one of the two answers."""
    f1: Floats
    """Of predictions whose threshold was chosen on rows other than those it judges."""
    f1_at_half: Floats
    threshold: Floats
    """Chosen on all validation rows: the one to use later."""
    prevalence: Floats

    @property
    def macro_auc(self) -> float:
        """The mean over the labels that have one; chance when none has."""
        known = self.auc[~np.isnan(self.auc)]
        return float(known.mean()) if len(known) else HALF


def score(probability: Floats, truth: Floats, fold: NDArray[np.int64]) -> Scores:
    """`probability` and `truth` are [N, labels], `fold` [N] is 0 or 1: each half is judged by the other's threshold,
    so the F1 has not seen the rows it is computed on. With an empty half, all rows are judged at 0.5."""
    columns = range(truth.shape[1])
    crossed = np.full_like(probability, HALF)
    if 0 < int(fold.sum()) < len(fold):
        for side in (0, 1):
            chosen = [best_threshold(probability[fold != side, i], truth[fold != side, i]) for i in columns]
            crossed[fold == side] = chosen
    return Scores(
        auc=np.array([auc(probability[:, i], truth[:, i]) for i in columns]),
        f1=f1(probability >= crossed, truth),
        f1_at_half=f1(probability >= HALF, truth),
        threshold=np.array([best_threshold(probability[:, i], truth[:, i]) for i in columns]),
        prevalence=truth.mean(axis=0),
    )


def auc(probability: Floats, truth: Floats) -> float:
    """Probability that a yes ranks above a no, ties counting half (Mann and Whitney, 1947). NaN without both."""
    positives = int(truth.sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        return float("nan")
    _, place, count = np.unique(probability, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2
    excess = float(rank[place][truth > 0].sum()) - positives * (positives + 1) / 2
    return excess / (positives * negatives)


def f1(predicted: NDArray[np.bool_], truth: Floats) -> Floats:
    """2 TP / (2 TP + FP + FN) for each column; 0 where nothing is positive and nothing was said to be."""
    hits = (predicted & (truth > 0)).sum(axis=0).astype(np.float64)
    said_or_true = predicted.sum(axis=0) + truth.sum(axis=0)
    return np.asarray(2 * hits / np.maximum(said_or_true, 1), dtype=np.float64)


def best_threshold(probability: Floats, truth: Floats) -> float:
    """The threshold of the highest F1, half-way between two neighbouring probabilities; 0.5 without a positive."""
    if not truth.sum():
        return HALF
    order = np.argsort(-probability, kind="stable")
    sorted_p, hits = probability[order], np.cumsum(truth[order])
    value = 2 * hits / (np.arange(1, len(order) + 1) + truth.sum())
    value[:-1][sorted_p[:-1] == sorted_p[1:]] = -1.0  # equal probabilities fall on one side
    best = int(np.argmax(value))
    below = sorted_p[best + 1] if best + 1 < len(order) else 0.0
    return float((sorted_p[best] + below) / 2)


def roc(probability: Floats, truth: Floats) -> tuple[Floats, Floats]:
    """False and true positive rates, from (0, 0) to (1, 1)."""
    order = np.argsort(-probability, kind="stable")
    hits, misses = np.cumsum(truth[order]), np.cumsum(1 - truth[order])
    last = np.append(np.diff(probability[order]) != 0, True)
    rates = [np.concatenate(([0.0], counted[last] / max(1.0, float(counted[-1])))) for counted in (misses, hits)]
    return rates[0], rates[1]
