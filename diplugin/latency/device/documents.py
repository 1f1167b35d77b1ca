"""What plans and journals share: JSON of one canonical form, read strictly, of one schema."""

from __future__ import annotations

import json

SCHEMA = 1


def canonical(document):
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def refuse_constant(name):
    raise ValueError(f"{name} is no number")


def parse(text):
    """One JSON value; ValueError for everything that is not strictly JSON."""
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
