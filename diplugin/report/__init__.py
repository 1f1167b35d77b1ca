"""The report of a run folder: one self-contained HTML page, and its pictures as files.

>>> from diplugin.report import write_report
>>> write_report("runs/a")  # doctest: +SKIP
PosixPath('runs/a/report.html')
"""

from __future__ import annotations

from .run import Run, read_run
from .table_info import table_info
from .write import figures, write_report

__all__ = ["Run", "figures", "read_run", "table_info", "write_report"]
