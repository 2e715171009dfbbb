"""A folder about one configuration: explain.html (self-contained) and the pictures as PNG files."""

from __future__ import annotations

from pathlib import Path

from tuner.contract.errors import ConfigError
from tuner.contract.explanation import ExplainResult
from tuner.report.explain_figures import explain_figures
from tuner.report.explain_pictures import draw_all
from tuner.report.page import explained, filled, write_page


def write_explanation(folder: Path, result: ExplainResult) -> list[Path]:
    """Write the page and the pictures, older ones are replaced; returns their paths. Raises ConfigError."""
    page = write_page(folder / "explain.html", render_explanation(result))
    try:
        return [page, *draw_all(folder, result)]
    except OSError as error:
        raise ConfigError(f"--out: {folder} cannot be written: {error.strerror}") from None


def render_explanation(result: ExplainResult) -> str:
    """The page as text."""
    figures = explain_figures(result)
    return filled("explain_page.html.j2", figures, explanation=result, explained=explained(result))
