"""What runs on a device: times the graphs of a profile bundle and writes a journal.

Idea: everything that needs thought happened where the bundle was made. Here a list of *jobs* (tiny ONNX graphs) is
timed in interleaved rounds, so that a slow minute touches all of a chunk alike, and every finished job becomes one
checksummed JSON line, synced to disk. Killed at any moment and started again it goes on where it was.

Read `bundle` (what to time), `runtimes` and `trtexec` (what runs it), `timer` and `profiler` (how and when),
`rows` and `journal` (what is kept), `state` (what the device says of itself), `command` (what a user meets).

A bundle carries this package's files, as `device/`, and runs them with `python3 bundle.pyz`: they import nothing but
each other, the standard library, numpy and a runtime, and keep to Python 3.8.
"""

from __future__ import annotations

from .bundle import PLAN_FORMAT, Bundle, plan_sha256
from .command import progress_line
from .documents import SCHEMA, canonical
from .errors import ProfileError
from .journal import Journal, read_journal
from .profiler import drifted, profile
from .state import device_model
from .timer import floor_of

__all__ = [
    "PLAN_FORMAT",
    "SCHEMA",
    "Bundle",
    "Journal",
    "ProfileError",
    "canonical",
    "device_model",
    "drifted",
    "floor_of",
    "plan_sha256",
    "profile",
    "progress_line",
    "read_journal",
]
