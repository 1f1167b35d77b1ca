"""Where the page and the pictures become files; both appear under their names only when they are whole."""

from __future__ import annotations

from pathlib import Path

from ..errors import PlanError
from ..run_folder import REPORT
from ..whole_files import write_bytes
from .page import PICTURES, render
from .run import read_run
from .summary import summary


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into a run folder from what is recorded there; returns its path.

    The page is one file: no script, no font, no picture is fetched from anywhere. It follows the reader's light or
    dark setting and prints.

    Raises:
        PlanError: no whole run folder, or one that cannot be written.
    """
    path = Path(folder) / REPORT
    _write(path, render(read_run(folder)))
    return path


def figures(folder: str | Path, out: str | Path) -> list[Path]:
    """Write a run's pictures as SVG files that follow the viewer's light or dark setting; returns their paths.

    Args:
        folder: a run folder.
        out: made if it does not exist; gets `summary.svg`, `structure.svg` and so on, as far as the run has them.

    Raises:
        PlanError: no whole run folder, or `out` cannot be written.
    """
    run = read_run(folder)
    drawings = {picture.__name__: picture(run) for picture in (summary, *PICTURES)}
    paths = []
    for name, drawing in drawings.items():
        if drawing is not None:
            path = Path(out) / f"{name}.svg"
            _write(path, drawing.standalone())
            paths.append(path)
    return paths


def _write(path: Path, text: str) -> None:
    try:
        write_bytes(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise PlanError(f"expected a file that can be written at {path}, got {error}") from error
