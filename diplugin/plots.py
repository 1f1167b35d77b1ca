"""Plots as files: a figure that needs no screen, checked before it is drawn for and whole once it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import UserError, first_line
from .whole_files import check_writable, writing_whole

#: Kinds of files that matplotlib is asked for.
ENDINGS = (".png", ".svg", ".pdf")


def check_plot_file(path: str | Path) -> Path:
    """The path, if a plot may go there; ask before work is done for it.

    Raises:
        UserError: the name is of no PNG, SVG or PDF file, its folder does not exist, or it cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS or not path.parent.is_dir():
        raise UserError(f"expected a PNG, SVG or PDF file by its name, in a folder that exists, got {str(path)!r}")
    check_place(path)
    return path


def check_place(path: Path) -> None:
    """Raise UserError unless a file can be written here."""
    try:
        check_writable(path)
    except OSError as error:
        raise UserError(f"expected a file that can be written at {path}, got {first_line(error)}") from None


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write the figure as the kind of file that its name says; returns the path.

    Raises:
        UserError: as `check_plot_file`, or it cannot be written.
    """
    path = check_plot_file(path)
    try:
        with writing_whole(path) as partial:
            figure.savefig(partial, dpi=150, format=path.suffix.lower()[1:])
    except OSError as error:
        raise UserError(f"expected a file that can be written at {path}, got {first_line(error)}") from None
    return path
