"""Trouble on a device is one line: no traceback, nothing longer than a terminal shows."""

from __future__ import annotations


class ProfileError(Exception):
    """The bundle, the journal or this device cannot be used; one line."""


def first_line(error):
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
