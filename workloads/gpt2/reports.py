"""What people look at: figures of each label as CSV and ROC curves, texts with their labels, texts continued."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from .metrics import Floats, Scores, roc

SHOWN_CURVES = 20


def write_text(path: Path, text: str) -> Path:
    """Written beside and moved, so that nobody reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def write_scores(path: Path, names: Sequence[str], scores: Scores) -> Path:
    """A line for each label: auc, f1, threshold, prevalence."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["label", "auc", "f1", "threshold", "prevalence"])
    columns = (scores.auc, scores.f1, scores.threshold, scores.prevalence)
    for place, name in enumerate(names):
        writer.writerow([name, *(f"{column[place]:.4f}" for column in columns)])
    return write_text(path, out.getvalue())


def draw_curves(path: Path, names: Sequence[str], probability: Floats, truth: Floats, scores: Scores) -> Path:
    """ROC curves of the labels, on one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], linestyle=":", color="grey", label="chance")
    for place, name in list(enumerate(names))[:SHOWN_CURVES]:
        false, true = roc(probability[:, place], truth[:, place])
        axes.plot(false, true, label=f"{name} ({scores.auc[place]:.2f})")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=f"macro-AUC {scores.macro_auc:.3f}")
    axes.legend(loc="lower right", fontsize="small")
    axes.grid(visible=True, alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=110)
    os.replace(partial, path)
    return path


def labelled_text(text: str, names: Sequence[str], probability: Floats, truth: Floats, threshold: Floats) -> str:
    """One text with what is true of it and what was predicted."""
    true = [name for name, value in zip(names, truth, strict=True) if value > 0]
    said = [
        f"{name} ({value:.2f})"
        for name, value, bound in zip(names, probability, threshold, strict=True)
        if value >= bound
    ]
    return f"{text.strip()}\n  true      : {', '.join(true) or '-'}\n  predicted : {', '.join(said) or '-'}\n"
